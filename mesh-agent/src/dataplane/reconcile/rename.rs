//! A service that is only called something else keeps all that it has in the kernel: backends with their
//! counts, ejections and connections, records with their turns and affinity.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use mesh_common::FrontendKey;

use super::{LetGo, Reconciler};
use crate::compile::{BackendKey, Tables};
use crate::dataplane::maps::Maps;
use crate::model::ServiceName;

impl<M: Maps> Reconciler<M> {
    /// Has the services of a batch that are others of it under a new name have what those had.
    ///
    /// That is so when one goes as a whole, and another, which has no frontend yet, has all of its frontends
    /// and all of its endpoints. With less, it is another service that has its address now.
    pub(super) fn rename(&mut self, wanted: &[(ServiceName, Arc<Tables>)]) {
        let leave = |(name, tables): &&(ServiceName, Arc<Tables>)| {
            tables.is_empty() && self.services.contains_key(name)
        };
        let mut leaving: HashSet<ServiceName> =
            wanted.iter().filter(leave).map(|(name, _)| name.clone()).collect();
        if leaving.is_empty() {
            return;
        }
        let mut renamed = HashMap::new();
        for (name, tables) in wanted.iter().filter(|(_, tables)| !tables.is_empty()) {
            if let Some(former) = self.former_name(name, tables, &leaving) {
                // No two can have all that one had.
                leaving.remove(&former);
                renamed.insert(former, name.clone());
            }
        }
        if renamed.is_empty() {
            return;
        }
        // Once for all of them: a file of many services may be renamed as a whole.
        self.former.rename(&renamed);
        for now in self.renamed.values_mut() {
            // Called something else once more, before all records said so.
            if let Some(name) = renamed.get(now) {
                now.clone_from(name);
            }
        }
        for (former, name) in &renamed {
            self.hand_on(former, name);
        }
    }

    /// What a service was called until now, if it was called something else.
    fn former_name(
        &self,
        name: &ServiceName,
        wanted: &Tables,
        leaving: &HashSet<ServiceName>,
    ) -> Option<ServiceName> {
        if self.services.get(name).is_some_and(|held| !held.frontends.is_empty()) {
            return None;
        }
        let owner = |(key, _): &(FrontendKey, usize)| {
            self.owner(key).filter(|owner| leaving.contains(*owner))
        };
        let former = wanted.frontends.iter().find_map(owner)?;
        let held = self.services.get(former)?;
        let frontends: HashSet<&FrontendKey> =
            wanted.frontends.iter().map(|(key, _)| key).collect();
        let backends: HashSet<&BackendKey> = wanted.backends.iter().map(|b| &b.key).collect();
        let is_it = !held.backends.is_empty()
            && held.frontends.iter().all(|key| frontends.contains(key))
            && held.backends.keys().all(|key| backends.contains(key));
        is_it.then(|| former.clone())
    }

    /// Has a service have what another had. The records say so once they are brought to what is wanted; until
    /// all do, the former name stays.
    fn hand_on(&mut self, former: &ServiceName, name: &ServiceName) {
        let Some(held) = self.services.remove(former) else { return };
        for key in &held.frontends {
            if let Some(frontend) = self.frontends.get_mut(key) {
                frontend.owner = name.clone();
            }
        }
        self.shares.rename(former, name);
        self.unfinished.remove(former);
        // It was defined already, and had no frontend: nobody was led there.
        let own = self.services.insert(name.clone(), held).unwrap_or_default();
        own.tables.values().for_each(|table| self.extents.release(*table));
        for (key, backend) in own.backends {
            let (service, generation) = (name.clone(), backend.record.generation);
            self.let_go(LetGo { service, key, id: backend.id, generation }, own.rules.policy);
        }
        self.absent.rename(former, name);
        self.renamed.insert(former.clone(), name.clone());
        tracing::info!(service = %name, "was {former}, and keeps what that had");
    }

    /// Gives up the name of a service that has nothing any more. `false` when records of the one that it was
    /// renamed to have that name still.
    pub(super) fn give_name(&mut self, name: &ServiceName) -> bool {
        let (id, now) = (self.names.id(name), self.renamed.get(name));
        if let Some((id, held)) = id.zip(now.and_then(|now| self.services.get(now))) {
            let frontends = held.frontends.iter().filter_map(|key| self.frontends.get(key));
            let mut owners = frontends.map(|frontend| frontend.owner_id);
            if owners.any(|owner| owner == id)
                || held.backends.values().any(|backend| backend.record.owner == id)
            {
                return false;
            }
        }
        self.renamed.remove(name);
        self.names.give(name);
        true
    }
}
