//! Turns and choices over tables in memory.

use core::cell::Cell;
use std::vec;
use std::vec::Vec;

use proptest::prelude::*;

use super::*;
use crate::ejection::{Client, Policy, Token};
use crate::layout::Slot;
use crate::layout::{FrontendKey, FrontendValue, Service};
use crate::{Addr, Ejection, alias};

/// A table at slot 3 of some weights, and what is open at each backend.
struct Memory {
    slots: Vec<Slot>,
    table: Table,
    position: Cell<u64>,
    seed: Cell<u64>,
    active: Vec<Cell<u64>>,
    ejections: Vec<Ejection>,
    client: u64,
}

const NOW: u64 = 1000;

/// What is known of a backend that these clients saw fail at that time, for ten ticks.
fn failed(clients: &[u64], at: u64) -> Ejection {
    let policy = Policy::new(1, 10, 60, 100);
    clients.iter().fold(Ejection::NONE, |known, client| {
        known.fail(policy, Client::of_cgroup(*client), Token::NONE, at).expect("a change")
    })
}

const BASE: u32 = 3;

impl Memory {
    fn new(weights: &[u32]) -> Self {
        let len = weights.len();
        let mut columns = vec![alias::Column::default(); len];
        assert!(alias::build(weights, &mut columns, &mut vec![alias::Entry::default(); len]));
        let mut ends = vec![0; len];
        tickets(weights, &mut ends);
        let mut slots = vec![Slot::default(); BASE as usize];
        for (index, (column, end)) in (0..).zip(columns.iter().zip(&ends)) {
            slots.push(Slot {
                backend: index,
                weight: u16::try_from(weights[index as usize]).expect("a weight"),
                threshold: column.threshold,
                alias: column.alias,
                end: *end,
                ..Slot::default()
            });
        }
        Self {
            slots,
            table: Table::slots(BASE, u32::try_from(len).expect("short")),
            position: Cell::new(0),
            seed: Cell::new(1),
            active: vec![Cell::new(0); len],
            ejections: vec![Ejection::NONE; len],
            client: 1,
        }
    }

    /// How often each backend has its turn in so many connects.
    fn turns(&self, connects: u64) -> Vec<u64> {
        let mut counts = vec![0; self.active.len()];
        for _ in 0..connects {
            counts[(turn(self, 0, self.table) - BASE) as usize] += 1;
        }
        counts
    }

    fn choose(&self) -> usize {
        (lighter(self, self.table, self.random()) - BASE) as usize
    }
}

impl Tables for Memory {
    fn frontend(&self, _: &FrontendKey) -> Option<FrontendValue> {
        None
    }

    fn service(&self, _: u32) -> Option<&Service> {
        None
    }

    fn slot(&self, index: u32) -> Option<&Slot> {
        self.slots.get(index as usize)
    }

    fn is_virtual(&self, _: &Addr) -> bool {
        false
    }

    fn random(&self) -> u32 {
        let seed = self.seed.get().wrapping_add(0x9e37_79b9_7f4a_7c15);
        self.seed.set(seed);
        let mixed = (seed ^ (seed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        u32::try_from(mixed >> 32).expect("32 bits")
    }

    fn ejection(&self, backend: u32) -> Ejection {
        self.ejections[backend as usize]
    }

    fn active(&self, backend: u32) -> u64 {
        self.active[backend as usize].get()
    }

    fn position(&self, _: u32) -> u64 {
        self.position.replace(self.position.get() + 1)
    }

    fn client(&self) -> Client {
        Client::of_cgroup(self.client)
    }

    fn now(&self) -> u64 {
        NOW
    }
}

#[test]
fn numbers_and_names() {
    for algorithm in Algorithm::ALL {
        assert_eq!(Algorithm::from_number(algorithm as u8), algorithm);
        let table = Table::slots(7, 9).by(algorithm);
        assert_eq!((table.base(), table.len(), table.algorithm()), (7, 9, algorithm));
        assert_eq!(table.by(Algorithm::Random), Table::slots(7, 9));
    }
    let refuse = Table::refuse(crate::Reason::NoRoom);
    assert_eq!(refuse.by(Algorithm::LeastConnections), refuse);
}

#[test]
fn tickets_are_the_reduced_weights() {
    for (weights, expected) in [
        (&[100, 100, 100][..], &[1, 2, 3][..]),
        (&[100, 200, 700], &[1, 3, 10]),
        (&[0, 65_535, 0, 1], &[0, 65_535, 65_535, 65_536]),
        (&[7], &[1]),
    ] {
        let mut ends = vec![0; weights.len()];
        tickets(weights, &mut ends);
        assert_eq!(ends, expected, "{weights:?}");
    }
}

#[test]
fn steps_are_even() {
    for (bits, step) in (0u32..).zip(STEPS).take(33).skip(2) {
        let quotient = greatest_quotient(1 << bits, step.into());
        assert!(step % 2 == 1 && quotient <= 5, "{bits} bits: {step} has a quotient of {quotient}");
    }
}

/// What a person expects of three backends, and of weights 5, 1, 1.
#[test]
fn turns_are_spread() {
    let turns = |weights: &[u32], count| {
        let memory = Memory::new(weights);
        (0..count).map(|_| turn(&memory, 0, memory.table) - BASE).collect::<Vec<_>>()
    };
    assert_eq!(turns(&[1, 1, 1], 6), [0, 2, 1, 0, 2, 1]);
    let heavy = turns(&[5, 1, 1], 28);
    assert!(heavy.windows(5).all(|five| five.iter().any(|&backend| backend != 0)), "{heavy:?}");
}

proptest! {
    /// From any position on: after each round exactly the weights, and never more than a few off.
    #[test]
    fn turns_are_exact(
        weights in prop::collection::vec(prop_oneof![1u32..4, 1u32..200], 1..40),
        position in 0u64..1 << 40,
        rounds in 1u64..4,
        unused in 0usize..4,
    ) {
        // Behind those with a weight, those without: nobody's turn.
        let weights = [&weights[..], &[0; 3][..unused.min(3)]].concat();
        let memory = Memory::new(&weights);
        memory.position.set(position);
        let last = memory.slots.last().expect("a slot").end;
        let counts = memory.turns(u64::from(last) * rounds);
        let mut before = 0;
        for (count, slot) in counts.iter().zip(&memory.slots[BASE as usize..]) {
            prop_assert_eq!(*count, u64::from(slot.end - before) * rounds);
            before = slot.end;
        }
        // Half a round on: about half of it.
        let half = memory.turns(u64::from(last / 2));
        let mut before = 0;
        for (count, slot) in half.iter().zip(&memory.slots[BASE as usize..]) {
            let due = f64::from(slot.end - before) * f64::from(last / 2) / f64::from(last);
            prop_assert!((*count as f64 - due).abs() <= 6.0, "{} of {}", count, due);
            before = slot.end;
        }
    }

    /// Whatever the sum of the weights is, no more than two positions in a row name no ticket.
    #[test]
    fn positions_name_tickets(total in prop_oneof![1u32..5000, 1u32..], position: u64) {
        let named = (0..3).any(|n| ticket(position.wrapping_add(n), total) < u64::from(total));
        prop_assert!(named);
    }

    /// No slot outside the table, also when the table is damaged.
    #[test]
    fn never_outside(ends in prop::collection::vec(any::<u32>(), 1..20), position: u64) {
        let mut memory = Memory::new(&vec![1; ends.len()]);
        for (slot, end) in memory.slots[BASE as usize..].iter_mut().zip(&ends) {
            slot.end = *end;
        }
        memory.position.set(position);
        let column = turn(&memory, 0, memory.table) - BASE;
        prop_assert!(column < memory.table.len());
    }
}

/// A backend that keeps its connections longer gets fewer; weights count.
#[test]
fn the_lighter_of_two() {
    let memory = Memory::new(&[1, 1, 1, 1]);
    for _ in 0..4000 {
        let chosen = memory.choose();
        memory.active[chosen].set(memory.active[chosen].get() + 1);
    }
    let open: Vec<_> = memory.active.iter().map(Cell::get).collect();
    assert!(open.iter().all(|&open| (995..=1005).contains(&open)), "{open:?}");

    let memory = Memory::new(&[1, 2, 7]);
    for _ in 0..10_000 {
        let chosen = memory.choose();
        memory.active[chosen].set(memory.active[chosen].get() + 1);
    }
    let open: Vec<_> = memory.active.iter().map(Cell::get).collect();
    for (open, due) in open.iter().zip([1000, 2000, 7000]) {
        assert!(open.abs_diff(due) <= 10, "{open:?} of {due}");
    }
}

/// With nothing open, two choices are as good as one: exactly the weights.
#[test]
fn without_load_by_weight() {
    let memory = Memory::new(&[1, 2, 7]);
    let mut counts = [0.0f64; 3];
    for _ in 0..100_000 {
        counts[memory.choose()] += 1.0;
    }
    let expected = [10_000.0, 20_000.0, 70_000.0];
    let chi: f64 = counts.iter().zip(expected).map(|(c, e)| (c - e) * (c - e) / e).sum();
    // Two degrees of freedom: 1 in 10^6.
    assert!(chi < 27.6, "{chi}: {counts:?}");
}

/// How often the first of two backends is chosen, of 10,000 times.
fn chosen(known: Ejection, client: u64) -> usize {
    let mut memory = Memory::new(&[1, 1]);
    memory.ejections[0] = known;
    memory.client = client;
    (0..10_000).filter(|_| memory.choose() == 0).count()
}

/// One that is out is chosen only when both draws are; for a client that it is not out for, as if
/// nothing were. One that is due for a try is chosen when it is drawn first.
#[test]
fn what_is_out_is_avoided() {
    let quarter = 2200..2800;
    let half = 4700..5300;
    assert!(quarter.contains(&chosen(failed(&[1, 2], NOW - 1), 1)), "out for all");
    assert!(quarter.contains(&chosen(failed(&[1], NOW - 1), 1)), "out for this client");
    assert!(half.contains(&chosen(failed(&[1], NOW - 1), 2)), "out for another one");
    assert!(half.contains(&chosen(failed(&[1, 2], NOW - 100), 3)), "due for a try");
    let answered = failed(&[1, 2], NOW - 500).take(NOW - 400);
    assert!(half.contains(&chosen(answered, 3)), "a try was answered");
}

/// Of several that connect at the same time one may find no ticket as often as it looks: then it takes
/// somebody's.
#[test]
fn without_a_ticket() {
    struct Strides(Memory, u64);
    impl Tables for Strides {
        fn position(&self, _: u32) -> u64 {
            self.0.position.replace(self.0.position.get() + self.1)
        }
        fn slot(&self, index: u32) -> Option<&Slot> {
            self.0.slot(index)
        }
        fn frontend(&self, _: &FrontendKey) -> Option<FrontendValue> {
            None
        }
        fn service(&self, _: u32) -> Option<&Service> {
            None
        }
        fn is_virtual(&self, _: &Addr) -> bool {
            false
        }
        fn random(&self) -> u32 {
            0
        }
        fn ejection(&self, _: u32) -> Ejection {
            Ejection::NONE
        }
        fn active(&self, _: u32) -> u64 {
            0
        }
        fn client(&self) -> Client {
            Client::NOBODY
        }
        fn now(&self) -> u64 {
            NOW
        }
    }
    for total in [3u32, 5, 9, 33, 65, 129] {
        let table = Memory::new(&vec![1; total as usize]);
        let len = table.table;
        for stride in 1..200 {
            let strides = Strides(Memory::new(&vec![1; total as usize]), stride);
            let seen: std::collections::BTreeSet<_> =
                (0..4 * total).map(|_| turn(&strides, 0, len) - BASE).collect();
            assert!(seen.iter().all(|column| *column < total), "{total}, {stride}: {seen:?}");
        }
    }
}
