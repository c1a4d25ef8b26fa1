//! How a backend of a table is chosen.
//!
//! All algorithms use the same slots, so a service changes from one to another by the store of its
//! table word, which names both.

use crate::ejection::{Admission, Ejection};
use crate::latency::{self, Candidate};
use crate::layout::Table;
use crate::translate::{Tables, drawn};

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
    /// Always the same for one client ([`crate::maglev`]): the cgroup of the task that connects.
    HashClient = 3,
    /// The same for its network namespace.
    HashNamespace = 4,
    /// The same for its process.
    HashProcess = 5,
    /// Of two that are drawn by weight, the one where a connect would wait less: by round-trip times and
    /// open connections ([`crate::latency`]).
    Latency = 6,
    /// The same as [`Algorithm::HashClient`] for the unit that the cgroup is part of, which the agent knows: what
    /// lasts when its processes are started again.
    HashUnit = 7,
}

impl Algorithm {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Random,
        Self::RoundRobin,
        Self::LeastConnections,
        Self::HashClient,
        Self::HashNamespace,
        Self::HashProcess,
        Self::Latency,
        Self::HashUnit,
    ];

    /// From its number; of an unknown one, [`Algorithm::Random`].
    #[inline(always)]
    #[must_use]
    pub const fn from_number(number: u8) -> Self {
        match number {
            1 => Self::RoundRobin,
            2 => Self::LeastConnections,
            3 => Self::HashClient,
            4 => Self::HashNamespace,
            5 => Self::HashProcess,
            6 => Self::Latency,
            7 => Self::HashUnit,
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
            Self::HashClient | Self::HashNamespace | Self::HashProcess | Self::HashUnit => {
                "consistent-hash"
            }
            Self::Latency => "latency",
        }
    }

    /// Whether the same client always has the same backend.
    #[inline(always)]
    #[must_use]
    pub const fn is_hash(self) -> bool {
        matches!(self, Self::HashClient | Self::HashNamespace | Self::HashProcess | Self::HashUnit)
    }
}

/// How many positions are tried for a ticket. No more than two in a row name none; of those that one
/// connect among many gets, all may.
pub const SKIPS: u32 = 4;

/// The greatest number of bits of an index: a search ends after as many steps.
const SEARCH: u32 = 25;

/// By the number of bits of a round: how far from one position's ticket that of the next is. No round has
/// more than 32 bits; there are 64 entries so that six bits are an index, whatever they are.
const STEPS: [u32; 64] = {
    let mut steps = [1; 64];
    let mut bits = 2;
    while bits <= 32 {
        steps[bits] = step(1 << bits);
        bits += 1;
    }
    steps
};

/// The odd number near the golden section of a round whose multiples lie most evenly in it: whose
/// continued fraction has the smallest quotients. Of the golden section itself all are 1, of a number
/// beside it one can be large, and then its multiples fall into heaps.
const fn step(round: u64) -> u32 {
    const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;
    const NEAR: u64 = 32;
    let middle = ((round as u128 * GOLDEN as u128) >> 64) as u64 | 1;
    let (mut best, mut least) = (middle, u64::MAX);
    let mut away = 0;
    while away < NEAR {
        let above = middle + 2 * away;
        let below = middle.saturating_sub(2 * away);
        if above < round && greatest_quotient(round, above) < least {
            (best, least) = (above, greatest_quotient(round, above));
        }
        if below > 0 && greatest_quotient(round, below) < least {
            (best, least) = (below, greatest_quotient(round, below));
        }
        away += 1;
    }
    (best & 0xffff_ffff) as u32
}

/// The greatest of the quotients of the continued fraction of `a / b`.
const fn greatest_quotient(mut a: u64, mut b: u64) -> u64 {
    let mut greatest = 0;
    while b != 0 {
        if a / b > greatest {
            greatest = a / b;
        }
        (a, b) = (b, a % b);
    }
    greatest
}

/// Which of `total` tickets a position names: each once in a round, which has as many positions as the
/// next power of two, and far from the one before it. What is not below `total` is no ticket.
#[inline(always)]
#[must_use]
pub fn ticket(position: u64, total: u32) -> u64 {
    let bits = (64 - u64::from(total).wrapping_sub(1).leading_zeros()) & 63;
    // The verifier has to see the mask right before the load.
    let step = STEPS[core::hint::black_box(bits as usize) & 63];
    position.wrapping_mul(step.into()) & (1u64 << bits).wrapping_sub(1)
}

/// The slot whose turn it is.
#[inline(always)]
pub fn turn<T: Tables + ?Sized>(tables: &T, service: u32, table: Table) -> u32 {
    let last = table.base().wrapping_add(table.len()).wrapping_sub(1);
    let total = tables.slot(last).map_or(0, |slot| slot.end);
    if total == 0 {
        return table.base();
    }
    let mut place = 0;
    for _ in 0..SKIPS {
        place = ticket(tables.position(service), total);
        if place < u64::from(total) {
            break;
        }
    }
    // A round is less than twice the tickets.
    let over = place.wrapping_sub(total.into());
    let ticket = (if place < u64::from(total) { place } else { over } & 0xffff_ffff) as u32;
    // Where weights are alike, the ticket is the column; and wherever that column ends with it.
    let index = table.base().wrapping_add(ticket);
    if ticket < table.len()
        && let Some(slot) = tables.slot(index)
        && slot.weight != 0
        && slot.end == ticket + 1
    {
        return index;
    }
    table.base().wrapping_add(holder(tables, table, ticket))
}

/// The column of the slot that has this ticket: the first whose tickets end after it, and the last if none
/// of those before does. That one is not looked at, so whatever the slots say, it is a column of the table.
#[inline(always)]
fn holder<T: Tables + ?Sized>(tables: &T, table: Table, ticket: u32) -> u32 {
    let (mut low, mut len) = (0u32, table.len().saturating_sub(1));
    for _ in 0..SEARCH {
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

/// A backend that may be chosen.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Loaded {
    /// Its id.
    pub backend: u32,
    /// Its weight.
    pub weight: u16,
    /// Its open connections.
    pub active: u64,
}

/// Of the slot that a random number draws and another one, that with fewer connections for its weight, or
/// where a connect waits less. One that is out for this client is none to choose, if the other is not; one
/// that is due for a try is tried when it is drawn first.
#[inline(always)]
pub fn lighter<T: Tables + ?Sized>(tables: &T, table: Table, chance: u32) -> u32 {
    let (first, one) = drawn(tables, table, chance);
    let (second, other) = drawn(tables, table, tables.random());
    let (Some(one), Some(other)) = (one, other) else { return first };
    let ((known, active), (other_known, other_active)) =
        (tables.load(one.backend), tables.load(other.backend));
    let one = Loaded { backend: one.backend, weight: one.weight, active };
    let other = Loaded { backend: other.backend, weight: other.weight, active: other_active };
    let standings = (standing(tables, first, known), standing(tables, second, other_known));
    let prefers = match standings {
        (Admission::In, Admission::In) if matches!(table.algorithm(), Algorithm::Latency) => {
            tables.nearer(other, one)
        }
        (Admission::In, Admission::In) => {
            let load = |of: Loaded, by: Loaded| of.active.wrapping_mul(by.weight.into());
            load(other, one) < load(one, other)
        }
        (Admission::Out, other) => other != Admission::Out,
        _ => false,
    };
    if prefers { second } else { first }
}

/// Whether a connect waits less at one backend than at the other.
#[inline(always)]
pub fn nearer<T: Tables + ?Sized>(tables: &T, one: Loaded, other: Loaded) -> bool {
    let candidate = |Loaded { backend, weight, active }| {
        let latency = tables.latency(backend);
        Candidate { latency, active, weight }
    };
    latency::compare(candidate(one), candidate(other)).is_lt()
}

/// What this connect may do with the backend of a slot; who connects is asked only if it is out for
/// anybody.
#[inline(always)]
fn standing<T: Tables + ?Sized>(tables: &T, index: u32, known: Ejection) -> Admission {
    if known.is_in() {
        return Admission::In;
    }
    tables.admission(index, tables.client(), tables.now())
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
