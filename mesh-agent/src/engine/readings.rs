//! What the engine counts, for other programs.

use std::net::SocketAddr;
use std::sync::Arc;

use super::Engine;
use super::view::{Handle, failures};
use crate::api::server::{View as _, ViewError};
use crate::canary;
use crate::dataplane::maps::Maps as _;
use crate::metrics::{Readings, Snapshot, Traffic};

impl Readings for Handle {
    async fn alive(&self) -> Result<(), ViewError> {
        self.feel_pulse().await
    }

    async fn readiness(&self) -> Result<(bool, Vec<String>), ViewError> {
        self.ask(|engine| {
            let attached = engine.programs().iter().all(|program| program.attached);
            (engine.is_ready(attached), engine.reasons(attached))
        })
        .await
    }

    async fn set_hindrance(&self, why: Option<String>) {
        // An engine that is gone does not need to know.
        let _ = self.ask(move |engine| engine.unheard = why).await;
    }

    async fn snapshot(&self) -> Result<Snapshot, ViewError> {
        let (mut backends, in_place) =
            self.ask(|engine| (engine.traffic(), engine.in_place())).await?;
        // Not in the engine's time.
        backends.sort_by(|a, b| {
            let key = |one: &Traffic| (one.port, one.protocol, one.address);
            a.service.cmp(&b.service).then_with(|| key(a).cmp(&key(b)))
        });
        Ok(Snapshot { status: self.status().await?, in_place, backends })
    }
}

impl Engine {
    /// The backends of services that were ever given a connect; most are not, on most nodes. Also those of
    /// their backends that were not: a counter is to be seen before it first counts.
    fn traffic(&self) -> Vec<Traffic> {
        let maps = self.reconciler.maps();
        let mut used = Vec::new();
        for service in self.reconciler.services().filter(|name| !canary::is(name)) {
            if self.reconciler.backends(service).all(|(_, id)| maps.opened(id) == 0) {
                continue;
            }
            let name: Arc<str> = service.as_str().into();
            for (key, id) in self.reconciler.backends(service) {
                let Some(backend) = maps.backend(id) else { continue };
                let counts = maps.counts(id);
                used.push(Traffic {
                    service: Arc::clone(&name),
                    port: key.port,
                    protocol: key.protocol.name(),
                    address: SocketAddr::new(backend.addr.ip(), u16::from_be(backend.port)),
                    opened: counts.opened,
                    active: counts.active,
                    failures: failures(counts.failed),
                });
            }
        }
        used
    }
}
