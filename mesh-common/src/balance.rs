//! How a backend of a table is chosen.
//!
//! All algorithms use the same slots, so a service changes from one to another by the store of its
//! table word, which names both.

use crate::layout::{Slot, Table};
use crate::translate::{Tables, draw};

/// How a backend is chosen.
#[repr(u8)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum Algorithm {
    /// By weight, independently of all other choices.
    #[default]
    Random = 0,
    /// In turn: after as many connects as the sum of the weights, divided by what they have in
    /// common, each backend has had exactly its share, in between about that.
    RoundRobin = 1,
    /// Of two that are drawn by weight, the one with fewer connections for its weight (M. D.
    /// Mitzenmacher 2001, "The Power of Two Choices").
    LeastConnections = 2,
}

impl Algorithm {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Random, Self::RoundRobin, Self::LeastConnections];

    /// From its number; of an unknown one, [`Algorithm::Random`].
    #[inline(always)]
    #[must_use]
    pub const fn from_number(number: u8) -> Self {
        match number {
            1 => Self::RoundRobin,
            2 => Self::LeastConnections,
            _ => Self::Random,
        }
    }

    /// Its name in files and answers.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Random => "random",
            Self::RoundRobin => "round-robin",
            Self::LeastConnections => "least-connections",
        }
    }
}

/// How many positions in a row name no ticket, at the most, and one more.
pub const SKIPS: u32 = 4;

/// The greatest number of bits of an index: a search ends after as many steps.
const STEPS: u32 = 25;

/// Which of `total` tickets a position names: each once in as many positions as the next power of two
/// has, far from the one before it. Some positions name none.
///
/// The positions go round that power of two in steps of about its golden section, which spread what
/// lies side by side, the tickets of one backend, as evenly as steps can (the three-distance theorem).
#[inline(always)]
#[must_use]
pub const fn ticket(position: u64, total: u32) -> Option<u32> {
    let round = (total as u64).next_power_of_two();
    let step = (round * 0x9e37_79b9) >> 32 | 1;
    let ticket = position.wrapping_mul(step) & (round - 1);
    if ticket < total as u64 { Some((ticket & 0xffff_ffff) as u32) } else { None }
}

/// The slot whose turn it is.
#[inline(always)]
pub fn turn<T: Tables + ?Sized>(tables: &T, service: u32, table: Table) -> u32 {
    let last = table.base().wrapping_add(table.len()).wrapping_sub(1);
    let total = tables.slot(last).map_or(0, |slot| slot.end);
    if total == 0 {
        return table.base();
    }
    for _ in 0..SKIPS {
        if let Some(ticket) = ticket(tables.position(service), total) {
            // No weight is 0, so as many tickets as slots are one for each.
            let column = if total == table.len() { ticket } else { holder(tables, table, ticket) };
            return table.base().wrapping_add(column);
        }
    }
    table.base()
}

/// The column of the slot that has this ticket: the first whose tickets end after it.
#[inline(always)]
fn holder<T: Tables + ?Sized>(tables: &T, table: Table, ticket: u32) -> u32 {
    let (mut low, mut len) = (0u32, table.len());
    for _ in 0..STEPS {
        if len == 0 {
            break;
        }
        let half = len / 2;
        let index = table.base().wrapping_add(low).wrapping_add(half);
        let end = tables.slot(index).map_or(u32::MAX, |slot| slot.end);
        // 1 if the slot's tickets end before. Without a branch, of which the verifier would have to
        // follow both ways at each step.
        let before = (u64::from(end).wrapping_sub(u64::from(ticket) + 1) >> 63) as u32;
        low = low.wrapping_add(before * (half + 1));
        len = before * len.wrapping_sub(half + 1) + (1 - before) * half;
    }
    low
}

/// Of the slot that was drawn and another one, that with fewer connections for its weight. One that is
/// out is none to choose, if the other is not.
#[inline(always)]
pub fn lighter<T: Tables + ?Sized>(tables: &T, table: Table, first: u32) -> u32 {
    let second = draw(tables, table);
    let (Some(one), Some(other)) = (tables.slot(first), tables.slot(second)) else { return first };
    let is_in = |slot: &Slot| tables.ejection(slot.backend).is_in();
    let prefers = match (is_in(one), is_in(other)) {
        (true, false) => false,
        (false, true) => true,
        _ => {
            let load =
                |of: &Slot, by: &Slot| tables.active(of.backend).wrapping_mul(by.weight.into());
            load(other, one) < load(one, other)
        }
    };
    if prefers { second } else { first }
}

/// Fills `ends` with where each backend's tickets end, for weights whose sum is below 2^32: as many
/// tickets as its weight, divided by what all weights have in common.
pub fn tickets(weights: &[u32], ends: &mut [u32]) {
    let common = weights.iter().fold(0, |common, &weight| divisor(common, weight)).max(1);
    let mut end = 0u32;
    for (weight, place) in weights.iter().zip(ends) {
        end = end.saturating_add(weight / common);
        *place = end;
    }
}

/// The greatest common divisor.
const fn divisor(mut a: u32, mut b: u32) -> u32 {
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a
}

#[cfg(test)]
mod tests;
