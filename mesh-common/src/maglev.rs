//! Consistent hashing (D. E. Eisenbud et al. 2016, "Maglev: A Fast and Reliable Software Network Load
//! Balancer", section 3.4): a table of many entries, each of which names a backend, and a client always
//! looks at the same one. When a backend goes, what it had is shared out among the others, and of what
//! the others had hardly anything moves.
//!
//! The entries lie behind the slots of their table, in the same extent, [`PER_SLOT`] to a slot. Their number is a power of two, so that an odd step visits all of them; weights are heeded as in Envoy: who
//! has half of the greatest weight has a turn every other time.

use crate::layout::{Slot, Table};
use crate::translate::Tables;

/// Entries in one slot.
pub const PER_SLOT: u32 = 16;

/// How large a table is.
#[repr(u8)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub enum Size {
    /// For up to 4 backends: 4,096 entries, 256 slots.
    #[default]
    Small = 0,
    /// For up to 32: 32,768 entries, 2,048 slots.
    Middle = 1,
    /// For more: 262,144 entries, 16,384 slots.
    Large = 2,
}

impl Size {
    /// From its number.
    #[inline(always)]
    #[must_use]
    pub const fn from_number(number: u8) -> Self {
        match number {
            0 => Self::Small,
            1 => Self::Middle,
            _ => Self::Large,
        }
    }

    /// That of a table of so many backends: each has 512 entries at the least then, up to 512
    /// backends, so that of what the others have no more than one in a hundred moves when one goes. Entries of a
    /// table of another size are others, so a service that has once had a larger one keeps that.
    #[must_use]
    pub const fn of(backends: usize) -> Self {
        match backends {
            0..=4 => Self::Small,
            5..=32 => Self::Middle,
            _ => Self::Large,
        }
    }

    /// The next smaller one.
    #[must_use]
    pub const fn smaller(self) -> Option<Self> {
        match self {
            Self::Small => None,
            Self::Middle => Some(Self::Small),
            Self::Large => Some(Self::Middle),
        }
    }

    /// The number of bits of an entry's index.
    #[inline(always)]
    #[must_use]
    pub const fn bits(self) -> u32 {
        match self {
            Self::Small => 12,
            Self::Middle => 15,
            Self::Large => 18,
        }
    }

    /// How many entries there are.
    #[must_use]
    pub const fn entries(self) -> u32 {
        1 << self.bits()
    }

    /// How many slots they take.
    #[must_use]
    pub const fn extra(self) -> u32 {
        self.entries() / PER_SLOT
    }
}

/// A hash of a client's key, even over its 32 bits: the last steps of SplitMix64.
#[inline(always)]
#[must_use]
pub const fn hash(key: u64) -> u32 {
    (mix(key) >> 32) as u32
}

#[inline(always)]
const fn mix(key: u64) -> u64 {
    let mut mixed = key.wrapping_add(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ mixed >> 31
}

/// The index of the slot that a client's key leads to.
#[inline(always)]
pub fn look_up<T: Tables + ?Sized>(tables: &T, table: Table, key: u64) -> u32 {
    let entry = hash(key) >> (32 - table.size().bits());
    let place = table.base().wrapping_add(table.len()).wrapping_add(entry / PER_SLOT);
    let column = tables.slot(place).map_or(0, |slot| u32::from(slot.entry(entry)));
    // Not one of this table only if that is damaged.
    table.base().wrapping_add(if column < table.len() { column } else { 0 })
}

/// What names a backend: a hash of its address, in two halves, and port.
#[must_use]
pub const fn name(high: u64, low: u64, port: u16) -> u64 {
    mix(mix(high) ^ low.rotate_left(16) ^ port as u64)
}

/// Fills `table`, whose length is a power of two, with the columns of backends that have these names and
/// weights. What names a backend is the same in each table that has it. `turns` is as long as `names`, and
/// so is `weights`. The same input gives the same table.
///
/// `false` when it cannot: without any weight, or with more than 65,535 backends. Weights count as at
/// least a [`LEAST`]th of the greatest, which bounds the time that this takes.
pub fn build(names: &[u64], weights: &[u16], table: &mut [u16], turns: &mut [Turn]) -> bool {
    const FREE: u16 = u16::MAX;
    let greatest = weights.iter().copied().max().unwrap_or(0);
    let mask = (table.len() as u64).wrapping_sub(1);
    if greatest == 0 || table.is_empty() || names.len() > usize::from(FREE) {
        return false;
    }
    let (least, greatest) = (counted(1, greatest), u64::from(greatest));
    let weights = weights.iter().map(|&weight| if weight == 0 { 0 } else { weight.max(least) });
    for (turn, &name) in turns.iter_mut().zip(names) {
        let step = mix(name ^ 0x5851_f42d_4c95_7f2d) | 1;
        *turn = Turn { at: mix(name), step, due: 0 };
    }
    table.fill(FREE);
    let mut filled = 0;
    for round in 1u64.. {
        for (column, (turn, weight)) in (0u16..FREE).zip(turns.iter_mut().zip(weights.clone())) {
            if weight == 0 || round.wrapping_mul(weight.into()) <= turn.due {
                continue;
            }
            turn.due = turn.due.wrapping_add(greatest);
            // The next free entry on its way, which visits all.
            let place = loop {
                let Ok(place) = usize::try_from(turn.at & mask) else { return false };
                turn.at = turn.at.wrapping_add(turn.step);
                match table.get(place) {
                    Some(&FREE) => break place,
                    Some(_) => {}
                    None => return false,
                }
            };
            if let Some(entry) = table.get_mut(place) {
                *entry = column;
            }
            filled += 1;
            if filled == table.len() {
                return true;
            }
        }
    }
    false
}

/// What a weight counts as beside the greatest one.
const fn counted(weight: u16, greatest: u16) -> u16 {
    let least = greatest / LEAST;
    if weight < least { least } else { weight }
}

/// Smaller parts of the greatest weight than this are not told apart.
pub const LEAST: u16 = 256;

/// Where a backend is on its way through a table: working space of [`build`].
#[derive(Clone, Copy, Debug, Default)]
pub struct Turn {
    at: u64,
    step: u64,
    due: u64,
}

/// The slot that holds these entries.
#[must_use]
pub const fn slot(entries: [u16; PER_SLOT as usize]) -> Slot {
    Slot::of_entries(entries)
}

#[cfg(test)]
mod tests {
    use std::vec::Vec;
    use std::{println, vec};

    use proptest::prelude::*;

    use super::*;

    fn table(names: &[u64], weights: &[u16]) -> Vec<u16> {
        sized(names, weights, Size::of(names.len()))
    }

    fn sized(names: &[u64], weights: &[u16], size: Size) -> Vec<u16> {
        let mut table = vec![0; size.entries() as usize];
        assert!(build(names, weights, &mut table, &mut vec![Turn::default(); names.len()]));
        table
    }

    fn names(count: u64) -> Vec<u64> {
        // Like addresses: one after the other.
        (0..count).map(|n| 0x0a00_0000_1f90 + n * 0x1_0000).collect()
    }

    /// Of what the others have, the part that another one has after this one went, in per cent.
    fn moved(count: u64, gone: usize) -> f64 {
        let before = names(count);
        let mut after = before.clone();
        after.remove(gone);
        let weights = vec![100; before.len()];
        let size = Size::of(before.len());
        let (old, new) = (sized(&before, &weights, size), sized(&after, &weights[1..], size));
        let (mut others, mut elsewhere) = (0u32, 0u32);
        for key in 0..100_000u64 {
            let at = |table: &[u16], names: &[u64]| {
                let bits = table.len().trailing_zeros();
                names[usize::from(table[(hash(key) >> (32 - bits)) as usize])]
            };
            let was = at(&old, &before);
            if was != before[gone] {
                others += 1;
                elsewhere += u32::from(at(&new, &after) != was);
            }
        }
        100.0 * f64::from(elsewhere) / f64::from(others)
    }

    #[test]
    fn what_cannot_be_had() {
        let turns = &mut vec![Turn::default(); 65_536];
        assert!(!build(&[1], &[0], &mut [0; 256], turns));
        assert!(!build(&vec![1; 65_536], &vec![1; 65_536], &mut [0; 256], turns));
    }

    #[test]
    fn little_moves_when_one_goes() {
        for (count, gone) in [
            (3, [0, 1, 2]),
            (4, [0, 1, 3]),
            (5, [0, 3, 4]),
            (32, [0, 15, 31]),
            (33, [0, 15, 32]),
            (50, [0, 20, 49]),
            (500, [7, 250, 499]),
        ] {
            let moved = gone.map(|gone| moved(count, gone));
            println!("{count} backends: {moved:.2?} % of the others' clients moved");
            assert!(moved.iter().all(|moved| *moved <= 1.0), "{count}: {moved:?}");
        }
    }

    proptest! {
        /// Each has its share, to an entry for each backend, and nobody without a weight has any.
        #[test]
        fn shares_are_by_weight(
            weights in prop::collection::vec(prop_oneof![0u16..4, 1u16..=65_535], 1..20)
                .prop_filter("one has a weight", |weights| weights.iter().any(|w| *w > 0)),
        ) {
            let table = table(&names(weights.len() as u64), &weights);
            let greatest = weights.iter().copied().max().unwrap_or(0);
            let counts = |w: u16| if w == 0 { 0.0 } else { f64::from(counted(w, greatest)) };
            let total: f64 = weights.iter().map(|w| counts(*w)).sum();
            for (column, &weight) in (0u16..).zip(&weights) {
                let has = table.iter().filter(|entry| **entry == column).count() as f64;
                let due = table.len() as f64 * counts(weight) / total;
                prop_assert!((has - due).abs() <= 1.0 + weights.len() as f64, "{} of {}: {} for {}", column, weight, has, due);
                prop_assert!(weight > 0 || has == 0.0);
            }
        }

        #[test]
        fn entries_survive_their_slots(entries: [u16; 16]) {
            let slot = slot(entries);
            for (index, entry) in (0..).zip(entries) {
                prop_assert_eq!(slot.entry(index), entry);
                prop_assert_eq!(slot.entry(index + 160), entry, "only its place in the slot counts");
            }
        }
    }
}
