//! Endpoints that come back while they would be out: their ejection goes on.

use std::collections::BTreeSet;
use std::time::SystemTime;

use mesh_common::ejection::{Phase, ticks};

use super::{Engine, journal, out};
use crate::api::types::Event;
use crate::dataplane::clock;
use crate::dataplane::reconcile::Returned;
use crate::model::ServiceName;

impl Engine {
    /// Tells of endpoints that have come back, and does what follows from that some of them are out.
    pub(super) fn take_returned(&mut self) {
        let returned = self.reconciler.take_returned();
        if returned.is_empty() {
            return;
        }
        let now = ticks(clock::monotonic());
        for Returned { service, key, ejection, is_spared } in &returned {
            let left = out::time(ejection.until().saturating_sub(now));
            let (kind, detail) = match (is_spared, ejection.phase()) {
                (true, _) => (
                    "spared",
                    "it came back, and its ejection is over: as large a share of the service's is out as may be"
                        .to_owned(),
                ),
                (false, Phase::Ejected | Phase::Trying) => {
                    ("ejected", format!("it came back, and is out for all clients for {left} more"))
                }
                (false, _) => {
                    ("suspected", format!("it came back, and is out for one client for {left} more"))
                }
            };
            tracing::info!(%service, backend = %key.address, "{detail}");
            self.journal.push(Event {
                service: Some(service.to_string()),
                backend: Some(key.address.to_string()),
                detail,
                ..journal::event(kind, SystemTime::now())
            });
        }
        let services: BTreeSet<ServiceName> =
            returned.into_iter().map(|returned| returned.service).collect();
        for name in &services {
            let frontends: Vec<_> = self.reconciler.frontends(name).collect();
            for frontend in &frontends {
                self.make_room(frontend);
            }
        }
        self.reconsider(services.into_iter().map(|name| (name, None)).collect());
    }
}
