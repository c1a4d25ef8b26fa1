//! Affinity: a client keeps its backend of a service for a time, whatever the algorithm says.

use crate::Word;

/// What clients of a service keep: one word of its record. 0 is nothing.
///
/// ```text
/// 63         62 .. 32        31 .. 0
/// [ jiffies ][ by whom + 1 ][ timeout, in jiffies ]
/// ```
///
/// 32 bits of jiffies are 49 days at `HZ` = 1000. Without the first bit the timeout is in units of 2^8 jiffies: earlier
/// versions of the agent wrote that, and a service that this one may not touch yet still has it.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Affinity(pub u64);

/// What earlier versions counted was 2 to this power jiffies.
const COARSE: u32 = 8;

/// `jiffies_64` begins 5 minutes before it fills 32 bits (`INITIAL_JIFFIES`), so what is less is in coarse units,
/// which take 17 years to come here at `HZ` = 1000.
const LEAST: u64 = 1 << 31;

/// Who a client is.
#[repr(u8)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum By {
    /// The cgroup of the task that connects.
    #[default]
    Client = 0,
    /// Its network namespace.
    Namespace = 1,
}

impl Affinity {
    /// None.
    pub const OFF: Self = Self(0);

    const JIFFIES: u64 = 1 << 63;

    /// By whom, and for how many jiffies after the last connect; at least one.
    #[must_use]
    pub const fn new(by: By, timeout: u32) -> Self {
        let timeout = if timeout == 0 { 1 } else { timeout };
        Self(Self::JIFFIES | (by as u64 + 1) << 32 | timeout as u64)
    }

    /// Whether there is any.
    #[inline(always)]
    #[must_use]
    pub const fn is_on(self) -> bool {
        self.0 != 0
    }

    /// Who a client is.
    #[inline(always)]
    #[must_use]
    pub const fn by(self) -> By {
        if (self.0 & !Self::JIFFIES) >> 32 == 2 { By::Namespace } else { By::Client }
    }

    /// For how many jiffies.
    #[inline(always)]
    #[must_use]
    pub const fn timeout(self) -> u64 {
        let timeout = self.0 & 0xffff_ffff;
        if self.0 & Self::JIFFIES == 0 { timeout << COARSE } else { timeout }
    }
}

/// The key of `AFFINITY`.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct PinKey {
    /// The client's cgroup, or the cookie of its network namespace.
    pub client: u64,
    /// [`crate::Service::generation`]: no two records ever have the same.
    pub service: u64,
}

/// What a client has: a value of `AFFINITY`.
///
/// The element of a hash map can be reused while it is read, so it holds its key, which is written before
/// the rest and read after it: what goes with another key is another client's.
#[repr(C, align(8))]
#[cfg_attr(not(target_arch = "bpf"), derive(Debug, Default))]
pub struct Pin {
    /// The client's key.
    pub client: Word,
    /// Likewise.
    pub service: Word,
    /// The backend's id, and its generation in the upper half.
    pub backend: Word,
    /// Until when, the last jiffy included ([`Pin::deadline`]). Written in place by the connects of the client.
    pub until: Word,
}

impl Pin {
    /// Until when it holds, the last jiffy included, from the word that says so.
    #[inline(always)]
    #[must_use]
    pub const fn deadline(until: u64) -> u64 {
        if until < LEAST { (until + 1) << COARSE } else { until }
    }

    /// The backend and the word that says until when, if this is the pin of `key`.
    #[inline(always)]
    #[must_use]
    pub fn of(&self, key: &PinKey) -> Option<(u64, u64)> {
        let (backend, until) = (self.backend.load(), self.until.load());
        let same = self.client.load() == key.client && self.service.load() == key.service;
        same.then_some((backend, until))
    }
}

/// Both halves of [`Pin::backend`].
#[inline(always)]
#[must_use]
pub const fn pack(backend: u32, generation: u32) -> u64 {
    (generation as u64) << 32 | backend as u64
}

const _: () = {
    assert!(size_of::<PinKey>() == 16);
    #[cfg(not(loom))]
    assert!(size_of::<Pin>() == 32);
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn survive_packing() {
        for by in [By::Client, By::Namespace] {
            for timeout in [1, 10_000, u32::MAX] {
                let affinity = Affinity::new(by, timeout);
                assert!(affinity.is_on());
                assert_eq!((affinity.by(), affinity.timeout()), (by, timeout.into()));
                // As an earlier version wrote it.
                let coarse = Affinity((by as u64 + 1) << 32 | u64::from(timeout));
                assert!(coarse.is_on());
                assert_eq!((coarse.by(), coarse.timeout()), (by, u64::from(timeout) << 8));
            }
        }
        assert!(!Affinity::OFF.is_on());
        assert_eq!(Affinity::new(By::Client, 0).timeout(), 1, "shorter than can be told");
    }

    /// What an earlier version pinned ends when it would have, give or take its unit.
    #[test]
    fn coarse_deadlines_are_known() {
        for hz in [100, 250, 300, 1_000] {
            let booted: u64 = (1 << 32) - 300 * hz;
            // Up to ten years after the machine was booted.
            for now in [booted, booted + 1, 1 << 32, booted + 3_650 * 86_400 * hz] {
                assert_eq!(Pin::deadline(now), now);
                let deadline = Pin::deadline(now >> 8);
                assert!((now..=now + 256).contains(&deadline), "{now}: {deadline}");
            }
        }
    }

    #[test]
    fn a_pin_is_its_clients() {
        let key = PinKey { client: 7, service: 9 };
        let pin = Pin {
            client: Word::new(7),
            service: Word::new(9),
            backend: Word::new(pack(5, 6)),
            until: Word::new(100),
        };
        assert_eq!(pin.of(&key), Some((6 << 32 | 5, 100)));
        assert_eq!(pin.of(&PinKey { client: 8, ..key }), None);
        assert_eq!(pin.of(&PinKey { service: 8, ..key }), None);
    }
}
