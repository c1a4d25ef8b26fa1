//! The additions: backends, tables, frontends, in this order.

use std::net::SocketAddr;

use mesh_common::alias::Column;
use mesh_common::maglev::{self, Size};
use mesh_common::{
    Addr, Algorithm, Backend, FrontendKey, FrontendValue, Marks, Policy, Reason, Slot, Table,
};

use super::absent::Outs;
use super::extents::{Content, Written};
use super::{Held, HeldBackend, HeldFrontend, Owner, Problem, Reconciler};
use crate::compile::{self, Rows, Rules, TableKey, Tables};
use crate::dataplane::clock;
use crate::dataplane::maps::{Frontend, Kind, MapError, Maps};
use crate::model::ServiceName;

/// How many attempts a service waits for ids that it was granted.
const PATIENCE: u32 = 3;

/// What leads nowhere, but says that an address is some service's.
pub(super) const ADDRESS: FrontendValue =
    FrontendValue { service: u32::MAX, pad: 0, generation: 0 };

/// Id and generation of each wanted backend that could be had, in their order.
type Ids = [Option<(u32, u32)>];

impl<M: Maps> Reconciler<M> {
    /// Makes what is wanted and not there, and switches frontends to it.
    pub(super) fn hold(
        &mut self,
        owner: Owner<'_>,
        held: &mut Held,
        wanted: &Tables,
        problems: &mut Vec<Problem>,
    ) {
        self.maps.forget_shortage();
        let (ids, busy) = self.hold_backends(owner, held, wanted, problems);
        let mut missing = 0;
        let mut tables = Vec::with_capacity(wanted.tables.len());
        for (key, rows) in &wanted.tables {
            // For the milliseconds that those take, what is in force stays so.
            let now = (held.tables.get(key).copied(), 0);
            let table = match busy {
                true => Ok(now),
                false => self.hold_table(held, *key, rows, wanted, &ids, problems),
            };
            let (table, left_out) = table.unwrap_or_else(|error| {
                problems.push(error.into());
                (None, 0)
            });
            missing += left_out;
            tables.push(table);
        }
        if missing > 0 {
            problems.push(Problem::Full {
                what: "slots",
                missing,
                of: wanted.tables.iter().map(|(_, rows)| rows.len()).sum(),
                map: "SLOTS",
                limit: self.maps.capacity().slots,
                note: ", and what is free is in pieces",
            });
        }
        self.hold_frontends(owner, held, wanted, &tables, problems);
        if let Some(shortage) = self.maps.shortage()
            && !problems.is_empty()
        {
            problems.push(Problem::Memory(shortage.to_owned()));
        }
        // One that goes says nothing about ejection: it may come back.
        if wanted.is_empty() {
            return;
        }
        // Nothing is out where nothing is to be.
        if held.rules.policy != wanted.rules.policy && wanted.rules.policy == Policy::OFF {
            held.backends.values().for_each(|backend| self.maps.forget_failures(backend.id));
        }
        if wanted.rules.policy == Policy::OFF {
            self.absent.forget_all(owner.name);
        }
        held.rules = wanted.rules;
    }

    // === backends ===

    /// Also tells whether some that were granted have no id yet: those that went still wait for
    /// running programs, or a write failed.
    fn hold_backends(
        &mut self,
        owner: Owner<'_>,
        held: &mut Held,
        wanted: &Tables,
        problems: &mut Vec<Problem>,
    ) -> (Vec<Option<(u32, u32)>>, bool) {
        let granted = self.shares.grow(owner.name, wanted.backends.len());
        let (mut busy, mut ids) = (false, Vec::with_capacity(wanted.backends.len()));
        let mut outs = Outs::new();
        for place in 0..granted {
            let id = self.hold_backend(owner, held, (wanted, place), &mut outs, problems);
            busy |= id.is_none();
            ids.push(id);
        }
        // Services that wait for one another would wait for ever: after some attempts, each goes on
        // with what it has, and what it had before is free for the others.
        held.waits = if busy { held.waits + 1 } else { 0 };
        if busy {
            problems.push(Problem::Busy { map: "BACKENDS" });
            // Nobody knows when there will be memory.
            busy = held.waits <= PATIENCE && self.maps.shortage().is_none();
        }
        ids.resize(wanted.backends.len(), None);
        held.granted = granted;
        if granted < wanted.backends.len() {
            problems.push(Problem::Full {
                what: "backends",
                missing: wanted.backends.len() - granted,
                of: wanted.backends.len(),
                map: "BACKENDS",
                limit: self.maps.capacity().backends,
                note: ", of which as many as the largest service has stay free for its replacement",
            });
        }
        (ids, busy)
    }

    /// The id and generation of a backend, which is made or updated; nothing when that has to wait.
    fn hold_backend(
        &mut self,
        Owner { name, id: owner }: Owner<'_>,
        held: &mut Held,
        (tables, place): (&Tables, usize),
        outs: &mut Outs,
        problems: &mut Vec<Problem>,
    ) -> Option<(u32, u32)> {
        let wanted = &tables.backends[place];
        let record = |generation| Backend {
            addr: wanted.key.address.ip().into(),
            port: wanted.key.address.port().to_be(),
            weight: wanted.weight,
            protocol: wanted.key.protocol as u8,
            marks: Marks::of(wanted.state).listed(wanted.listed).by_command(wanted.by_command),
            service_port: wanted.key.port,
            generation,
            owner,
        };
        if let Some(backend) = held.backends.get_mut(&wanted.key) {
            let record = record(backend.record.generation);
            if record != backend.record {
                match self.maps.write_backend(backend.id, &record) {
                    Ok(()) => backend.record = record,
                    // No program decides by this record: the backend can be used all the same.
                    Err(error) => problems.push(error.into()),
                }
            }
            return Some((backend.id, record.generation));
        }
        let maps = &mut self.maps;
        let id = self.backends.take(|id| maps.reach(Kind::Backends, id + 1) > id)?;
        // 0 says that the id is nobody's.
        self.last.backend = self.last.backend.wrapping_add(1).max(1);
        self.maps.note_generations(self.last);
        let record = record(self.last.backend);
        let start = self.start(name, held, tables, place, outs);
        let written = self
            .maps
            .reset_stats(id, record.generation, start.ejection)
            .and_then(|()| self.maps.write_backend(id, &record));
        if let Err(error) = written {
            // Nothing names it, and nothing ever did.
            self.maps.retire_stats(id);
            self.clearing.push(id);
            problems.push(error.into());
            return None;
        }
        self.extents.hold_backend(id);
        self.started(name, wanted.key, start);
        held.backends.insert(wanted.key, HeldBackend { id, record });
        Some((id, record.generation))
    }

    // === tables ===

    /// The table for these rows: the one in force if it has them, otherwise a new one; nothing when
    /// that has to wait a moment. Also says how many rows had to be left out for lack of slots.
    ///
    /// Whatever does not fit, endpoints that are gone are never kept: a table is made as large as
    /// there is room for, and one that cannot be made at all refuses.
    fn hold_table(
        &mut self,
        held: &mut Held,
        key: TableKey,
        rows: &Rows,
        wanted: &Tables,
        ids: &Ids,
        problems: &mut Vec<Problem>,
    ) -> Result<(Option<Table>, usize), MapError> {
        let now = held.tables.get(&key).copied();
        let (table, left_out) = match rows {
            Rows::Refuse(reason) => (Some(Table::refuse(*reason)), 0),
            Rows::Candidates(candidates) => {
                let row = |candidate: &compile::Candidate| {
                    let compile::Candidate { place, weight } = *candidate;
                    Some(Row { backend: &wanted.backends[place], weight, id: ids[place]? })
                };
                let rows = candidates.iter().filter_map(row).collect();
                self.write_table(now, rows, wanted.algorithm, problems)?
            }
        };
        if let Some(table) = table.filter(|table| now != Some(*table)) {
            held.tables.insert(key, table);
            // The same slots, chosen from by another algorithm, go on being held.
            if let Some(now) = now.filter(|now| table.is_empty() || now.base() != table.base()) {
                self.extents.release(now);
            }
        }
        Ok((table, left_out))
    }

    fn write_table(
        &mut self,
        now: Option<Table>,
        mut rows: Vec<Row<'_>>,
        mut algorithm: Algorithm,
        problems: &mut Vec<Problem>,
    ) -> Result<(Option<Table>, usize), MapError> {
        let before = now.filter(|now| now.algorithm().is_hash()).map(Table::size);
        let mut size = Size::of(rows.len()).max(before.unwrap_or_default());
        let all = slots(&rows);
        loop {
            // What is there already, chosen from as it should be.
            let is_hash = algorithm.is_hash();
            let same = now.filter(|now| !now.is_empty() && now.algorithm().is_hash() == is_hash);
            let same = same.map(|now| now.by(algorithm));
            // The same backends in the same order have the same entries, which take a while to find.
            if let Some(same) = same.filter(|same| is_hash && same.size() == size)
                && self.extents.begins(&self.maps, same, &slots(&rows))
            {
                return Ok((Some(same), all.len() - rows.len()));
            }
            let Some(content) = content(&rows, algorithm, size) else {
                problems.push(Problem::Entries { limit: self.maps.capacity().slots });
                algorithm = Algorithm::Random;
                continue;
            };
            let left_out = all.len() - content.backends;
            if content.slots.is_empty() {
                return Ok((Some(Table::refuse(Reason::NoRoom)), left_out));
            }
            if let Some(same) = same
                && self.extents.holds(&self.maps, same, &content)
            {
                return Ok((Some(same), left_out));
            }
            let room = match self.extents.write(&mut self.maps, &content, now)? {
                Written::Table(table) => return Ok((Some(table.by(algorithm)), left_out)),
                Written::Room(room) => room,
                Written::Busy => {
                    problems.push(Problem::Busy { map: "SLOTS" });
                    return Ok((same.or(now), 0));
                }
            };
            // Fewer entries come before none, and those before fewer backends.
            if is_hash {
                match size.smaller() {
                    Some(smaller) => size = smaller,
                    None => {
                        problems.push(Problem::Entries { limit: self.maps.capacity().slots });
                        algorithm = Algorithm::Random;
                    }
                }
                continue;
            }
            if let Some(same) = same
                && self.extents.is_as_good(&self.maps, same, &all, room)
            {
                return Ok((Some(same), all.len() - same.len() as usize));
            }
            rows.truncate(content.backends.min(room as usize));
        }
    }

    // === frontends ===

    fn hold_frontends(
        &mut self,
        owner: Owner<'_>,
        held: &mut Held,
        wanted: &Tables,
        tables: &[Option<Table>],
        problems: &mut Vec<Problem>,
    ) {
        let mut missing = 0;
        for &(key, table) in &wanted.frontends {
            // Without its table, a frontend stays as it is; the reason has been noted.
            let Some(Some(table)) = tables.get(table) else { continue };
            match self.hold_frontend(owner, key, *table, wanted.rules) {
                Ok(true) => {}
                Ok(false) => missing += 1,
                Err(error) => problems.push(error.into()),
            }
            // Also after a failure it may have changed hands.
            if self.owner(&key) == Some(owner.name) {
                held.frontends.insert(key);
            }
        }
        if missing > 0 {
            problems.push(Problem::Full {
                what: "frontends",
                missing,
                of: wanted.frontends.len(),
                map: "FRONTENDS",
                limit: self.maps.capacity().frontends.min(self.maps.capacity().services),
                note: ", where each address counts too",
            });
        }
    }

    /// Makes a frontend lead to a table. A frontend of another service is taken over. `false` when
    /// there is no room.
    fn hold_frontend(
        &mut self,
        owner: Owner<'_>,
        key: FrontendKey,
        table: Table,
        rules: Rules,
    ) -> Result<bool, MapError> {
        if self.frontends.get(&key).is_some_and(|held| held.owner != *owner.name && held.named)
            && self.take_over(owner, key, table, rules)?
        {
            return Ok(true);
        }
        if let Some(held) = self.frontends.get_mut(&key) {
            if held.rules != rules {
                self.maps.set_rules(held.index, rules)?;
                held.rules = rules;
            }
            if held.table != table {
                self.maps.switch_table(held.index, table)?;
                self.extents.acquire(table);
                self.extents.release(held.table);
                held.table = table;
            }
            if held.owner_id != owner.id {
                self.maps.set_owner(held.index, owner.id)?;
                held.owner_id = owner.id;
            }
            if held.owner != *owner.name {
                let loser = std::mem::replace(&mut held.owner, owner.name.clone());
                self.disown(&loser, &key);
            }
            let Some(held) = self.frontends.get_mut(&key) else { return Ok(true) };
            if !held.named {
                let value =
                    FrontendValue { service: held.index, pad: 0, generation: held.generation };
                self.maps.insert_frontend(&key, value)?;
                held.named = true;
            }
            return Ok(true);
        }
        let new_address = u32::from(!self.addresses.contains_key(&key.addr));
        if self.usage().frontends + 1 + new_address > self.maps.capacity().frontends {
            return Ok(false);
        }
        let Some(held) = self.make_frontend(owner, key, table, rules)? else { return Ok(false) };
        *self.addresses.entry(key.addr).or_default() += 1;
        self.frontends.insert(key, held);
        Ok(true)
    }

    /// A new record, and the entry that names it, perhaps in place of one that names another. Nothing
    /// when there is no record left.
    fn make_frontend(
        &mut self,
        owner: Owner<'_>,
        key: FrontendKey,
        table: Table,
        rules: Rules,
    ) -> Result<Option<HeldFrontend>, MapError> {
        let maps = &mut self.maps;
        let reach = |index| maps.reach(Kind::Services, index + 1) > index;
        let Some(index) = self.records.take(reach) else { return Ok(None) };
        // 0 says that a record is nobody's. Only somebody else can have written so high a number.
        self.last.service = self.last.service.wrapping_add(1).max(1);
        self.maps.note_generations(self.last);
        let generation = self.last.service;
        let frontend = Frontend { key, generation, table, rules, owner: owner.id };
        if let Err(error) = self.name(index, &frontend) {
            // No entry names the record, and none did.
            self.records.give(index);
            return Err(error);
        }
        self.extents.acquire(table);
        let (owner, owner_id) = (owner.name.clone(), owner.id);
        let since = clock::monotonic();
        let held =
            HeldFrontend { owner, owner_id, index, generation, table, rules, named: true, since };
        Ok(Some(held))
    }

    /// Gives a frontend of another service a record of its own, with a generation of its own: what clients
    /// and sockets have of the former owner is not this service's. `false` when there is no record left.
    fn take_over(
        &mut self,
        owner: Owner<'_>,
        key: FrontendKey,
        table: Table,
        rules: Rules,
    ) -> Result<bool, MapError> {
        let Some(held) = self.make_frontend(owner, key, table, rules)? else { return Ok(false) };
        let Some(former) = self.frontends.insert(key, held) else { return Ok(true) };
        self.disown(&former.owner, &key);
        self.extents.release(former.table);
        self.retired_records.push(former.index);
        self.maps.retire_service(former.index)?;
        Ok(true)
    }

    /// A frontend is another service's now.
    fn disown(&mut self, loser: &ServiceName, key: &FrontendKey) {
        if let Some(others) = self.services.get_mut(loser) {
            others.frontends.remove(key);
            if others.is_empty() {
                self.services.remove(loser);
                self.names.give(loser);
            }
        }
    }

    /// Writes a new record and the entry that names it.
    fn name(&mut self, index: u32, frontend: &Frontend) -> Result<(), MapError> {
        let Frontend { key, generation, .. } = *frontend;
        if !self.addresses.contains_key(&key.addr) {
            self.maps.insert_frontend(&FrontendKey::address_only(key.addr), ADDRESS)?;
            self.addresses.insert(key.addr, 0);
            // Until the frontend itself is made; `drop_addresses` looks at the count.
            self.unused_addresses.insert(key.addr);
        }
        self.maps.write_service(index, frontend)?;
        self.maps.insert_frontend(&key, FrontendValue { service: index, pad: 0, generation })
    }
}

/// A row of a table: a backend with its weight there, its id and generation.
#[derive(Clone, Copy)]
struct Row<'a> {
    backend: &'a compile::Backend,
    weight: u16,
    id: (u32, u32),
}

/// What a table is to hold; no slot when no row has a weight, and nothing at all when there are too many
/// for a consistent hash.
fn content(rows: &[Row<'_>], algorithm: Algorithm, size: Size) -> Option<Content> {
    let mut slots = slots(rows);
    let backends = slots.len();
    if algorithm.is_hash() && backends > 0 {
        let names: Vec<u64> = rows.iter().map(|row| name(row.backend.key.address)).collect();
        let weights: Vec<u16> = rows.iter().map(|row| row.weight).collect();
        slots.extend(compile::entries(&names, &weights, size)?);
    }
    Some(Content { slots, backends, size })
}

/// What a backend is called in the tables of consistent hashes, on every node alike.
fn name(address: SocketAddr) -> u64 {
    let addr = Addr::from(address.ip());
    let [a, b, c, d] = addr.words().map(u64::from);
    maglev::name(a << 32 | b, c << 32 | d, address.port())
}

/// The slots of a table; none when no row has a weight.
fn slots(rows: &[Row<'_>]) -> Vec<Slot> {
    if rows.iter().all(|row| row.weight == 0) {
        return Vec::new();
    }
    let columns = compile::columns(rows.iter().map(|row| row.weight));
    let ends = compile::ends(rows.iter().map(|row| row.weight));
    let slot = |(row, (column, end)): (&Row<'_>, (Column, u32))| Slot {
        addr: row.backend.key.address.ip().into(),
        port: row.backend.key.address.port().to_be(),
        weight: row.weight,
        backend: row.id.0,
        generation: row.id.1,
        threshold: column.threshold,
        alias: column.alias,
        end,
    };
    rows.iter().zip(columns.into_iter().zip(ends)).map(slot).collect()
}
