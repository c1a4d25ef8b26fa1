//! Affinity: a client keeps its backend of a service for a time, whatever the algorithm says.

use crate::Word;

/// What clients of a service keep: one word of its record. 0 is nothing.
///
/// ```text
/// 32 .. 63       31 .. 0
/// [ by whom + 1 ][ timeout, in units of 2^8 jiffies ]
/// ```
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Affinity(pub u64);

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

    /// By whom, and for how many units after the last connect; at least one.
    #[must_use]
    pub const fn new(by: By, timeout: u32) -> Self {
        let timeout = if timeout == 0 { 1 } else { timeout };
        Self((by as u64 + 1) << 32 | timeout as u64)
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
        if self.0 >> 32 == 2 { By::Namespace } else { By::Client }
    }

    /// For how many units.
    #[inline(always)]
    #[must_use]
    pub const fn timeout(self) -> u64 {
        self.0 & 0xffff_ffff
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
    /// Until when, in units of 2^8 jiffies. Written in place by the connects of the client.
    pub until: Word,
}

impl Pin {
    /// The backend and until when, if this is the pin of `key`.
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
            }
        }
        assert!(!Affinity::OFF.is_on());
        assert_eq!(Affinity::new(By::Client, 0).timeout(), 1, "shorter than can be told");
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
