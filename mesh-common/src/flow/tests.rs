//! The words of records, and what tells peers apart.

use std::collections::HashMap;
use std::net::{Ipv4Addr, Ipv6Addr};

use proptest::prelude::*;

use super::*;

/// Cookies of each direction that a word has room for.
const COOKIES: u64 = 1 << 52;

/// A cookie as the kernel makes them: mostly counted up from 1, sometimes down from 2^64.
fn cookies() -> impl Strategy<Value = u64> {
    let up = 1..COOKIES;
    prop_oneof![up.clone(), up.prop_map(u64::wrapping_neg)]
}

/// Whether a record could be had and says now whose it is.
fn take(word: &Word, mine: Held) -> Claim {
    let claimed = claim(word);
    if claimed == Claim::Taken {
        publish(word, mine);
    }
    claimed
}

proptest! {
    #[test]
    fn words_survive_packing(
        cookie in cookies(),
        backend in 0..Held::MAX_BACKENDS,
        token: bool,
        more_places in 0u32..8,
    ) {
        let held = Held::new(cookie, backend, token);
        prop_assert!(held.is_used());
        prop_assert!(held.is_of(cookie));
        prop_assert_eq!(held.backend(), backend);
        prop_assert_eq!(held.has_token(), token);
        // A table with more records than 2^16 has places of more bits.
        let place = u32::try_from(cookie & 0xffff).expect("16 bits") | more_places << 16;
        prop_assert_eq!(held.cookie(place), cookie);
    }

    /// At one place, a word is one socket's. Elsewhere it says nothing: whoever keeps records by
    /// other means than their place has to tell sockets apart by itself.
    #[test]
    fn sockets_at_one_place_are_told_apart(one in cookies(), other in cookies()) {
        let (one, other) = (one >> 16, other >> 16);
        let place = 0x1234;
        let held = Held::new(one << 16 | place, 1, false);
        prop_assert_eq!(held.is_of(other << 16 | place), one == other);
        prop_assert!(held.is_of(one << 16 | (place + 1)));
    }

    #[test]
    fn who_claims_releases_once(cookie in cookies(), other in cookies(), token: bool) {
        let (word, mine) = (Word::new(0), Held::new(cookie, 5, token));
        prop_assert_eq!(release(&word, cookie), None);
        prop_assert_eq!(take(&word, mine), Claim::Taken);
        prop_assert_eq!(take(&word, Held::new(other, 6, false)), Claim::Collision);
        prop_assert_eq!(settle(&word, cookie), token);
        prop_assert!(!settle(&word, cookie));
        if other >> Held::PLACE_BITS != cookie >> Held::PLACE_BITS {
            prop_assert_eq!(release(&word, other), None);
        }
        prop_assert_eq!(release(&word, cookie), Some(Held::new(cookie, 5, false)));
        prop_assert_eq!(release(&word, cookie), None);
        prop_assert_eq!(word.load(), 0);
    }
}

proptest! {
    /// What the agent saw is what it releases: with the token or after it was used up, and not what
    /// the socket, or another one, holds since.
    #[test]
    fn what_was_seen_is_released_once(
        cookie in cookies(),
        next in prop_oneof![Just(None), cookies().prop_map(Some)],
        token: bool,
        used_up: bool,
    ) {
        let (seen, word) = (Held::new(cookie, 5, token), Word::new(0));
        prop_assert_eq!(release_seen(&word, seen), None);
        prop_assert_eq!(release_seen(&word, Held::default()), None);
        prop_assert_eq!(take(&word, seen), Claim::Taken);
        let settled = used_up && settle(&word, cookie);
        let other = Held::new(next.unwrap_or(cookie), 6, token);
        prop_assert_eq!(release_seen(&word, other), None);
        let expected = Held::new(cookie, 5, token && !settled);
        prop_assert_eq!(release_seen(&word, seen), Some(expected));
        prop_assert_eq!(take(&word, other), Claim::Taken);
        prop_assert_eq!(release_seen(&word, seen), None);
        prop_assert_eq!(word.load(), other.0);
    }
}

proptest! {
    /// Between claiming and saying whose it is, a record is neither free nor anybody's.
    #[test]
    fn what_is_being_filled_in_is_nobodys(cookie in cookies(), token: bool) {
        let word = Word::new(0);
        prop_assert_eq!(claim(&word), Claim::Taken);
        let filling = Held(word.load());
        prop_assert!(!filling.is_used() && !filling.is_of(cookie) && !filling.has_token());
        prop_assert_eq!(claim(&word), Claim::Collision);
        prop_assert_eq!(release(&word, cookie), None);
        prop_assert_eq!(release_seen(&word, filling), None);
        prop_assert!(!settle(&word, cookie));
        prop_assert_eq!(Held(word.load()), filling);
        let mine = Held::new(cookie, 5, token);
        publish(&word, mine);
        prop_assert_eq!(release_seen(&word, filling), None);
        prop_assert_eq!(release(&word, cookie), Some(mine));
    }
}

proptest! {
    /// The SYN of a try that is under way is blamed for once, and not when it is sent again the second time. When the
    /// try counts as answered already, that is left to the second time.
    #[test]
    fn silence_of_a_try_is_blamed_once(cookie in cookies(), is_current: bool) {
        let (word, mine) = (Word::new(0), Held::new(cookie, 5, true));
        prop_assert_eq!(take(&word, mine), Claim::Taken);
        let noted = if is_current { tell(&word, mine, cookie) } else { settle(&word, cookie) };
        prop_assert!(noted);
        prop_assert!(!Held(word.load()).has_token());
        prop_assert_eq!(tell(&word, Held(word.load()), cookie), !is_current);
        prop_assert!(release(&word, cookie).is_some_and(Held::is_told));
    }

    /// A failure of what goes on is told once, by whoever comes first; its token is used up with it, and
    /// the record is released as before, by its socket or by the agent that saw it earlier.
    #[test]
    fn a_failure_is_told_once(cookie in cookies(), token: bool, by_agent: bool) {
        let (word, mine) = (Word::new(0), Held::new(cookie, 5, token));
        let seen = || Held(word.load());
        prop_assert!(!tell(&word, seen(), cookie));
        prop_assert_eq!(take(&word, mine), Claim::Taken);
        prop_assert!(tell(&word, mine, cookie));
        prop_assert!(!tell(&word, mine, cookie) && !tell(&word, seen(), cookie));
        prop_assert!(!settle(&word, cookie));
        let released = if by_agent { release_seen(&word, mine) } else { release(&word, cookie) };
        let released = released.expect("it was held");
        prop_assert!(released.is_told() && !released.has_token() && released.backend() == 5);
        prop_assert_eq!(word.load(), 0);
        // What it is given then is another reservation.
        prop_assert_eq!(take(&word, Held::new(cookie, 6, token)), Claim::Taken);
        prop_assert!(!tell(&word, mine, cookie));
    }

    #[test]
    fn origins_survive_packing(netns in 1u64..1 << 36, then: u64, later in 0u64..1 << 34) {
        let origin = Origin::new(netns, then);
        prop_assert_eq!(origin.netns(), netns);
        prop_assert_eq!(origin.age(then), 0);
        let age = origin.age(then.wrapping_add(later));
        // It goes round with the counter itself, which takes longer than a machine runs.
        if then.checked_add(later).is_some() {
            prop_assert!(age.abs_diff(later >> Origin::TIME_SHIFT) <= 1, "{} for {}", age, later);
        }
    }

    #[test]
    fn roles_survive_packing(
        service in 0..crate::Limits::MOST.frontends,
        connected: bool,
        more in 0..=Role::MOST,
        last in 0..=Role::MOST,
        measured: bool,
    ) {
        let role = Role::new(service, connected).measured(measured).with_last(last).with_more(more);
        prop_assert_eq!(role.is_measured(), measured);
        let role = Role::new(service, connected).with_last(last).with_more(more);
        prop_assert!(!role.is_measured() && !role.is_elsewhere());
        let elsewhere = role.measured(measured).elsewhere();
        prop_assert!(elsewhere.with_more(more).with_last(last).disconnected().is_elsewhere());
        prop_assert_eq!((elsewhere.service(), elsewhere.is_measured()), (service, measured));
        prop_assert_eq!(role, Role::new(service, connected).with_more(more).with_last(last));
        prop_assert_eq!((role.service(), role.is_connected()), (service, connected));
        prop_assert_eq!((role.more(), role.last()), (more, last));
        // What is passed over is so until it is used, and keeps what it says else.
        for of in [role, elsewhere] {
            let over = of.passed_over();
            prop_assert!(over.is_passed_over() && !of.is_passed_over());
            prop_assert!(over.with_more(more).disconnected().is_passed_over());
            prop_assert!(last == 0 || over.with_last(last).is_passed_over());
            prop_assert_eq!((over.last(), over.with_last(0)), (0, of.with_last(0)));
            prop_assert_eq!((over.asked(), over.passed_over()), (of.asked(), over));
            prop_assert_eq!(over.with_last(0).with_last(last), of.with_last(last));
            prop_assert_eq!((over.service(), over.is_elsewhere()), (of.service(), of.is_elsewhere()));
            prop_assert_eq!(over.is_connected(), of.is_connected());
        }
    }

    /// What the agent reads word by word is what the programs wrote.
    #[test]
    fn records_are_read_word_by_word(
        parts: [u32; 4],
        port: u16,
        protocol: u8,
        words: [u64; 3],
        ids: [u32; 3],
    ) {
        let ([client, origin, token], [peer, role, generation]) = (words, ids);
        let given = Given {
            frontend: FrontendKey { addr: Addr::from_words(parts), port, protocol, pad: 0 },
            peer,
            origin: Origin(origin),
            client,
            role: Role(role),
            generation,
            token: Token(token),
        };
        let half = |low: u32, high: u32| {
            let ([a, b, c, d], [e, f, g, h]) = (low.to_ne_bytes(), high.to_ne_bytes());
            u64::from_ne_bytes([a, b, c, d, e, f, g, h])
        };
        let [a, b, c, d] = parts;
        let [port_low, port_high] = port.to_ne_bytes();
        let dialled = u32::from_ne_bytes([port_low, port_high, protocol, 0]);
        let read = Given::from_words([
            half(a, b),
            half(c, d),
            half(dialled, given.peer),
            origin,
            client,
            half(given.role.0, given.generation),
            token,
        ]);
        prop_assert_eq!(read, given);
    }
}

#[test]
fn nothing_is_free_and_nobodys() {
    assert!(!Held::default().is_used());
    assert!(!Held::default().is_of(0));
}

/// The backends of a cluster, on all ports that are used: no two have one hash, but for as many as
/// chance makes.
#[test]
fn peers_are_told_apart() {
    let mut peers = HashMap::new();
    let mut shared = 0;
    for n in 0..=u16::MAX {
        let [high, low] = n.to_be_bytes();
        let v4 = Addr::from(Ipv4Addr::new(10, 0, high, low));
        let v6 = Addr::from(Ipv6Addr::new(0xfd00, 0, 0, 1, 0, 0, 0, n));
        let nodes = Addr::from(Ipv6Addr::new(0xfd00, n, 0, 0, 0, 0, 0, 1));
        for (addr, port) in [(v4, 80), (v4, 443), (v6, 80), (nodes, 80)] {
            shared += u32::from(peers.insert(peer_hash(addr, u16::to_be(port)), n).is_some());
        }
    }
    for port in 0..=u16::MAX {
        let addr = Addr::from(Ipv4Addr::new(192, 0, 2, 1));
        shared += u32::from(peers.insert(peer_hash(addr, port), port).is_some());
    }
    // 327,680 of 2^32: a random hash has 12.5 pairs.
    assert!(shared <= 30, "{shared} share a hash");
}

/// Who looks at the place of now and at the former one finds every record, whenever it was made.
#[test]
fn a_record_is_found_however_the_table_has_grown() {
    let sizes =
        [Places::settled(1 << 16), Places::grown(1 << 16, 1 << 18), Places::settled(1 << 18)];
    for cookie in (1..5_000_000u64).step_by(4_099) {
        let [before, growing, after] = sizes;
        assert!(!before.has_former() && before.former(cookie).is_none());
        // Made before it grew, and found after.
        let made = before.of(cookie);
        assert!(growing.of(cookie) == made || growing.former(cookie) == Some(made));
        // Made since, and found when it has settled.
        assert!(growing.has_former() && !after.has_former());
        assert_eq!(growing.of(cookie), after.of(cookie));
        // A record says by itself whose it is, at either place, so nobody takes it for another's.
        let held = Held::new(cookie, 7, false);
        assert_eq!(held.cookie(made), held.cookie(after.of(cookie)));
        assert_eq!(held.cookie(made), cookie);
    }
}

/// What an agent finds is believed when it can have been said of that table.
#[test]
fn places_that_make_sense() {
    let there = 1 << 18;
    for (places, makes_sense) in [
        (Places::settled(1 << 16), true),
        (Places::grown(1 << 16, 1 << 18), true),
        (Places::grown(1 << 18, 1 << 16), false),
        (Places::settled(1 << 19), false),
        (Places::settled(3 << 16), false),
        (Places(0), false),
        (Places(u64::MAX), false),
    ] {
        assert_eq!(places.is_of(there), makes_sense, "{places:?}");
    }
}
