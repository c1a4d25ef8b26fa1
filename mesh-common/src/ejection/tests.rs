//! The packed words against the same rules written down slowly, with plain fields.

mod reference;

use std::vec::Vec;

use proptest::prelude::*;

use super::*;
use reference::{Plain, Rules, Who};

/// The last time that fits.
const END: u64 = (1 << 34) - 1;

// === sequences ===

/// Which token a connect holds.
#[derive(Clone, Copy, Debug)]
enum Held {
    None,
    /// That of the last try.
    Last,
    /// That of another one, counted from the first.
    Earlier(usize),
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Wait(u32),
    Fail(u16, Held),
    Succeed(u16, Held),
    Enter(u16),
    GiveBack(Held),
    Confirm,
    Spare,
    ComeBack,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let client = || 1u16..4;
    let held = || {
        prop_oneof![
            1 => Just(Held::None),
            3 => Just(Held::Last),
            1 => (0usize..9).prop_map(Held::Earlier),
        ]
    };
    let lapse = u32::try_from(LAPSE).expect("a minute");
    let ticks = prop_oneof![
        8 => 0u32..30,
        4 => 76u32..80,
        1 => lapse - 30..lapse + 30,
        1 => Just(Policy::MAX_TICKS),
    ];
    let step = prop_oneof![
        4 => ticks.prop_map(Step::Wait),
        4 => (client(), held()).prop_map(|(client, held)| Step::Fail(client, held)),
        2 => (client(), held()).prop_map(|(client, held)| Step::Succeed(client, held)),
        4 => client().prop_map(Step::Enter),
        1 => held().prop_map(Step::GiveBack),
        1 => Just(Step::Confirm),
        1 => Just(Step::Spare),
        1 => Just(Step::ComeBack),
    ];
    prop::collection::vec(step, 1..120)
}

fn rules() -> impl Strategy<Value = Rules> {
    let failures = prop_oneof![Just(0u8), Just(1), Just(2), Just(3), Just(127)];
    let ticks = || prop_oneof![0u32..20, Just(Policy::MAX_TICKS)];
    (failures, ticks(), ticks()).prop_map(|(failures, base, max)| Rules { failures, base, max })
}

/// The next word as `Ejection` gives it: where nothing changes, the same.
fn next(known: Ejection, next: Option<Ejection>) -> Ejection {
    next.unwrap_or(known)
}

fn phase() -> impl Strategy<Value = Phase> {
    const PHASES: [Phase; 5] =
        [Phase::In, Phase::Suspected, Phase::SuspectTry, Phase::Ejected, Phase::Trying];
    prop::sample::select(&PHASES[..])
}

fn who() -> impl Strategy<Value = Who> {
    prop_oneof![Just(Who::Nobody), (1..u16::MAX).prop_map(Who::One), Just(Who::Several)]
}

prop_compose! {
    /// Any word, also one that no sequence leads to.
    fn plain()(
        phase in phase(),
        failures in 0u64..=127,
        level in 0u64..=15,
        who in who(),
        until in 0..=END,
    ) -> Plain {
        Plain { phase, failures, level, who, until }
    }
}

proptest! {
    #[test]
    fn does_what_the_rules_say(
        rules in rules(),
        steps in steps(),
        start in prop_oneof![Just(0u64), Just(1), 0u64..1 << 20, Just(1 << 33)],
    ) {
        let policy = rules.policy();
        let (mut word, mut plain, mut now) = (Ejection::NONE, Plain::NONE, start);
        let mut tokens: Vec<Token> = Vec::new();
        for step in steps {
            let token = |held| match held {
                Held::None => Token::NONE,
                Held::Last => tokens.last().copied().unwrap_or_default(),
                Held::Earlier(n) => tokens.get(n).copied().unwrap_or_default(),
            };
            match step {
                Step::Wait(ticks) => now += u64::from(ticks),
                Step::Fail(client, held) => {
                    let token = token(held);
                    word = next(word, word.fail(policy, Client(client), token, now));
                    plain.fail(rules, client, token, now);
                }
                Step::Succeed(client, held) => {
                    let token = token(held);
                    word = next(word, word.succeed(policy, Client(client), token, now));
                    plain.succeed(rules, client, token, now);
                }
                Step::Enter(client) => match plain.admits(client, now) {
                    Admission::Try => {
                        word = word.take(now);
                        plain.take(now);
                        prop_assert_eq!(word.admits(Client(client), now), Admission::Out);
                        // None that was not given back is worth anything now.
                        let token = word.token();
                        prop_assert!(token.is_some() && !tokens.contains(&token));
                        tokens.push(token);
                    }
                    Admission::Answered => {
                        word = word.recover(policy, now);
                        plain.recover(rules, now);
                        prop_assert_eq!(word.admits(Client(client), now), Admission::In);
                    }
                    Admission::In | Admission::Out => {}
                },
                Step::GiveBack(held) => {
                    let token = token(held);
                    if let Some(given_back) = word.give_back(token, now) {
                        word = given_back;
                        tokens.retain(|&issued| issued != token);
                    }
                    plain.give_back(token, now);
                }
                Step::Confirm => {
                    word = next(word, word.confirm(policy, now));
                    plain.confirm(rules, now);
                }
                Step::Spare if plain.phase == Phase::In => {
                    word = word.spare(policy, now);
                    plain.spare(rules, now);
                }
                Step::Spare => {}
                Step::ComeBack => {
                    word = word.come_back(policy, now);
                    plain.come_back(rules, now);
                }
            }
            prop_assert_eq!(word, plain.packed(), "after {:?}", step);
            prop_assert_eq!(word.token(), plain.token());
            prop_assert_eq!(word.is_out_for(Client::SEVERAL), plain.is_out_for_anybody());
            for client in 1..4 {
                prop_assert_eq!(word.is_out_for(Client(client)), plain.is_out_for(client));
                for at in [now.saturating_sub(1), now, now + 1, plain.until] {
                    prop_assert_eq!(word.admits(Client(client), at), plain.admits(client, at));
                }
            }
        }
    }

    /// The token of another try decides nothing: the word becomes what it would become without.
    #[test]
    fn the_token_of_another_try_means_nothing(
        plain in plain(),
        rules in rules(),
        client in who(),
        token: u64,
        now in 0..END,
    ) {
        let (word, policy) = (plain.packed(), rules.policy());
        let (client, token) = (client.client(), Token(token));
        prop_assume!(token != word.token());
        let none = Token::NONE;
        prop_assert_eq!(word.give_back(token, now), None);
        let fail = |token| word.fail(policy, client, token, now);
        prop_assert_eq!(fail(token), fail(none));
        let succeed = |token| word.succeed(policy, client, token, now);
        prop_assert_eq!(succeed(token), succeed(none));
        // It ends at most what others count of a suspicion.
        if let Some(after) = succeed(token) && !word.is_in() {
            prop_assert!(word.client() != client && word.phase() == after.phase());
            prop_assert_eq!((word.until(), word.client()), (after.until(), after.client()));
        }
    }

    /// A client's try that was answered, which nobody came along to note, is nothing to others.
    #[test]
    fn a_try_is_answered_before_that_is_noted(
        (plain, rules) in (plain(), rules()),
        client in 1u16..4,
        long_ago in prop_oneof![Just(0u64), 0u64..200, 0u64..1 << 26],
    ) {
        let plain = Plain { phase: Phase::SuspectTry, until: plain.until.min(END / 2), ..plain };
        let (word, policy, client) = (plain.packed(), rules.policy(), Client(client));
        prop_assume!(word.client() != client);
        let now = word.until() + long_ago;
        let fail = |word: Ejection| word.fail(policy, client, Token::NONE, now);
        prop_assert_eq!(fail(word), fail(Ejection::NONE));
        let after = fail(word).expect("a failure");
        prop_assert!(matches!(after.phase(), Phase::In | Phase::Suspected));
        prop_assert_eq!((after.client(), after.failures()), (client, 1));
    }

    #[test]
    fn words_survive_packing(plain in plain()) {
        let word = plain.packed();
        prop_assert_eq!(word.phase(), plain.phase);
        prop_assert_eq!(word.failures(), plain.failures);
        prop_assert_eq!(word.level(), plain.level);
        prop_assert_eq!(word.client(), plain.who.client());
        prop_assert_eq!(word.until(), plain.until);
        prop_assert_eq!(word.is_in(), plain.phase == Phase::In);
    }

    /// Times beyond the last one that fits are wrong, and nothing else is.
    #[test]
    fn the_end_of_time_spoils_no_other_field(plain in plain(), now in END - 5..=END) {
        let policy = Policy::new(3, Policy::MAX_TICKS, Policy::MAX_TICKS, 50);
        let word = plain.packed();
        let held = word.token();
        let changes = [word.fail(policy, Client(7), held, now), word.confirm(policy, now)];
        for after in changes.into_iter().flatten() {
            let known = word.known_to(Client(7), now);
            let agreed = after.phase() == Phase::Ejected && after.failures() == policy.failures();
            prop_assert!(agreed || after.failures() >= known.failures());
            let levels = [known.level(), (known.level() + 1).min(15), word.level()];
            prop_assert!(levels.contains(&after.level()));
            let clients = [word.client(), Client(7), Client::SEVERAL];
            prop_assert!(clients.contains(&after.client()));
        }
    }

    #[test]
    fn policies_survive_packing(failures: u8, base: u32, max: u32, share: u8) {
        let policy = Policy::new(failures, base, max, share);
        prop_assert_eq!(policy.failures(), u64::from(failures.min(127)));
        prop_assert_eq!(policy.share(), u64::from(share.min(100)));
        prop_assert_eq!(policy.base(), u64::from(base.min(Policy::MAX_TICKS)));
        prop_assert_eq!(policy.max(), u64::from(max.min(Policy::MAX_TICKS)));
    }

    #[test]
    fn times_double_up_to_the_longest(
        base in 0..=Policy::MAX_TICKS,
        max in 0..=Policy::MAX_TICKS,
        level in 0u64..=15,
    ) {
        let rules = Rules { failures: 1, base, max };
        prop_assert_eq!(rules.policy().duration(level), rules.duration(level));
    }

    #[test]
    fn clients_are_neither_nobody_nor_several(id: u64) {
        let client = Client::of_cgroup(id);
        prop_assert!(client != Client::NOBODY && client != Client::SEVERAL);
    }
}

#[test]
fn the_longest_times_do_not_overflow() {
    let policy = Policy::new(1, Policy::MAX_TICKS, Policy::MAX_TICKS, 100);
    assert_eq!(policy.duration(15), u64::from(Policy::MAX_TICKS));
}

/// Two of the first ids of cgroups rarely share a tag, and the tags that mean something else are
/// nobody's: among 2^20 ids there are some that would have had them.
#[test]
fn clients_are_told_apart() {
    let mut seen = std::vec![0u32; 1 << 16];
    for id in 0..1 << 20 {
        seen[usize::from(Client::of_cgroup(id).0)] += 1;
    }
    assert_eq!((seen[0], seen[usize::from(u16::MAX)]), (0, 0));
    let most = seen.iter().max().expect("tags");
    assert!(*most <= 64, "{most} of 2^20 ids share a tag; 16 would be even");
}

const ONE: Client = Client(1);
const TWO: Client = Client(2);
const THREE: Client = Client(3);

/// After as many failures as it takes, of one client.
fn suspected(policy: Policy, client: Client, now: u64) -> Ejection {
    let fail = |word: Ejection, _| word.fail(policy, client, Token::NONE, now).expect("a change");
    let word = (0..policy.failures()).fold(Ejection::NONE, fail);
    assert_eq!((word.phase(), word.client()), (Phase::Suspected, client));
    word
}

/// Others have to see as many failures in a row as the first client, as far as there is room to
/// count them.
#[test]
fn others_have_to_agree() {
    for (failures, needed) in [(1, 1), (2, 2), (3, 3), (63, 63), (64, 63), (126, 1), (127, 1)] {
        let policy = Policy::new(failures, 10, 60, 100);
        for word in [suspected(policy, ONE, 1000), suspected(policy, ONE, 1000).take(1010)] {
            let mut known = word;
            for n in 1..needed {
                known = known.fail(policy, TWO, Token::NONE, 1020).expect("counted");
                assert_eq!(known.failures(), policy.failures() + n);
                assert_eq!((known.phase(), known.client()), (word.phase(), ONE));
                assert_eq!(known.until(), word.until(), "it is not out for longer");
                assert_eq!(known.admits(TWO, 1020), Admission::In);
                // What its own client sees of connects that were under way says nothing new.
                assert_eq!(known.fail(policy, ONE, Token::NONE, 1020), None);
            }
            // Whoever it is of the others.
            let out = known.fail(policy, THREE, Token::NONE, 1020).expect("ejected");
            assert_eq!((out.phase(), out.client()), (Phase::Ejected, Client::SEVERAL));
            assert_eq!((out.failures(), out.level()), (policy.failures(), 1));
            assert_eq!(out.until(), 1030);
        }
    }
}

/// Another client gets there: what others saw before was not in a row.
#[test]
fn others_agree_in_a_row() {
    let policy = Policy::new(3, 10, 60, 100);
    let fail = |word: Ejection, client| word.fail(policy, client, Token::NONE, 1005).expect("more");
    for word in [suspected(policy, ONE, 1000), suspected(policy, ONE, 1000).take(1000)] {
        assert_eq!(word.succeed(policy, TWO, Token::NONE, 1005), None, "nothing to take back");
        let doubted = fail(fail(word, TWO), TWO);
        assert_eq!(doubted.failures(), 5);
        assert_eq!(doubted.succeed(policy, ONE, Token::NONE, 1005), None, "none of the others");
        for client in [TWO, THREE] {
            assert_eq!(doubted.succeed(policy, client, Token::NONE, 1005), Some(word));
        }
        assert_eq!(fail(doubted, TWO).phase(), Phase::Ejected);
    }
}

/// Once ejection is off, a suspicion stays its client's.
#[test]
fn nobody_agrees_while_it_is_off() {
    let word = suspected(Policy::new(1, 10, 60, 100), ONE, 1000);
    for word in [word, word.take(1010)] {
        for client in [ONE, TWO] {
            assert_eq!(word.fail(Policy::OFF, client, Token::NONE, 1020), None);
        }
    }
}

/// A suspicion whose client never came along again is nothing to others after a minute, and is
/// what it was to its client.
#[test]
fn a_suspicion_lapses() {
    let policy = Policy::new(1, 10, 60, 100);
    let word = suspected(policy, ONE, 1000);
    let end = word.until() + LAPSE;
    let fail = |now| word.fail(policy, TWO, Token::NONE, now).expect("a failure");
    assert_eq!(fail(end - 1).phase(), Phase::Ejected);
    assert_eq!(fail(end), suspected(policy, TWO, end));
    assert_eq!(word.known_to(ONE, end), word);
    assert_eq!(word.fail(policy, ONE, Token::NONE, end), None);
    assert_eq!(word.admits(ONE, end), Admission::Try);
    // One that is out for all is so until it was tried.
    let out = fail(end - 1);
    assert_eq!(out.known_to(TWO, END - 1), out);
}

/// Being out for anybody is not being out for all.
#[test]
fn out_for_anybody() {
    let policy = Policy::new(1, 10, 60, 100);
    let word = suspected(policy, ONE, 1000);
    let out = word.confirm(policy, 1000).expect("ejected");
    for (word, anybody, another) in [
        (Ejection::NONE, false, false),
        (word.recover(policy, 1000), false, false),
        (word, true, false),
        (word.take(1010), true, false),
        (out, true, true),
        (out.take(1010), true, true),
    ] {
        assert_eq!(word.is_out_for(Client::SEVERAL), anybody, "{word:?}");
        assert_eq!(word.is_out_for(TWO), another, "{word:?}");
        assert_eq!(word.is_out_for(Client::NOBODY), another, "{word:?}");
    }
}

/// With each try that fails the time grows, and a recovery that lasts starts it anew.
#[test]
fn tries_that_fail_grow_the_time() {
    let policy = Policy::new(1, 10, 60, 100);
    let mut now = 1000;
    let mut word = Ejection::NONE.fail(policy, ONE, Token::NONE, now).expect("out");
    for expected in [10, 20, 40, 60, 60] {
        assert_eq!(word.until() - now, expected);
        now = word.until();
        assert_eq!(word.admits(ONE, now - 1), Admission::Out);
        assert_eq!(word.admits(ONE, now), Admission::Try);
        word = word.take(now);
        word = word.fail(policy, ONE, word.token(), now).expect("out again");
    }
    now = word.until();
    let tried = word.take(now);
    let back = tried.succeed(policy, ONE, tried.token(), now).expect("in");
    assert_eq!((back.phase(), back.until()), (Phase::In, now + 60));
    let soon = back.fail(policy, ONE, Token::NONE, back.until() - 1).expect("out");
    assert_eq!(soon.level(), word.level() + 1, "it did not last");
    let late = back.fail(policy, ONE, Token::NONE, back.until()).expect("out");
    assert_eq!((late.level(), late.until()), (1, back.until() + 10), "it lasted");
}

/// A run of failures is one only while they follow each other in the longest time.
#[test]
fn failures_are_forgotten() {
    let policy = Policy::new(3, 10, 60, 100);
    let fail = |word: Ejection, now| word.fail(policy, ONE, Token::NONE, now).expect("a change");
    let two = fail(fail(Ejection::NONE, 1000), 1059);
    assert_eq!((two.failures(), two.phase()), (2, Phase::In));
    assert_eq!(fail(two, 1059 + 59).phase(), Phase::Suspected);
    let late = fail(two, 1059 + 60);
    assert_eq!((late.failures(), late.phase()), (1, Phase::In));
}

/// No bad news for long enough is good news; and what comes later says nothing about a later try.
#[test]
fn a_try_of_which_nothing_is_heard_was_answered() {
    let policy = Policy::new(1, 10, 60, 100);
    let out = Ejection::NONE.fail(policy, ONE, Token::NONE, 1000).expect("out");
    let first = out.take(1010);
    assert_eq!(first.admits(ONE, 1010 + ANSWERED - 1), Admission::Out);
    assert_eq!(first.admits(ONE, 1010 + ANSWERED), Admission::Answered);
    let now = 1010 + ANSWERED;
    let back = first.recover(policy, now);
    assert_eq!((back.phase(), back.level(), back.failures()), (Phase::In, 1, 0));
    assert_eq!(back.give_back(first.token(), now), None);
    assert_eq!(back.succeed(policy, ONE, first.token(), now), None);

    let again = back.fail(policy, ONE, Token::NONE, now).expect("out again");
    let second = again.take(again.until());
    let late = second.until() - 1;
    assert_eq!(second.give_back(first.token(), late), None);
    assert_eq!(second.succeed(policy, ONE, first.token(), late), None);
    assert_eq!(second.fail(policy, ONE, first.token(), late), None);
    let failed = second.fail(policy, ONE, second.token(), late).expect("its own");
    assert_eq!((failed.phase(), failed.level()), (Phase::Suspected, 3));
}
