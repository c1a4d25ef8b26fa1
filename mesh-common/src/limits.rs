//! How much the maps hold.

use crate::Held;

/// How much the maps may hold. What is a flat array begins with one [`chunk`], and grows by more of them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// Entries of `FRONTENDS`, and as many records of `SERVICES`.
    pub frontends: u32,
    /// Records of `BACKENDS` and `BACKEND_STATS`.
    pub backends: u32,
    /// Entries of `AFFINITY`.
    pub pins: u32,
    /// Records of `FLOWS`, a power of two, and as many entries of `OVERFLOW`. There are
    /// [`chunk::FLOWS`] to begin with.
    pub records: u32,
}

impl Limits {
    /// Without anything said.
    pub const DEFAULT: Self =
        Self { frontends: 65_536, backends: 131_072, pins: 65_536, records: 262_144 };
    /// The least that makes sense.
    pub const LEAST: Self =
        Self { frontends: 16, backends: 16, pins: 16, records: 1 << Held::PLACE_BITS };
    /// The most that there may be.
    pub const MOST: Self =
        Self { frontends: 2_097_152, backends: 2_097_152, pins: 4_194_304, records: 4_194_304 };

    /// Records of `SLOTS`: two for each backend, one in force and one in a table that is being
    /// replaced, and some for the entries of consistent hashes ([`crate::maglev`]).
    #[must_use]
    pub const fn slots(self) -> u32 {
        let entries = self.backends * 6;
        self.backends * 2 + if entries < 1_024 { 1_024 } else { entries }
    }
}

/// Flat arrays are made of chunks of so many records: maps of a fixed size in an array of maps
/// (`BPF_MAP_TYPE_ARRAY_OF_MAPS`, whose elements must be of one size). All are powers of two, so that a
/// record is found by a shift and a mask, and large enough for every chunk to be whole pages, so that they
/// lie one behind the other in the agent's memory.
pub mod chunk {
    use super::Limits;
    use crate::Name;

    /// Of `SERVICES` and `SERVICE_STATS`.
    pub const SERVICES: usize = 8_192;
    /// Of `SLOTS`.
    pub const SLOTS: usize = 32_768;
    /// Of `BACKENDS`, `BACKEND_STATS` and `LATENCIES`.
    pub const BACKENDS: usize = 8_192;
    /// Of `NAMES`.
    pub const NAMES: usize = 1_024;
    /// Of `FLOWS`: no less, see [`crate::Held::PLACE_BITS`].
    pub const FLOWS: usize = 65_536;

    /// How many chunks of so many records there are at most.
    #[must_use]
    pub const fn most(records: u32, chunk: usize) -> usize {
        (records as usize).div_ceil(chunk)
    }

    const _: () = {
        assert!(SERVICES.is_power_of_two() && SLOTS.is_power_of_two());
        assert!(BACKENDS.is_power_of_two() && FLOWS.is_power_of_two());
        assert!(NAMES.is_power_of_two());
        // Records are multiples of 8 bytes, and no page is larger than 64 KiB.
        assert!(SERVICES >= 8_192 && SLOTS >= 8_192 && BACKENDS >= 8_192 && FLOWS >= 8_192);
        assert!((NAMES * size_of::<Name>()).is_multiple_of(65_536));
        assert!(FLOWS == Limits::LEAST.records as usize);
    };
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
