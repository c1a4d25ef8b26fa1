//! When backends are ejected, and for how long.

use super::{MAX_LEVEL, min};

/// When a service's backends are ejected, and for how long: one word of its record.
///
/// ```text
/// 63       39 38       14 13     7 6        0
/// [ longest ][ first     ][ share ][ failures ]
/// ```
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Policy(pub u64);

impl Policy {
    /// Nothing is ejected.
    pub const OFF: Self = Self(0);
    /// The largest number of failures.
    pub const MAX_FAILURES: u8 = 127;
    /// The longest time, in ticks: 6.5 days.
    pub const MAX_TICKS: u32 = (1 << 25) - 1;

    /// After so many `failures` in a row (1 to 127), for `base` ticks at first and at most for `max`,
    /// and at most so many per cent of a table's backends (0 to 100). What is larger is cut.
    #[must_use]
    pub const fn new(failures: u8, base: u32, max: u32, share: u8) -> Self {
        let failures = min(failures as u64, Self::MAX_FAILURES as u64);
        let share = min(share as u64, 100);
        let (base, max) =
            (min(base as u64, Self::MAX_TICKS as u64), min(max as u64, Self::MAX_TICKS as u64));
        Self(max << 39 | base << 14 | share << 7 | failures)
    }

    /// Failures in a row that eject; 0 is never.
    #[inline(always)]
    #[must_use]
    pub const fn failures(self) -> u64 {
        self.0 & 0x7f
    }

    /// The same, but that one failure ejects.
    #[inline(always)]
    #[must_use]
    pub const fn at_once(self) -> Self {
        Self(self.0 & !0x7f | 1)
    }

    /// Failures that are known when a suspicion is shared: those of the first client, and as many of
    /// others.
    #[inline(always)]
    pub(super) const fn agreement(self) -> u64 {
        min(2 * self.failures(), Self::MAX_FAILURES as u64)
    }

    /// Per cent of a table's backends that may be out.
    #[inline(always)]
    #[must_use]
    pub const fn share(self) -> u64 {
        self.0 >> 7 & 0x7f
    }

    /// The first time, in ticks.
    #[inline(always)]
    #[must_use]
    pub const fn base(self) -> u64 {
        self.0 >> 14 & Self::MAX_TICKS as u64
    }

    /// The longest time, in ticks.
    #[inline(always)]
    #[must_use]
    pub const fn max(self) -> u64 {
        self.0 >> 39
    }

    /// How long the ejection lasts that is the `level`-th in a row, from 1 on. At least one tick, also
    /// by [`Policy::OFF`]: so a try that follows on one that was cut short has another token.
    #[inline(always)]
    #[must_use]
    pub const fn duration(self, level: u64) -> u64 {
        let ticks = if level >= MAX_LEVEL {
            self.max()
        } else {
            min(self.base() << level.saturating_sub(1), self.max())
        };
        ticks | ticks.wrapping_sub(1) >> 63 // No branch: the verifier would follow both ways.
    }
}
