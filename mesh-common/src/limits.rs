//! How much the maps hold.

use crate::Held;

/// Sizes of the maps: the programs have the defaults, and the agent may set others when it loads them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// Entries of `FRONTENDS`, and as many records of `SERVICES`.
    pub frontends: u32,
    /// Records of `BACKENDS` and `BACKEND_STATS`.
    pub backends: u32,
    /// Entries of `AFFINITY`.
    pub pins: u32,
    /// Records of `FLOWS`, a power of two, and as many entries of `OVERFLOW`.
    pub records: u32,
}

impl Limits {
    /// Without anything said.
    pub const DEFAULT: Self =
        Self { frontends: 65_536, backends: 131_072, pins: 65_536, records: 131_072 };
    /// The least that makes sense.
    pub const LEAST: Self =
        Self { frontends: 16, backends: 16, pins: 16, records: 1 << Held::PLACE_BITS };
    /// The most that there may be: no array is larger than 256 MiB.
    pub const MOST: Self =
        Self { frontends: 2_097_152, backends: 2_097_152, pins: 4_194_304, records: 4_194_304 };

    /// Records of `SLOTS`: two for each backend, one in force and one in a table that is being
    /// replaced, and some for the entries of consistent hashes ([`crate::maglev`]).
    #[must_use]
    pub const fn slots(self) -> u32 {
        let entries = self.backends / 2;
        self.backends * 2 + if entries < 1_024 { 1_024 } else { entries }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self::DEFAULT
    }
}

const _: () = {
    assert!(Limits::DEFAULT.records.is_power_of_two() && Limits::LEAST.records.is_power_of_two());
    assert!(Limits::MOST.backends <= Held::MAX_BACKENDS);
};
