//! What a former agent left in the kernel, until this one knows what its sources say about it.
//!
//! A service that no source defines is removed; but a source that has not answered, or that has found
//! errors, may define it all the same. Until all of them have been read without errors, it is held.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use mesh_common::Marks;

use super::{Engine, few};
use crate::canary;
use crate::dataplane::maps::Maps;
use crate::dataplane::reconcile::Reconciler;
use crate::model::ServiceName;

/// Services that were taken over, and that no source has defined yet.
#[derive(Debug, Default)]
pub(super) struct Stale(BTreeSet<ServiceName>);

/// What is said of such a service.
const HELD: &str = "no source has defined it since the agent was started: it is held as it was found in the kernel";

impl Stale {
    /// All that the kernel holds.
    pub(super) fn new<M: Maps>(reconciler: &Reconciler<M>) -> Self {
        Self(reconciler.services().filter(|name| !canary::is(name)).cloned().collect())
    }

    /// What is said about a service, if it is one of these.
    pub(super) fn note(&self, name: &ServiceName) -> Option<&'static str> {
        self.0.contains(name).then_some(HELD)
    }

    /// What is said about all of them.
    pub(super) fn reason(&self) -> Option<String> {
        if self.0.is_empty() {
            return None;
        }
        let names = few(self.0.iter().map(|name| shown(name).to_owned()).collect());
        Some(format!(
            "services are held as a former agent left them, since no source has defined them yet: {}; \
             they are removed once every source has been read without errors",
            names.join(", ")
        ))
    }
}

impl Engine {
    /// How the endpoints of a service that was taken over were, when it is defined for the first time.
    pub(super) fn found(&self, name: &ServiceName) -> BTreeMap<SocketAddr, Marks> {
        if !self.stale.0.contains(name) {
            return BTreeMap::new();
        }
        let maps = self.reconciler.maps();
        let marks = |(key, id): (crate::compile::BackendKey, u32)| {
            Some((key.address, maps.backend(id)?.marks))
        };
        self.reconciler.backends(name).filter_map(marks).collect()
    }

    /// Once every source has been read without errors, removes what none of them defines.
    pub(super) fn settle(&mut self) {
        let catalog = &self.catalog;
        self.stale.0.retain(|name| catalog.get(name.as_str()).is_none());
        let known =
            self.all_ready() && self.sources.values().all(|source| source.errors.is_empty());
        if !known || self.stale.0.is_empty() {
            return;
        }
        let gone = std::mem::take(&mut self.stale.0);
        let names = few(gone.iter().map(|name| shown(name).to_owned()).collect());
        tracing::info!(
            services = gone.len(),
            "no source defines any more what a former agent left: {} removed",
            names.join(", ")
        );
        self.update(gone);
    }
}

/// The name, also of what has none.
fn shown(name: &ServiceName) -> &str {
    if name.as_str().is_empty() { "(of unknown name)" } else { name.as_str() }
}
