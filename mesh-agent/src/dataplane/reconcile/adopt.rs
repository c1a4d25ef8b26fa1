//! Taking over maps from an agent that is gone: whatever it was doing when it ended.
//!
//! What the kernel holds is held on, and belongs to whom it belonged. What the former agent had begun and
//! not ended is undone: since nothing names it, and the programs that may have read it have ended, it is
//! free at once. What makes no sense (somebody wrote into the maps) is taken out, and never believed.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;

use mesh_common::{Backend, FrontendKey, FrontendValue, Name, Protocol};

use super::names::{Names, UNNAMED};
use super::{HeldBackend, HeldFrontend, Reconciler};
use crate::compile::{BackendKey, TableKey};
use crate::dataplane::alloc::IdPool;
use crate::dataplane::maps::{Contents, Kind, MapError};
use crate::model::ServiceName;

/// What was taken over.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Adopted {
    /// Services of which the kernel holds something.
    pub services: usize,
    /// What clients dial.
    pub frontends: usize,
    /// Backends.
    pub backends: usize,
    /// Entries of `FRONTENDS` that made no sense, and were removed.
    pub wrong: usize,
}

impl<M: Contents> Reconciler<M> {
    /// Takes over maps; they may be empty. Every program that ran when the former agent ended has ended.
    ///
    /// What is whose nobody knows any more belongs to [`Reconciler::nobody`].
    ///
    /// # Errors
    ///
    /// When the kernel does not let them be read, or what is wrong be removed. Nothing else was changed.
    pub fn adopt(maps: M) -> Result<(Self, Adopted), MapError> {
        let entries = maps.entries()?;
        let capacity = maps.capacity();
        let mut this = Self::new(maps);
        this.last = this.maps.generations();
        this.gone_opened = this.maps.gone();
        let there = this.maps.there(Kind::Names);
        let record =
            |index| Some((index, this.maps.name(index)?)).filter(|(_, r)| *r != Name::NONE);
        this.names = Names::adopt(capacity.services, (0..there).filter_map(record));
        let names = this.names.by_index();
        let nobodys = this.adopt_backends(&names)?;
        let mut adopted = Adopted::default();
        let mut wrong = Vec::new();
        for (key, value) in entries {
            if key == FrontendKey::address_only(key.addr) {
                this.addresses.entry(key.addr).or_default();
            } else if !this.adopt_frontend(&names, key, value)? {
                wrong.push(key);
            }
        }
        this.records =
            IdPool::adopt(capacity.services, this.frontends.values().map(|held| held.index));
        for key in &wrong {
            this.maps.remove_frontend(key)?;
        }
        this.retire_others()?;
        this.adopt_addresses()?;
        this.leave(nobodys);
        for (name, held) in &mut this.services {
            held.granted = held.backends.len();
            this.shares.adopt(name, held.granted);
            adopted.backends += held.backends.len();
        }
        for name in names.values().filter(|name| !this.services.contains_key(*name)) {
            this.names.give(name);
        }
        this.names.clear(&mut this.maps);
        this.clear_backends();
        adopted.services = this.services.len();
        adopted.frontends = this.frontends.len();
        adopted.wrong = wrong.len();
        Ok((this, adopted))
    }

    /// Whose that is of which the kernel does not say whose it is: a name that no service has.
    pub fn nobody() -> ServiceName {
        ServiceName::new("")
    }

    /// Holds the backends that are some service's. Gives the ids that are in use besides: what they were
    /// is over, or had not begun.
    fn adopt_backends(&mut self, names: &HashMap<u32, ServiceName>) -> Result<Vec<u32>, MapError> {
        let (mut used, mut nobodys) = (Vec::new(), Vec::new());
        for id in 0..self.maps.there(Kind::Backends) {
            let Some(record) = self.maps.backend(id) else { break };
            let life = self.maps.life(id);
            if record.protocol == 0 && life == 0 {
                continue;
            }
            used.push(id);
            let lives = life != 0 && life == u64::from(record.generation);
            let key = backend_key(&record).filter(|_| lives);
            let owner = names.get(&record.owner).cloned();
            // Without what was noted, the highest is as good as can be had.
            self.last.backend = self.last.backend.max(record.generation);
            let Some(key) = key.filter(|key| !self.holds(owner.as_ref(), key)) else {
                nobodys.push(id);
                continue;
            };
            let record = match owner {
                Some(_) => record,
                None => Backend { owner: UNNAMED, ..record },
            };
            if self.maps.backend(id) != Some(record) {
                self.maps.write_backend(id, &record)?;
            }
            self.extents.hold_backend(id);
            let held = self.services.entry(owner.unwrap_or_else(Self::nobody)).or_default();
            held.backends.insert(key, HeldBackend { id, record });
        }
        self.backends = IdPool::adopt(self.maps.capacity().backends, used.into_iter());
        Ok(nobodys)
    }

    fn holds(&self, owner: Option<&ServiceName>, key: &BackendKey) -> bool {
        let nobody = Self::nobody();
        self.services
            .get(owner.unwrap_or(&nobody))
            .is_some_and(|held| held.backends.contains_key(key))
    }

    /// `false` when this entry leads nowhere, or its record to what is not there.
    fn adopt_frontend(
        &mut self,
        names: &HashMap<u32, ServiceName>,
        key: FrontendKey,
        value: FrontendValue,
    ) -> Result<bool, MapError> {
        let Some(protocol) = Protocol::from_number(key.protocol) else { return Ok(false) };
        let Some(record) = self.maps.service(value.service) else { return Ok(false) };
        // Two entries cannot name one record: it has one key.
        if record.key != key || record.generation != value.generation || value.generation == 0 {
            return Ok(false);
        }
        let (table, rules) = (record.table, record.rules);
        if !table.is_empty() && !self.extents.adopt(&self.maps, table) {
            return Ok(false);
        }
        self.last.service = self.last.service.max(value.generation);
        let named = names.get(&record.owner).cloned();
        let owner_id = if named.is_some() { record.owner } else { UNNAMED };
        if owner_id != record.owner {
            self.maps.set_owner(value.service, owner_id)?;
        }
        let owner = named.unwrap_or_else(Self::nobody);
        let held = self.services.entry(owner.clone()).or_default();
        held.frontends.insert(key);
        held.rules = rules;
        let of = TableKey { port: key.host_port(), protocol, v4: key.addr.is_v4() };
        // Of two, since it was being switched, either: the other one's frontend holds that.
        held.tables.entry(of).or_insert_with(|| {
            self.extents.acquire(table);
            table
        });
        *self.addresses.entry(key.addr).or_default() += 1;
        let held = HeldFrontend {
            owner,
            owner_id,
            index: value.service,
            generation: value.generation,
            table,
            rules,
            named: true,
            since: 0,
        };
        self.frontends.insert(key, held);
        Ok(true)
    }

    /// Retires records that no entry names: the former agent ended between the two.
    fn retire_others(&mut self) -> Result<(), MapError> {
        let named: HashSet<u32> = self.frontends.values().map(|held| held.index).collect();
        for index in (0..self.maps.there(Kind::Services)).filter(|index| !named.contains(index)) {
            if self.maps.service(index).is_some_and(|record| record.generation != 0) {
                self.maps.retire_service(index)?;
            }
        }
        Ok(())
    }

    /// Sees to it that each address that is used has its entry; those that are not are to be removed.
    fn adopt_addresses(&mut self) -> Result<(), MapError> {
        for (&addr, &count) in &self.addresses {
            let key = FrontendKey::address_only(addr);
            if count == 0 {
                self.unused_addresses.insert(addr);
            } else if self.maps.frontend(&key).is_none() {
                self.maps.insert_frontend(&key, super::hold::ADDRESS)?;
            }
        }
        Ok(())
    }

    /// What these ids were is over. A table may name them still.
    fn leave(&mut self, nobodys: Vec<u32>) {
        let named: HashSet<u32> =
            nobodys.iter().copied().filter(|&id| self.extents.names(id)).collect();
        for id in nobodys {
            self.maps.retire_stats(id);
            self.going.insert(id, self.graces);
            if !named.contains(&id) {
                self.clearing.push(id);
            }
        }
    }
}

/// Which backend of its service a record is; nothing when it is none.
pub(super) fn backend_key(record: &Backend) -> Option<BackendKey> {
    let protocol = Protocol::from_number(record.protocol)?;
    let address = SocketAddr::new(record.addr.ip(), u16::from_be(record.port));
    (record.port != 0 && record.service_port != 0).then_some(BackendKey {
        port: record.service_port,
        protocol,
        address,
    })
}
