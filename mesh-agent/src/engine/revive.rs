//! What the kernel has out, and the agent finds to be well: an endpoint whose checks pass again, and one that
//! no connect tries, since nobody connects.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::{Duration, SystemTime};

use mesh_common::ejection::{Phase, TICK_SHIFT, ticks};
use mesh_common::stats::change;
use mesh_common::{Client, Ejection, Protocol};

use super::confirm::{Purpose, Question};
use super::ending::Life;
use super::{Engine, journal};
use crate::api::types::Event;
use crate::compile::BackendKey;
use crate::dataplane::clock;
use crate::dataplane::maps::Maps as _;
use crate::model::ServiceName;

/// How long connects are waited for that could try a backend.
const WAITS: Duration = Duration::from_secs(5);

/// Whether a backend is out for all, and could have been tried for a while.
pub(super) fn is_idle(ejection: Ejection, now: u64) -> bool {
    let waits = u64::try_from(WAITS.as_nanos()).unwrap_or(u64::MAX) >> TICK_SHIFT;
    matches!(ejection.phase(), Phase::Ejected | Phase::Trying) && ejection.until() + waits <= now
}

impl Engine {
    /// The checks of these endpoints of a service pass again: that connects failed there is over, for all
    /// who fall back to it too. How often it was out is remembered, as after a try.
    pub(super) fn readmit(&mut self, service: &ServiceName, well: &BTreeSet<SocketAddr>) {
        let mut moved = Vec::new();
        for name in self.holders(service) {
            let own = name == *service;
            let passed = |(key, _): &(BackendKey, u32)| {
                // A check says nothing about datagrams.
                key.protocol == Protocol::Tcp
                    && well.contains(&key.address)
                    && (own || !self.defines(&name, key.address))
            };
            let passed: Vec<_> = self.reconciler.backends(&name).filter(passed).collect();
            let mut any = false;
            for (key, id) in passed {
                any |= self.recover(&name, key, id, |_| true, "its checks pass again");
            }
            if any {
                moved.push((name, None));
            }
        }
        self.reconsider(moved);
    }

    /// A service, and those that fall back to it: they have its endpoints, but for what they define
    /// themselves ([`Engine::defines`]).
    pub(super) fn holders(&self, service: &ServiceName) -> Vec<ServiceName> {
        self.spread.dependents(service).chain([service]).cloned().collect()
    }

    /// Whether a service has this endpoint itself: then what its own checks say holds there.
    pub(super) fn defines(&self, service: &ServiceName, address: SocketAddr) -> bool {
        self.health.get(service).is_some_and(|health| health.endpoints.contains_key(&address))
    }

    /// Lets a backend in again that is out, if `when` says so of what it is. Whether it did.
    fn recover(
        &mut self,
        service: &ServiceName,
        key: BackendKey,
        id: u32,
        when: impl Fn(Ejection) -> bool,
        why: &str,
    ) -> bool {
        let policy = self.reconciler.rules(service).policy;
        let maps = self.reconciler.maps();
        let (Some(stats), Some(backend)) = (maps.stats(id), maps.backend(id)) else { return false };
        if !stats.is_life(backend.generation) {
            return false;
        }
        let now = ticks(clock::monotonic());
        let next =
            |known: Ejection| (!known.is_in() && when(known)).then(|| known.recover(policy, now));
        if change(&stats.ejection, next).is_none() {
            return false;
        }
        self.suspects.remove(&id);
        self.tell_recovered(service, key.address, why);
        true
    }

    /// A backend is out, and for a while no connect has come along that would have tried it: the agent does.
    pub(super) fn try_in_place(&mut self, service: &ServiceName, key: BackendKey, id: u32) {
        let maps = self.reconciler.maps();
        let (Some(stats), Some(backend)) = (maps.stats(id), maps.backend(id)) else { return };
        let is_served = backend.marks.state().is_usable() && stats.is_life(backend.generation);
        // Nothing can be asked of a datagram service without knowing what it speaks.
        if !is_served || key.protocol != Protocol::Tcp {
            return;
        }
        let now = ticks(clock::monotonic());
        if stats.ejection().phase() == Phase::Trying {
            // It was answered, as the next connect would note.
            let when = |known: Ejection| known.phase() == Phase::Trying && is_idle(known, now);
            if self.recover(service, key, id, when, "a try succeeded") {
                self.reconsider(vec![(service.clone(), Some(key.address))]);
            }
            return;
        }
        // Without the token: whoever has that has to tell how it went, also when the agent ends.
        self.opinions.ask(Question {
            backend: id,
            generation: backend.generation,
            address: key.address,
            purpose: Purpose::Try(service.clone()),
        });
    }

    /// The agent's try has ended. A connect may have begun one of its own meanwhile, or have failed: that one
    /// counts.
    pub(super) fn tried(
        &mut self,
        service: &ServiceName,
        (id, generation): Life,
        address: SocketAddr,
        passed: bool,
    ) {
        let policy = self.reconciler.rules(service).policy;
        let stats = self.reconciler.maps().stats(id).filter(|stats| stats.is_life(generation));
        let Some(stats) = stats else { return };
        let now = ticks(clock::monotonic());
        let changed = change(&stats.ejection, |known| match known.phase() {
            Phase::Ejected if known.until() > now => None,
            Phase::Ejected if passed => Some(known.recover(policy, now)),
            Phase::Ejected => {
                let taken = known.take(now);
                taken.fail(policy, Client::NOBODY, taken.token(), now)
            }
            _ => None,
        });
        if passed && changed.is_some() {
            self.tell_recovered(service, address, "the agent's own connect succeeded");
            self.reconsider(vec![(service.clone(), Some(address))]);
        }
    }

    fn tell_recovered(&self, service: &ServiceName, address: SocketAddr, why: &str) {
        tracing::info!(%service, backend = %address, "in again: {why}");
        self.journal.push(Event {
            service: Some(service.to_string()),
            backend: Some(address.to_string()),
            detail: why.to_owned(),
            ..journal::event("recovered", SystemTime::now())
        });
    }
}
