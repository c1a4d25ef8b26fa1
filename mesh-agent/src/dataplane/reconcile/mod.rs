//! Brings the maps to what the compiler wants, in an order in which nothing half done is ever
//! visible:
//!
//! 1. new backends, 2. the new extent of slots, 3. the service record, 4. the frontend, or the one
//!    store that switches a record to its new table, 5. a grace period, 6. the old extent, record
//!    and backend ids are free again.
//!
//! Any step may fail. What has been done stays accounted for, the service is remembered as
//! unfinished, and [`Reconciler::retry`] goes on from there.

mod extents;
#[cfg(test)]
mod tests;

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use mesh_common::{Addr, Backend, FrontendKey, FrontendValue, Slot, Table};

use super::alloc::IdPool;
use super::maps::{MapError, Maps};
use crate::compile::{BackendKey, Rows, TableKey, Tables};
use crate::model::ServiceName;
use extents::Extents;

/// What keeps a part of a service from being in the kernel.
#[derive(Debug, thiserror::Error)]
pub enum Problem {
    /// A map has no room.
    #[error("no room for {what}: {map} holds {limit}; what fitted goes on working")]
    Full {
        /// What did not fit.
        what: String,
        /// The map.
        map: &'static str,
        /// Its size.
        limit: u32,
    },
    /// The kernel refused a write.
    #[error("{0}; it is tried again")]
    Map(#[from] MapError),
}

/// What is in the maps for a frontend.
#[derive(Debug)]
struct HeldFrontend {
    owner: ServiceName,
    index: u32,
    generation: u64,
    table: Table,
    /// Whether `FRONTENDS` has it. Without it the record waits to be retired.
    named: bool,
}

/// What is in the maps for a service, besides its frontends.
#[derive(Debug, Default)]
struct Held {
    backends: HashMap<BackendKey, HeldBackend>,
    tables: HashMap<TableKey, Table>,
    frontends: HashSet<FrontendKey>,
}

#[derive(Debug)]
struct HeldBackend {
    id: u32,
    record: Backend,
}

/// How much of each map is used.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Usage {
    /// Entries of `FRONTENDS`.
    pub frontends: u32,
    /// Records of `SERVICES`.
    pub services: u32,
    /// Records of `SLOTS`.
    pub slots: u32,
    /// Records of `BACKENDS`.
    pub backends: u32,
}

/// The keeper of the maps.
#[derive(Debug)]
pub struct Reconciler<M> {
    maps: M,
    services: HashMap<ServiceName, Held>,
    frontends: HashMap<FrontendKey, HeldFrontend>,
    /// Service addresses in `FRONTENDS`, with the number of frontends that need each.
    addresses: HashMap<Addr, u32>,
    /// Those of them that no frontend may need any more.
    unused_addresses: HashSet<Addr>,
    extents: Extents,
    records: IdPool,
    backends: IdPool,
    /// The last generation given to a service record; 0 is none.
    generation: u64,
    /// The last generation given to a backend. It wraps after 2^32 backends: a stale pair of id and
    /// generation would have to survive exactly that many.
    backend_generation: u32,
    retired_records: Vec<u32>,
    waiting_records: Vec<u32>,
    /// Backend ids that nothing names, whose record is still to be cleared.
    clearing: Vec<u32>,
    /// What was wanted of services for which something failed.
    unfinished: HashMap<ServiceName, Arc<Tables>>,
}

impl<M: Maps> Reconciler<M> {
    /// Takes over maps that are empty.
    pub fn new(maps: M) -> Self {
        let capacity = maps.capacity();
        Self {
            maps,
            services: HashMap::new(),
            frontends: HashMap::new(),
            addresses: HashMap::new(),
            unused_addresses: HashSet::new(),
            extents: Extents::new(capacity.slots),
            records: IdPool::new(capacity.services),
            backends: IdPool::new(capacity.backends),
            generation: 0,
            backend_generation: 0,
            retired_records: Vec::new(),
            waiting_records: Vec::new(),
            clearing: Vec::new(),
            unfinished: HashMap::new(),
        }
    }

    /// The maps.
    pub fn maps(&self) -> &M {
        &self.maps
    }

    /// The maps, for tests that change how they behave.
    #[cfg(test)]
    fn maps_mut(&mut self) -> &mut M {
        &mut self.maps
    }

    /// How much of each map is used, including what waits for a grace period.
    pub fn usage(&self) -> Usage {
        let entries = self.frontends.len() + self.addresses.len();
        Usage {
            frontends: u32::try_from(entries).unwrap_or(u32::MAX),
            services: self.records.used(),
            slots: self.extents.used(),
            backends: self.backends.used(),
        }
    }

    /// The backends of a service and their ids.
    pub fn backends(&self, name: &ServiceName) -> impl Iterator<Item = (BackendKey, u32)> {
        let held = self.services.get(name);
        held.into_iter().flat_map(|held| held.backends.iter().map(|(key, held)| (*key, held.id)))
    }

    /// The frontends of a service that the kernel has.
    pub fn frontends(&self, name: &ServiceName) -> impl Iterator<Item = FrontendKey> {
        let held = self.services.get(name);
        held.into_iter()
            .flat_map(|held| held.frontends.iter().copied())
            .filter(|key| self.maps.frontend(key).is_some())
    }

    /// The service that holds a frontend.
    pub fn owner(&self, key: &FrontendKey) -> Option<&ServiceName> {
        self.frontends.get(key).map(|held| &held.owner)
    }

    /// Whether something failed and [`Reconciler::retry`] has work.
    pub fn is_unfinished(&self) -> bool {
        !self.unfinished.is_empty() || !self.clearing.is_empty()
    }

    /// Makes the kernel hold `wanted` for each of these services, and says what was in the way.
    ///
    /// All additions and switches of the batch come before all removals, so an address that moves
    /// from one service to another is served without a gap.
    pub fn apply(
        &mut self,
        wanted: Vec<(ServiceName, Arc<Tables>)>,
    ) -> Vec<(ServiceName, Vec<Problem>)> {
        let mut outcome = Vec::with_capacity(wanted.len());
        for (name, tables) in &wanted {
            let mut held = self.services.remove(name).unwrap_or_default();
            let mut problems = Vec::new();
            self.add(name, &mut held, tables, &mut problems);
            self.services.insert(name.clone(), held);
            outcome.push((name.clone(), problems));
        }
        for ((name, tables), (_, problems)) in wanted.into_iter().zip(&mut outcome) {
            let mut held = self.services.remove(&name).unwrap_or_default();
            self.remove(&name, &mut held, &tables, problems);
            if !held.backends.is_empty() || !held.tables.is_empty() || !held.frontends.is_empty() {
                self.services.insert(name.clone(), held);
            }
            if problems.is_empty() {
                self.unfinished.remove(&name);
            } else {
                self.unfinished.insert(name, tables);
            }
        }
        self.clear_backends();
        outcome
    }

    /// Tries again what failed.
    pub fn retry(&mut self) -> Vec<(ServiceName, Vec<Problem>)> {
        let wanted = self.unfinished.drain().collect();
        self.apply(wanted)
    }

    /// Starts a grace period for what was retired so far. `false` when there is nothing to wait
    /// for, or one is under way.
    ///
    /// The caller then waits until every program that is running now has ended, and calls
    /// [`Reconciler::end_grace`].
    pub fn begin_grace(&mut self) -> bool {
        if !self.waiting_records.is_empty() || self.extents.is_waiting() {
            return false;
        }
        self.waiting_records = std::mem::take(&mut self.retired_records);
        let extents = self.extents.begin_grace();
        extents || !self.waiting_records.is_empty()
    }

    /// Ends the grace period. `waited` says whether the wait succeeded; if not, what was retired
    /// waits for the next one.
    pub fn end_grace(&mut self, waited: bool) {
        if !waited {
            self.retired_records.append(&mut self.waiting_records);
            self.extents.abandon_grace();
            return;
        }
        for index in self.waiting_records.drain(..) {
            self.records.give(index);
        }
        self.extents.end_grace(&self.maps, &mut self.clearing);
        self.clear_backends();
    }

    // === additions ===

    fn add(
        &mut self,
        name: &ServiceName,
        held: &mut Held,
        wanted: &Tables,
        problems: &mut Vec<Problem>,
    ) {
        let ids: Vec<Option<(u32, u32)>> = wanted
            .backends
            .iter()
            .map(|backend| {
                self.hold_backend(held, backend).map_err(|problem| problems.push(problem)).ok()
            })
            .collect();
        let tables: Vec<Option<Table>> = wanted
            .tables
            .iter()
            .map(|(key, rows)| {
                self.hold_table(held, *key, rows, wanted, &ids)
                    .map_err(|problem| problems.push(problem))
                    .ok()
                    .flatten()
            })
            .collect();
        for &(key, table) in &wanted.frontends {
            // Without its table, a frontend stays as it is; the reason has been noted.
            let Some(Some(table)) = tables.get(table) else { continue };
            if let Err(problem) = self.hold_frontend(name, key, *table) {
                problems.push(problem);
            }
            // Also after a failure it may have changed hands.
            if self.owner(&key) == Some(name) {
                held.frontends.insert(key);
            }
        }
    }

    /// The id and generation of a backend, which is made or updated.
    fn hold_backend(
        &mut self,
        held: &mut Held,
        wanted: &crate::compile::Backend,
    ) -> Result<(u32, u32), Problem> {
        let record = |generation| Backend {
            addr: wanted.key.address.ip().into(),
            port: wanted.key.address.port().to_be(),
            protocol: wanted.key.protocol as u8,
            state: wanted.state as u8,
            generation,
            weight: u32::from(wanted.weight),
            pad: 0,
        };
        if let Some(backend) = held.backends.get_mut(&wanted.key) {
            let record = record(backend.record.generation);
            if record != backend.record {
                self.maps.write_backend(backend.id, &record)?;
                backend.record = record;
            }
            return Ok((backend.id, record.generation));
        }
        let Some(id) = self.backends.take() else {
            let what = format!("backend {}", wanted.key.address);
            let limit = self.maps.capacity().backends;
            return Err(Problem::Full { what, map: "BACKENDS", limit });
        };
        self.backend_generation = self.backend_generation.wrapping_add(1);
        let record = record(self.backend_generation);
        let written = self.maps.reset_stats(id).and_then(|()| self.maps.write_backend(id, &record));
        if let Err(error) = written {
            // Nothing names it.
            self.clearing.push(id);
            return Err(error.into());
        }
        self.extents.hold_backend(id);
        held.backends.insert(wanted.key, HeldBackend { id, record });
        Ok((id, record.generation))
    }

    /// The table for these rows: the one in force if it has them, otherwise a new one. Nothing
    /// when one of its backends could not be made.
    fn hold_table(
        &mut self,
        held: &mut Held,
        key: TableKey,
        rows: &Rows,
        wanted: &Tables,
        ids: &[Option<(u32, u32)>],
    ) -> Result<Option<Table>, Problem> {
        let now = held.tables.get(&key).copied();
        let table = match rows {
            Rows::Refuse(reason) => Table::refuse(*reason),
            Rows::Columns(rows) => {
                let Some(slots) = slots(rows, wanted, ids) else { return Ok(None) };
                if let Some(now) = now
                    && self.extents.holds(&self.maps, now, &slots)
                {
                    return Ok(Some(now));
                }
                let limit = self.maps.capacity().slots;
                let what = || format!("{} slots of port {}", slots.len(), key.port);
                let full = || Problem::Full { what: what(), map: "SLOTS", limit };
                self.extents.write(&mut self.maps, &slots)?.ok_or_else(full)?
            }
        };
        if now != Some(table) {
            held.tables.insert(key, table);
            if let Some(now) = now {
                self.extents.release(now);
            }
        }
        Ok(Some(table))
    }

    /// Makes a frontend lead to a table. A frontend of another service is taken over.
    fn hold_frontend(
        &mut self,
        name: &ServiceName,
        key: FrontendKey,
        table: Table,
    ) -> Result<(), Problem> {
        if let Some(held) = self.frontends.get_mut(&key) {
            if held.owner != *name {
                if let Some(loser) = self.services.get_mut(&held.owner) {
                    loser.frontends.remove(&key);
                }
                held.owner = name.clone();
            }
            if held.table != table {
                self.maps.switch_table(held.index, table)?;
                self.extents.acquire(table);
                self.extents.release(held.table);
                held.table = table;
            }
            if !held.named {
                let value =
                    FrontendValue { service: held.index, pad: 0, generation: held.generation };
                self.maps.insert_frontend(&key, value)?;
                held.named = true;
            }
            return Ok(());
        }
        let capacity = self.maps.capacity();
        let full = |map, limit| {
            let what = format!("{}:{}/tcp", key.addr.ip(), key.host_port());
            Problem::Full { what, map, limit }
        };
        let new_address = u32::from(!self.addresses.contains_key(&key.addr));
        if self.usage().frontends + 1 + new_address > capacity.frontends {
            return Err(full("FRONTENDS", capacity.frontends));
        }
        let index = self.records.take().ok_or_else(|| full("SERVICES", capacity.services))?;
        self.generation += 1;
        let generation = self.generation;
        let written = self.name(&key, index, generation, table);
        if let Err(error) = written {
            // No entry names the record, and none did.
            self.records.give(index);
            return Err(error.into());
        }
        *self.addresses.entry(key.addr).or_default() += 1;
        self.extents.acquire(table);
        let owner = name.clone();
        self.frontends.insert(key, HeldFrontend { owner, index, generation, table, named: true });
        Ok(())
    }

    /// Writes a new record and the entry that names it.
    fn name(
        &mut self,
        key: &FrontendKey,
        index: u32,
        generation: u64,
        table: Table,
    ) -> Result<(), MapError> {
        if !self.addresses.contains_key(&key.addr) {
            let value = FrontendValue { service: u32::MAX, pad: 0, generation: 0 };
            self.maps.insert_frontend(&FrontendKey::address_only(key.addr), value)?;
            self.addresses.insert(key.addr, 0);
            // Until the frontend itself is made; `drop_addresses` looks at the count.
            self.unused_addresses.insert(key.addr);
        }
        self.maps.write_service(index, key, generation, table)?;
        self.maps.insert_frontend(key, FrontendValue { service: index, pad: 0, generation })
    }

    // === removals ===

    fn remove(
        &mut self,
        name: &ServiceName,
        held: &mut Held,
        wanted: &Tables,
        problems: &mut Vec<Problem>,
    ) {
        let frontends: HashSet<FrontendKey> =
            wanted.frontends.iter().map(|(key, _)| *key).collect();
        held.frontends.retain(|key| {
            if frontends.contains(key) {
                return true;
            }
            self.drop_frontend(key).map_err(|error| problems.push(error.into())).is_err()
        });
        held.tables.retain(|key, table| {
            let keep = wanted.tables.iter().any(|(wanted, _)| wanted == key);
            if !keep {
                self.extents.release(*table);
            }
            keep
        });
        let backends: HashSet<BackendKey> = wanted.backends.iter().map(|b| b.key).collect();
        held.backends.retain(|key, backend| {
            let keep = backends.contains(key);
            if !keep && self.extents.release_backend(backend.id) {
                self.clearing.push(backend.id);
            }
            keep
        });
        self.drop_addresses(problems);
        tracing::debug!(service = %name, problems = problems.len(), "reconciled");
    }

    fn drop_frontend(&mut self, key: &FrontendKey) -> Result<(), MapError> {
        let Some(held) = self.frontends.get_mut(key) else { return Ok(()) };
        if held.named {
            self.maps.remove_frontend(key)?;
            held.named = false;
        }
        self.maps.retire_service(held.index)?;
        self.retired_records.push(held.index);
        self.extents.release(held.table);
        self.frontends.remove(key);
        if let Some(count) = self.addresses.get_mut(&key.addr) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                self.unused_addresses.insert(key.addr);
            }
        }
        Ok(())
    }

    /// Removes the entries of addresses that no frontend needs any more.
    fn drop_addresses(&mut self, problems: &mut Vec<Problem>) {
        for addr in std::mem::take(&mut self.unused_addresses) {
            if self.addresses.get(&addr).is_none_or(|&count| count > 0) {
                continue;
            }
            match self.maps.remove_frontend(&FrontendKey::address_only(addr)) {
                Ok(()) => {
                    self.addresses.remove(&addr);
                }
                Err(error) => {
                    self.unused_addresses.insert(addr);
                    problems.push(error.into());
                }
            }
        }
    }

    /// Clears the records of backends that nothing names, and gives their ids back.
    fn clear_backends(&mut self) {
        let (maps, ids) = (&mut self.maps, &mut self.backends);
        self.clearing.retain(|&id| {
            let cleared = maps.write_backend(id, &Backend::default()).is_ok();
            if cleared {
                ids.give(id);
            }
            !cleared
        });
    }
}

/// The slots for these rows; nothing when a backend of theirs has no id.
fn slots(
    rows: &[(usize, mesh_common::alias::Column)],
    wanted: &Tables,
    ids: &[Option<(u32, u32)>],
) -> Option<Vec<Slot>> {
    rows.iter()
        .map(|&(place, column)| {
            let (backend, generation) = ids[place]?;
            let address = wanted.backends[place].key.address;
            Some(Slot {
                addr: address.ip().into(),
                port: address.port().to_be(),
                pad: 0,
                backend,
                generation,
                threshold: column.threshold,
                alias: column.alias,
                pad2: 0,
            })
        })
        .collect()
}
