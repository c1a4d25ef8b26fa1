//! What a failure changes.

use core::cell::Cell;

use super::*;
use crate::ejection::Phase;

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
