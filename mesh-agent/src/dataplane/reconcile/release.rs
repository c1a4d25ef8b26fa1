//! The removals: frontends, tables, backends, in this order.

use std::collections::HashSet;

use mesh_common::FrontendKey;

use super::{Held, LetGo, Problem, Reconciler};
use crate::compile::{BackendKey, TableKey, Tables};
use crate::dataplane::maps::{MapError, Maps};
use crate::model::ServiceName;

impl<M: Maps> Reconciler<M> {
    /// Takes away what is there and not wanted. Returns whether a frontend had to be kept because
    /// another service, one of `claimed`, has not been able to take it over yet.
    pub(super) fn release(
        &mut self,
        name: &ServiceName,
        held: &mut Held,
        wanted: &Tables,
        claimed: &HashSet<FrontendKey>,
        problems: &mut Vec<Problem>,
    ) -> bool {
        let frontends: HashSet<FrontendKey> =
            wanted.frontends.iter().map(|(key, _)| *key).collect();
        let mut kept = false;
        held.frontends.retain(|key| {
            if frontends.contains(key) {
                return true;
            }
            if claimed.contains(key) {
                kept = true;
                return true;
            }
            self.drop_frontend(key).map_err(|error| problems.push(error.into())).is_err()
        });
        let tables: HashSet<TableKey> = wanted.tables.iter().map(|(key, _)| *key).collect();
        held.tables.retain(|key, table| {
            let keep = tables.contains(key);
            if !keep {
                self.extents.release(*table);
            }
            keep
        });
        let backends: HashSet<BackendKey> =
            wanted.backends.iter().take(held.granted).map(|b| b.key).collect();
        let mut gone = Vec::new();
        held.backends.retain(|key, backend| {
            let keep = backends.contains(key);
            if !keep {
                let generation = backend.record.generation;
                let service = name.clone();
                gone.push(LetGo { service, key: *key, id: backend.id, generation });
            }
            keep
        });
        for gone in gone {
            self.let_go(gone, held.rules.policy);
        }
        self.drop_addresses(problems);
        tracing::debug!(service = %name, problems = problems.len(), kept, "reconciled");
        kept
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
}
