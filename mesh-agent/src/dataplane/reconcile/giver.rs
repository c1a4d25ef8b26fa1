//! Which service gave a socket its backend. Its record names the backend's id and life, which no other service
//! ever has; what the socket had dialled may be another service's frontend by now.

use std::collections::{HashMap, VecDeque};

use mesh_common::FrontendKey;

use super::{LetGo, Reconciler, UNNAMED, adopt};
use crate::compile::BackendKey;
use crate::dataplane::maps::Maps;
use crate::model::ServiceName;

/// How many backends are remembered that are gone: what goes on there, or is told of them late, has their names.
const REMEMBERED: usize = 16_384;

/// A backend's id and generation.
type Life = (u32, u32);

/// Whose the backends were that are gone, those that went last.
#[derive(Debug, Default)]
pub(super) struct Former {
    of: HashMap<Life, (ServiceName, BackendKey)>,
    order: VecDeque<Life>,
}

impl Former {
    pub(super) fn note(&mut self, gone: &LetGo) {
        let life = (gone.id, gone.generation);
        if self.of.insert(life, (gone.service.clone(), gone.key)).is_none() {
            self.order.push_back(life);
        }
        if self.order.len() > REMEMBERED
            && let Some(first) = self.order.pop_front()
        {
            self.of.remove(&first);
        }
    }

    /// Services are called something else: former names, and what each is now.
    pub(super) fn rename(&mut self, renamed: &HashMap<ServiceName, ServiceName>) {
        for (name, _) in self.of.values_mut() {
            if let Some(now) = renamed.get(name) {
                name.clone_from(now);
            }
        }
    }
}

impl<M: Maps> Reconciler<M> {
    /// The service that a backend is, or was, of, and which of its backends it is; nothing when it was gone
    /// before this agent came, or long ago.
    pub fn giver(&self, id: u32, generation: u32) -> Option<(&ServiceName, BackendKey)> {
        let former = self.former.of.get(&(id, generation));
        former.map(|(name, key)| (name, *key)).or_else(|| self.holder(id, generation))
    }

    /// The service that has this backend now.
    fn holder(&self, id: u32, generation: u32) -> Option<(&ServiceName, BackendKey)> {
        let record = self.maps.backend(id).filter(|record| record.generation == generation)?;
        let key = adopt::backend_key(&record)?;
        let has = |name: &ServiceName| {
            let backend = self.services.get(name)?.backends.get(&key)?;
            (backend.id == id).then_some(())
        };
        match self.names.get(record.owner) {
            Some(name) => has(name).map(|()| (name, key)),
            None if record.owner != UNNAMED => None,
            // Its name does not fit, or it is nobody's.
            None => self.services.keys().find(|name| has(name).is_some()).map(|name| (name, key)),
        }
    }

    /// The service that gave a socket its backend, by the socket's record: what was dialled, by which record
    /// of `SERVICES`, and which backend. Nothing when that is gone, and nobody knows any more whose it was.
    pub fn giver_of(
        &self,
        (id, generation): Life,
        frontend: &FrontendKey,
        index: u32,
    ) -> Option<&ServiceName> {
        let given = self.giver(id, generation).map(|(name, _)| name);
        // A former agent let go of the backend. Its frontend may be there as it was then; of one that this
        // agent made, no connection of that time is.
        given.or_else(|| {
            let held = self.frontends.get(frontend)?;
            (held.since == 0 && held.index == index).then_some(&held.owner)
        })
    }

    /// The service that refused a connect to a frontend at this time, in nanoseconds of `CLOCK_MONOTONIC`:
    /// nothing when that was before the one that has it now.
    pub fn refuser(&self, frontend: &FrontendKey, time: u64) -> Option<&ServiceName> {
        self.frontends.get(frontend).filter(|held| held.since <= time).map(|held| &held.owner)
    }
}
