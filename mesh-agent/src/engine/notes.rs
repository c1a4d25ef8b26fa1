//! What is odd about definitions: what is done otherwise than written, or is likely a mistake.

use std::collections::{BTreeMap, BTreeSet};

use mesh_common::Protocol;

use super::{Engine, few, spread};
use crate::model::{HealthCheck, HealthPolicy, ServiceName};

impl Engine {
    /// Notes what is odd about the definitions that changed, and says so once.
    pub(super) fn note_definitions(&mut self, changed: &BTreeSet<ServiceName>) {
        let mut notes: BTreeMap<&ServiceName, Vec<String>> =
            changed.iter().map(|name| (name, Vec::new())).collect();
        for name in changed {
            let Some(entry) = self.catalog.get(name.as_str()) else { continue };
            let inside = entry.service.endpoints.iter().filter(|endpoint| {
                self.config.virtual_ips.iter().any(|range| range.contains(&endpoint.address))
            });
            let lost = inside.map(|endpoint| {
                format!(
                    "the endpoint {} lies inside virtual-ips: connects go to it as it is, and no \
                     service address is resolved a second time",
                    endpoint.address
                )
            });
            let policy = self.config.policy(&entry.service.health);
            let connects = |policy: &HealthPolicy| {
                policy.port.is_none() && !matches!(policy.check, HealthCheck::Command(_))
            };
            let forbidden = self.config.forbids(&entry.service.health).then(|| {
                "its checks are commands, which this agent does not run, so its endpoints are not checked: \
                 name who they run as by `command-checks: {user: nobody}` in the agent file"
                    .to_owned()
            });
            let only_datagrams = policy.is_some_and(connects)
                && entry.service.ports.iter().all(|port| port.protocol == Protocol::Udp);
            let unheard = only_datagrams.then(|| {
                "its checks connect by TCP, and all of its ports are UDP: endpoints that do not \
                 listen on TCP there too never pass; name a TCP port with `port` in `health`, or write \
                 `health: off`"
                    .to_owned()
            });
            let behind = spread::fallback_note(name, &self.catalog)
                .into_iter()
                .chain(unheard)
                .chain(forbidden);
            let texts = entry.shadowed.iter().chain(&entry.warnings).cloned();
            let texts = texts.chain(lost).chain(behind);
            notes.insert(name, few(texts.collect()));
        }
        for (name, texts) in notes {
            let before = self.notes.remove(name).unwrap_or_default();
            for text in texts.iter().filter(|text| !before.contains(text)) {
                tracing::warn!(service = %name, "{text}");
            }
            if !texts.is_empty() {
                self.notes.insert(name.clone(), texts);
            }
        }
        let shadowed: BTreeSet<String> =
            self.catalog.shadowed_definitions().map(|shadowed| shadowed.to_string()).collect();
        for text in shadowed.difference(&self.shadowed) {
            tracing::warn!("{text}");
        }
        self.shadowed = shadowed;
    }
}
