//! What the kernel is to hold of each service: its definition, with what is known of its endpoints.

use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::SystemTime;

use mesh_common::{Algorithm, Client, FrontendKey, Marks, State};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::{Engine, drains, out, spread};
use crate::catalog::Entry;
use crate::compile::{self, Condition, Here, Input, Tables};
use crate::dataplane::clock;
use crate::dataplane::maps::Maps as _;
use crate::dataplane::sys::heap;
use crate::health::{Life, Monitor, Plan};
use crate::model::{Ending, HealthPolicy, ServiceName};

/// When so many services change at once, what that took is worth being given back.
const MANY: usize = 500;

/// What is known of an endpoint.
#[derive(Clone, Debug)]
pub(super) struct Known {
    /// Differs between the lives of an endpoint.
    pub(super) life: u64,
    /// What it was when it came.
    born: State,
    pub(super) state: State,
    pub(super) reason: Cow<'static, str>,
    pub(super) since: SystemTime,
    /// Since when it is usable, or was when it last was; nothing when it was so before the agent began.
    pub(super) usable_since: Option<Instant>,
}

/// The endpoints of a service.
#[derive(Debug, Default)]
pub(super) struct Health {
    pub(super) plan: Option<Plan>,
    /// In a tree, which has little more room than it needs for few.
    pub(super) endpoints: BTreeMap<SocketAddr, Known>,
}

impl Engine {
    /// Compiles these services and has the kernel hold them.
    pub(super) fn update(&mut self, names: BTreeSet<ServiceName>) {
        let names = self.spread.with_dependents(names);
        let names = self.without_held(names);
        if names.is_empty() {
            return;
        }
        let many = names.len() >= MANY;
        // Before any is compiled: one may fall back to another.
        for name in &names {
            self.follow(name);
        }
        let compiled = names.into_iter().map(|name| {
            let tables = self.compile(&name);
            (name, Arc::new(tables))
        });
        let wanted: Vec<_> = compiled.collect();
        self.are_followed(wanted.iter().map(|(name, _)| name));
        let outcome = self.reconciler.apply(wanted);
        self.note(outcome);
        self.take_let_go();
        self.take_returned();
        if many {
            // It may hold up others that want memory, and takes long enough not to wait for it.
            if self.trimming.as_ref().is_none_or(JoinHandle::is_finished) {
                self.trimming = Some(tokio::task::spawn_blocking(heap::trim));
            }
        }
        if self.reconciler.is_unfinished() {
            self.retry.begin();
        } else {
            self.retry.end();
        }
    }

    /// Has checks, drains and deadlines follow the definition of a service.
    fn follow(&mut self, name: &ServiceName) {
        self.drains.follow(name, self.catalog.get(name.as_str()));
        let Some(entry) = self.catalog.get(name.as_str()) else {
            if self.health.remove(name).is_some_and(|health| health.plan.is_some()) {
                self.monitor.set(name.clone(), None);
            }
            return self.spread.forget(name);
        };
        let timeout = entry.service.drain_timeout;
        let found = self.found(name);
        self.drains.adopt(name, entry, &found);
        if !found.is_empty() {
            let groups = self.groups_found(name, entry);
            self.spread.groups.insert(name.clone(), groups);
        }
        let health = self.health.entry(name.clone()).or_default();
        let policy = self.config.policy(&entry.service.health);
        health.follow(name, entry, &found, policy, &self.monitor, &mut self.life);
        self.removed.follow(name, timeout);
        self.follow_dead(name);
    }

    fn compile(&mut self, name: &ServiceName) -> Tables {
        let owned = self.catalog.get(name.as_str()).map(keys).unwrap_or_default();
        let frontends = self.unblocked(name, owned);
        let Some(entry) = self.catalog.get(name.as_str()) else { return Tables::default() };
        let service = &entry.service;
        if service.algorithm == Algorithm::HashUnit {
            self.units.send_if_modified(|wanted| !std::mem::replace(wanted, true));
        }
        let behind = self.behind(entry);
        let drained: HashMap<&ServiceName, _> = [Some((name, entry)), behind]
            .into_iter()
            .flatten()
            .map(|(name, entry)| (name, self.drains.causes(name, entry)))
            .collect();
        let maps = self.reconciler.maps();
        let is_out = |&(_, id): &(_, u32)| out::is_out(maps.counts(id).ejection, Client::NOBODY);
        // Without ejection nothing is out, whatever is left of it.
        let matters = service.ejection.is_some()
            && (service.locality.is_some()
                || service.panic_threshold > 0
                || behind.is_some()
                || service.endpoints.iter().any(|endpoint| endpoint.priority > 0));
        let out: HashSet<SocketAddr> = match matters {
            false => HashSet::new(),
            true => {
                let held = self.reconciler.backends(name).filter(is_out).map(|(key, _)| key);
                held.chain(self.reconciler.absent(name)).map(|key| key.address).collect()
            }
        };
        let ramps = RefCell::new(BTreeSet::new());
        let condition = |of: &ServiceName, address: SocketAddr| {
            let known = self.health.get(of).and_then(|health| health.endpoints.get(&address));
            let cause = drained.get(of).and_then(|drained| drained.get(&address));
            let by_command = cause.is_some_and(|cause| cause.command.is_some());
            let found = known.map_or(State::Unknown, |known| known.state);
            let ramp = known.map_or(Condition::FULL, |known| {
                spread::ramp(service.slow_start, known.usable_since)
            });
            let state = drains::state(found, cause.is_some());
            if state.is_usable() {
                ramps.borrow_mut().insert(ramp);
            }
            Condition { state, is_out: out.contains(&address), ramp, by_command }
        };
        let none = BTreeMap::new();
        let input = Input {
            service,
            frontends: &frontends,
            fallback: behind.map(|(_, entry)| &*entry.service),
            here: Here {
                node: &self.config.node,
                zone: self.config.zone.as_deref(),
                tick: clock::tick(),
            },
            before: self.spread.groups.get(name).unwrap_or(&none),
            source: self.stale.key(entry.origin.source),
        };
        let tables = compile::compile(input, |of, address| condition(&of.name, address));
        let service = Arc::clone(service);
        // While all are alike, nothing would change.
        self.spread.set_step(&service, ramps.into_inner().len() > 1);
        self.set_groups(name, &tables.groups);
        self.set_panics(name, !tables.panics.is_empty());
        tables
    }

    /// The service that another falls back to, if it is defined.
    pub(super) fn behind<'e>(&'e self, entry: &Entry) -> Option<(&'e ServiceName, &'e Entry)> {
        let other = entry.service.fallback_service.as_ref()?;
        let entry = self.catalog.get(other.as_str())?;
        Some((&entry.service.name, entry))
    }
}

// === impl Known ===

impl Known {
    /// Another verdict of its checks. Whether its state has changed, and not only the reason.
    pub(super) fn turn(&mut self, state: State, reason: String) -> bool {
        if state.is_usable() && !self.state.is_usable() {
            self.usable_since = Some(Instant::now());
        }
        self.reason = reason.into();
        let is_new = self.state != state;
        if is_new {
            (self.state, self.since) = (state, SystemTime::now());
        }
        is_new
    }
}

// === impl Health ===

impl Health {
    /// Which connections are ended of endpoints that are unhealthy.
    pub(super) fn ending(&self) -> Ending {
        self.plan.as_ref().map(|plan| plan.policy.ending).unwrap_or_default()
    }

    /// Follows a new definition: endpoints that stay keep their state. Each that comes gets the
    /// next `life`.
    /// Of endpoints that a former agent has left, `found` says how they were.
    fn follow(
        &mut self,
        name: &ServiceName,
        entry: &Entry,
        found: &BTreeMap<SocketAddr, Marks>,
        policy: Option<&HealthPolicy>,
        monitor: &Monitor,
        life: &mut u64,
    ) {
        let service = &entry.service;
        let targets: BTreeSet<SocketAddr> = service
            .ports
            .iter()
            .flat_map(|port| service.endpoints.iter().map(|e| compile::target(e, port)))
            .collect();
        let checked = policy.is_some();
        if checked != self.plan.is_some() {
            // What checks have found means nothing without them, and the other way round.
            self.endpoints.clear();
        }
        self.endpoints.retain(|address, _| targets.contains(address));
        let since = SystemTime::now();
        for address in targets {
            self.endpoints.entry(address).or_insert_with(|| {
                *life += 1;
                let found = found.get(&address).map(|marks| marks.state());
                let (state, reason) = match found {
                    _ if !checked => (State::Unknown, "no health check"),
                    Some(state @ (State::Healthy | State::Unhealthy)) => {
                        (state, "as it was found in the kernel; not checked since")
                    }
                    _ => (State::Unknown, "not checked yet"),
                };
                let usable_since = found.is_none().then(Instant::now);
                Known {
                    life: *life,
                    born: state,
                    state,
                    reason: reason.into(),
                    since,
                    usable_since,
                }
            });
        }
        let plan = policy.cloned().map(|policy| {
            let life = |known: &Known| Life { number: known.life, state: known.born };
            let lives = self.endpoints.iter().map(|(address, known)| (*address, life(known)));
            Plan { policy, targets: lives.collect() }
        });
        if plan != self.plan {
            monitor.set(name.clone(), plan.clone());
            self.plan = plan;
        }
    }
}

/// The frontends that a service owns, as the kernel knows them.
pub(super) fn keys(entry: &Entry) -> Vec<FrontendKey> {
    let key = |owned: &crate::catalog::OwnedFrontend| {
        let frontend = owned.frontend;
        FrontendKey::new(frontend.address.into(), frontend.port, frontend.protocol)
    };
    entry.frontends.iter().map(key).collect()
}
