//! What errors mean, and what a failure changes.

use core::cell::Cell;

use super::*;
use crate::ejection::Phase;

/// `EPERM`, `EACCES`, `EADDRNOTAVAIL`, `ENETUNREACH`, `ECONNABORTED`, `EPIPE`, `EPROTO`.
const OTHERS: [i32; 7] = [1, 13, 99, 101, 103, 32, 71];

/// What is seen of a socket, as words in a table.
fn seen(error: i32, words: &str) -> Seen {
    let mut seen = Seen { error, ..Seen::default() };
    for word in words.split_whitespace() {
        match word {
            "connected" => seen.connected = true,
            "answered" => seen.answered = true,
            "closed" => seen.closed = true,
            "disconnected" => seen.disconnected = true,
            "repeated" => seen.repeated = true,
            "unreachable" => seen.unreachable = true,
            other => panic!("no field is called {other}"),
        }
    }
    seen
}

/// All that can be seen of a socket with this error. What was answered was connected.
fn everything(error: i32) -> impl Iterator<Item = Seen> {
    (0u32..64).map(move |bits| {
        let [connected, answered, closed, disconnected, repeated, unreachable] =
            [0, 1, 2, 3, 4, 5].map(|bit| bits >> bit & 1 == 1);
        let answered = answered && connected;
        Seen { error, connected, answered, closed, disconnected, repeated, unreachable }
    })
}

#[test]
fn errors() {
    use Outcome::{Failed, Nothing, Over};
    use errno::{ECONNREFUSED, ECONNRESET, EHOSTUNREACH, ETIMEDOUT};
    let cases: [(i32, &str, Outcome); 23] = [
        // The SYN: a reset, nothing at all, an ICMP message or no neighbour.
        (ECONNREFUSED, "closed", Failed(Failure::Refused)),
        (ETIMEDOUT, "closed repeated", Failed(Failure::Timeout)),
        (ETIMEDOUT, "closed", Failed(Failure::Timeout)),
        (EHOSTUNREACH, "closed", Failed(Failure::Unreachable)),
        (EHOSTUNREACH, "", Failed(Failure::Unreachable)),
        // After a time without an answer, this is what the kernel was told on the way.
        (EHOSTUNREACH, "closed repeated unreachable", Failed(Failure::Unreachable)),
        // Connected, and no byte came.
        (ETIMEDOUT, "connected closed repeated", Failed(Failure::Timeout)),
        (ETIMEDOUT, "connected", Failed(Failure::Timeout)),
        // It has served: how it ends is the application's affair.
        (ETIMEDOUT, "connected answered closed repeated", Over),
        (ECONNRESET, "connected answered closed", Over),
        // A peer's reset was seen before; what is left is this side's.
        (ECONNRESET, "connected closed", Over),
        (ECONNRESET, "connected", Over),
        // `AF_UNSPEC` and `SO_LINGER` 0 report this after the counters were reset.
        (ECONNRESET, "closed disconnected", Over),
        (ECONNRESET, "closed disconnected repeated", Over),
        // `IP_RECVERR` on an established connection.
        (EHOSTUNREACH, "connected", Nothing),
        (ECONNREFUSED, "connected", Nothing),
        (EHOSTUNREACH, "connected answered", Nothing),
        (EHOSTUNREACH, "connected closed", Over),
        (ECONNREFUSED, "connected closed", Over),
        (EHOSTUNREACH, "connected answered closed", Over),
        (ECONNREFUSED, "connected answered closed", Over),
        // A soft error is none while the connection goes on.
        (0, "repeated unreachable", Nothing),
        (0, "connected repeated unreachable", Nothing),
    ];
    for (error, words, expected) in cases {
        assert_eq!(judge(seen(error, words)), expected, "{error} {words}");
    }
    for error in OTHERS {
        for seen in everything(error) {
            let expected = if seen.closed || !seen.connected { Over } else { Nothing };
            assert_eq!(judge(seen), expected, "{seen:?}");
        }
    }
}

/// Somebody was faster and has asked for the error: what the kernel did to the socket tells it.
#[test]
fn errors_that_were_fetched() {
    use Outcome::{Failed, Nothing, Over};
    let cases: [(&str, Outcome); 14] = [
        // The SYN was sent again and again.
        ("closed repeated", Failed(Failure::Timeout)),
        // Somebody said that the host cannot be reached: at once, or while it was sent again.
        ("closed", Failed(Failure::Unreachable)),
        ("closed unreachable", Failed(Failure::Unreachable)),
        ("closed repeated unreachable", Failed(Failure::Unreachable)),
        // Data was sent again and again.
        ("connected closed repeated", Failed(Failure::Timeout)),
        // Nothing was, or somebody said why: this connection's end is not the backend's failure.
        ("connected closed", Over),
        ("connected closed repeated unreachable", Over),
        // It has served.
        ("connected answered closed", Over),
        ("connected answered closed repeated", Over),
        // It was disconnected.
        ("closed disconnected", Over),
        ("closed disconnected repeated", Over),
        // Something to read on the error queue.
        ("", Nothing),
        ("connected", Nothing),
        ("connected answered repeated", Nothing),
    ];
    for (words, expected) in cases {
        assert_eq!(judge(seen(0, words)), expected, "{words}");
    }
}

/// Whatever else is seen.
#[test]
fn what_is_no_failure_of_the_backend() {
    use errno::{ECONNREFUSED, ECONNRESET, EHOSTUNREACH, ETIMEDOUT};
    for error in [0, ECONNREFUSED, ECONNRESET, EHOSTUNREACH, ETIMEDOUT] {
        for seen in everything(error) {
            let failed = matches!(judge(seen), Outcome::Failed(_));
            assert!(!(failed && seen.answered), "it was answered: {seen:?}");
            // These two are what `tcp_disconnect` reports.
            let disconnected = seen.disconnected && matches!(error, 0 | ECONNRESET);
            assert!(!(failed && disconnected), "it was disconnected: {seen:?}");
        }
    }
}

#[test]
fn resets() {
    assert_eq!(judge_reset(false, false), Some(Failure::Refused), "of the SYN");
    assert_eq!(judge_reset(true, false), Some(Failure::Reset), "before the first byte");
    assert_eq!(judge_reset(true, true), None, "it has served");
}

/// The end of a socket whose error was reported to nobody.
#[test]
fn ends() {
    let (in_flight, timeout, unreachable) = (true, Failure::Timeout, Failure::Unreachable);
    let cases = [
        // The kernel gave up: after sending the SYN again, or since it was told that it must.
        ("closed repeated", !in_flight, Some(timeout)),
        ("closed", !in_flight, Some(unreachable)),
        ("closed unreachable", !in_flight, Some(unreachable)),
        ("closed repeated unreachable", !in_flight, Some(unreachable)),
        // The application gave up.
        ("closed", in_flight, None),
        ("closed repeated", in_flight, None),
        ("closed repeated unreachable", in_flight, None),
        // It was disconnected.
        ("closed disconnected", !in_flight, None),
        ("closed disconnected repeated", !in_flight, None),
        // It was connected.
        ("connected closed", !in_flight, None),
        ("connected closed repeated", !in_flight, None),
        ("connected answered closed", !in_flight, None),
        ("connected answered closed repeated", in_flight, None),
    ];
    for (words, in_flight, expected) in cases {
        // By then the error says nothing: it is there, or was fetched.
        for error in [0, errno::ETIMEDOUT, errno::EHOSTUNREACH] {
            let judged = judge_end(seen(error, words), in_flight);
            assert_eq!(judged, expected, "{error} {words}, in flight: {in_flight}");
        }
    }
}

#[test]
fn failures_survive_their_numbers() {
    for failure in Failure::ALL {
        assert_eq!(Failure::from_number(failure as u8), Some(failure));
    }
    assert_eq!(Failure::from_number(4), None);
}

const NOW: u64 = 5000;

/// A failure of a backend of which `before` is known.
fn fail(
    before: Ejection,
    policy: Policy,
    client: u64,
    may_go: impl Fn(Ejection, bool) -> bool,
) -> (BackendStats, Option<Change>) {
    let stats = BackendStats::default();
    stats.ejection.store(before.0);
    stats.opened.increment();
    let client = Client::of_cgroup(client);
    let change = stats.fail(Failure::Timeout, Token::NONE, policy, client, NOW, may_go);
    (stats, change)
}

#[test]
fn a_failure_is_counted_once() {
    let (stats, _) = fail(Ejection::NONE, Policy::OFF, 1, |_, _| true);
    assert_eq!((stats.opened.load(), stats.closed.load(), stats.active()), (1, 1, 0));
    assert_eq!(stats.failed.each_ref().map(Word::load), [0, 1, 0, 0]);
}

#[test]
fn the_share_is_asked_before_and_after() {
    let policy = Policy::new(1, 10, 60, 50);
    let asked = Cell::new(0);
    let (stats, change) = fail(Ejection::NONE, policy, 1, |next, is_out| {
        assert_eq!(next.phase(), Phase::Suspected);
        assert_eq!(is_out, asked.get() == 1);
        asked.set(asked.get() + 1);
        true
    });
    assert_eq!(asked.get(), 2);
    let (before, after) = change.expect("a change");
    assert_eq!((before, after), (Ejection::NONE, stats.ejection()));
}

/// Whoever tells about it must learn that one was spared, also when the word stays as it is, which
/// it does at one failure less than it takes.
#[test]
fn a_backend_that_is_spared_is_told_of() {
    for failures in [1, 2, 127] {
        let policy = Policy::new(failures, 10, 60, 50);
        let mut before = Ejection::NONE;
        for _ in 1..failures {
            before = before.fail(policy, Client::of_cgroup(1), Token::NONE, NOW).expect("counted");
        }
        let spared = before.spare(policy, NOW);
        for _ in 0..2 {
            let (stats, change) = fail(before, policy, 1, |_, _| false);
            assert_eq!(change, Some((before, spared)), "{failures} failures");
            assert_eq!(stats.ejection(), spared);
            assert_eq!(spared.failures(), u64::from(failures) - 1);
            before = spared;
        }
    }
}

/// Found to be one too many after it went: it comes back.
#[test]
fn one_too_many_comes_back() {
    let policy = Policy::new(1, 10, 60, 50);
    let (stats, change) = fail(Ejection::NONE, policy, 1, |_, is_out| !is_out);
    let back = Ejection::NONE.spare(policy, NOW);
    assert_eq!(stats.ejection(), back);
    assert_eq!(change, Some((Ejection::NONE, back)));

    let suspected =
        Ejection::NONE.fail(policy, Client::of_cgroup(1), Token::NONE, NOW - 1).expect("suspected");
    let asked = Cell::new(0);
    let (stats, change) = fail(suspected, policy, 2, first_time(&asked));
    assert_eq!(asked.get(), 2);
    assert_eq!(stats.ejection(), suspected);
    assert_eq!(change, Some((suspected, suspected)));
    let (stats, change) = fail(suspected, policy, 2, |_, _| false);
    assert_eq!((stats.ejection(), change), (suspected, None));
}

/// Yes before it goes, and no afterwards.
fn first_time(asked: &Cell<u32>) -> impl Fn(Ejection, bool) -> bool {
    |next, is_out| {
        assert_eq!((next.phase(), is_out), (Phase::Ejected, asked.get() == 1));
        asked.set(asked.get() + 1);
        asked.get() == 1
    }
}

/// What others see of a suspected backend is counted without asking, until it would go out for all.
#[test]
fn the_share_is_asked_when_others_agree() {
    let policy = Policy::new(3, 10, 60, 50);
    let mut known = Ejection::NONE;
    for _ in 0..3 {
        known = known.fail(policy, Client::of_cgroup(1), Token::NONE, NOW).expect("counted");
    }
    for counted in [4, 5] {
        let (stats, change) = fail(known, policy, 2, |_, _| unreachable!("it is out already"));
        assert_eq!(change, Some((known, stats.ejection())));
        known = stats.ejection();
        assert_eq!((known.phase(), known.failures()), (Phase::Suspected, counted));
    }
    let asked = Cell::new(0);
    let (stats, change) = fail(known, policy, 2, |next, is_out| {
        asked.set(asked.get() + 1);
        next.phase() == Phase::Ejected && is_out == (asked.get() == 2)
    });
    assert_eq!((asked.get(), stats.ejection().phase()), (2, Phase::Ejected));
    assert_eq!(change, Some((known, stats.ejection())));
}

/// While it was out for all, the try's outcome was of no use: the token must not wait for it.
#[test]
fn a_try_is_void_when_its_backend_comes_back() {
    let policy = Policy::new(1, 10, 60, 50);
    let one = Client::of_cgroup(1);
    let suspected = Ejection::NONE.fail(policy, one, Token::NONE, NOW - 20).expect("suspected");
    let asked = Cell::new(0);
    let (stats, _) = fail(suspected.take(NOW), policy, 2, first_time(&asked));
    assert_eq!(asked.get(), 2);
    let after = stats.ejection();
    assert_eq!((after.phase(), after.client()), (Phase::Suspected, one));
    assert_eq!(after.until(), NOW + 10);
}

/// Of a backend of which `before` is known.
fn with(before: Ejection) -> BackendStats {
    let stats = BackendStats::default();
    stats.ejection.store(before.0);
    stats.opened.increment();
    stats
}

/// The SYN of a try is sent again, and then something becomes of its connection: the try has
/// failed once, and the connection is closed once.
#[test]
fn a_silent_try_has_failed_and_goes_on() {
    let policy = Policy::new(1, 10, 60, 50);
    let one = Client::of_cgroup(1);
    let suspected = Ejection::NONE.fail(policy, one, Token::NONE, NOW - 20).expect("suspected");
    let trying = suspected.take(NOW - 1);
    let token = trying.token();
    let stats = with(trying);
    let (before, after) = stats.stay_silent(policy, one, token, NOW).expect("a change");
    assert_eq!((before, after.phase(), after.level()), (trying, Phase::Suspected, 2));
    assert_eq!(after.until(), NOW + 20);
    assert_eq!((stats.closed.load(), stats.failed[1].load()), (0, 0), "it goes on");
    assert_eq!(stats.stay_silent(policy, one, token, NOW), None, "once");
    // The token is used up, so its end says nothing more.
    assert_eq!(stats.succeed(Token::NONE, policy, one, NOW), None);
    assert_eq!((stats.closed.load(), stats.ejection()), (1, after));
}

/// A retransmission of an earlier try, or without a try, is no failure: neither of a backend that is
/// in, nor for others of one that another client suspects.
#[test]
fn silence_is_a_failure_of_its_try_alone() {
    let policy = Policy::new(1, 10, 60, 50);
    let [one, two] = [1, 2].map(Client::of_cgroup);
    let suspected = Ejection::NONE.fail(policy, one, Token::NONE, NOW - 20).expect("suspected");
    let trying = suspected.take(NOW - 1);
    for known in [Ejection::NONE, suspected, trying, trying.recover(policy, NOW)] {
        for (client, token) in [(one, Token(5)), (two, Token(5))] {
            let stats = with(known);
            assert_eq!(stats.stay_silent(policy, client, token, NOW), None);
            assert_eq!(stats.ejection(), known);
        }
    }
}

#[test]
fn an_end_gives_back_its_own_token_alone() {
    let policy = Policy::new(1, 10, 60, 50);
    let suspected = Ejection::NONE
        .fail(policy, Client::of_cgroup(1), Token::NONE, NOW - 20)
        .expect("suspected");
    let trying = suspected.take(NOW - 1);
    for token in [Token::NONE, Token(trying.token().0 - 1)] {
        let stats = with(trying);
        assert_eq!(stats.end(token, || NOW), None);
        assert_eq!((stats.ejection(), stats.closed.load()), (trying, 1));
    }
    let stats = with(trying);
    let (_, after) = stats.end(trying.token(), || NOW).expect("given back");
    assert_eq!((after.phase(), after.until(), after.level()), (Phase::Suspected, NOW, 1));
}

/// Success is never missed where it changes something, and not asked about while nothing is wrong.
#[test]
fn success_is_asked_about_where_it_matters() {
    let policy = Policy::new(3, 10, 60, 50);
    let [one, two] = [1, 2].map(Client::of_cgroup);
    let fail = |known: Ejection, policy, client| {
        known.fail(policy, client, Token::NONE, NOW - 20).expect("a change")
    };
    let failed = fail(Ejection::NONE, policy, one);
    let out = fail(Ejection::NONE, Policy::new(1, 10, 60, 50), one);
    let doubted =
        fail(fail(fail(fail(Ejection::NONE, policy, one), policy, one), policy, one), policy, two);
    assert_eq!((doubted.phase(), doubted.failures()), (Phase::Suspected, 4));
    let trying = out.take(NOW - 1);
    let back = trying.recover(policy, NOW);
    let none = Token::NONE;
    for (known, client, token, changes) in [
        (Ejection::NONE, one, none, false),
        (back, one, none, false),
        (back, one, trying.token(), false),
        (failed, one, none, true),
        (failed, two, none, false),
        (out, one, none, false),
        (out, two, none, false),
        (doubted, one, none, false),
        (doubted, two, none, true),
        (trying, one, none, false),
        (trying, one, trying.token(), true),
    ] {
        let stats = with(known);
        let awaits = stats.awaits_success(Held::new(1, 1, token.is_some()));
        assert_eq!(awaits, token.is_some() || known.failures() > 0, "{known:?} with {token:?}");
        let changed = stats.succeed(token, policy, client, NOW).is_some();
        assert_eq!(changed, changes, "{known:?} with {token:?} by {client:?}");
        assert!(awaits || !changed);
    }
}

/// Another client's try was answered long ago, or it never tried again, and never came back: the
/// first failure of this one takes the backend out for itself alone, and asks for its own share.
#[test]
fn an_old_suspicion_of_another_does_not_eject() {
    let policy = Policy::new(1, 10, 60, 50);
    let [one, two] = [1, 2].map(Client::of_cgroup);
    let suspected = Ejection::NONE.fail(policy, one, Token::NONE, 100).expect("suspected");
    for (known, allowed) in [suspected, suspected.take(110)]
        .into_iter()
        .flat_map(|known| [true, false].map(|allowed| (known, allowed)))
    {
        let asked = Cell::new(0);
        let (stats, change) = fail(known, policy, 2, |next, is_out| {
            assert_eq!((next.phase(), next.client()), (Phase::Suspected, two));
            assert_eq!(is_out, asked.get() == 1);
            asked.set(asked.get() + 1);
            allowed
        });
        let (before, after) = change.expect("told of");
        assert_eq!((before, after), (Ejection::NONE, stats.ejection()));
        assert_eq!(after.is_out_for(two), allowed);
        assert!(!after.is_out_for(one));
        assert_eq!(asked.get(), if allowed { 2 } else { 1 });
    }
}

/// Failures of long ago are not part of the run that is told of.
#[test]
fn what_is_told_of_is_what_counts() {
    let policy = Policy::new(3, 10, 60, 50);
    let one = Client::of_cgroup(1);
    let once = Ejection::NONE.fail(policy, one, Token::NONE, 100).expect("counted");
    let twice = once.fail(policy, one, Token::NONE, 110).expect("counted");
    let (_, change) = fail(twice, policy, 1, |_, _| unreachable!("it stays in"));
    let (before, after) = change.expect("counted");
    assert_eq!((before.failures(), after.failures()), (0, 1));
}
