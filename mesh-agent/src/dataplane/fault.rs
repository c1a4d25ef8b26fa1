//! A [`Maps`] that fails now and then, to test that every failure is survived.

use std::io;

use mesh_common::{Addr, Backend, Ejection, FrontendKey, FrontendValue, Name, Slot, Table};

use super::maps::{
    Capacity, Contents, Counts, Frontend, Generations, Kind, MapError, Maps, Refused,
};
use crate::compile::Rules;

/// Passes calls on to another implementation, unless `fails` says that this one fails.
pub struct Faulty<M, F> {
    /// Where the calls go.
    pub maps: M,
    /// Asked before each write, with the name of the operation.
    pub fails: F,
    /// After so many changes the agent is gone: nothing that comes later is done.
    pub lives: Option<usize>,
}

impl<M, F: FnMut(&'static str) -> bool> Faulty<M, F> {
    /// Another implementation with these faults, whose agent lives on.
    pub const fn new(maps: M, fails: F) -> Self {
        Self { maps, fails, lives: None }
    }

    /// Nothing once the agent is gone.
    fn alive(&mut self) -> Option<&mut M> {
        match &mut self.lives {
            Some(0) => return None,
            Some(left) => *left -= 1,
            None => {}
        }
        Some(&mut self.maps)
    }

    fn gate(&mut self, operation: &'static str) -> Result<&mut M, MapError> {
        let failed = |error| MapError { operation, source: io::Error::from_raw_os_error(error) };
        if (self.fails)(operation) {
            return Err(failed(libc::ENOMEM));
        }
        self.alive().ok_or_else(|| failed(libc::ESRCH))
    }
}

impl<M: Maps, F: FnMut(&'static str) -> bool> Maps for Faulty<M, F> {
    fn capacity(&self) -> Capacity {
        self.maps.capacity()
    }

    fn reach(&mut self, kind: Kind, len: u32) -> u32 {
        self.maps.reach(kind, len)
    }

    fn reach_all(&mut self, wanted: &[(Kind, u32)]) {
        self.maps.reach_all(wanted);
    }

    fn shortage(&self) -> Option<&str> {
        self.maps.shortage()
    }

    fn forget_shortage(&mut self) {
        self.maps.forget_shortage();
    }

    fn write_backend(&mut self, id: u32, backend: &Backend) -> Result<(), MapError> {
        self.gate("writing BACKENDS")?.write_backend(id, backend)
    }

    fn reset_stats(&mut self, id: u32, generation: u32, known: Ejection) -> Result<(), MapError> {
        self.gate("writing BACKEND_STATS")?.reset_stats(id, generation, known)
    }

    fn retire_stats(&mut self, id: u32) {
        if let Some(maps) = self.alive() {
            maps.retire_stats(id);
        }
    }

    fn forget_failures(&mut self, id: u32) {
        if let Some(maps) = self.alive() {
            maps.forget_failures(id);
        }
    }

    fn write_slots(&mut self, base: u32, slots: &[Slot]) -> Result<(), MapError> {
        self.gate("writing SLOTS")?.write_slots(base, slots)
    }

    fn write_service(&mut self, index: u32, frontend: &Frontend) -> Result<(), MapError> {
        self.gate("writing SERVICES")?.write_service(index, frontend)
    }

    fn set_owner(&mut self, index: u32, owner: u32) -> Result<(), MapError> {
        self.gate("giving a record of SERVICES to another")?.set_owner(index, owner)
    }

    fn write_name(&mut self, index: u32, name: &Name) -> Result<(), MapError> {
        self.gate("writing NAMES")?.write_name(index, name)
    }

    fn note_generations(&mut self, last: Generations) {
        if let Some(maps) = self.alive() {
            maps.note_generations(last);
        }
    }

    fn note_gone(&mut self, opened: u64) {
        if let Some(maps) = self.alive() {
            maps.note_gone(opened);
        }
    }

    fn set_rules(&mut self, index: u32, rules: Rules) -> Result<(), MapError> {
        self.gate("setting rules in SERVICES")?.set_rules(index, rules)
    }

    fn switch_table(&mut self, index: u32, table: Table) -> Result<(), MapError> {
        self.gate("switching a table in SERVICES")?.switch_table(index, table)
    }

    fn retire_service(&mut self, index: u32) -> Result<(), MapError> {
        self.gate("retiring a record of SERVICES")?.retire_service(index)
    }

    fn insert_frontend(&mut self, key: &FrontendKey, value: FrontendValue) -> Result<(), MapError> {
        self.gate("inserting into FRONTENDS")?.insert_frontend(key, value)
    }

    fn remove_frontend(&mut self, key: &FrontendKey) -> Result<(), MapError> {
        self.gate("removing from FRONTENDS")?.remove_frontend(key)
    }

    fn insert_virtual_ip(&mut self, addr: Addr, bits: u8) -> Result<(), MapError> {
        self.gate("inserting into VIRTUAL_IPS")?.insert_virtual_ip(addr, bits)
    }

    fn remove_virtual_ip(&mut self, addr: Addr, bits: u8) -> Result<(), MapError> {
        self.gate("removing from VIRTUAL_IPS")?.remove_virtual_ip(addr, bits)
    }

    fn set_virtual_ip_count(&mut self, count: u32) -> Result<(), MapError> {
        self.gate("writing SETTINGS")?.set_virtual_ip_count(count)
    }

    fn frontend(&self, key: &FrontendKey) -> Option<FrontendValue> {
        self.maps.frontend(key)
    }

    fn slot(&self, index: u32) -> Option<Slot> {
        self.maps.slot(index)
    }

    fn backend(&self, id: u32) -> Option<Backend> {
        self.maps.backend(id)
    }

    fn counts(&self, id: u32) -> Counts {
        self.maps.counts(id)
    }

    fn refused(&self, index: u32) -> Refused {
        self.maps.refused(index)
    }
}

impl<M: Contents, F: FnMut(&'static str) -> bool> Contents for Faulty<M, F> {
    fn entries(&self) -> Result<Vec<(FrontendKey, FrontendValue)>, MapError> {
        self.maps.entries()
    }

    fn virtual_ips(&self) -> Result<Vec<(Addr, u8)>, MapError> {
        self.maps.virtual_ips()
    }

    fn there(&self, kind: Kind) -> u32 {
        self.maps.there(kind)
    }

    fn service(&self, index: u32) -> Option<Frontend> {
        self.maps.service(index)
    }

    fn name(&self, index: u32) -> Option<Name> {
        self.maps.name(index)
    }

    fn life(&self, id: u32) -> u64 {
        self.maps.life(id)
    }

    fn generations(&self) -> Generations {
        self.maps.generations()
    }

    fn gone(&self) -> u64 {
        self.maps.gone()
    }
}
