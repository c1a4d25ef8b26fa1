//! The one way to the maps. Everything that the agent writes goes through [`Maps`], which has a
//! real implementation ([`super::kernel`]), one in memory ([`super::memory`]) and one that injects
//! faults into another ([`super::fault`]).

use std::io;

use mesh_common::{
    Addr, Backend, BackendStats, Ejection, FrontendKey, FrontendValue, Name, Reason, Slot, Table,
};

use crate::compile::Rules;
/// A map operation that did not succeed; nothing of it is visible.
#[derive(Debug, thiserror::Error)]
#[error("{operation} failed: {source}")]
pub struct MapError {
    /// What was tried, with the map's name.
    pub operation: &'static str,
    /// What the kernel said.
    #[source]
    pub source: io::Error,
}

/// How many entries each map holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Capacity {
    /// Entries of `FRONTENDS`.
    pub frontends: u32,
    /// Records of `SERVICES`.
    pub services: u32,
    /// Records of `SLOTS`.
    pub slots: u32,
    /// Records of `BACKENDS` and `BACKEND_STATS`.
    pub backends: u32,
    /// Entries of `VIRTUAL_IPS`.
    pub virtual_ips: u32,
}

/// What is made of arrays that grow.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// `SERVICES` and what is counted for them.
    Services,
    /// `SLOTS`.
    Slots,
    /// `BACKENDS` and what is known of them.
    Backends,
    /// `NAMES`.
    Names,
}

/// A record of `SERVICES`, with whose it is, as the agent writes it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Frontend {
    /// What is dialled.
    pub key: FrontendKey,
    /// Which life of the record this is; never 0.
    pub generation: u64,
    /// The table in force.
    pub table: Table,
    /// What else the programs heed.
    pub rules: Rules,
    /// Index into `NAMES`.
    pub owner: u32,
}

/// The last generations that were given, of services' records and of backends.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Generations {
    /// 64 bits do not wrap; 0 is none.
    pub service: u64,
    /// It wraps after 2^32 backends: a stale pair of id and generation would have to survive exactly that
    /// many. 0 is none.
    pub backend: u32,
}

/// The maps, as the agent writes and reads them.
///
/// The kernel programs read all of it at any time, between any two calls. What each call must
/// guarantee is said at the call; the order of the calls is the reconciler's matter.
pub trait Maps {
    /// The size of the maps.
    fn capacity(&self) -> Capacity;
    /// Sees to it that there are so many records, as far as the kernel has memory for them. Returns how
    /// many there are now: only below that they are written.
    fn reach(&mut self, kind: Kind, len: u32) -> u32;
    /// The same for all kinds, in less time; what cannot be had is told when it is asked for by itself.
    fn reach_all(&mut self, wanted: &[(Kind, u32)]) {
        for &(kind, len) in wanted {
            self.reach(kind, len);
        }
    }
    /// What the kernel had no memory for since this was forgotten, for people.
    fn shortage(&self) -> Option<&str>;
    /// Forgets it.
    fn forget_shortage(&mut self);

    /// Writes a record of `BACKENDS`. No program decides by it.
    fn write_backend(&mut self, id: u32, backend: &Backend) -> Result<(), MapError>;
    /// Sets the counters of an unused id to zero, notes what is known of failures of the backend that it is
    /// to be, and then says whose they are.
    fn reset_stats(&mut self, id: u32, generation: u32, known: Ejection) -> Result<(), MapError>;
    /// Says that the counters of an id are nobody's any more: programs that start from now on leave
    /// them alone.
    fn retire_stats(&mut self, id: u32);
    /// Forgets what is known of failures of a backend: a single store.
    fn forget_failures(&mut self, id: u32);
    /// Writes slots that no table names.
    fn write_slots(&mut self, base: u32, slots: &[Slot]) -> Result<(), MapError>;
    /// Writes a record of `SERVICES` that no entry of `FRONTENDS` names, and sets what is counted
    /// for it to zero.
    fn write_service(&mut self, index: u32, frontend: &Frontend) -> Result<(), MapError>;
    /// Gives a record to another service. No program reads that.
    fn set_owner(&mut self, index: u32, owner: u32) -> Result<(), MapError>;
    /// Writes a record of `NAMES`: before anything is its, and after everything was.
    fn write_name(&mut self, index: u32, name: &Name) -> Result<(), MapError>;
    /// Notes the last generations that were given, before they are written anywhere.
    fn note_generations(&mut self, last: Generations);
    /// Notes how many connects were given to backends that are gone, all together.
    fn note_gone(&mut self, opened: u64);
    /// Gives a record other rules: a store for each.
    fn set_rules(&mut self, index: u32, rules: Rules) -> Result<(), MapError>;
    /// Switches a record to another table: a single store, after all that was written before.
    fn switch_table(&mut self, index: u32, table: Table) -> Result<(), MapError>;
    /// Marks a record that no entry of `FRONTENDS` names any more, so that a program that is
    /// still reading it notices.
    fn retire_service(&mut self, index: u32) -> Result<(), MapError>;
    /// Makes or replaces an entry of `FRONTENDS`, after all that was written before.
    fn insert_frontend(&mut self, key: &FrontendKey, value: FrontendValue) -> Result<(), MapError>;
    /// Removes an entry of `FRONTENDS`; it is no error when there is none.
    fn remove_frontend(&mut self, key: &FrontendKey) -> Result<(), MapError>;
    /// Makes an entry of `VIRTUAL_IPS`: a prefix of so many of the 128 bits.
    fn insert_virtual_ip(&mut self, addr: Addr, bits: u8) -> Result<(), MapError>;
    /// Removes an entry of `VIRTUAL_IPS`; it is no error when there is none.
    fn remove_virtual_ip(&mut self, addr: Addr, bits: u8) -> Result<(), MapError>;
    /// Says in `SETTINGS` how many entries `VIRTUAL_IPS` has; while it is 0, none is looked at.
    fn set_virtual_ip_count(&mut self, count: u32) -> Result<(), MapError>;

    /// Reads an entry of `FRONTENDS`.
    fn frontend(&self, key: &FrontendKey) -> Option<FrontendValue>;
    /// Reads a record of `SLOTS`.
    fn slot(&self, index: u32) -> Option<Slot>;
    /// Reads a record of `BACKENDS`.
    fn backend(&self, id: u32) -> Option<Backend>;
    /// Reads what is counted for a backend.
    fn counts(&self, id: u32) -> Counts;
    /// Reads how many connects were given to a backend: the one of its counts that is looked at for all
    /// of them at once.
    fn opened(&self, id: u32) -> u64 {
        self.counts(id).opened
    }
    /// Reads how many connects to the frontend of a record of `SERVICES` were refused, by
    /// [`Reason`].
    fn refused(&self, index: u32) -> Refused;
}

/// What the maps hold, for whoever takes them over from an agent that is gone.
pub trait Contents: Maps {
    /// All entries of `FRONTENDS`.
    fn entries(&self) -> Result<Vec<(FrontendKey, FrontendValue)>, MapError>;
    /// All entries of `VIRTUAL_IPS`.
    fn virtual_ips(&self) -> Result<Vec<(Addr, u8)>, MapError>;
    /// How many records of a kind there are.
    fn there(&self, kind: Kind) -> u32;
    /// A record of `SERVICES`, and whose it is.
    fn service(&self, index: u32) -> Option<Frontend>;
    /// A record of `NAMES`.
    fn name(&self, index: u32) -> Option<Name>;
    /// Whose the counters of a backend are: the generation of one, 0 for nobody's.
    fn life(&self, id: u32) -> u64;
    /// The last generations that were noted.
    fn generations(&self) -> Generations;
    /// What was last noted of backends that are gone.
    fn gone(&self) -> u64;
}

/// Refused connects, by the number of the [`Reason`].
pub type Refused = [u64; Reason::ALL.len()];

/// What is counted for a backend since it appeared.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Counts {
    /// Connects that were given to it.
    pub opened: u64,
    /// How many of them are open, or being opened.
    pub active: u64,
    /// How many of them failed, by the number of the [`mesh_common::Failure`].
    pub failed: [u64; 4],
    /// Whether it is out of rotation.
    pub ejection: Ejection,
}

impl Counts {
    /// Reads them.
    pub fn of(stats: &BackendStats) -> Self {
        Self {
            active: stats.active(),
            opened: stats.opened.load(),
            failed: [0, 1, 2, 3].map(|reason| stats.failed[reason].load()),
            ejection: stats.ejection(),
        }
    }
}
