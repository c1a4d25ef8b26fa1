//! Where connects go while backends are out, and how many may be.

use core::cell::RefCell;
use std::vec::Vec;

use super::*;
use crate::ejection::ANSWERED;

/// Who connects.
const ME: u64 = 1;

/// The tables of one service, with ejections that the test sets.
struct OneService {
    service: Service,
    slots: Vec<Slot>,
    ejections: RefCell<Vec<Ejection>>,
    /// The generator's state.
    seed: Cell<u64>,
    all_ejected: Cell<u32>,
    /// Another connect is decided completely before the first asks for entry.
    rival: Cell<bool>,
    rivals_backend: Cell<Option<(u32, Token)>>,
}

impl OneService {
    fn new(weights: &[u32], ejections: Vec<Ejection>, seed: u64) -> Self {
        let mut columns = std::vec![alias::Column::default(); weights.len()];
        let mut scratch = std::vec![alias::Entry::default(); weights.len()];
        assert!(alias::build(weights, &mut columns, &mut scratch));
        let slot = |(backend, column): (u32, &alias::Column)| Slot {
            backend,
            threshold: column.threshold,
            alias: column.alias,
            ..Slot::default()
        };
        let len = u32::try_from(weights.len()).expect("slots");
        Self {
            service: Service {
                table: Word::new(Table::slots(0, len).0),
                generation: Word::new(7),
                policy: Word::new(POLICY.0),
                key: key(1),
                rate: Half::default(),
                position: Word::new(0),
                affinity: Word::new(0),
            },
            slots: (0..).zip(&columns).map(slot).collect(),
            ejections: RefCell::new(ejections),
            seed: Cell::new(seed),
            all_ejected: Cell::new(0),
            rival: Cell::new(false),
            rivals_backend: Cell::new(None),
        }
    }

    /// Backends of equal weight.
    fn even(ejections: Vec<Ejection>, seed: u64) -> Self {
        Self::new(&std::vec![1; ejections.len()], ejections, seed)
    }

    fn connect(&self) -> (u32, Token) {
        match translate(self, self, &key(1)) {
            Verdict::Balance(choice) => (choice.slot.backend, choice.token),
            other => panic!("{other:?}"),
        }
    }

    /// The backends in the order in which a connect looks at them: five draws, and from the last of
    /// them on a part of the table. It draws as `translate` is about to.
    fn order(&self) -> Vec<u32> {
        let seed = self.seed.get();
        let len = self.service.table().len();
        let mut order = Vec::new();
        for _ in 0..=REDRAWS {
            let (column, position) = alias::column(self.random(), len);
            let slot = &self.slots[column as usize];
            order.push(if position < slot.threshold { column } else { slot.alias });
        }
        let last = order[REDRAWS as usize];
        order.extend((1..=SCAN.min(len)).map(|step| (last + step) % len));
        self.seed.set(seed);
        order
    }
}

impl Tables for OneService {
    fn frontend(&self, _: &FrontendKey) -> Option<FrontendValue> {
        Some(value(0, 7))
    }

    fn service(&self, index: u32) -> Option<&Service> {
        (index == 0).then_some(&self.service)
    }

    fn slot(&self, index: u32) -> Option<&Slot> {
        self.slots.get(index as usize)
    }

    fn is_virtual(&self, _: &Addr) -> bool {
        false
    }

    /// G. Steele's `SplitMix64`.
    fn random(&self) -> u32 {
        let seed = self.seed.get().wrapping_add(0x9e37_79b9_7f4a_7c15);
        self.seed.set(seed);
        let mixed = (seed ^ (seed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        u32::try_from(mixed >> 32).expect("32 bits")
    }

    fn ejection(&self, backend: u32) -> Ejection {
        self.ejections.borrow()[backend as usize]
    }

    fn active(&self, _: u32) -> u64 {
        0
    }

    fn position(&self, _: u32) -> u64 {
        0
    }

    fn client(&self) -> Client {
        client(ME)
    }

    fn now(&self) -> u64 {
        NOW
    }

    fn all_ejected(&self) {
        self.all_ejected.set(self.all_ejected.get() + 1);
    }
}

impl Caller for OneService {
    fn chance(&self) -> u32 {
        self.random()
    }

    fn key(&self, _: Algorithm) -> u64 {
        self.chance().into()
    }

    fn enter(&self, backend: u32, _: Policy) -> Option<Token> {
        if self.rival.take() {
            self.rivals_backend.set(Some(self.connect()));
        }
        let word = &mut self.ejections.borrow_mut()[backend as usize];
        let (next, token) = enters(*word, self.client())?;
        *word = next;
        Some(token)
    }
}

/// Suspected by that client since then, for ten ticks.
fn suspected(by: u64, since: u64) -> Ejection {
    Ejection::NONE.fail(POLICY, client(by), Token::NONE, since).expect("suspected")
}

fn out() -> impl Strategy<Value = Ejection> {
    prop_oneof![
        Just(ejected(NOW - 9)),
        Just(ejected(NOW - 50).take(NOW - 1)),
        Just(suspected(ME, NOW)),
        Just(suspected(ME, NOW - 50).take(NOW)),
    ]
}

/// In for this client, whatever it is for others.
fn usable() -> impl Strategy<Value = Ejection> {
    let trying = ejected(NOW - 50).take(NOW - 1);
    prop_oneof![
        Just(Ejection::NONE),
        Just(trying.succeed(POLICY, client(2), trying.token(), NOW).expect("in")),
        Just(suspected(2, NOW)),
        Just(suspected(3, NOW - 50).take(NOW)),
    ]
}

fn to_be_tried() -> impl Strategy<Value = Ejection> {
    prop_oneof![Just(ejected(NOW - 10)), Just(suspected(ME, NOW - 50))]
}

/// Tried, and nothing bad was heard for long enough.
fn answered() -> impl Strategy<Value = Ejection> {
    let then = NOW - ANSWERED;
    prop_oneof![Just(ejected(then - 10).take(then)), Just(suspected(ME, then - 50).take(then - 9))]
}

/// Tables of which nearly all, nearly none or some is out.
fn ejections() -> impl Strategy<Value = Vec<Ejection>> {
    let some = prop_oneof![4 => out(), 2 => usable(), 1 => to_be_tried(), 1 => answered()];
    let few = prop_oneof![200 => out(), 1 => usable(), 1 => to_be_tried(), 1 => answered()];
    prop_oneof![
        prop::collection::vec(some, 1..8),
        prop::collection::vec(few, 1..700),
        prop::collection::vec(out(), 1..20),
    ]
}

proptest! {
    /// The first backend in order that is not out; if all are, the very first, and that is counted.
    #[test]
    fn goes_around_those_that_are_out(ejections in ejections(), seed: u64) {
        let tables = OneService::even(ejections.clone(), seed);
        let order = tables.order();
        let admitted = |&&backend: &&u32| {
            ejections[backend as usize].admits(client(ME), NOW) != Admission::Out
        };
        let expected = order.iter().find(admitted);
        let (backend, token) = tables.connect();
        prop_assert_eq!(backend, *expected.unwrap_or(&order[0]));
        prop_assert_eq!(tables.all_ejected.get(), u32::from(expected.is_none()));
        // With the token, or without need of it; and nobody else's is touched.
        let known = ejections[backend as usize];
        let admission = known.admits(client(ME), NOW);
        prop_assert_eq!(token.is_some(), admission == Admission::Try);
        let mut after = ejections;
        if let Some((next, expected)) = enters(known, client(ME)) {
            after[backend as usize] = next;
            prop_assert_eq!(token, expected);
            let then = next.admits(client(ME), NOW);
            let tries = admission == Admission::Try;
            prop_assert_eq!(then, if tries { Admission::Out } else { Admission::In });
        }
        prop_assert_eq!(tables.ejections.into_inner(), after);
    }

    /// Two connects want to try the same backend: one does. Two find it answered: both go there.
    #[test]
    fn one_of_two_tries(
        mut ejections in ejections(),
        word in prop_oneof![to_be_tried(), answered()],
        seed: u64,
    ) {
        ejections.push(word);
        let tables = OneService::even(ejections.clone(), seed);
        tables.rival.set(true);
        let mine = tables.connect();
        let rivals = tables.rivals_backend.get();
        prop_assert!(!mine.1.is_some() || rivals != Some(mine), "{mine:?} twice");
        for (backend, token) in [Some(mine), rivals].into_iter().flatten() {
            let (before, after) = (ejections[backend as usize], tables.ejection(backend));
            match before.admits(client(ME), NOW) {
                Admission::Answered => prop_assert!(after.is_in() && !token.is_some()),
                Admission::Try if token.is_some() => prop_assert_eq!(after.token(), token),
                _ => prop_assert!(!token.is_some()),
            }
        }
    }

    #[test]
    fn the_share_is_that_of_the_backends(
        ejections in ejections(),
        share in prop_oneof![Just(0u8), Just(50), Just(100), 0u8..=100],
        whose in prop::sample::select(std::vec![Client::NOBODY, Client::SEVERAL, client(ME)]),
        is_out: bool,
        seed: u64,
    ) {
        let tables = OneService::even(ejections.clone(), seed);
        let (len, table) = (ejections.len(), tables.service.table());
        let counted = len.min(CENSUS as usize);
        let first = match len - counted {
            0 => 0,
            more => alias::column(tables.random(), u32::try_from(more + 1).expect("slots")).0 as usize,
        };
        tables.seed.set(seed);
        let out = (0..counted)
            .filter(|step| ejections[first + step].is_out_for(whose))
            .count();
        let after = if is_out { out } else { out + 1 };
        let policy = Policy::new(1, 10, 60, share);
        let allowed = share_allows(&tables, table, policy, whose, is_out);
        prop_assert_eq!(allowed, after * 100 <= usize::from(share) * counted);
    }
}

/// Tables that are looked at as a whole, up to the largest: never one that is out while there is
/// another, wherever that is.
#[test]
fn uses_what_there_is() {
    for len in [1, 2, 3, 7, SCAN as usize - 1, SCAN as usize] {
        for odd in 0..len {
            for word in [Ejection::NONE, suspected(2, NOW), ejected(NOW - 10)] {
                let mut ejections = std::vec![ejected(NOW); len];
                ejections[odd] = word;
                let tables = OneService::even(ejections, 1);
                assert_eq!(tables.connect().0 as usize, odd, "of {len}");
                assert_eq!(tables.all_ejected.get(), 0);
            }
        }
    }
}

/// The usual share keeps the only backend, one of two and of three, two of four and of five.
#[test]
fn how_many_half_of_the_backends_are() {
    let policy = Policy::new(1, 10, 60, 50);
    for (len, may_go) in [(1, 0), (2, 1), (3, 1), (4, 2), (5, 2), (100, 50)] {
        let tables = OneService::even(std::vec![Ejection::NONE; len], 1);
        let mut gone = 0;
        while share_allows(&tables, tables.service.table(), policy, Client::NOBODY, false) {
            tables.ejections.borrow_mut()[gone] = ejected(NOW);
            gone += 1;
        }
        assert_eq!(gone, may_go, "of {len}");
        assert!(share_allows(&tables, tables.service.table(), policy, Client::NOBODY, true));
    }
    let none = OneService::even(std::vec![Ejection::NONE; 4], 1);
    for (share, allowed) in [(0, false), (100, true)] {
        let policy = Policy::new(1, 10, 60, share);
        let table = none.service.table();
        assert_eq!(share_allows(&none, table, policy, client(ME), false), allowed);
    }
    // A service that is gone has no backend of which one could be out.
    assert!(!share_allows(&none, Table(0), policy, Client::NOBODY, false));
}

/// What is left gets its share by weight.
#[test]
fn weights_hold_for_those_that_are_in() {
    const CONNECTS: u32 = 300_000;
    let out = std::vec![Ejection::NONE, Ejection::NONE, Ejection::NONE, ejected(NOW)];
    let tables = OneService::new(&[10, 20, 30, 20], out, 4);
    let mut seen = [0u32; 4];
    for _ in 0..CONNECTS {
        seen[tables.connect().0 as usize] += 1;
    }
    // One connect in 1,024 draws the backend that is out five times, and takes the next one: that
    // moves a share by less than 0.1 %; five standard deviations of the rest are 0.5 %.
    for (seen, weight) in seen.into_iter().zip([10u32, 20, 30, 0]) {
        let expected = CONNECTS / 60 * weight;
        assert!(seen.abs_diff(expected) < CONNECTS / 170, "{seen} for {weight}, not {expected}");
    }
}
