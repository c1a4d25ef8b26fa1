//! The layouts of the BPF maps: the ABI between the kernel programs and the agent.
//!
//! Every type is `repr(C)` without implicit padding (a padding byte in a key makes look-ups miss),
//! and its size is asserted. Change one of them and [`ABI_VERSION`] changes with it.
//!
//! Words that the kernel and the agent share while both run are a [`Word`] each.

pub use crate::backend::{Backend, Marks, Name, State};
pub use crate::reason::Reason;
use crate::{Addr, Affinity, Algorithm, Half, Policy, Rate, Word, maglev};

/// The version of everything in this module. It is part of the kernel object, and the agent
/// refuses an object of another version.
pub const ABI_VERSION: u32 = if cfg!(feature = "other-layout") { 1_012 } else { 12 };

/// Transport protocol, with its IANA number.
#[repr(u8)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub enum Protocol {
    /// TCP, and MPTCP, whose subflows are TCP.
    Tcp = 6,
    /// UDP.
    Udp = 17,
}

impl Protocol {
    /// From the IANA number.
    #[must_use]
    pub const fn from_number(number: u8) -> Option<Self> {
        match number {
            6 => Some(Self::Tcp),
            17 => Some(Self::Udp),
            _ => None,
        }
    }

    /// The name used in files, tables and JSON.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        }
    }
}

/// What a client dials: the key of `FRONTENDS`.
///
/// Port and protocol 0 mark the address itself: the agent keeps one such entry for each service
/// address, so that a refusal inside the virtual range can tell "no such service" from "the
/// service has no such port".
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct FrontendKey {
    /// Address.
    pub addr: Addr,
    /// Port in network byte order.
    pub port: u16,
    /// IANA protocol number.
    pub protocol: u8,
    /// Zero.
    pub pad: u8,
}

impl FrontendKey {
    /// A key for a port in host byte order.
    #[must_use]
    pub const fn new(addr: Addr, port: u16, protocol: Protocol) -> Self {
        Self { addr, port: port.to_be(), protocol: protocol as u8, pad: 0 }
    }

    /// The entry that only says "this address belongs to a service".
    #[inline(always)]
    #[must_use]
    pub const fn address_only(addr: Addr) -> Self {
        Self { addr, port: 0, protocol: 0, pad: 0 }
    }

    /// The port in host byte order.
    #[must_use]
    pub const fn host_port(&self) -> u16 {
        u16::from_be(self.port)
    }
}

/// Value of `FRONTENDS`: which service record holds this frontend.
#[repr(C, align(8))]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct FrontendValue {
    /// What [`Service::generation`] is while this entry is valid.
    #[cfg(feature = "other-layout")]
    pub generation: u64,
    /// Index into `SERVICES`.
    pub service: u32,
    /// Zero.
    pub pad: u32,
    /// What [`Service::generation`] is while this entry is valid.
    #[cfg(not(feature = "other-layout"))]
    pub generation: u64,
}

/// Which slots a service record uses: one word, so that switching from one table to the next is
/// one store and is never half visible.
///
/// ```text
/// 63                  56 55             32 31                   0
/// [ algorithm or reason ] [ number of slots ] [ first slot          ]
/// ```
///
/// A table of no slots refuses, with the reason that it carries; others carry how one is chosen, and in
/// the two highest bits how many entries of a consistent hash there are.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Table(pub u64);

impl Table {
    /// The largest number of slots that one table can have.
    pub const MAX_LEN: u32 = (1 << 24) - 1;

    const SIZE_SHIFT: u32 = 62;
    const SIZE: u64 = 3 << Self::SIZE_SHIFT;

    /// A table of `len` slots from `base` on. `len` above [`Table::MAX_LEN`] is the caller's error
    /// and is cut to it.
    #[must_use]
    pub const fn slots(base: u32, len: u32) -> Self {
        let len = if len > Self::MAX_LEN { Self::MAX_LEN } else { len };
        Self((len as u64) << 32 | base as u64)
    }

    /// The same table, chosen from by another algorithm; one of no slots stays as it is.
    #[must_use]
    pub const fn by(self, algorithm: Algorithm) -> Self {
        if self.is_empty() {
            return self;
        }
        let size = if algorithm.is_hash() { self.0 & Self::SIZE } else { 0 };
        Self(self.0 & !(0xff << 56) | (algorithm as u64) << 56 | size)
    }

    /// How a slot is chosen, if there are any.
    #[inline(always)]
    #[must_use]
    pub const fn algorithm(self) -> Algorithm {
        Algorithm::from_number((self.0 >> 56) as u8 & 0x3f)
    }

    /// A table that refuses every connect for `reason`.
    #[must_use]
    pub const fn refuse(reason: Reason) -> Self {
        Self((reason as u64) << 56)
    }

    /// How many slots it takes: its own, and those that hold the entries of a consistent hash.
    #[must_use]
    pub const fn extent(self) -> u32 {
        let len = self.len();
        let is_hash = len > 0 && self.algorithm().is_hash();
        if is_hash { len + self.size().extra() } else { len }
    }

    /// The same table, with so many entries of a consistent hash.
    #[must_use]
    pub const fn sized(self, size: maglev::Size) -> Self {
        Self(self.0 & !Self::SIZE | (size as u64) << Self::SIZE_SHIFT)
    }

    /// How many entries of a consistent hash it has.
    #[inline(always)]
    #[must_use]
    pub const fn size(self) -> maglev::Size {
        maglev::Size::from_number((self.0 >> Self::SIZE_SHIFT) as u8)
    }

    /// Index of the first slot.
    #[inline(always)]
    #[must_use]
    pub const fn base(self) -> u32 {
        (self.0 & 0xffff_ffff) as u32
    }

    /// Number of slots.
    #[inline(always)]
    #[must_use]
    pub const fn len(self) -> u32 {
        (self.0 >> 32) as u32 & Self::MAX_LEN
    }

    /// Whether there is no slot.
    #[inline(always)]
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.len() == 0
    }

    /// Why a table of no slots refuses.
    #[inline(always)]
    #[must_use]
    pub const fn reason(self) -> Reason {
        Reason::from_number((self.0 >> 56) as u8)
    }
}

/// A record of `SERVICES`: one for each frontend (a service port on one address).
///
/// Writer: the agent, through its mapping, but for `position`. Readers: the connect programs.
///
/// `key` and `generation` do not change while an entry of `FRONTENDS` names the record; `table` is
/// switched by a single store. The record holds its own key because the element of a hash map can
/// be reused while a program still holds a pointer to it: such a program reads another frontend's
/// value, finds a record whose key is not what it dialled, and looks again.
#[repr(C, align(8))]
#[cfg_attr(not(target_arch = "bpf"), derive(Debug, Default))]
pub struct Service {
    /// An [`Affinity`]: whether its clients keep their backends. Written by the agent, one store.
    #[cfg(feature = "other-layout")]
    pub affinity: Word,
    /// A [`Table`].
    pub table: Word,
    /// Unique among the lives of all records (64 bits do not wrap); 0 while the record is free or
    /// retired.
    pub generation: Word,
    /// A [`Policy`]: when its backends are ejected.
    pub policy: Word,
    /// The frontend that this record serves.
    pub key: FrontendKey,
    /// A [`Rate`]: the share of failures that ejects its backends. Written by the agent, one store. Whoever reads
    /// it with another policy than it came with goes by both for one failure.
    pub rate: Half,
    /// How many turns there were ([`crate::balance::turn`]). Written by the connect programs, atomic
    /// addition, and only where the algorithm is that; it goes on when the table changes.
    pub position: Word,
    /// An [`Affinity`]: whether its clients keep their backends. Written by the agent, one store.
    #[cfg(not(feature = "other-layout"))]
    pub affinity: Word,
}

impl Service {
    /// The table that is in force now.
    #[inline(always)]
    #[must_use]
    pub fn table(&self) -> Table {
        Table(self.table.load())
    }

    /// The generation now.
    #[inline(always)]
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.generation.load()
    }

    /// Whether its clients keep their backends.
    #[inline(always)]
    #[must_use]
    pub fn affinity(&self) -> Affinity {
        Affinity(self.affinity.load())
    }

    /// The share of failures that ejects its backends.
    #[inline(always)]
    #[must_use]
    pub fn rate(&self) -> Rate {
        Rate(self.rate.load())
    }

    /// When its backends are ejected.
    #[inline(always)]
    #[must_use]
    pub fn policy(&self) -> Policy {
        Policy(self.policy.load())
    }
}

/// A record of `SLOTS`: one backend of a table, with what the alias method needs
/// ([`crate::alias`]).
///
/// Immutable while a service's table names it. The backend's address is held here and not looked
/// up in `BACKENDS`: that saves a cold cache line on each connect.
#[repr(C, align(8))]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Slot {
    /// The backend's address.
    pub addr: Addr,
    /// The backend's port in network byte order.
    pub port: u16,
    /// The backend's weight.
    pub weight: u16,
    /// Index into `BACKENDS`.
    pub backend: u32,
    /// [`Backend::generation`] at the time of writing.
    pub generation: u32,
    /// A draw below this stays at this slot, see [`crate::alias`].
    pub threshold: u32,
    /// Where the other draws go: a position in the same table.
    pub alias: u32,
    /// Where its tickets end, see [`crate::balance::tickets`].
    pub end: u32,
}

impl Slot {
    /// A record that is no backend, but holds entries of [`crate::maglev`].
    #[must_use]
    pub const fn of_entries(entries: [u16; 16]) -> Self {
        let [a, b, c, d, e, f, g, h, port, weight, i, j, k, l, m, n] = entries;
        Self {
            addr: Addr::from_words([pair(a, b), pair(c, d), pair(e, f), pair(g, h)]),
            port,
            weight,
            backend: pair(i, j),
            generation: pair(k, l),
            threshold: pair(m, n),
            alias: 0,
            end: 0,
        }
    }

    /// The entry at this place, of which the lower four bits count.
    #[inline(always)]
    #[must_use]
    #[expect(unsafe_code, reason = "16 entries of 16 bits over fields of other widths")]
    pub fn entry(&self, index: u32) -> u16 {
        // The verifier has to see the mask right before the load.
        let index = core::hint::black_box(index as usize) & 15;
        // SAFETY: `repr(C)` without padding: the first 32 of its 40 bytes are 16 aligned values of 16
        // bits, of which this is one.
        let entry = unsafe { (&raw const *self).cast::<u16>().add(index) };
        // SAFETY: as above; every bit pattern is a value.
        unsafe { entry.read() }
    }
}

/// Two values in the order of memory.
const fn pair(first: u16, second: u16) -> u32 {
    let ([a, b], [c, d]) = (first.to_ne_bytes(), second.to_ne_bytes());
    u32::from_ne_bytes([a, b, c, d])
}

/// The key of `OVERFLOW`: records that do not lie at the place that their socket's cookie names.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Elsewhere {
    /// The socket's cookie.
    pub cookie: u64,
    /// 0 is the socket's record, whose place was taken; from 1 to [`crate::Role::MOST`] are further records.
    pub index: u64,
}

/// The only record of `SETTINGS`. Writer: the agent.
#[repr(C)]
#[cfg_attr(not(target_arch = "bpf"), derive(Debug, Default))]
pub struct Settings {
    /// How many prefixes `VIRTUAL_IPS` holds; while it is 0 that map is not looked at.
    pub virtual_ips: Word,
    /// 1 while anybody is excluded; while it is 0 nobody is looked for.
    pub excludes: Word,
    /// [`crate::Places`]: where the records of sockets are.
    pub places: Word,
    /// Ids of cgroups that are excluded, with all below them; 0 is none.
    pub cgroups: [Word; Self::EXCLUDED],
    /// Cookies of network namespaces that are excluded; 0 is none.
    pub namespaces: [Word; Self::EXCLUDED],
    /// The last [`Service::generation`] that was given, so that none is given again.
    pub generation: Word,
    /// The last [`Backend::generation`], likewise.
    pub backend_generation: Word,
    /// Connects that were given to backends whose counters are another's now.
    pub gone_opened: Word,
    /// Which programs are attached, all of them: a number that differs between builds and what they were
    /// loaded with; 0 while some are others. Nothing is decided by it but whether they stay.
    pub programs: Word,
}

impl Settings {
    /// How many cgroups, and how many network namespaces, may be excluded.
    pub const EXCLUDED: usize = if cfg!(feature = "other-layout") { 16 } else { 8 };

    /// Whether a cgroup is excluded by itself.
    #[inline(always)]
    #[must_use]
    pub fn excludes_cgroup(&self, id: u64) -> bool {
        self.cgroups.iter().any(|excluded| excluded.load() == id)
    }

    /// Whether a network namespace is excluded.
    #[inline(always)]
    #[must_use]
    pub fn excludes_namespace(&self, cookie: u64) -> bool {
        self.namespaces.iter().any(|excluded| excluded.load() == cookie)
    }
}

/// Indices of `COUNTERS` beyond the refusals, which come first, each at the number of its
/// [`Reason`]. Written by the programs, atomic addition; none of them is on the way of a connection
/// that succeeds.
pub mod counter {
    /// Balanced connects without a record, because none was free: they are not among the open
    /// connections of their backend, and `getpeername` shows the backend.
    pub const NO_FLOW_RECORD: u32 = 16;
    /// Attempts that found the tables changed and looked again.
    pub const RETRIES: u32 = 17;
    /// Balanced connects whose place in `FLOWS` was taken: their record is in `OVERFLOW`.
    pub const COLLISIONS: u32 = 18;
    /// Records in `OVERFLOW` now: while it is 0, nobody looks there.
    pub const OVERFLOWED: u32 = 19;
    /// Events that were left out because there were too many in a second, or nobody reads them.
    pub const EVENTS_LOST: u32 = 20;
    /// The second in the upper 40 bits, and the events in that second: not a counter.
    pub const EVENT_BUDGET: u32 = 21;
    /// Connects that went to an ejected backend because all were.
    pub const ALL_EJECTED: u32 = 22;
    /// Backends that were not ejected because as many as may be are.
    pub const SHARE_REACHED: u32 = 23;
    /// Further records of datagram sockets in `OVERFLOW` now.
    pub const FURTHER: u32 = 24;
    /// Records of datagram sockets that gave way to another one of the same socket, which sends to more
    /// services than it can have records.
    pub const GAVE_WAY: u32 = 25;
    /// Connects of clients that could not be given a backend to keep, because `AFFINITY` was full.
    pub const NO_PIN: u32 = 26;
    /// Number of counters.
    pub const COUNT: u32 = 32;
}

const _: () = {
    assert!(size_of::<Addr>() == 16);
    assert!(size_of::<FrontendKey>() == 20);
    assert!(size_of::<FrontendValue>() == 16);
    assert!(size_of::<Elsewhere>() == 16);
    #[cfg(not(loom))]
    assert!(size_of::<Service>() == 64);
    assert!(size_of::<Slot>() == 40);
    assert!(size_of::<Backend>() == 32);
    #[cfg(not(loom))]
    assert!(size_of::<Settings>() == 56 + 16 * Settings::EXCLUDED);
    assert!(size_of::<Name>() == 9 + Name::MOST);
    assert!(Reason::ALL.len() <= counter::NO_FLOW_RECORD as usize);
};

#[cfg(feature = "user")]
#[expect(unsafe_code, reason = "aya::Pod is an unsafe trait; these layouts are its purpose")]
mod pod {
    use crate::PinKey;

    use super::{Backend, Elsewhere, FrontendKey, FrontendValue, Slot};

    // SAFETY: `repr(C)`, no padding (sizes asserted above), and every bit pattern is a value.
    unsafe impl aya::Pod for FrontendKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for FrontendValue {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Slot {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Elsewhere {}
    // SAFETY: as above.
    unsafe impl aya::Pod for PinKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Backend {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn reasons_and_states_survive_their_numbers() {
        for (number, reason) in (0..).zip(Reason::ALL) {
            assert_eq!(reason as u8, number);
            assert_eq!(Reason::from_number(number), reason);
            assert_eq!(Table::refuse(reason).reason(), reason);
            assert!(Table::refuse(reason).is_empty());
        }
        for number in 0..=4 {
            assert_eq!(State::from_number(number) as u8, number);
        }
    }

    proptest! {
        #[test]
        fn tables_survive_packing(base: u32, len in 0..=Table::MAX_LEN) {
            let table = Table::slots(base, len);
            prop_assert_eq!((table.base(), table.len()), (base, len));
        }
    }
}
