//! [`Maps`] over the kernel's maps.

use std::io;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{HashMap, MapData};
use mesh_common::ejection::ticks;
use mesh_common::latency::Latency;
use mesh_common::{
    Addr, Backend, BackendStats, Client, Ejection, FrontendKey, FrontendValue, Limits, Name,
    Origin, Service, ServiceStats, Settings, Slot, Table, Tables, Word, chunk,
};

use super::chunks::Chunks;
use super::clock;
use super::contents::record;
use super::maps::{Capacity, Counts, Frontend, Generations, Kind, MapError, Maps, Refused};
use super::opened::Opened;
use super::pindir::PinError;
use super::sys::Mapped;
use crate::compile::Rules;

/// A map of the loaded object that is not what this agent expects.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// It is not there.
    #[error("the kernel object has no map {0}")]
    Missing(&'static str),
    /// It has another layout.
    #[error("map {map} has values of {found} bytes where this agent has {expected}")]
    Layout {
        /// Its name.
        map: &'static str,
        /// Size of a value in the object.
        found: u32,
        /// Size of a value here.
        expected: usize,
    },
    /// It cannot be used.
    #[error("map {map}: {source}")]
    Map {
        /// Its name.
        map: &'static str,
        /// Why.
        #[source]
        source: aya::maps::MapError,
    },
    /// Its pin is something else.
    #[error(transparent)]
    Pin(#[from] PinError),
    /// It cannot be mapped.
    #[error("mapping {map} into the agent: {source}")]
    Mapping {
        /// Its name.
        map: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// The kernel's maps. There is one owner: the reconciler.
pub struct KernelMaps {
    pub(super) frontends: HashMap<MapData, FrontendKey, FrontendValue>,
    pub(super) services: Chunks<Service>,
    slots: Chunks<Slot>,
    backends: Chunks<Backend>,
    pub(super) stats: Chunks<BackendStats>,
    latencies: Chunks<Word>,
    windows: Chunks<Word>,
    pub(super) service_stats: Chunks<ServiceStats>,
    pub(super) names: Chunks<Name>,
    pub(super) settings: Mapped<Settings>,
    pub(super) virtual_ips: LpmTrie<MapData, [u8; 16], u32>,
    counters: Mapped<Word>,
    capacity: Capacity,
    /// Of each kind.
    shortages: [Option<Shortage>; 4],
    /// One that was met.
    shortage: Option<Arc<str>>,
    /// Changes since the agent was started.
    writes: u64,
    /// It is only looked at: what is to be changed stays as it is.
    is_view: bool,
}

/// That the kernel had no memory.
struct Shortage {
    /// For what, and what it said.
    text: Arc<str>,
    /// For so many records.
    len: u32,
    /// It is not asked for as many again before.
    until: Instant,
}

impl Shortage {
    /// Whether there is no use in asking for so many.
    fn holds(&self, len: u32) -> bool {
        len >= self.len && Instant::now() < self.until
    }
}

/// For so long the kernel is not asked for memory again: it clears what it gives, and takes back what is
/// no use without the rest.
const SHORT: Duration = Duration::from_secs(2);

impl KernelMaps {
    /// Opens the maps that are pinned, to keep them. They will hold as much as `limits` says.
    ///
    /// # Errors
    ///
    /// When a map is missing or has another layout than this agent's, or cannot be made.
    pub fn open(maps: &Opened, limits: Limits) -> Result<Self, OpenError> {
        let mut opened = Self::look(maps, limits)?;
        opened.is_view = false;
        for kind in [Kind::Services, Kind::Slots, Kind::Backends, Kind::Names] {
            if opened.reach(kind, 1) == 0 {
                let source = io::Error::other(opened.shortage().unwrap_or_default().to_owned());
                return Err(OpenError::Mapping { map: "the first chunks", source });
            }
        }
        // A version that had none may have left all the others.
        let mapping = |source| OpenError::Mapping { map: "WINDOWS", source };
        let backends = opened.there(Kind::Backends);
        opened.windows.reach(backends).map_err(mapping)?;
        Ok(opened)
    }

    /// The same for somebody who only looks: nothing is made, and nothing changes.
    ///
    /// # Errors
    ///
    /// When a map is missing or has another layout than this agent's.
    pub fn look(maps: &Opened, limits: Limits) -> Result<Self, OpenError> {
        let frontends = maps.typed("FRONTENDS", HashMap::try_from)?;
        let virtual_ips = maps.typed("VIRTUAL_IPS", LpmTrie::try_from)?;
        let (services, backends) = (limits.frontends, limits.backends);
        let mut opened = Self {
            frontends,
            services: Chunks::found(maps, "SERVICES", chunk::SERVICES, services)?,
            service_stats: Chunks::found(maps, "SERVICE_STATS", chunk::SERVICES, services)?,
            names: Chunks::found(maps, "NAMES", chunk::NAMES, services)?,
            slots: Chunks::found(maps, "SLOTS", chunk::SLOTS, limits.slots())?,
            backends: Chunks::found(maps, "BACKENDS", chunk::BACKENDS, backends)?,
            stats: Chunks::found(maps, "BACKEND_STATS", chunk::BACKENDS, backends)?,
            latencies: Chunks::found(maps, "LATENCIES", chunk::BACKENDS, backends)?,
            windows: Chunks::found(maps, "WINDOWS", chunk::BACKENDS, backends)?,
            settings: maps.mapped("SETTINGS")?,
            virtual_ips,
            counters: maps.mapped("COUNTERS")?,
            capacity: Capacity {
                frontends: maps.entries("FRONTENDS")?,
                services,
                slots: limits.slots(),
                backends,
                virtual_ips: maps.entries("VIRTUAL_IPS")?,
            },
            shortages: [const { None }; 4],
            shortage: None,
            writes: 0,
            is_view: true,
        };
        // What is there stays, also when the agent file wants less by now.
        let Capacity { services, slots, backends, .. } = opened.sizes();
        let capacity = &mut opened.capacity;
        capacity.services = capacity.services.max(services);
        capacity.backends = capacity.backends.max(backends);
        capacity.slots = capacity.slots.max(slots).max(capacity.backends.saturating_mul(2));
        Ok(opened)
    }

    /// A counter. The index is one of [`mesh_common::layout::counter`], or a
    /// [`mesh_common::Reason`].
    pub fn counter(&self, index: u32) -> u64 {
        self.counters.get(index).map_or(0, Word::load)
    }

    /// Counts a change, which is to be made unless this is only looked at.
    fn changes(&mut self) -> bool {
        self.writes += u64::from(!self.is_view);
        !self.is_view
    }

    /// Whether it is only looked at.
    pub fn is_view(&self) -> bool {
        self.is_view
    }

    /// How many changes were made since the agent was started; slots that are written together are one.
    pub fn writes(&self) -> u64 {
        self.writes
    }

    /// For how many entries there is memory now.
    pub fn sizes(&self) -> Capacity {
        Capacity {
            services: self.services.size(),
            slots: self.slots.size(),
            backends: self.backends.size(),
            ..self.capacity
        }
    }

    /// How many records there are, in all arrays of a kind.
    pub(super) fn there(&self, kind: Kind) -> u32 {
        match kind {
            Kind::Services => self.service_stats.size().min(self.services.size()),
            Kind::Slots => self.slots.size(),
            Kind::Names => self.names.size(),
            Kind::Backends => {
                self.stats.size().min(self.latencies.size()).min(self.backends.size())
            }
        }
    }

    /// Bytes of the arrays that grow.
    pub fn bytes(&self) -> u64 {
        self.services.bytes()
            + self.service_stats.bytes()
            + self.names.bytes()
            + self.slots.bytes()
            + self.backends.bytes()
            + self.stats.bytes()
            + self.latencies.bytes()
            + self.windows.bytes()
    }

    /// What is known of failures of a backend, to change it.
    pub fn stats(&self, id: u32) -> Option<&BackendStats> {
        self.stats.get(id)
    }
}

// === impl Maps ===

/// Names the operation that failed.
pub(super) fn map_error(operation: &'static str) -> impl FnOnce(aya::maps::MapError) -> MapError {
    move |error| {
        let source = match error {
            aya::maps::MapError::SyscallError(error) => error.io_error,
            other => io::Error::other(other),
        };
        MapError { operation, source }
    }
}

/// Names the array in which a write did not fit.
fn out_of_range(operation: &'static str) -> impl FnOnce(io::Error) -> MapError {
    move |source| MapError { operation, source }
}

impl Maps for KernelMaps {
    fn capacity(&self) -> Capacity {
        self.capacity
    }

    fn reach(&mut self, kind: Kind, len: u32) -> u32 {
        let there = self.there(kind);
        if len <= there || self.is_view {
            return there;
        }
        let place = kind as usize;
        if let Some(known) = self.shortages[place].as_ref().filter(|known| known.holds(len)) {
            self.shortage = Some(Arc::clone(&known.text));
            return there;
        }
        let grown = match kind {
            Kind::Services => self.service_stats.reach(len).and_then(|()| self.services.reach(len)),
            Kind::Slots => self.slots.reach(len),
            Kind::Names => self.names.reach(len),
            Kind::Backends => self
                .stats
                .reach(len)
                .and_then(|()| self.latencies.reach(len))
                .and_then(|()| self.windows.reach(len))
                .and_then(|()| self.backends.reach(len)),
        };
        self.shortages[place] = grown.err().map(|error| {
            let map = ["SERVICES", "SLOTS", "BACKENDS", "NAMES"][place];
            let text = format!("{map} cannot grow to {len} records: {error}").into();
            self.shortage = Some(Arc::clone(&text));
            Shortage { text, len, until: Instant::now() + SHORT }
        });
        self.there(kind)
    }

    /// What takes time is that the kernel waits for running programs, for each array.
    fn reach_all(&mut self, wanted: &[(Kind, u32)]) {
        let len = |of| {
            let found = wanted.iter().find(|&&(kind, len)| kind == of && len > self.there(kind));
            found.map(|&(_, len)| len)
        };
        let lens = [Kind::Services, Kind::Slots, Kind::Backends, Kind::Names].map(len);
        if lens == [None; 4] || self.shortages.iter().flatten().any(|known| known.holds(u32::MAX)) {
            return;
        }
        let [of_services, of_slots, of_backends, of_names] = lens;
        let Self { services, service_stats, slots, backends, stats, names, .. } = self;
        let (latencies, windows) = (&mut self.latencies, &mut self.windows);
        thread::scope(|scope| {
            // Without a thread, or memory, it is as if nobody had asked yet.
            let spawn = |grow: Box<dyn FnOnce() + Send>| {
                drop(thread::Builder::new().spawn_scoped(scope, grow));
            };
            if let Some(len) = of_services {
                spawn(Box::new(move || drop(services.reach(len))));
                spawn(Box::new(move || drop(service_stats.reach(len))));
            }
            if let Some(len) = of_slots {
                spawn(Box::new(move || drop(slots.reach(len))));
            }
            if let Some(len) = of_names {
                spawn(Box::new(move || drop(names.reach(len))));
            }
            if let Some(len) = of_backends {
                spawn(Box::new(move || drop(backends.reach(len))));
                spawn(Box::new(move || drop(stats.reach(len))));
                spawn(Box::new(move || drop(latencies.reach(len))));
                spawn(Box::new(move || drop(windows.reach(len))));
            }
        });
    }

    fn shortage(&self) -> Option<&str> {
        self.shortage.as_deref()
    }

    fn forget_shortage(&mut self) {
        self.shortage = None;
    }

    fn write_backend(&mut self, id: u32, backend: &Backend) -> Result<(), MapError> {
        if !self.changes() {
            return Ok(());
        }
        let records = std::slice::from_ref(backend);
        self.backends.write(id, records).map_err(out_of_range("writing BACKENDS"))
    }

    fn reset_stats(&mut self, id: u32, generation: u32, known: Ejection) -> Result<(), MapError> {
        if !self.changes() {
            return Ok(());
        }
        let ejection = Word::new(known.0);
        let stats = [BackendStats { ejection, ..BackendStats::default() }];
        self.stats.write(id, &stats).map_err(out_of_range("writing BACKEND_STATS"))?;
        for words in [&self.latencies, &self.windows] {
            if let Some(word) = words.get(id) {
                word.store(0);
            }
        }
        if let Some(stats) = self.stats.get(id) {
            stats.generation.store(generation.into());
        }
        Ok(())
    }

    fn retire_stats(&mut self, id: u32) {
        if !self.changes() {
            return;
        }
        if let Some(stats) = self.stats.get(id) {
            stats.generation.store(0);
        }
    }

    fn forget_failures(&mut self, id: u32) {
        if !self.changes() {
            return;
        }
        if let Some(stats) = self.stats.get(id) {
            stats.ejection.store(0);
        }
    }

    fn write_slots(&mut self, base: u32, slots: &[Slot]) -> Result<(), MapError> {
        if !self.changes() {
            return Ok(());
        }
        self.slots.write(base, slots).map_err(out_of_range("writing SLOTS"))
    }

    fn write_service(&mut self, index: u32, frontend: &Frontend) -> Result<(), MapError> {
        if !self.changes() {
            return Ok(());
        }
        let record = [record(frontend)];
        let owner = Word::new(frontend.owner.into());
        let stats = [ServiceStats { owner, ..ServiceStats::default() }];
        self.service_stats.write(index, &stats).map_err(out_of_range("writing SERVICE_STATS"))?;
        self.services.write(index, &record).map_err(out_of_range("writing SERVICES"))
    }

    fn set_owner(&mut self, index: u32, owner: u32) -> Result<(), MapError> {
        if !self.changes() {
            return Ok(());
        }
        if let Some(stats) = self.service_stats.get(index) {
            stats.owner.store(owner.into());
        }
        Ok(())
    }

    fn write_name(&mut self, index: u32, name: &Name) -> Result<(), MapError> {
        if !self.changes() {
            return Ok(());
        }
        let names = std::slice::from_ref(name);
        self.names.write(index, names).map_err(out_of_range("writing NAMES"))
    }

    fn note_generations(&mut self, last: Generations) {
        if self.is_view {
            return;
        }
        if let Some(settings) = self.settings.get(0) {
            settings.generation.store(last.service);
            settings.backend_generation.store(last.backend.into());
        }
    }

    fn note_gone(&mut self, opened: u64) {
        if self.is_view {
            return;
        }
        if let Some(settings) = self.settings.get(0) {
            settings.gone_opened.store(opened);
        }
    }

    fn set_rules(&mut self, index: u32, rules: Rules) -> Result<(), MapError> {
        if !self.changes() {
            return Ok(());
        }
        if let Some(service) = self.services.get(index) {
            service.policy.store(rules.policy.0);
            service.rate.store(rules.rate.0);
            service.affinity.store(rules.affinity.0);
        }
        Ok(())
    }

    fn switch_table(&mut self, index: u32, table: Table) -> Result<(), MapError> {
        if !self.changes() {
            return Ok(());
        }
        if let Some(service) = self.services.get(index) {
            service.table.store(table.0);
        }
        Ok(())
    }

    fn retire_service(&mut self, index: u32) -> Result<(), MapError> {
        if !self.changes() {
            return Ok(());
        }
        if let Some(service) = self.services.get(index) {
            service.generation.store(0);
        }
        Ok(())
    }

    fn insert_frontend(&mut self, key: &FrontendKey, value: FrontendValue) -> Result<(), MapError> {
        if !self.changes() {
            return Ok(());
        }
        self.frontends.insert(key, value, 0).map_err(map_error("inserting into FRONTENDS"))
    }

    fn remove_frontend(&mut self, key: &FrontendKey) -> Result<(), MapError> {
        if !self.changes() {
            return Ok(());
        }
        gone(self.frontends.remove(key).map_err(map_error("removing from FRONTENDS")))
    }

    fn insert_virtual_ip(&mut self, addr: Addr, bits: u8) -> Result<(), MapError> {
        if !self.changes() {
            return Ok(());
        }
        let key = Key::new(u32::from(bits), addr.octets());
        self.virtual_ips.insert(&key, 1, 0).map_err(map_error("inserting into VIRTUAL_IPS"))
    }

    fn remove_virtual_ip(&mut self, addr: Addr, bits: u8) -> Result<(), MapError> {
        if !self.changes() {
            return Ok(());
        }
        let key = Key::new(u32::from(bits), addr.octets());
        gone(self.virtual_ips.remove(&key).map_err(map_error("removing from VIRTUAL_IPS")))
    }

    fn set_virtual_ip_count(&mut self, count: u32) -> Result<(), MapError> {
        if let Some(settings) = self.settings.get(0) {
            settings.virtual_ips.store(count.into());
        }
        Ok(())
    }

    fn frontend(&self, key: &FrontendKey) -> Option<FrontendValue> {
        self.frontends.get(key, 0).ok()
    }

    fn slot(&self, index: u32) -> Option<Slot> {
        self.slots.get(index).copied()
    }

    fn backend(&self, id: u32) -> Option<Backend> {
        self.backends.get(id).copied()
    }

    fn counts(&self, id: u32) -> Counts {
        self.stats.get(id).map(Counts::of).unwrap_or_default()
    }

    fn opened(&self, id: u32) -> u64 {
        self.stats.get(id).map_or(0, |stats| stats.opened.load())
    }

    fn refused(&self, index: u32) -> Refused {
        let mut refused = Refused::default();
        if let Some(stats) = self.service_stats.get(index) {
            for (count, word) in refused.iter_mut().zip(&stats.refused) {
                *count = word.load();
            }
        }
        refused
    }
}

/// Removing what is not there is no error.
fn gone(removed: Result<(), MapError>) -> Result<(), MapError> {
    removed.or_else(|error| match error.source.raw_os_error() {
        Some(libc::ENOENT) => Ok(()),
        _ => Err(error),
    })
}

impl KernelMaps {
    /// How far a backend is, in microseconds, as the programs see it now; 0 when nothing is known.
    pub fn latency_of(&self, id: u32) -> u64 {
        let word = self.latencies.get(id).map_or(0, Word::load);
        Latency(word).average(clock::jiffies() >> Origin::TIME_SHIFT, clock::half_life())
    }
}

/// What the kernel programs see, for `explain`.
impl Tables for KernelMaps {
    fn frontend(&self, key: &FrontendKey) -> Option<FrontendValue> {
        Maps::frontend(self, key)
    }

    fn service(&self, index: u32) -> Option<&Service> {
        self.services.get(index)
    }

    fn slot(&self, index: u32) -> Option<&Slot> {
        self.slots.get(index)
    }

    fn is_virtual(&self, addr: &Addr) -> bool {
        self.virtual_ips.get(&Key::new(128, addr.octets()), 0).is_ok()
    }

    fn random(&self) -> u32 {
        fastrand::u32(..)
    }

    fn ejection(&self, backend: u32) -> Ejection {
        self.stats.get(backend).map_or(Ejection::NONE, BackendStats::ejection)
    }

    fn latency(&self, backend: u32) -> u64 {
        self.latency_of(backend)
    }

    fn active(&self, backend: u32) -> u64 {
        self.stats.get(backend).map_or(0, BackendStats::active)
    }

    /// Whoever only asks takes no turn.
    fn position(&self, service: u32) -> u64 {
        self.services.get(service).map_or(0, |service| service.position.load())
    }

    /// Somebody for whom nothing is out that is not out for all.
    fn client(&self) -> Client {
        Client::NOBODY
    }

    fn now(&self) -> u64 {
        ticks(clock::monotonic())
    }
}
