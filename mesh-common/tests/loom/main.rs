//! Records, accounts and ejection under every interleaving of those who change them at the same
//! time: the connect program, the programs that see what becomes of a socket, the agent's audit
//! and its probe.
//!
//! `RUSTFLAGS="--cfg loom" cargo test -p mesh-common --release --test loom`, with `-- --nocapture`
//! to see how many interleavings there are.
#![cfg(loom)]

mod growth;
mod node;
mod share;

use std::sync::atomic::{AtomicU32, Ordering};

use loom::sync::Arc;
use loom::thread;
use mesh_common::ejection::Phase;
use mesh_common::stats::change;
use mesh_common::{Ejection, Failure, Held, Token};

use crate::node::{A, B, COOKIES, ELSEWHERE, End, LATER, NOW, Node, POLICY, client, generation};

/// Checks every interleaving that loom tries, and says how many there are. It does not try quite all:
/// what comes before and after another thread's access is remembered for the last access only.
fn explore(name: &str, model: impl Fn() + Sync + Send + 'static) {
    check(name, None, model);
}

/// Checks every interleaving of three threads in which they are interrupted at most three times
/// where they could have gone on: all others would take hours.
fn explore_three(name: &str, model: impl Fn() + Sync + Send + 'static) {
    check(name, Some(3), model);
}

fn check(name: &str, bound: Option<usize>, model: impl Fn() + Sync + Send + 'static) {
    let count = std::sync::Arc::new(AtomicU32::new(0));
    let counted = std::sync::Arc::clone(&count);
    let start = std::time::Instant::now();
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = bound;
    builder.check(move || {
        counted.fetch_add(1, Ordering::Relaxed);
        model();
    });
    let count = count.load(Ordering::Relaxed);
    eprintln!("{name}: {count} executions in {:.2} s", start.elapsed().as_secs_f64());
}

/// Runs `f` in a thread of its own.
fn spawn(node: &Arc<Node>, f: impl FnOnce(&Node) + 'static) -> thread::JoinHandle<()> {
    let node = Arc::clone(node);
    thread::spawn(move || f(&node))
}

fn join(threads: impl IntoIterator<Item = thread::JoinHandle<()>>) {
    for thread in threads {
        thread.join().expect("a thread of the model");
    }
}

/// Out for the first client, and to be tried.
fn suspected() -> Ejection {
    Ejection::NONE.fail(POLICY, client(1), Token::NONE, NOW - 100).expect("suspected")
}

/// Out for all, and to be tried.
fn ejected() -> Ejection {
    suspected().fail(POLICY, client(2), Token::NONE, NOW - 100).expect("ejected")
}

/// The first socket is the one that tries the first backend.
fn a_try(before: [Ejection; 2]) -> (Arc<Node>, Token) {
    let node = Node::new(before);
    let token = node.enters(0, client(1), NOW).expect("a try");
    assert!(token.is_some());
    assert!(node.connect(A, 0, token, NOW));
    (node, token)
}

// === one socket ===

/// What may become of a connect that tries a backend. All but the last step is the order of a
/// connection's life.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Life {
    /// It is answered, and later closed.
    Answered,
    /// It is closed before it is answered.
    Aborted,
    /// It fails.
    Fails(Failure),
    /// An error ends it that says nothing about the backend.
    EndsOtherwise,
    /// It has to send its SYN again, and is answered then.
    SilentThenAnswered,
    /// It has to send its SYN again and again, and fails.
    SilentThenFails,
    /// The same, and no program is run when it fails.
    SilentThenFailsUnseen,
    /// It has to send its SYN again, and is closed.
    SilentThenAborted,
}

impl Life {
    const ALL: [Self; 8] = [
        Self::Answered,
        Self::Aborted,
        Self::Fails(Failure::Refused),
        Self::EndsOtherwise,
        Self::SilentThenAnswered,
        Self::SilentThenFails,
        Self::SilentThenFailsUnseen,
        Self::SilentThenAborted,
    ];

    fn is_silent(self) -> bool {
        matches!(
            self,
            Self::SilentThenAnswered
                | Self::SilentThenFails
                | Self::SilentThenFailsUnseen
                | Self::SilentThenAborted
        )
    }

    fn fails(self) -> bool {
        matches!(self, Self::Fails(_) | Self::SilentThenFails | Self::SilentThenFailsUnseen)
    }

    fn end(self) -> End {
        match self {
            Self::Answered | Self::SilentThenAnswered => End::Connected,
            Self::SilentThenFailsUnseen => End::Unseen(Failure::Timeout),
            _ => End::NotConnected,
        }
    }

    fn live(self, node: &Node, socket: usize, now: u64) {
        let client = client(1);
        if self.is_silent() {
            node.retransmit(socket, client, now);
        }
        match self {
            Self::Fails(failure) => {
                node.error(socket, client, Some(failure), now);
            }
            Self::SilentThenFails => {
                node.error(socket, client, Some(Failure::Timeout), now);
            }
            Self::EndsOtherwise => {
                node.error(socket, client, None, now);
            }
            _ => {}
        }
        node.destroy(socket, client, self.end(), now);
    }
}

/// A try lives, while the agent takes its socket for gone.
fn one_socket(name: &str, before: Ejection) {
    for life in Life::ALL {
        explore(&format!("{name}, {life:?}"), move || {
            let (node, _) = a_try([before, Ejection::NONE]);
            let seen = node.seen(A);
            let threads = [
                spawn(&node, move |node| life.live(node, A, NOW)),
                spawn(&node, move |node| {
                    node.audit(A, &seen, NOW);
                }),
            ];
            node.observe();
            join(threads);
            assert!(node.settled([1, 0]) <= 1, "one connect fails once");
            // Decided once: a failure makes it one ejection more, and nothing makes it two.
            assert!(node.backends[0].ejection().level() <= before.level() + 1);
        });
    }
}

#[test]
fn a_try_for_all() {
    one_socket("a_try_for_all", ejected());
}

#[test]
fn a_try_for_one_client() {
    one_socket("a_try_for_one_client", suspected());
}

/// Whoever reads the accounts while a socket lives never sees more closed than opened.
#[test]
fn accounts_while_a_socket_lives() {
    explore("accounts_while_a_socket_lives", || {
        let node = Node::new([Ejection::NONE; 2]);
        let socket = spawn(&node, |node| {
            node.connect(A, 0, Token::NONE, NOW);
            node.error(A, client(1), Some(Failure::Reset), NOW);
            node.destroy(A, client(1), End::NotConnected, NOW);
        });
        node.observe();
        join([socket]);
        assert_eq!(node.settled([1, 0]), 1);
    });
}

/// Whoever sees that a record is a socket's sees what that was given; before, it is nobody's.
#[test]
fn a_record_that_is_being_filled_in() {
    explore("a_record_that_is_being_filled_in", || {
        let node = Node::new([ejected(), Ejection::NONE]);
        let token = node.enters(0, client(1), NOW).expect("a try");
        // In this order: of a thread that reads a word first, loom does not try what it would read
        // after another one that reads it too, and then writes it.
        let connects = spawn(&node, move |node| assert!(node.connect(A, 0, token, NOW)));
        let sees = spawn(&node, move |node| {
            let seen = node.seen(A);
            if seen.held.is_used() {
                assert_eq!(seen.held, Held::new(COOKIES[A], 0, true));
                assert_eq!((seen.generation, seen.token), (u64::from(generation(0)), token));
            } else {
                assert_eq!(node.audit(A, &seen, NOW), None);
            }
        });
        join([connects, sees]);
        let kept = node.destroy(A, client(1), End::NotConnected, NOW);
        assert_eq!(kept, Some(Held::new(COOKIES[A], 0, true)));
        assert_eq!(node.settled([1, 0]), 0);
    });
}

/// A socket that failed before anything was sent connects again, elsewhere, while the agent, which
/// does not see such a socket, releases what it held before.
#[test]
fn a_second_connect() {
    explore("a_second_connect", || {
        let (node, _) = a_try([ejected(), Ejection::NONE]);
        let seen = node.seen(A);
        let threads = [
            spawn(&node, |node| assert!(node.connect(A, 1, Token::NONE, NOW))),
            spawn(&node, move |node| {
                node.audit(A, &seen, NOW);
            }),
        ];
        join(threads);
        let kept = node.destroy(A, client(1), End::Connected, NOW);
        assert_eq!(kept, Some(Held::new(COOKIES[A], 1, false)), "the second one is kept");
        assert_eq!(node.settled([1, 1]), 0);
    });
}

// === two sockets at one place ===

/// Both come and go, and want the same record. Who does not get it is closed at once.
#[test]
fn a_collision() {
    explore("a_collision", || {
        let node = Node::new([Ejection::NONE; 2]);
        let threads = [
            spawn(&node, |node| {
                let recorded = node.connect(A, 0, Token::NONE, NOW);
                let mine = Held::new(COOKIES[A], 0, false);
                assert_eq!(
                    node.destroy(A, client(1), End::NotConnected, NOW),
                    recorded.then_some(mine)
                );
            }),
            spawn(&node, |node| {
                let recorded = node.connect(B, 1, Token::NONE, NOW);
                assert_eq!(node.error(B, client(1), Some(Failure::Refused), NOW), recorded);
                assert_eq!(node.destroy(B, client(1), End::NotConnected, NOW), None);
            }),
        ];
        join(threads);
        assert!(node.settled([1, 1]) <= 1);
    });
}

/// One ends, the agent takes it for gone, and the other wants its place.
#[test]
fn a_place_that_becomes_free() {
    explore_three("a_place_that_becomes_free", || {
        let node = Node::new([Ejection::NONE; 2]);
        assert!(node.connect(A, 0, Token::NONE, NOW));
        let seen = node.seen(A);
        let threads = [
            spawn(&node, |node| {
                node.destroy(A, client(1), End::NotConnected, NOW);
            }),
            spawn(&node, move |node| {
                node.audit(A, &seen, NOW);
            }),
            spawn(&node, |node| {
                let recorded = node.connect(B, 1, Token::NONE, NOW);
                let mine = Held::new(COOKIES[B], 1, false);
                let released = node.destroy(B, client(1), End::NotConnected, NOW);
                assert_eq!(released, recorded.then_some(mine));
            }),
        ];
        join(threads);
        assert_eq!(node.settled([1, 1]), 0);
    });
}

// === the token ===

/// Two connects find an ejection that has expired. One of them tries the backend; the other does
/// only when the first has given the token back, or goes there when that was answered.
fn two_tries(name: &str, before: Ejection) {
    for life in Life::ALL {
        explore(&format!("{name}, {life:?}"), move || {
            let node = Node::new([before, Ejection::NONE]);
            let tries = [A, ELSEWHERE].map(|socket| {
                spawn(&node, move |node| {
                    if let Some(token) = node.enters(0, client(1), NOW) {
                        assert!(token.is_some() || life == Life::Answered);
                        assert!(node.connect(socket, 0, token, NOW));
                        life.live(node, socket, NOW);
                    }
                })
            });
            join(tries);
            let opened = node.backends[0].opened.load();
            let most = match life {
                Life::Aborted | Life::EndsOtherwise | Life::Answered => 2,
                _ => 1,
            };
            assert!((1..=most).contains(&opened), "{opened} tries");
            node.settled([opened, 0]);
        });
    }
}

#[test]
fn two_tries_for_all() {
    two_tries("two_tries_for_all", ejected());
}

#[test]
fn two_tries_for_one_client() {
    two_tries("two_tries_for_one_client", suspected());
}

/// A client's try succeeds, is aborted, or is silent, while another client sees the backend fail and
/// the agent's probe fails as well.
#[test]
fn a_try_while_others_decide() {
    for life in [Life::Answered, Life::Aborted, Life::SilentThenAborted] {
        explore_three(&format!("a_try_while_others_decide, {life:?}"), move || {
            let (node, _) = a_try([suspected(), Ejection::NONE]);
            assert!(node.connect(ELSEWHERE, 0, Token::NONE, NOW));
            let threads = [
                spawn(&node, move |node| life.live(node, A, NOW)),
                spawn(&node, |node| {
                    node.error(ELSEWHERE, client(2), Some(Failure::Refused), NOW);
                }),
                spawn(&node, |node| {
                    change(&node.backends[0].ejection, |known| known.confirm(POLICY, NOW));
                }),
            ];
            join(threads);
            assert_eq!(node.settled([2, 0]), 1);
        });
    }
}

// === a try that counts as answered ===

/// Nothing was heard of a try for so long that the next connect takes it for answered, when
/// something becomes of it after all, and the agent takes its socket for gone.
#[test]
fn a_try_that_ends_when_it_counts_as_answered() {
    for life in Life::ALL {
        explore_three(
            &format!("a_try_that_ends_when_it_counts_as_answered, {life:?}"),
            move || {
                let (node, _) = a_try([ejected(), Ejection::NONE]);
                let seen = node.seen(A);
                let threads = [
                    spawn(&node, move |node| life.live(node, A, LATER)),
                    spawn(&node, |node| {
                        if let Some(token) = node.enters(0, client(2), LATER) {
                            assert!(node.connect(ELSEWHERE, 0, token, LATER));
                            node.destroy(ELSEWHERE, client(2), End::Connected, LATER);
                        }
                    }),
                    spawn(&node, move |node| {
                        node.audit(A, &seen, LATER);
                    }),
                ];
                join(threads);
                let opened = node.backends[0].opened.load();
                let failed = node.settled([opened, 0]);
                assert!(failed <= 1, "one connect fails once");
                // It counts as answered, or as failed, or neither; as both only when it fails later,
                // as any connection may, and so for its client alone.
                let known = node.backends[0].ejection();
                match known.phase() {
                    Phase::In => assert_eq!((known.level(), known.failures()), (1, 0)),
                    Phase::Suspected => assert_eq!((known.level(), failed), (2, 1)),
                    Phase::Ejected => assert!(known.level() <= 2),
                    other => panic!("{other:?}"),
                }
            },
        );
    }
}

/// Two connects find a try answered: both go there, and it is noted once.
#[test]
fn two_find_a_try_answered() {
    explore_three("two_find_a_try_answered", || {
        let (node, _) = a_try([ejected(), Ejection::NONE]);
        let enters = || {
            spawn(&node, |node| {
                let entered = node.enters(0, client(2), LATER);
                let word = node.backends[0].ejection();
                assert!(word.is_in(), "{word:?}");
                assert!(entered.is_none_or(|token| !token.is_some()));
            })
        };
        join([enters(), enters()]);
        node.destroy(A, client(1), End::Connected, LATER);
        assert_eq!(node.settled([1, 0]), 0);
        assert_eq!(node.backends[0].ejection().until(), LATER + 10);
    });
}

/// The backend has failed again since a try counted as answered, and another connect tries it. What
/// becomes of the first says nothing about the second: the end is that of the second alone.
#[test]
fn what_becomes_of_an_earlier_try() {
    for second in [Life::Answered, Life::Aborted, Life::SilentThenAborted] {
        for first in Life::ALL {
            // What the second one alone leads to.
            let alone = std::sync::Arc::new(std::sync::Mutex::new(Ejection::NONE));
            for both in [false, true] {
                let alone = std::sync::Arc::clone(&alone);
                let name = format!("what_becomes_of_an_earlier_try, {first:?}, {second:?}");
                explore(&name, move || {
                    let (node, stale) = a_try([ejected(), Ejection::NONE]);
                    let again = LATER + 20;
                    assert_eq!(node.enters(0, client(2), LATER), Some(Token::NONE));
                    let word = &node.backends[0].ejection;
                    for failing in [1, 2].map(client) {
                        change(word, |known| known.fail(POLICY, failing, Token::NONE, LATER));
                    }
                    let token = node.enters(0, client(1), again).expect("another try");
                    assert!(token.is_some() && token != stale);
                    assert!(node.connect(ELSEWHERE, 0, token, again));
                    let seen = node.seen(A);
                    if both {
                        join([
                            spawn(&node, move |node| first.live(node, A, again)),
                            spawn(&node, move |node| second.live(node, ELSEWHERE, again)),
                        ]);
                        let ended = node.backends[0].ejection();
                        // A backend that is in may fail for anybody.
                        if !(first.fails() && second == Life::Answered) {
                            assert_eq!(ended, *alone.lock().expect("alone"));
                        }
                    } else {
                        second.live(&node, ELSEWHERE, again);
                        *alone.lock().expect("alone") = node.backends[0].ejection();
                        node.audit(A, &seen, again);
                        assert_eq!(node.backends[0].ejection(), *alone.lock().expect("alone"));
                    }
                    assert!(node.settled([2, 0]) <= 1);
                });
            }
        }
    }
}
