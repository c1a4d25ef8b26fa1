//! What the engine counts, for other programs.

use std::net::SocketAddr;

use super::Engine;
use super::view::{Handle, failures};
use crate::api::server::{View as _, ViewError};
use crate::dataplane::maps::Maps as _;
use crate::metrics::{Readings, Snapshot, Traffic};

impl Readings for Handle {
    async fn alive(&self) -> Result<(), ViewError> {
        self.ask(|_| ()).await
    }

    async fn readiness(&self) -> Result<(bool, Vec<String>), ViewError> {
        self.ask(|engine| {
            let attached = engine.programs().iter().all(|program| program.attached);
            (engine.is_ready(attached), engine.reasons(attached))
        })
        .await
    }

    async fn snapshot(&self) -> Result<Snapshot, ViewError> {
        let backends = self.ask(|engine| engine.traffic()).await?;
        Ok(Snapshot { status: self.status().await?, backends })
    }
}

impl Engine {
    /// The backends that were ever given a connect; most are not, on most nodes.
    fn traffic(&self) -> Vec<Traffic> {
        let maps = self.reconciler.maps();
        let mut used = Vec::new();
        for service in self.reconciler.services() {
            for (key, id) in self.reconciler.backends(service) {
                if maps.opened(id) == 0 {
                    continue;
                }
                let counts = maps.counts(id);
                let Some(backend) = maps.backend(id) else { continue };
                used.push(Traffic {
                    service: service.to_string(),
                    port: key.port,
                    protocol: key.protocol.name(),
                    address: SocketAddr::new(backend.addr.ip(), u16::from_be(backend.port)),
                    opened: counts.opened,
                    active: counts.active,
                    failures: failures(counts.failed),
                });
            }
        }
        used.sort_by(|a, b| {
            let key = |one: &Traffic| (one.port, one.protocol, one.address);
            a.service.cmp(&b.service).then_with(|| key(a).cmp(&key(b)))
        });
        used
    }
}
