//! How far a backend is: a decaying average of the round-trip times that connections to it had.

use core::cmp::Ordering;

/// The average, and when it was last changed: one word, changed by compare-and-swap. 0 is nothing known.
///
/// ```text
/// 63        24 23      0
/// [ time      ][ µs     ]
/// ```
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Latency(pub u64);

/// A new time counts one part in so many, as a power of two.
const PART: u32 = 2;

/// The most that is told apart: 16 seconds.
const MOST: u64 = (1 << 24) - 1;

/// How often a change is tried when others change it too.
pub const ATTEMPTS: u32 = 4;

impl Latency {
    /// Microseconds as of now: half of it after each `half` without a new one, so that what is avoided
    /// because it was far is tried again. 0 when nothing is known. Both times are in one unit.
    #[inline(always)]
    #[must_use]
    pub const fn average(self, now: u64, half: u64) -> u64 {
        let age = now.saturating_sub(self.0 >> 24);
        // Of a division the verifier would know nothing.
        let mut average = self.0 & MOST;
        let mut passed = half;
        let mut halvings = 0;
        while halvings < 24 {
            if passed > age || half == 0 {
                break;
            }
            average >>= 1;
            passed += half;
            halvings += 1;
        }
        average
    }

    /// With one more time, in microseconds.
    #[inline(always)]
    #[must_use]
    pub const fn with(self, time: u64, now: u64, half: u64) -> Self {
        let time = if time > MOST {
            MOST
        } else if time == 0 {
            1
        } else {
            time
        };
        let before = self.average(now, half);
        let average = if before == 0 {
            time
        } else if time > before {
            before + ((time - before) >> PART)
        } else {
            before - ((before - time) >> PART)
        };
        Self(now << 24 | if average == 0 { 1 } else { average })
    }
}

/// A backend that may be chosen.
#[derive(Clone, Copy, Debug)]
pub struct Candidate {
    /// Its average; 0 when nothing is known.
    pub latency: u64,
    /// Its open connections.
    pub active: u64,
    /// Its weight; not 0.
    pub weight: u16,
}

/// Compares what a connect would wait at two backends: their latencies times the connections that they have
/// for their weight, and one more, which counts as if it were at the heavier one of either. So where nothing
/// is open, latencies alone decide, and between equal ones the draws, which are by weight. Of one that
/// nothing is known of, one connect finds out; while that is under way, it counts as far as the other.
#[inline(always)]
#[must_use]
pub fn compare(one: Candidate, other: Candidate) -> Ordering {
    let assumed = |this: Candidate, that: Candidate| match (this.latency, this.active) {
        (0, 0) if that.latency != 0 => 0,
        (0, _) if that.latency != 0 => that.latency,
        (0, _) => 1,
        (latency, _) => latency,
    };
    let lesser = u64::from(if one.weight < other.weight { one.weight } else { other.weight });
    // Both sides times both weights. 24 bits; 20 bits and 16 bits.
    let cost = |this: Candidate, that: Candidate| {
        let active = if this.active > 0xf_ffff { 0xf_ffff } else { this.active };
        let load = active.wrapping_mul(that.weight.into()).wrapping_add(lesser);
        assumed(this, that).wrapping_mul(load)
    };
    cost(one, other).cmp(&cost(other, one))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const HALF: u64 = 10;

    #[test]
    fn an_average_follows_and_decays() {
        let mut latency = Latency::default();
        assert_eq!(latency.average(1_000, HALF), 0);
        latency = latency.with(400, 1_000, HALF);
        assert_eq!(latency.average(1_000, HALF), 400);
        latency = latency.with(800, 1_001, HALF);
        assert_eq!(latency.average(1_001, HALF), 500);
        for _ in 0..40 {
            latency = latency.with(800, 1_001, HALF);
        }
        assert!((797..=800).contains(&latency.average(1_001, HALF)), "{latency:?}");
        assert_eq!(latency.average(1_010, HALF), latency.average(1_001, HALF));
        assert_eq!(latency.average(1_011, HALF), latency.average(1_001, HALF) / 2);
        assert_eq!(latency.average(1_031, HALF), latency.average(1_001, HALF) / 8);
        assert_eq!(latency.average(9_999, HALF), 0, "forgotten");
        assert_eq!(latency.average(0, HALF), latency.average(1_001, HALF), "a clock behind");
    }

    #[test]
    fn who_is_nearer() {
        let candidate = |latency, active, weight| Candidate { latency, active, weight };
        let less = |one, other| compare(one, other) == Ordering::Less;
        assert!(less(candidate(100, 0, 1), candidate(200, 0, 1)));
        assert!(less(candidate(100, 0, 1), candidate(100, 1, 1)));
        assert!(less(candidate(200, 0, 1), candidate(100, 3, 1)));
        assert!(less(candidate(100, 3, 4), candidate(100, 1, 1)));
        assert!(less(candidate(100, 1, 1), candidate(100, 5, 4)));
        // Where nothing is open, weights are heeded by the draws, and once.
        assert_eq!(compare(candidate(100, 0, 1), candidate(100, 0, 7)), Ordering::Equal);
        assert!(less(candidate(100, 0, 1), candidate(101, 0, 7)));
        assert_eq!(compare(candidate(100, 2, 1), candidate(100, 14, 7)), Ordering::Equal);
        // Unknown: tried once, and then as far as the other.
        assert!(less(candidate(0, 0, 1), candidate(1, 0, 1)));
        assert!(less(candidate(100, 0, 1), candidate(0, 1, 1)));
        assert!(less(candidate(0, 1, 1), candidate(100, 2, 1)));
        assert!(less(candidate(0, 0, 1), candidate(0, 1, 1)), "both: by connections");
        assert_eq!(compare(candidate(0, 0, 1), candidate(0, 0, 1)), Ordering::Equal);
    }

    proptest! {
        #[test]
        fn averages_stay_between(times in prop::collection::vec(1u64..1 << 24, 1..50)) {
            let mut latency = Latency::default();
            for &time in &times {
                latency = latency.with(time, 5, HALF);
            }
            let (least, most) = (times.iter().min(), times.iter().max());
            let average = latency.average(5, HALF);
            prop_assert!(Some(&average) >= least && Some(&average) <= most);
        }

        /// Whatever is compared, one is not both nearer and farther.
        #[test]
        fn comparing_is_antisymmetric(
            a in (0u64..1 << 24, 0u64..1 << 40, 1u16..),
            b in (0u64..1 << 24, 0u64..1 << 40, 1u16..),
        ) {
            let candidate = |(latency, active, weight)| Candidate { latency, active, weight };
            let (a, b) = (candidate(a), candidate(b));
            prop_assert_eq!(compare(a, b), compare(b, a).reverse());
        }
    }
}
