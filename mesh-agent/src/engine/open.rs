//! The connections that are open, in the words of people.

use std::net::SocketAddr;

use mesh_common::{Held, Protocol};

use super::Engine;
use super::view::Handle;
use crate::api::server::ViewError;
use crate::api::types;
use crate::audit::Record;
use crate::canary;
use crate::connections;
use crate::dataplane::clock;
use crate::model::ServiceName;
use crate::observe::clients::Clients;

/// How many records are named at a time: the engine has other things to do.
const PART: usize = 4_096;

/// A record, and what its numbers mean.
struct Named {
    record: Record,
    service: Option<ServiceName>,
    backend: Option<SocketAddr>,
}

impl Handle {
    /// Those of a service, or all.
    pub(super) async fn open_connections(
        &self,
        service: Option<String>,
    ) -> Result<Vec<types::Connection>, ViewError> {
        let wanted = service.as_deref().map(ServiceName::new);
        if let Some(wanted) = wanted.clone() {
            let known = self.ask(move |engine| engine.knows(&wanted)).await?;
            if !known {
                return Err(ViewError::no_service(service.as_deref().unwrap_or_default()));
            }
        }
        let mut named = Vec::new();
        for part in self.auditor.records().chunks(PART) {
            let part = part.to_vec();
            named.extend(self.ask(move |engine| engine.name_records(part)).await?);
        }
        named.retain(|named| match &wanted {
            Some(_) => named.service == wanted,
            None => !canary::is_dialled(&named.record.given.frontend),
        });
        let records = named.iter().map(|named| named.record).collect();
        let failed = |error: std::io::Error| {
            ViewError::Failed(format!("the sockets cannot be listed: {error}"))
        };
        let described = connections::describe(records).await.map_err(failed)?;
        let mut clients = Clients::of(&self.config.cgroup.clone().unwrap_or_default());
        clients.learn(described.iter().map(|described| described.record.given.client)).await;
        let mut open: Vec<types::Connection> = named
            .into_iter()
            .zip(described)
            // What has ended meanwhile is not open.
            .filter(|(named, _)| self.auditor.still(&named.record))
            .map(|(named, described)| {
                let given = named.record.given;
                let (frontend, protocol) = (given.frontend, given.frontend.protocol);
                types::Connection {
                    service: named.service.map_or_else(String::new, |name| name.to_string()),
                    frontend: SocketAddr::new(frontend.addr.ip(), frontend.host_port()).to_string(),
                    backend: named.backend.map_or_else(String::new, |place| place.to_string()),
                    protocol: Protocol::from_number(protocol).map_or("", Protocol::name).to_owned(),
                    pid: described.holder.as_ref().map(|holder| holder.pid),
                    command: described.holder.map(|holder| holder.command),
                    cgroup: clients.name(given.client).to_string(),
                    age: clock::age(given.origin).as_secs(),
                    state: described.state.to_owned(),
                }
            })
            .collect();
        open.sort();
        Ok(open)
    }
}

impl Engine {
    pub(super) fn knows(&self, service: &ServiceName) -> bool {
        self.catalog.get(service.as_str()).is_some()
            || self.reconciler.backends(service).next().is_some()
            || self.reconciler.frontends(service).next().is_some()
    }

    fn name_records(&self, records: Vec<Record>) -> Vec<Named> {
        let named = |record: Record| {
            let given = record.given;
            let life = (Held(record.word).backend(), given.generation);
            let giver = self.reconciler.giver_of(life, &given.frontend, given.role.service());
            let backend = self.reconciler.giver(life.0, life.1).map(|(_, key)| key.address);
            // Of one that is gone there is no other name.
            Named { record, service: giver.filter(|name| self.knows(name)).cloned(), backend }
        };
        records.into_iter().map(named).collect()
    }
}
