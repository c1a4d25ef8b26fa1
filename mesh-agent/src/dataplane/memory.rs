//! A [`Maps`] in memory. It checks what the kernel programs rely on: an operation that could be
//! half visible to them panics.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, DefaultHasher};
use std::io;
use std::net::{Ipv6Addr, SocketAddr};

use mesh_common::{
    Addr, Backend, BackendStats, Caller, Client, Ejection, FrontendKey, FrontendValue, Name,
    Policy, Service, Slot, Table, Tables, Token, Word,
};

use super::contents::{frontend, record};
use super::maps::{
    Capacity, Contents, Counts, Frontend, Generations, Kind, MapError, Maps, Refused,
};
use super::reconcile::UNNAMED;
use crate::compile::Rules;

/// The tables, with the memory of what is still in use.
#[derive(Debug)]
pub struct Memory {
    capacity: Capacity,
    /// For how many records there is memory.
    pub memory: Capacity,
    /// How many records there are.
    there: Capacity,
    is_short: bool,
    /// In the same order in each run, so that what goes wrong does so again.
    frontends: HashMap<FrontendKey, FrontendValue, BuildHasherDefault<DefaultHasher>>,
    services: Vec<Service>,
    slots: Vec<Slot>,
    backends: Vec<Backend>,
    stats: Vec<BackendStats>,
    /// By record of `SERVICES`.
    owners: Vec<u32>,
    names: Vec<Name>,
    generations: Generations,
    gone: u64,
    virtual_ips: Vec<(u128, u8)>,
    virtual_ip_count: u32,
    /// Draws so far.
    draws: Word,
    /// Backends, by service and place, of which this has to be known whenever a table leads there.
    pub known: HashMap<(String, SocketAddr), Ejection>,
    /// Tables that programs still running have read: their slots must stay as they are.
    pub readers: Vec<Table>,
    /// Backends, by id and generation, whose connections programs still running have seen end: the
    /// id must stay nobody else's.
    pub enders: Vec<(u32, u64)>,
}

/// A value that is not what was written: a place, as a number of any size, and what is there.
#[derive(Clone, Copy, Debug)]
#[expect(missing_docs, reason = "each is a map")]
#[expect(clippy::large_enum_variant, reason = "a test has few of them")]
pub enum Spoiled {
    Entry(u32, FrontendValue),
    Table(u32, u64),
    Generation(u32, u64),
    Key(u32, FrontendKey),
    Owner(u32, u32),
    Slot(u32, Slot),
    Backend(u32, Backend),
    Life(u32, u64),
    Name(u32, Name),
    /// One more, if there is room.
    Frontend(FrontendKey, FrontendValue),
    /// The policy of ejection, and affinity.
    Rules(u32, u64, u64),
    Opened(u32, u64),
    VirtualIp(Addr, u8),
    Noted(Generations),
    Gone(u64),
}

impl Memory {
    /// Empty tables of this size.
    #[must_use]
    pub fn new(capacity: Capacity) -> Self {
        fn filled<T: Default>(len: u32) -> Vec<T> {
            (0..len).map(|_| T::default()).collect()
        }
        Self {
            capacity,
            memory: capacity,
            there: Capacity { services: 0, slots: 0, backends: 0, ..capacity },
            is_short: false,
            frontends: HashMap::default(),
            services: filled(capacity.services),
            slots: filled(capacity.slots),
            backends: filled(capacity.backends),
            stats: filled(capacity.backends),
            owners: filled(capacity.services),
            names: vec![Name::NONE; capacity.services as usize],
            generations: Generations::default(),
            gone: 0,
            virtual_ips: Vec::new(),
            virtual_ip_count: 0,
            draws: Word::new(0),
            known: HashMap::new(),
            readers: Vec::new(),
            enders: Vec::new(),
        }
    }

    /// Programs start now: one has read the tables of all frontends, one the generations of all
    /// backends. They run until [`Memory::end_readers`].
    pub fn start_readers(&mut self) {
        let tables: Vec<_> =
            self.named_services().map(|index| self.services[index as usize].table()).collect();
        self.readers.extend(tables);
        let lives = (0..).zip(&self.stats).map(|(id, stats)| (id, stats.generation.load()));
        self.enders.extend(lives.filter(|&(_, generation)| generation != 0));
    }

    /// Those programs end.
    pub fn end_readers(&mut self) {
        self.readers.clear();
        self.enders.clear();
    }

    /// Another value in place of one: what no agent would write.
    pub fn spoil(&mut self, spoiled: Spoiled) {
        let at = |place: u32, len: usize| place as usize % len.max(1);
        let Capacity { services, slots, backends, .. } = self.there;
        if services.min(slots).min(backends) == 0 {
            return;
        }
        match spoiled {
            Spoiled::Entry(place, value) => {
                let place = at(place, self.frontends.len());
                if let Some(entry) = self.frontends.values_mut().nth(place) {
                    *entry = value;
                }
            }
            Spoiled::Table(place, table) => {
                let place = at(place, services as usize);
                self.services[place].table.store(table);
            }
            Spoiled::Generation(place, generation) => {
                let place = at(place, services as usize);
                self.services[place].generation.store(generation);
            }
            Spoiled::Key(place, key) => {
                let place = at(place, services as usize);
                self.services[place].key = key;
            }
            Spoiled::Owner(place, owner) => {
                let place = at(place, services as usize);
                self.owners[place] = owner;
            }
            Spoiled::Slot(place, slot) => {
                let place = at(place, slots as usize);
                self.slots[place] = slot;
            }
            Spoiled::Backend(place, backend) => {
                let place = at(place, backends as usize);
                self.backends[place] = backend;
            }
            Spoiled::Life(place, life) => {
                let place = at(place, backends as usize);
                self.stats[place].generation.store(life);
            }
            Spoiled::Name(place, name) => {
                let place = at(place, services as usize);
                self.names[place] = name;
            }
            Spoiled::Frontend(key, value) => {
                if self.frontends.len() < self.capacity.frontends as usize {
                    self.frontends.insert(key, value);
                }
            }
            Spoiled::Rules(place, policy, affinity) => {
                let service = &self.services[at(place, services as usize)];
                service.policy.store(policy);
                service.affinity.store(affinity);
            }
            Spoiled::Opened(place, opened) => {
                self.stats[at(place, backends as usize)].opened.store(opened);
            }
            Spoiled::VirtualIp(addr, bits) => {
                if self.virtual_ips.len() < self.capacity.virtual_ips as usize {
                    self.virtual_ips.push((u128::from_be_bytes(addr.octets()), bits));
                }
            }
            Spoiled::Noted(generations) => self.generations = generations,
            Spoiled::Gone(opened) => self.gone = opened,
        }
    }

    /// The entries of `FRONTENDS`.
    pub fn frontends(&self) -> impl Iterator<Item = (&FrontendKey, &FrontendValue)> {
        self.frontends.iter()
    }

    /// Every slot that a table in force, or a running program, names.
    pub fn named_slots(&self) -> impl Iterator<Item = &Slot> {
        let named = self.named_services().filter_map(|index| self.services.get(index as usize));
        named
            .map(Service::table)
            .chain(self.readers.iter().copied())
            // One that refuses may have anything else in its word, if somebody else has written that.
            .filter(|table| !table.is_empty())
            .flat_map(|table| &self.slots[table.base() as usize..][..table.len() as usize])
    }

    fn size_of(&self, kind: Kind) -> u32 {
        match kind {
            Kind::Services | Kind::Names => self.there.services,
            Kind::Slots => self.there.slots,
            Kind::Backends => self.there.backends,
        }
    }

    /// A program has seen a backend fail, or answer.
    pub fn find(&mut self, id: u32, ejection: Ejection) {
        self.stats[id as usize].ejection.store(ejection.0);
        let backend = self.backends[id as usize];
        let name = self.names[backend.owner as usize].get().expect("a name").to_owned();
        let place = SocketAddr::new(backend.addr.ip(), u16::from_be(backend.port));
        self.known.insert((name, place), ejection);
    }

    /// What has to be known of the backends of a table is.
    fn assert_known(&self, table: Table) {
        if table.is_empty() || self.known.is_empty() {
            return;
        }
        for slot in &self.slots[table.base() as usize..][..table.len() as usize] {
            let owner = self.backends[slot.backend as usize].owner as usize;
            let Some(name) = self.names.get(owner).and_then(Name::get) else { continue };
            let place = SocketAddr::new(slot.addr.ip(), u16::from_be(slot.port));
            if let Some(known) = self.known.get(&(name.to_owned(), place)) {
                let there = self.stats[slot.backend as usize].ejection();
                assert_eq!(there, *known, "a table leads to {place} of {name}");
            }
        }
    }

    fn assert_named(&self, owner: u32) {
        let name = self.names.get(owner as usize).and_then(Name::get);
        assert!(owner == UNNAMED || name.is_some(), "service {owner} has no name");
    }

    fn named_services(&self) -> impl Iterator<Item = u32> {
        self.frontends.iter().filter(|(key, _)| key.protocol != 0).map(|(_, value)| value.service)
    }
}

impl Maps for Memory {
    fn capacity(&self) -> Capacity {
        self.capacity
    }

    fn reach(&mut self, kind: Kind, len: u32) -> u32 {
        let of = |all: &Capacity| match kind {
            Kind::Services | Kind::Names => all.services,
            Kind::Slots => all.slots,
            Kind::Backends => all.backends,
        };
        let there = len.min(of(&self.memory)).max(of(&self.there));
        match kind {
            Kind::Services | Kind::Names => self.there.services = there,
            Kind::Slots => self.there.slots = there,
            Kind::Backends => self.there.backends = there,
        }
        self.is_short |= there < len;
        there
    }

    fn shortage(&self) -> Option<&str> {
        self.is_short.then_some("no memory")
    }

    fn forget_shortage(&mut self) {
        self.is_short = false;
    }

    fn write_backend(&mut self, id: u32, backend: &Backend) -> Result<(), MapError> {
        assert!(id < self.there.backends, "backend {id} is not there");
        let same_life = self.backends[id as usize].generation == backend.generation;
        if backend.protocol != 0 {
            let noted = same_life || backend.generation <= self.generations.backend;
            assert!(noted, "a generation is not noted");
            self.assert_named(backend.owner);
        }
        self.backends[id as usize] = *backend;
        assert!(
            same_life || self.named_slots().all(|slot| slot.backend != id),
            "backend {id} was reused while a slot names it"
        );
        Ok(())
    }

    fn reset_stats(&mut self, id: u32, generation: u32, known: Ejection) -> Result<(), MapError> {
        assert!(self.named_slots().all(|slot| slot.backend != id), "backend {id} is named");
        let mut enders = self.enders.iter();
        assert!(enders.all(|&(other, _)| other != id), "a program will count for backend {id}");
        let stats = &mut self.stats[id as usize];
        assert_eq!(stats.generation.load(), 0, "the counters of backend {id} are somebody's");
        *stats = BackendStats { ejection: Word::new(known.0), ..BackendStats::default() };
        stats.generation.store(generation.into());
        Ok(())
    }

    fn retire_stats(&mut self, id: u32) {
        self.stats[id as usize].generation.store(0);
    }

    fn forget_failures(&mut self, id: u32) {
        self.stats[id as usize].ejection.store(0);
    }

    fn write_slots(&mut self, base: u32, slots: &[Slot]) -> Result<(), MapError> {
        let end = base as usize + slots.len();
        assert!(end <= self.there.slots as usize, "slots that are not there are written");
        let named = self.named_services().filter_map(|index| self.services.get(index as usize));
        let tables = named.map(Service::table).chain(self.readers.iter().copied());
        for table in tables.filter(|table| !table.is_empty()) {
            let (from, to) = (table.base() as usize, (table.base() + table.extent()) as usize);
            assert!(end <= from || to <= base as usize, "slots of a table in force are written");
        }
        self.slots[base as usize..end].copy_from_slice(slots);
        Ok(())
    }

    fn write_service(&mut self, index: u32, frontend: &Frontend) -> Result<(), MapError> {
        assert!(index < self.there.services, "record {index} is not there");
        assert!(self.named_services().all(|named| named != index), "service {index} is named");
        assert!(frontend.generation <= self.generations.service, "a generation is not noted");
        self.assert_named(frontend.owner);
        self.services[index as usize] = record(frontend);
        self.owners[index as usize] = frontend.owner;
        Ok(())
    }

    fn set_owner(&mut self, index: u32, owner: u32) -> Result<(), MapError> {
        self.assert_named(owner);
        self.owners[index as usize] = owner;
        Ok(())
    }

    fn write_name(&mut self, index: u32, name: &Name) -> Result<(), MapError> {
        assert!(index < self.there.services, "name {index} is not there");
        // It may have moved to another source.
        if name.get().is_some() && self.names[index as usize].get() == name.get() {
            self.names[index as usize] = *name;
            return Ok(());
        }
        let of_frontend = |record: u32| self.owners[record as usize] == index;
        assert!(!self.named_services().any(of_frontend), "name {index} is a frontend's");
        let mut lives = self.backends.iter().zip(&self.stats);
        let of_backend = |(backend, stats): (&Backend, &BackendStats)| {
            let lives = backend.generation != 0 && stats.is_life(backend.generation);
            backend.owner == index && lives && backend.protocol != 0
        };
        assert!(!lives.any(of_backend), "name {index} is a backend's");
        self.names[index as usize] = *name;
        Ok(())
    }

    fn note_generations(&mut self, last: Generations) {
        self.generations = last;
    }

    fn note_gone(&mut self, opened: u64) {
        self.gone = opened;
    }

    fn set_rules(&mut self, index: u32, rules: Rules) -> Result<(), MapError> {
        let service = &self.services[index as usize];
        service.policy.store(rules.policy.0);
        service.rate.store(rules.rate.0);
        service.affinity.store(rules.affinity.0);
        Ok(())
    }

    fn switch_table(&mut self, index: u32, table: Table) -> Result<(), MapError> {
        let slots = &self.slots[table.base() as usize..][..table.len() as usize];
        for slot in slots {
            let backend = self.backends[slot.backend as usize];
            assert_eq!(backend.generation, slot.generation, "a slot names a backend that is gone");
        }
        self.assert_known(table);
        self.services[index as usize].table.store(table.0);
        Ok(())
    }

    fn retire_service(&mut self, index: u32) -> Result<(), MapError> {
        assert!(self.named_services().all(|named| named != index), "service {index} is named");
        self.services[index as usize].generation.store(0);
        Ok(())
    }

    fn insert_frontend(&mut self, key: &FrontendKey, value: FrontendValue) -> Result<(), MapError> {
        let full = self.frontends.len() >= self.capacity.frontends as usize;
        if full && !self.frontends.contains_key(key) {
            let source = io::Error::from_raw_os_error(libc::E2BIG);
            return Err(MapError { operation: "inserting into FRONTENDS", source });
        }
        if key.protocol != 0 {
            let service = &self.services[value.service as usize];
            assert!(service.key == *key && service.generation() == value.generation);
            self.assert_known(service.table());
        }
        self.frontends.insert(*key, value);
        Ok(())
    }

    fn remove_frontend(&mut self, key: &FrontendKey) -> Result<(), MapError> {
        self.frontends.remove(key);
        Ok(())
    }

    fn insert_virtual_ip(&mut self, addr: Addr, bits: u8) -> Result<(), MapError> {
        self.virtual_ips.push((u128::from_be_bytes(addr.octets()), bits));
        Ok(())
    }

    fn remove_virtual_ip(&mut self, addr: Addr, bits: u8) -> Result<(), MapError> {
        let prefix = (u128::from_be_bytes(addr.octets()), bits);
        self.virtual_ips.retain(|known| *known != prefix);
        Ok(())
    }

    fn set_virtual_ip_count(&mut self, count: u32) -> Result<(), MapError> {
        self.virtual_ip_count = count;
        Ok(())
    }

    fn frontend(&self, key: &FrontendKey) -> Option<FrontendValue> {
        self.frontends.get(key).copied()
    }

    fn slot(&self, index: u32) -> Option<Slot> {
        self.slots.get(index as usize).copied()
    }

    fn backend(&self, id: u32) -> Option<Backend> {
        self.backends.get(id as usize).copied()
    }

    fn counts(&self, id: u32) -> Counts {
        self.stats.get(id as usize).map(Counts::of).unwrap_or_default()
    }

    fn refused(&self, _: u32) -> Refused {
        Refused::default()
    }
}

impl Contents for Memory {
    fn entries(&self) -> Result<Vec<(FrontendKey, FrontendValue)>, MapError> {
        Ok(self.frontends.iter().map(|(key, value)| (*key, *value)).collect())
    }

    fn virtual_ips(&self) -> Result<Vec<(Addr, u8)>, MapError> {
        let prefix = |&(addr, bits): &(u128, u8)| (Ipv6Addr::from_bits(addr).into(), bits);
        Ok(self.virtual_ips.iter().map(prefix).collect())
    }

    fn there(&self, kind: Kind) -> u32 {
        self.size_of(kind)
    }

    fn service(&self, index: u32) -> Option<Frontend> {
        let index = index as usize;
        frontend(self.services.get(index)?, (*self.owners.get(index)?).into())
    }

    fn name(&self, index: u32) -> Option<Name> {
        self.names.get(index as usize).copied()
    }

    fn life(&self, id: u32) -> u64 {
        self.stats.get(id as usize).map_or(0, |stats| stats.generation.load())
    }

    fn generations(&self) -> Generations {
        self.generations
    }

    fn gone(&self) -> u64 {
        self.gone
    }
}

/// What the kernel programs would see. Draws go round the columns in order.
impl Tables for Memory {
    fn frontend(&self, key: &FrontendKey) -> Option<FrontendValue> {
        self.frontends.get(key).copied()
    }

    fn service(&self, index: u32) -> Option<&Service> {
        self.services.get(index as usize)
    }

    fn slot(&self, index: u32) -> Option<&Slot> {
        self.slots.get(index as usize)
    }

    fn is_virtual(&self, addr: &Addr) -> bool {
        let addr = u128::from_be_bytes(addr.octets());
        let inside = |&(range, bits): &(u128, u8)| {
            bits == 0 || (addr ^ range) >> (128 - u32::from(bits)) == 0
        };
        self.virtual_ip_count > 0 && self.virtual_ips.iter().any(inside)
    }

    fn random(&self) -> u32 {
        // A step of the golden ratio spreads over all columns and positions.
        let draws = self.draws.load() + 1;
        self.draws.store(draws);
        u32::try_from(draws.wrapping_mul(0x9e37_79b9) & 0xffff_ffff).unwrap_or(0)
    }
    fn ejection(&self, backend: u32) -> Ejection {
        self.stats.get(backend as usize).map_or(Ejection::NONE, BackendStats::ejection)
    }

    fn active(&self, backend: u32) -> u64 {
        self.counts(backend).active
    }

    fn position(&self, service: u32) -> u64 {
        self.services.get(service as usize).map_or(0, |service| service.position.next())
    }

    fn client(&self) -> Client {
        Client::NOBODY
    }

    fn now(&self) -> u64 {
        0
    }
}

impl Caller for Memory {
    fn chance(&self) -> u32 {
        self.random()
    }

    fn key(&self, _: mesh_common::Algorithm) -> u64 {
        self.chance().into()
    }

    fn enter(&self, _: u32, _: Policy) -> Option<Token> {
        Some(Token::NONE)
    }
}
