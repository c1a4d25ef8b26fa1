//! What changes which endpoints of a service are preferred, besides definitions and checks: time (slow
//! start), what the kernel has taken out, and other services that it falls back to.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::SocketAddr;
use std::time::{Duration, SystemTime};

use tokio::time::Instant;

use super::{Engine, journal};
use crate::api::types::Event;
use crate::catalog::Catalog;
use crate::compile::{Condition, FALLBACK, TableKey};
use crate::model::{Service, ServiceName};

/// In so many steps an endpoint comes to its weight.
const STEPS: u32 = 20;

/// What it has at first, in thousandths.
const FIRST: u128 = 100;

/// No steps follow each other faster.
const QUICKEST: Duration = Duration::from_millis(100);

/// What is remembered for that.
#[derive(Debug, Default)]
pub(super) struct Spread {
    /// Which group each table uses, where it is not the first.
    pub(super) groups: HashMap<ServiceName, BTreeMap<TableKey, u8>>,
    /// Services that use endpoints whose checks fail, because too few others are usable.
    panics: HashSet<ServiceName>,
    /// When the next step of a service is due.
    steps: HashMap<ServiceName, Instant>,
    /// The service that a service falls back to.
    fallback: HashMap<ServiceName, ServiceName>,
    /// The services that fall back to a service.
    dependents: HashMap<ServiceName, BTreeSet<ServiceName>>,
}

// === impl Spread ===

impl Spread {
    /// Follows the definitions of these services.
    pub(super) fn follow(&mut self, names: &BTreeSet<ServiceName>, catalog: &Catalog) {
        for name in names {
            let entry = catalog.get(name.as_str());
            let other = entry.and_then(|entry| entry.service.fallback_service.clone());
            if let Some(before) = self.fallback.remove(name)
                && let Some(dependents) = self.dependents.get_mut(&before)
            {
                dependents.remove(name);
                if dependents.is_empty() {
                    self.dependents.remove(&before);
                }
            }
            if let Some(other) = other {
                self.dependents.entry(other.clone()).or_default().insert(name.clone());
                self.fallback.insert(name.clone(), other);
            }
        }
    }

    /// These services, and those that fall back to one of them.
    pub(super) fn with_dependents(&self, names: BTreeSet<ServiceName>) -> BTreeSet<ServiceName> {
        let dependents = names.iter().filter_map(|name| self.dependents.get(name)).flatten();
        let dependents: Vec<_> = dependents.cloned().collect();
        names.into_iter().chain(dependents).collect()
    }

    /// Those that fall back to a service.
    pub(super) fn dependents(&self, name: &ServiceName) -> impl Iterator<Item = &ServiceName> {
        self.dependents.get(name).into_iter().flatten()
    }

    /// A service that is no more.
    pub(super) fn forget(&mut self, name: &ServiceName) {
        self.groups.remove(name);
        self.panics.remove(name);
        self.steps.remove(name);
    }

    /// Whether a service has endpoints on their way to their weight; then it is compiled again soon.
    pub(super) fn set_step(&mut self, service: &Service, is_on_the_way: bool) {
        match service.slow_start.filter(|_| is_on_the_way) {
            Some(window) => {
                let next = Instant::now() + QUICKEST.max(window / STEPS);
                self.steps.insert(service.name.clone(), next);
            }
            None => drop(self.steps.remove(&service.name)),
        }
    }

    /// Waits for services whose next step is due, and gives them.
    pub(super) async fn due(&mut self) -> BTreeSet<ServiceName> {
        let Some(next) = self.steps.values().min().copied() else {
            return std::future::pending().await;
        };
        tokio::time::sleep_until(next).await;
        self.steps.extract_if(|_, at| *at <= next).map(|(name, _)| name).collect()
    }
}

/// The part of its weight, in thousandths, that an endpoint has which has been usable since then, or for
/// longer than this agent knows.
pub(super) fn ramp(slow_start: Option<Duration>, since: Option<Instant>) -> u16 {
    let (Some(window), Some(since)) = (slow_start, since) else { return Condition::FULL };
    let full = u128::from(Condition::FULL);
    let steps = u128::from(STEPS);
    let passed = since.elapsed().as_nanos() * steps / window.as_nanos().max(1);
    let ramp = FIRST + (full - FIRST) * passed.min(steps) / steps;
    u16::try_from(ramp).unwrap_or(Condition::FULL)
}

/// What is odd about the service that this one falls back to.
pub(super) fn fallback_note(name: &ServiceName, catalog: &Catalog) -> Option<String> {
    let next =
        |name: &str| catalog.get(name).and_then(|entry| entry.service.fallback_service.clone());
    let first = next(name.as_str())?;
    if catalog.get(first.as_str()).is_none() {
        return Some(format!("it falls back to service {first}, which is not defined"));
    }
    let mut way = vec![first.clone()];
    while let Some(further) = way.last().and_then(|last| next(last.as_str())) {
        if further == *name {
            let way: Vec<_> = way.iter().map(ServiceName::as_str).collect();
            return Some(format!(
                "its fallback goes in a circle, {name} → {} → {name}: only the endpoints of {first} \
                 itself are used",
                way.join(" → ")
            ));
        }
        // A circle of others.
        if way.contains(&further) {
            break;
        }
        way.push(further);
    }
    None
}

impl Engine {
    /// Backends of these services went out for all, or came back: what is preferred may change. Of what
    /// came back its address is named.
    pub(super) fn reconsider(&mut self, moved: Vec<(ServiceName, Option<SocketAddr>)>) {
        let mut concerned = BTreeSet::new();
        for (name, recovered) in moved {
            let Some(entry) = self.catalog.get(name.as_str()) else { continue };
            let service = &entry.service;
            let matters = service.locality.is_some()
                || service.slow_start.is_some()
                || service.panic_threshold > 0
                || service.fallback_service.is_some()
                || service.endpoints.iter().any(|endpoint| endpoint.priority > 0);
            if !matters {
                continue;
            }
            if let Some(address) = recovered
                && let Some(health) = self.health.get_mut(&name)
                && let Some(known) = health.endpoints.get_mut(&address)
            {
                known.usable_since = Some(Instant::now());
            }
            concerned.insert(name);
        }
        self.update(concerned);
    }

    /// Notes which groups of endpoints a service uses, and tells what has changed.
    pub(super) fn set_groups(&mut self, name: &ServiceName, groups: &BTreeMap<TableKey, u8>) {
        let before = self.spread.groups.remove(name).unwrap_or_default();
        let keys: BTreeSet<&TableKey> = before.keys().chain(groups.keys()).collect();
        for key in keys {
            let (then, now) = [&before, groups].map(|g| g.get(key).copied().unwrap_or(0)).into();
            if then == now {
                continue;
            }
            let detail = match (now, self.spread.fallback.get(name)) {
                (0, _) => "the first endpoints are used again".to_owned(),
                (FALLBACK, Some(other)) => {
                    format!("too few of its endpoints serve: those of service {other} are used")
                }
                _ => format!("too few endpoints before serve: those of priority {now} are used"),
            };
            tracing::info!(service = %name, port = key.port, "{detail}");
            let kind = if now > then { "fallback" } else { "back" };
            self.journal.push(Event {
                service: Some(name.to_string()),
                frontend: Some(format!("port {}/{}", key.port, key.protocol.name())),
                detail,
                ..journal::event(kind, SystemTime::now())
            });
        }
        if !groups.is_empty() {
            self.spread.groups.insert(name.clone(), groups.clone());
        }
    }

    /// Notes whether a service uses endpoints whose checks fail, because too few others are usable; tells
    /// when that changes.
    pub(super) fn set_panics(&mut self, name: &ServiceName, panics: bool) {
        let (kind, detail) = match panics {
            true if self.spread.panics.insert(name.clone()) => {
                ("panic", "too few endpoints are usable: those whose checks fail are used too")
            }
            false if self.spread.panics.remove(name) => {
                ("calm", "enough endpoints are usable: those whose checks fail are not used")
            }
            _ => return,
        };
        tracing::warn!(service = %name, "{detail}");
        self.journal.push(Event {
            service: Some(name.to_string()),
            detail: detail.to_owned(),
            ..journal::event(kind, SystemTime::now())
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn an_endpoint_comes_to_its_weight_by_and_by() {
        let (window, since) = (Some(Duration::from_secs(20)), Instant::now());
        assert_eq!(ramp(None, Some(since)), 1_000);
        assert_eq!(ramp(window, Some(since)), 100);
        tokio::time::advance(Duration::from_millis(9_999)).await;
        assert_eq!(ramp(window, Some(since)), 505, "nine steps of twenty");
        tokio::time::advance(Duration::from_millis(1)).await;
        assert_eq!(ramp(window, Some(since)), 550);
        tokio::time::advance(Duration::from_secs(100)).await;
        assert_eq!(ramp(window, Some(since)), 1_000);
    }
}
