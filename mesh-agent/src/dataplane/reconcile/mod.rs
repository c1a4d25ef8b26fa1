//! Brings the maps to what the compiler wants, in an order in which nothing half done is ever
//! visible:
//!
//! 1. new backends, 2. the new extent of slots, 3. the service record, 4. the frontend, or the one
//!    store that switches a record to its new table, 5. a grace period, 6. the old extent, record
//!    and backend ids are free again.
//!
//! Any step may fail. What has been done stays accounted for, the service is remembered as
//! unfinished, and [`Reconciler::retry`] goes on from there.

mod absent;
mod adopt;
mod extents;
mod giver;
mod hold;
mod names;
mod problem;
mod ranges;
mod release;
mod rename;
mod share;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use mesh_common::{Addr, Backend, FrontendKey, Policy, Table};

use super::alloc::IdPool;
use super::maps::{Generations, Kind, Maps, Refused};
use crate::compile::{BackendKey, Rules, TableKey, Tables};
use crate::model::ServiceName;
use absent::Absent;
pub use absent::Returned;
pub use adopt::Adopted;
use extents::Extents;
use giver::Former;
use names::Names;
pub use names::UNNAMED;
pub use problem::Problem;
use share::Shares;

/// A service, and its record of `NAMES`.
#[derive(Clone, Copy)]
struct Owner<'a> {
    name: &'a ServiceName,
    id: u32,
}

/// What is in the maps for a frontend.
#[derive(Debug)]
struct HeldFrontend {
    owner: ServiceName,
    /// As the record says it.
    owner_id: u32,
    index: u32,
    generation: u64,
    table: Table,
    rules: Rules,
    /// Whether `FRONTENDS` has it. Without it the record waits to be retired.
    named: bool,
    /// When this agent had made it, in nanoseconds of `CLOCK_MONOTONIC`; 0 when a former one had.
    since: u64,
}

/// What is in the maps for a service.
#[derive(Debug, Default)]
struct Held {
    /// In a tree, which has little more room than it needs for few.
    backends: BTreeMap<BackendKey, HeldBackend>,
    tables: HashMap<TableKey, Table>,
    frontends: HashSet<FrontendKey>,
    /// How many of the backends that it wants it may have.
    granted: usize,
    /// Attempts in a row that found ids missing that it was granted.
    waits: u32,
    /// When backends are ejected.
    rules: Rules,
}

#[derive(Debug)]
struct HeldBackend {
    id: u32,
    record: Backend,
}

/// So many services at once are worth looking at together first.
const LARGE: usize = 64;

/// A backend that a service has no more.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LetGo {
    /// The service.
    pub service: ServiceName,
    /// Which of its backends.
    pub key: BackendKey,
    /// The id that it had.
    pub id: u32,
    /// With this generation, which no other backend of this id has.
    pub generation: u32,
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
    /// Entries of `VIRTUAL_IPS`.
    pub virtual_ips: u32,
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
    shares: Shares,
    names: Names,
    records: IdPool,
    backends: IdPool,
    /// The last generations that were given.
    last: Generations,
    retired_records: Vec<u32>,
    waiting_records: Vec<u32>,
    /// Backend ids that no service has any more, and how many grace periods had begun when their
    /// counters became nobody's: after the next one, no program counts for them.
    going: HashMap<u32, u64>,
    /// Those of them that nothing names either, before and during their grace period.
    retired_backends: Vec<u32>,
    waiting_backends: Vec<u32>,
    /// Backend ids that nothing names and nobody counts for, whose record is still to be cleared.
    clearing: Vec<u32>,
    /// Backends that services let go of, until somebody asks.
    let_go: Vec<LetGo>,
    /// The last of them.
    former: Former,
    /// What is known of failures of those that are gone.
    absent: Absent,
    /// Backends that came back with an ejection, until somebody asks.
    returned: Vec<Returned>,
    /// How many grace periods have begun.
    graces: u64,
    /// Connects that were given to backends that are gone.
    gone_opened: u64,
    virtual_ips: u32,
    /// Services that are called something else now, by their former names, which records may have still.
    renamed: HashMap<ServiceName, ServiceName>,
    /// What was wanted of services for which something failed.
    unfinished: HashMap<ServiceName, Arc<Tables>>,
}

impl<M: Maps> Reconciler<M> {
    /// Takes over maps that are empty. There are at least two slots for each backend: one in force,
    /// and one in a table that is being replaced.
    pub fn new(maps: M) -> Self {
        let capacity = maps.capacity();
        debug_assert!(capacity.slots / 2 >= capacity.backends, "{capacity:?}");
        Self {
            maps,
            services: HashMap::new(),
            frontends: HashMap::new(),
            addresses: HashMap::new(),
            unused_addresses: HashSet::new(),
            extents: Extents::new(
                capacity.slots,
                capacity.slots.saturating_sub(capacity.backends.saturating_mul(2)),
            ),
            shares: Shares::new(capacity.backends),
            names: Names::new(capacity.services),
            records: IdPool::new(capacity.services),
            backends: IdPool::new(capacity.backends),
            last: Generations::default(),
            retired_records: Vec::new(),
            waiting_records: Vec::new(),
            going: HashMap::new(),
            retired_backends: Vec::new(),
            waiting_backends: Vec::new(),
            let_go: Vec::new(),
            former: Former::default(),
            absent: Absent::default(),
            returned: Vec::new(),
            graces: 0,
            gone_opened: 0,
            clearing: Vec::new(),
            virtual_ips: 0,
            renamed: HashMap::new(),
            unfinished: HashMap::new(),
        }
    }

    /// The maps.
    pub fn maps(&self) -> &M {
        &self.maps
    }

    /// The maps, for the agent that comes after this one.
    pub fn into_maps(self) -> M {
        self.maps
    }

    /// The last generations that were given.
    #[cfg(test)]
    fn last(&self) -> Generations {
        self.last
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
            virtual_ips: self.virtual_ips,
        }
    }

    /// The backends of a service and their ids.
    pub fn backends(&self, name: &ServiceName) -> impl Iterator<Item = (BackendKey, u32)> {
        let held = self.services.get(name);
        held.into_iter().flat_map(|held| held.backends.iter().map(|(key, held)| (*key, held.id)))
    }

    /// What else the programs go by for a service.
    pub fn rules(&self, name: &ServiceName) -> Rules {
        self.services.get(name).map(|held| held.rules).unwrap_or_default()
    }

    /// The frontends of a service that the kernel has.
    pub fn frontends(&self, name: &ServiceName) -> impl Iterator<Item = FrontendKey> {
        let held = self.services.get(name);
        held.into_iter()
            .flat_map(|held| held.frontends.iter().copied())
            .filter(|key| self.maps.frontend(key).is_some())
    }

    /// The services of which the kernel holds something.
    pub fn services(&self) -> impl Iterator<Item = &ServiceName> {
        self.services.keys()
    }

    /// Which source a service was of when the kernel was last told ([`Tables::source`]).
    pub fn source(&self, name: &ServiceName) -> u64 {
        self.names.source(name)
    }

    /// Which backend of a service this id is, if it still is the one with this generation.
    pub fn backend(&self, name: &ServiceName, id: u32, generation: u32) -> Option<BackendKey> {
        let mut backends = self.services.get(name)?.backends.iter();
        let found = backends.find(|(_, b)| b.id == id && b.record.generation == generation);
        found.map(|(key, _)| *key)
    }

    /// The service that holds a frontend.
    pub fn owner(&self, key: &FrontendKey) -> Option<&ServiceName> {
        self.frontends.get(key).map(|held| &held.owner)
    }

    /// A service, of this policy of ejection, lets go of a backend. Connections to it that are still open
    /// count no more.
    fn let_go(&mut self, gone: LetGo, policy: Policy) {
        self.retire_backend(gone.id);
        self.remember(&gone, policy);
        self.former.note(&gone);
        self.let_go.push(gone);
    }

    /// The backends that services have let go of since this was asked last.
    pub fn take_let_go(&mut self) -> Vec<LetGo> {
        std::mem::take(&mut self.let_go)
    }

    /// Whether something failed and [`Reconciler::retry`] has work.
    pub fn is_unfinished(&self) -> bool {
        !self.unfinished.is_empty() || !self.clearing.is_empty() || self.names.is_unfinished()
    }

    /// Makes the kernel hold `wanted` for each of these services, and says what was in the way.
    ///
    /// All additions and switches of the batch come before all removals, so an address that moves
    /// from one service to another is served without a gap. When its new owner could not take it
    /// over, its former one keeps it until that succeeds.
    pub fn apply(
        &mut self,
        wanted: Vec<(ServiceName, Arc<Tables>)>,
    ) -> Vec<(ServiceName, Vec<Problem>)> {
        self.rename(&wanted);
        // What is given back first can be granted to others of the batch.
        for (name, tables) in &wanted {
            self.shares.shrink(name, tables.backends.len());
        }
        if wanted.len() >= LARGE {
            self.make_room(&wanted);
        }
        let mut outcome = Vec::with_capacity(wanted.len());
        for (name, tables) in &wanted {
            let mut problems = Vec::new();
            // Of what holds nothing, and is to hold nothing, nobody asks.
            let is_any = !tables.is_empty() || self.services.contains_key(name);
            let source = if tables.is_empty() { self.names.source(name) } else { tables.source };
            let (id, problem) = match is_any {
                true => self.names.take(&mut self.maps, name, source),
                false => (UNNAMED, None),
            };
            problems.extend(problem);
            let mut held = self.services.remove(name).unwrap_or_default();
            self.hold(Owner { name, id }, &mut held, tables, &mut problems);
            self.services.insert(name.clone(), held);
            if problems.is_empty() {
                self.unfinished.remove(name);
            } else {
                self.unfinished.insert(name.clone(), Arc::clone(tables));
            }
            outcome.push((name.clone(), problems));
        }
        let claimed: HashSet<FrontendKey> = self
            .unfinished
            .values()
            .flat_map(|tables| tables.frontends.iter().map(|(key, _)| *key))
            .collect();
        for ((name, tables), (_, problems)) in wanted.into_iter().zip(&mut outcome) {
            let Some(mut held) = self.services.remove(&name) else { continue };
            let before = problems.len();
            let mut kept = self.release(&name, &mut held, &tables, &claimed, problems);
            if held.is_empty() {
                kept |= !self.give_name(&name);
            } else {
                self.services.insert(name.clone(), held);
            }
            if kept || problems.len() > before {
                self.unfinished.insert(name, tables);
            }
        }
        self.clear_backends();
        self.names.clear(&mut self.maps);
        outcome
    }

    /// Has the arrays grow to what services take that are not there yet, all of them at once.
    fn make_room(&mut self, wanted: &[(ServiceName, Arc<Tables>)]) {
        let number = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
        let Usage { services, slots, backends, .. } = self.usage();
        let mut needs = [
            (Kind::Services, services),
            (Kind::Slots, slots),
            (Kind::Backends, backends),
            (Kind::Names, self.names.used()),
        ];
        for (_, tables) in wanted.iter().filter(|(name, _)| !self.services.contains_key(name)) {
            let rows: usize = tables.tables.iter().map(|(_, rows)| rows.len()).sum();
            let more = [tables.frontends.len(), rows, tables.backends.len(), 1];
            for ((_, need), more) in needs.iter_mut().zip(more) {
                *need = need.saturating_add(number(more));
            }
        }
        let capacity = self.maps.capacity();
        let most = [capacity.services, capacity.slots, capacity.backends, capacity.services];
        for ((_, need), most) in needs.iter_mut().zip(most) {
            *need = most.min(*need);
        }
        self.maps.reach_all(&needs);
    }

    /// Tries again what failed.
    pub fn retry(&mut self) -> Vec<(ServiceName, Vec<Problem>)> {
        let wanted =
            self.unfinished.iter().map(|(name, tables)| (name.clone(), Arc::clone(tables)));
        self.apply(wanted.collect())
    }

    /// Starts a grace period for what was retired so far. `false` when there is nothing to wait
    /// for, or one is under way.
    ///
    /// The caller then waits until every program that is running now has ended, and calls
    /// [`Reconciler::end_grace`].
    pub fn begin_grace(&mut self) -> bool {
        let waits = |ids: &Vec<u32>| !ids.is_empty();
        if waits(&self.waiting_records)
            || waits(&self.waiting_backends)
            || self.extents.is_waiting()
        {
            return false;
        }
        self.waiting_records = std::mem::take(&mut self.retired_records);
        self.waiting_backends = std::mem::take(&mut self.retired_backends);
        let extents = self.extents.begin_grace();
        let begins = extents || waits(&self.waiting_records) || waits(&self.waiting_backends);
        self.graces += u64::from(begins);
        begins
    }

    /// Ends the grace period. `waited` says whether the wait succeeded; if not, what was retired
    /// waits for the next one.
    pub fn end_grace(&mut self, waited: bool) {
        if !waited {
            self.retired_records.append(&mut self.waiting_records);
            self.retired_backends.append(&mut self.waiting_backends);
            self.extents.abandon_grace();
            return;
        }
        for index in self.waiting_records.drain(..) {
            self.records.give(index);
        }
        self.clearing.append(&mut self.waiting_backends);
        let mut unnamed = Vec::new();
        self.extents.end_grace(&self.maps, &mut unnamed);
        for id in unnamed {
            // A service may have let go of it while this grace period was under way.
            let counted_out = self.going.get(&id).is_some_and(|&before| before < self.graces);
            if counted_out { &mut self.clearing } else { &mut self.retired_backends }.push(id);
        }
        self.clear_backends();
    }

    fn retire_backend(&mut self, id: u32) {
        self.maps.retire_stats(id);
        self.going.insert(id, self.graces);
        if self.extents.release_backend(id) {
            self.retired_backends.push(id);
        }
    }

    /// Clears the records of backends that nothing names, and gives their ids back.
    fn clear_backends(&mut self) {
        let (maps, ids) = (&mut self.maps, &mut self.backends);
        self.clearing.retain(|&id| {
            let cleared = maps.write_backend(id, &Backend::default()).is_ok();
            if cleared {
                self.gone_opened = self.gone_opened.wrapping_add(maps.opened(id));
                maps.note_gone(self.gone_opened);
                self.going.remove(&id);
                ids.give(id);
            }
            !cleared
        });
    }

    /// Connects that were given a backend, as far as all of them are counted: each backend that is
    /// there or was, besides those that go at this moment.
    pub fn opened(&self) -> u64 {
        let going = self.going.keys().map(|&id| self.maps.opened(id));
        let held = self.services.values().flat_map(|held| held.backends.values());
        let held = held.map(|backend| self.maps.opened(backend.id));
        // What was found in the maps may be anything.
        held.chain(going).fold(self.gone_opened, u64::wrapping_add)
    }

    /// Connects to the frontends of a service that were refused, for whatever reason.
    pub fn refusals(&self, name: &ServiceName) -> u64 {
        let keys = self.services.get(name).into_iter().flat_map(|held| &held.frontends);
        keys.flat_map(|key| self.refused(key)).fold(0, u64::wrapping_add)
    }

    /// Connects to a frontend that were refused, by reason.
    pub fn refused(&self, key: &FrontendKey) -> Refused {
        self.frontends.get(key).map(|held| self.maps.refused(held.index)).unwrap_or_default()
    }
}

// === impl Held ===

impl Held {
    fn is_empty(&self) -> bool {
        let holds_nothing =
            self.backends.is_empty() && self.tables.is_empty() && self.frontends.is_empty();
        // One that waits counts how often it has.
        holds_nothing && self.waits == 0
    }
}
