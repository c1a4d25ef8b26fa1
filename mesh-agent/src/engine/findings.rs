//! What the health checks find.

use std::collections::{BTreeMap, BTreeSet};

use mesh_common::State;

use super::{Engine, few, observed};
use crate::health::{Finding, Verdict};
use crate::model::ServiceName;

impl Engine {
    pub(super) fn take_findings(&mut self, findings: impl Iterator<Item = Finding>) {
        let (mut changed, mut well) = (BTreeSet::new(), BTreeMap::<_, BTreeSet<_>>::new());
        for finding in findings {
            let Verdict { service, address, life, state, reason } = match finding {
                Finding::Verdict(verdict) => verdict,
                Finding::Trouble(service, trouble) => {
                    self.take_trouble(service, trouble);
                    continue;
                }
            };
            let Some(health) = self.health.get_mut(&service) else { continue };
            let ending = health.ending();
            let known = health.endpoints.get_mut(&address);
            // A verdict may come in after its endpoint went, or even came back.
            let Some(known) = known.filter(|known| known.life == life) else { continue };
            self.dead.follow(&service, address, (life, state), ending);
            let was_unhealthy = known.state == State::Unhealthy;
            if known.turn(state, reason.clone()) {
                tracing::info!(%service, endpoint = %address, state = state.name(), "{reason}");
                self.journal.push(observed::checked(&service, address, state, &reason));
                if state == State::Unhealthy {
                    self.end_waiting(&service, address);
                }
                if was_unhealthy && state == State::Healthy {
                    well.entry(service.clone()).or_default().insert(address);
                }
                changed.insert(service);
            }
        }
        self.update(changed);
        for (service, addresses) in well {
            self.readmit(&service, &addresses);
        }
    }

    /// Checks of a service cannot be made, or can again.
    fn take_trouble(&mut self, service: ServiceName, trouble: Option<String>) {
        let Some(error) = trouble else {
            self.trouble.remove(&service);
            return tracing::info!(%service, "health checks can be made again");
        };
        // What is wrong with this machine is so for all services alike.
        if !self.trouble.values().any(|known| *known == error) {
            tracing::error!(%service, "health checks cannot be made: {error}; endpoints keep their states");
            self.fail(format!("health checks of service {service} cannot be made: {error}"));
        }
        self.trouble.insert(service, error);
    }

    /// Whose checks cannot be made, by the reason.
    pub(super) fn troubles(&self) -> Vec<String> {
        let mut by_reason = BTreeMap::<&str, Vec<String>>::new();
        for (service, error) in &self.trouble {
            by_reason.entry(error).or_default().push(service.to_string());
        }
        let text = |(error, services): (&str, Vec<String>)| {
            let services = few(services).join(", ");
            format!(
                "health checks cannot be made of {services}: {error}; endpoints keep their states"
            )
        };
        by_reason.into_iter().map(text).collect()
    }
}
