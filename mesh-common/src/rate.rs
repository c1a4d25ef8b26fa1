//! Ejection by the share of connects that fail: of a backend that answers some, never so many in a row fail
//! as its service asks for, though many do.
//!
//! It is only looked at when a connect fails. That one is counted in a window, which begins with a failure
//! and lasts for [`WINDOW`]; how many connects there were meanwhile says the number of those that were
//! opened. What is still being connected counts as well for the backend as what was answered.

use crate::Policy;

/// How long failures are counted together, in ticks: 10 s.
pub const WINDOW: u64 = 596;

/// When the share of failures takes a backend out: half a word of a service's record.
///
/// ```text
/// 31    23 22      7 6      0
/// [ 0    ][ samples ][ share ]
/// ```
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Rate(pub u32);

impl Rate {
    /// Never.
    pub const OFF: Self = Self(0);

    /// When so many per cent (1 to 100; 0 is never) of at least so many connects have failed.
    #[must_use]
    pub const fn new(share: u8, samples: u16) -> Self {
        let share = if share > 100 { 100 } else { share };
        Self((samples as u32) << 7 | share as u32)
    }

    /// Per cent; 0 is never.
    #[inline(always)]
    #[must_use]
    pub const fn share(self) -> u64 {
        self.0 as u64 & 0x7f
    }

    /// How many connects it takes at least.
    #[inline(always)]
    #[must_use]
    pub const fn samples(self) -> u64 {
        self.0 as u64 >> 7 & 0xffff
    }

    /// Whether it can say anything that the failures in a row do not say first.
    #[inline(always)]
    #[must_use]
    pub const fn matters(self, policy: Policy) -> bool {
        self.share() > 0 && policy.failures() > 1
    }
}

/// The failures of a backend that are counted together: one word, changed by compare-and-swap. Whoever is
/// slower than another has its failure not counted, which one of so many is not worth a second attempt.
///
/// ```text
/// 63     38 37     24 23     0
/// [ began  ][ failed ][ opened ]
/// ```
///
/// `began` is in ticks, of which 26 bits last for 13 days, and `opened` is the number of connects by then. A
/// failure that comes 13 days after another, to ten seconds, is counted together with it, of which 1 in
/// 100,000 is.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Window(pub u64);

const BEGAN: u64 = (1 << 26) - 1;
const FAILED: u64 = (1 << 14) - 1;
const OPENED: u64 = (1 << 24) - 1;

impl Window {
    /// Nothing is counted.
    pub const NONE: Self = Self(0);

    /// With one more failure, when so many connects have been opened, that one included.
    #[inline(always)]
    #[must_use]
    pub const fn with_failure(self, opened: u64, now: u64) -> Self {
        let age = now.wrapping_sub(self.0 >> 38) & BEGAN;
        if self.0 == 0 || age >= WINDOW {
            return Self((now & BEGAN) << 38 | 1 << 24 | opened.wrapping_sub(1) & OPENED);
        }
        if self.failed() == FAILED {
            return self;
        }
        Self(self.0 + (1 << 24))
    }

    /// How many have failed; no more than 16,383 are counted.
    #[inline(always)]
    #[must_use]
    pub const fn failed(self) -> u64 {
        self.0 >> 24 & FAILED
    }

    /// Whether too many have, of those that have been opened since it began.
    #[inline(always)]
    #[must_use]
    pub const fn is_bad(self, rate: Rate, opened: u64) -> bool {
        let all = opened.wrapping_sub(self.0) & OPENED;
        let (share, samples) = (rate.share(), rate.samples());
        // Those that were opened before may fail after it began.
        share > 0 && all >= samples && self.failed() * 100 >= share * all
    }
}

#[cfg(test)]
mod tests {
    use std::vec::Vec;

    use proptest::prelude::*;

    use super::*;

    /// Failures, each at a tick, after so many connects: after which it is bad.
    fn run(rate: Rate, failures: &[(u64, u64)]) -> Vec<bool> {
        let mut window = Window::NONE;
        let mut look = |&(now, opened): &(u64, u64)| {
            window = window.with_failure(opened, now);
            window.is_bad(rate, opened)
        };
        failures.iter().map(&mut look).collect()
    }

    #[test]
    fn a_share_of_enough_connects() {
        let half = Rate::new(50, 4);
        assert_eq!(run(half, &[(1, 1), (2, 2), (3, 3), (4, 4)]), [false, false, false, true]);
        // Every second one fails, from the first on.
        assert_eq!(run(half, &[(1, 1), (2, 3), (3, 5), (4, 7)]), [false, false, true, true]);
        // Every third one: of few that counts for more, since the last is one that failed.
        let third = [(1, 1), (2, 4), (3, 7), (4, 10), (5, 13)];
        assert!(run(Rate::new(50, 10), &third).iter().all(|bad| !bad));
        // What was long ago does not count.
        let late = WINDOW + 1;
        assert_eq!(run(half, &[(1, 1), (2, 2), (3, 3), (late, 4), (late + 1, 5)]), [false; 5]);
        assert!(run(Rate::OFF, &[(1, 1), (2, 2), (3, 3), (4, 4)]).iter().all(|bad| !bad));
        // The number of connects has gone around in what is kept of it.
        let base = (1 << 24) - 2;
        let around = [(1, base + 1), (2, base + 2), (3, base + 3), (4, base + 4)];
        assert_eq!(run(half, &around), [false, false, false, true]);
    }

    #[test]
    fn it_matters_where_one_failure_is_not_enough() {
        let rate = Rate::new(50, 20);
        assert!(!rate.matters(Policy::new(1, 60, 3600, 50)));
        assert!(rate.matters(Policy::new(2, 60, 3600, 50)));
        assert!(!rate.matters(Policy::OFF) && !Rate::OFF.matters(Policy::new(2, 60, 3600, 50)));
    }

    proptest! {
        #[test]
        fn what_is_packed_comes_back(share in 0u8..=100, samples: u16) {
            let rate = Rate::new(share, samples);
            prop_assert_eq!((rate.share(), rate.samples()), (share.into(), samples.into()));
        }

        /// As counting all of them in lists would say, with windows that begin at a failure.
        #[test]
        fn as_counted_by_hand(
            share in 1u8..=100,
            samples in 1u16..50,
            steps in prop::collection::vec((0u64..300, 1u64..20), 1..100),
            start in 0u64..1 << 40,
            before in 0u64..1 << 30,
        ) {
            let rate = Rate::new(share, samples);
            let (mut now, mut opened) = (start, before);
            let (mut window, mut began, mut first, mut failed) = (Window::NONE, 0, 0, 0u64);
            for (later, more) in steps {
                (now, opened) = (now + later, opened + more);
                if failed == 0 || now - began >= WINDOW {
                    (began, first, failed) = (now, opened - 1, 0);
                }
                failed += 1;
                window = window.with_failure(opened, now);
                prop_assert_eq!(window.failed(), failed);
                let all = opened - first;
                let bad = all >= samples.into() && failed * 100 >= u64::from(share) * all;
                prop_assert_eq!(window.is_bad(rate, opened), bad);
            }
        }
    }
}
