//! What a former agent left in the kernel, until this one knows what its sources say about it.
//!
//! A service that no source defines is removed. But a source that has not answered, or that has found errors,
//! may define it all the same; so may one that takes precedence over the one that does define it. `NAMES`
//! says which source each service was of:
//!
//! * At first nothing of it is touched, until every source has answered or has had its time: then all that
//!   changed while no agent ran is applied at once.
//! * From then on a service follows its definition when that is in the source that it was of, or in one that
//!   takes precedence over it, or when the source that it was of has been read without errors.
//! * It is removed when every source has been read without errors and none defines it: it may have moved to
//!   any of them. But not when the one that it was of has nothing at all in it, as a directory that was not
//!   mounted.
//! * What it has stays its own meanwhile: no other service takes its addresses over.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::SocketAddr;

use mesh_common::{Client, FrontendKey, Marks};

use super::observed::dialled;
use super::{Engine, few, out, wanted};
use crate::api::server::ViewError;
use crate::canary;
use crate::catalog::Entry;
use crate::compile::{self, TableKey};
use crate::config::Source;
use crate::dataplane::maps::Maps;
use crate::dataplane::reconcile::Reconciler;
use crate::discovery::SourceState;
use crate::model::{Endpoint, ServiceName};

/// Services that were taken over, and do not follow a definition yet.
#[derive(Debug, Default)]
pub(super) struct Stale {
    /// What tells the sources apart, in their order.
    keys: Vec<u64>,
    /// With the source that each was of.
    services: BTreeMap<ServiceName, u64>,
    /// Not every source has answered or had its time.
    gathers: bool,
    /// Services that were to follow a definition meanwhile.
    waiting: BTreeSet<ServiceName>,
    /// Some have gone from `services` since it was last looked who is free by that.
    shrank: bool,
    /// Services that lack an address because one of these has it, and what is said about that.
    blocked: BTreeMap<ServiceName, Vec<String>>,
}

/// What is said of such a service.
const HELD: &str = "held as it was found in the kernel when the agent was started: a source that may define it \
                    has not been read without errors since, or the one that it was of has nothing at all in it";

impl Stale {
    /// All that the kernel holds.
    pub(super) fn new<M: Maps>(reconciler: &Reconciler<M>, sources: &[Source]) -> Self {
        let services = reconciler.services().filter(|name| !canary::is(name));
        let services: BTreeMap<_, _> =
            services.map(|name| (name.clone(), reconciler.source(name))).collect();
        let keys = sources.iter().map(Source::key).collect();
        Self { keys, gathers: !services.is_empty(), services, ..Self::default() }
    }

    /// What tells the source at this position from others.
    pub(super) fn key(&self, source: usize) -> u64 {
        self.keys.get(source).copied().unwrap_or_default()
    }

    /// Whether it is one of these.
    fn has(&self, name: &ServiceName) -> bool {
        self.services.contains_key(name)
    }

    /// What is said about a service.
    pub(super) fn notes(&self, name: &ServiceName) -> impl Iterator<Item = String> {
        let held = self.has(name).then(|| HELD.to_owned());
        held.into_iter().chain(self.blocked.get(name).into_iter().flatten().cloned())
    }

    /// What is said about all of them.
    pub(super) fn reason(&self) -> Option<String> {
        if self.services.is_empty() {
            return None;
        }
        let names = few(self.services.keys().map(|name| shown(name).to_owned()).collect());
        Some(format!(
            "services are held as a former agent left them: {}; until every source has \
             been read without errors, and the one that they were of has something in it (`services: []`, \
             if nothing is meant), or until `mesh-agent forget`",
            names.join(", ")
        ))
    }
}

impl Engine {
    /// How the endpoints of a service that was taken over were, when it is defined for the first time; or those
    /// of one that was called something else until now.
    pub(super) fn found(&self, name: &ServiceName) -> BTreeMap<SocketAddr, Marks> {
        let name = match self.stale.has(name) {
            true => name,
            false => match self.former_name(name) {
                Some(former) => former,
                None => return BTreeMap::new(),
            },
        };
        let maps = self.reconciler.maps();
        let marks =
            |(key, id): (compile::BackendKey, u32)| Some((key.address, maps.backend(id)?.marks));
        self.reconciler.backends(name).filter_map(marks).collect()
    }

    /// What a service that is defined for the first time was called before: its frontends and endpoints are
    /// all those of one that is defined no more ([`Reconciler::apply`] goes by the same).
    fn former_name(&self, name: &ServiceName) -> Option<&ServiceName> {
        if self.health.contains_key(name) {
            return None;
        }
        let entry = self.catalog.get(name.as_str())?;
        let frontends = wanted::keys(entry);
        let is_gone = |owner: &&ServiceName| {
            *owner != name && self.catalog.get(owner.as_str()).is_none() && !self.stale.has(owner)
        };
        let owner = |key| self.reconciler.owner(key).filter(is_gone);
        let former = frontends.iter().find_map(owner)?;
        let keys = self.keys(name);
        let has_all = self.reconciler.frontends(former).all(|key| frontends.contains(&key))
            && self.reconciler.backends(former).all(|(key, _)| keys.contains(&key));
        has_all.then_some(former)
    }

    /// Which group of endpoints each table of such a service uses, where it is not the first: what is needed to
    /// come back from it depends on that. It is the first of which one is in the table that serves; what of
    /// an earlier one is in it waits for being tried.
    pub(super) fn groups_found(&self, name: &ServiceName, entry: &Entry) -> BTreeMap<TableKey, u8> {
        let other = self.behind(entry).map(|(_, entry)| entry);
        let mut groups: BTreeMap<TableKey, u8> = BTreeMap::new();
        if other.is_none() && entry.service.endpoints.iter().all(|e| e.priority == 0) {
            return groups;
        }
        // What neither defines says nothing; what both define is its own.
        let of_other = other.into_iter().flat_map(|entry| listening(entry, |_| compile::FALLBACK));
        let defined: HashMap<compile::BackendKey, u8> =
            of_other.chain(listening(entry, |endpoint| endpoint.priority)).collect();
        let maps = self.reconciler.maps();
        for (key, id) in self.reconciler.backends(name) {
            let marks = maps.backend(id).map(|backend| backend.marks);
            let is_used = marks.is_some_and(|marks| marks.is_listed() && marks.state().is_usable());
            if !is_used || out::is_out(maps.counts(id).ejection, Client::NOBODY) {
                continue;
            }
            let Some(&group) = defined.get(&key) else { continue };
            let v4 = key.address.is_ipv4();
            let table = TableKey { port: key.port, protocol: key.protocol, v4 };
            groups.entry(table).and_modify(|used| *used = group.min(*used)).or_insert(group);
        }
        groups.retain(|_, group| *group > 0);
        groups
    }

    /// Takes out those that have to stay as they are for now.
    pub(super) fn without_held(
        &mut self,
        mut names: BTreeSet<ServiceName>,
    ) -> BTreeSet<ServiceName> {
        if self.stale.services.is_empty() {
            return names;
        }
        let held: BTreeSet<ServiceName> =
            names.extract_if(.., |name| !self.may_follow(name)).collect();
        self.stale.waiting.extend(held);
        names
    }

    /// Why what is asked for would have no effect on a service yet.
    pub(super) fn why_held(&self, name: &ServiceName) -> Option<String> {
        (!self.may_follow(name)).then(|| format!("service {name} is {HELD}; try again then"))
    }

    /// These follow their definitions from now on, or are gone.
    pub(super) fn are_followed<'n>(&mut self, names: impl Iterator<Item = &'n ServiceName>) {
        if self.stale.services.is_empty() {
            return;
        }
        for name in names {
            self.stale.shrank |= self.stale.services.remove(name).is_some();
            self.stale.waiting.remove(name);
        }
    }

    /// Whether a service may follow its definition, or be removed without one.
    fn may_follow(&self, name: &ServiceName) -> bool {
        let Some(&source) = self.stale.services.get(name) else { return true };
        if self.stale.gathers {
            return false;
        }
        let was = self.stale.keys.iter().position(|&key| key == source);
        let has_said =
            |state: &SourceState| state.ready && state.errors.is_empty() && !state.is_empty;
        let has_said_all = match was {
            Some(was) => self.sources.get(&was).is_some_and(has_said),
            // Another one may have its services now, perhaps by another name; or there is none any more.
            None => {
                self.sources.values().any(|state| !state.is_empty) || self.config.sources.is_empty()
            }
        };
        match self.catalog.get(name.as_str()) {
            Some(entry) => has_said_all || was.is_some_and(|was| entry.origin.source <= was),
            None => {
                has_said_all
                    && self.all_ready()
                    && self.sources.values().all(|source| source.errors.is_empty())
            }
        }
    }

    /// Not every source has answered, and what those say that have is in force from now on.
    pub(super) fn gather_no_more(&mut self) {
        self.stale.gathers = false;
        self.settle();
    }

    /// Some services are free that other ones waited for.
    pub(super) fn has_shrunk(&self) -> bool {
        self.stale.shrank && !self.stale.blocked.is_empty()
    }

    /// Has those follow their definitions that may, and removes those that nobody defines.
    pub(super) fn settle(&mut self) {
        self.stale.shrank = false;
        if self.stale.gathers && self.all_answered() {
            self.stale.gathers = false;
        }
        if self.stale.gathers {
            return;
        }
        let mut names: BTreeSet<ServiceName> =
            self.stale.services.keys().filter(|name| self.may_follow(name)).cloned().collect();
        let is_gone = |name: &&ServiceName| self.catalog.get(name.as_str()).is_none();
        let gone: Vec<String> =
            names.iter().filter(is_gone).map(|name| shown(name).to_owned()).collect();
        if !gone.is_empty() {
            let services = gone.len();
            tracing::info!(
                services,
                "no source defines any more what a former agent left: {} removed",
                few(gone).join(", ")
            );
        }
        // Also what had to wait with them.
        names.append(&mut self.stale.waiting);
        names.extend(std::mem::take(&mut self.stale.blocked).into_keys());
        self.update(names);
    }

    /// Removes such services although nobody knows what their source says: this one, or all that no source
    /// defines. Gives their names.
    pub(super) fn forget(&mut self, service: Option<&str>) -> Result<Vec<String>, ViewError> {
        let names: BTreeSet<ServiceName> = match service {
            None => {
                let is_free = |name: &&ServiceName| self.catalog.get(name.as_str()).is_none();
                self.stale.services.keys().filter(is_free).cloned().collect()
            }
            Some(service) => {
                let name = ServiceName::new(service);
                if !self.knows(&name) {
                    return Err(ViewError::no_service(service));
                }
                if !self.stale.has(&name) {
                    return Err(ViewError::BadRequest(format!(
                        "service {service} is not held as a former agent left it; what a source defines \
                         is removed there"
                    )));
                }
                BTreeSet::from([name])
            }
        };
        let forgotten = names.iter().map(|name| shown(name).to_owned()).collect();
        for name in &names {
            tracing::info!(service = shown(name), "forgotten by command");
        }
        self.are_followed(names.iter());
        self.update(names);
        self.settle();
        Ok(forgotten)
    }

    /// Those of a service's frontends that no other service has which is held. Notes the others.
    pub(super) fn unblocked(
        &mut self,
        name: &ServiceName,
        mut frontends: Vec<FrontendKey>,
    ) -> Vec<FrontendKey> {
        if self.stale.services.is_empty() {
            return frontends;
        }
        let mut texts = Vec::new();
        frontends.retain(|key| {
            let owner = self.reconciler.owner(key).filter(|owner| *owner != name);
            let owner = owner.filter(|owner| self.stale.has(owner) && !self.may_follow(owner));
            texts.extend(owner.map(|owner| {
                format!(
                    "{} is still an address of service {}, which is held as a former agent left it",
                    dialled(key),
                    shown(owner)
                )
            }));
            owner.is_none()
        });
        if texts.is_empty() {
            self.stale.blocked.remove(name);
        } else {
            self.stale.blocked.insert(name.clone(), few(texts));
        }
        frontends
    }
}

/// Where the endpoints of a service listen, each with its group.
fn listening(
    entry: &Entry,
    group: impl Fn(&Endpoint) -> u8 + Copy,
) -> impl Iterator<Item = (compile::BackendKey, u8)> {
    let service = &entry.service;
    service.ports.iter().flat_map(move |port| {
        service.endpoints.iter().map(move |endpoint| {
            let address = compile::target(endpoint, port);
            let key = compile::BackendKey { port: port.port, protocol: port.protocol, address };
            (key, group(endpoint))
        })
    })
}

/// The name, also of what has none.
fn shown(name: &ServiceName) -> &str {
    if name.as_str().is_empty() { "(of unknown name)" } else { name.as_str() }
}
