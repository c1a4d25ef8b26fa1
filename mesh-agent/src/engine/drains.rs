//! Draining: what takes no new connection while another endpoint is usable. Connections that are
//! open go on.
//!
//! What the service file drains, it drains until it says otherwise. What a person drains lasts until
//! it is undrained, or the endpoint is not defined any more: its record says so to the agent that comes
//! after this one.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::time::SystemTime;

use mesh_common::{Marks, State};

use super::standing::{Said, Voice};
use super::{Engine, journal};
use crate::api::server::{DrainQuery, ViewError};
use crate::api::types::{self, Event};
use crate::catalog::Entry;
use crate::compile;
use crate::model::ServiceName;

/// What is drained by command, and since when.
#[derive(Debug, Default)]
pub(super) struct Drains(HashMap<ServiceName, BTreeMap<Place, SystemTime>>);

/// An address, with a port or with all that it has.
type Place = (IpAddr, Option<u16>);

/// Why an endpoint drains.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Cause {
    /// The service file says so.
    file: bool,
    /// Somebody did, then.
    pub(super) command: Option<SystemTime>,
}

// === impl Drains ===

impl Drains {
    /// Forgets what a service does not define any more.
    pub(super) fn follow(&mut self, service: &ServiceName, entry: Option<&Entry>) {
        let Some(drained) = self.0.get_mut(service) else { return };
        let defined: BTreeSet<SocketAddr> = entry.into_iter().flat_map(targets).collect();
        drained.retain(|place, _| defined.iter().any(|address| is_at(*address, *place)));
        if drained.is_empty() {
            self.0.remove(service);
        }
    }

    /// Drains what a former agent drained by command.
    pub(super) fn adopt(
        &mut self,
        service: &ServiceName,
        entry: &Entry,
        found: &BTreeMap<SocketAddr, Marks>,
    ) {
        let is_drained =
            |target: &SocketAddr| found.get(target).is_some_and(|marks| marks.is_by_command());
        let drained: BTreeSet<SocketAddr> = targets(entry).filter(is_drained).collect();
        if !drained.is_empty() {
            let now = SystemTime::now();
            let places =
                drained.into_iter().map(|target| ((target.ip(), Some(target.port())), now));
            self.0.entry(service.clone()).or_default().extend(places);
        }
    }

    /// Drains these endpoints no more. Whether any of them was drained.
    fn end(&mut self, name: &ServiceName, entry: &Entry, meant: &BTreeSet<SocketAddr>) -> bool {
        let Some(drained) = self.0.get_mut(name) else { return false };
        let is_meant = |place: &Place| meant.iter().any(|target| is_at(*target, *place));
        let ended: Vec<_> = drained.extract_if(.., |place, _| is_meant(place)).collect();
        for &(place, since) in &ended {
            // What was drained with its address, and is not meant now.
            let others = targets(entry).filter(|t| is_at(*t, place) && !meant.contains(t));
            drained.extend(others.map(|target| ((target.ip(), Some(target.port())), since)));
        }
        !ended.is_empty()
    }

    /// Which endpoints of a service drain, and why.
    pub(super) fn causes(&self, name: &ServiceName, entry: &Entry) -> HashMap<SocketAddr, Cause> {
        let filed = |target| (target, Cause { file: true, command: None });
        let mut causes: HashMap<_, _> = by_file(entry).map(filed).collect();
        let Some(drained) = self.0.get(name) else { return causes };
        for target in targets(entry) {
            let keys = [None, Some(target.port())].map(|port| (target.ip(), port));
            if let Some(since) = keys.iter().filter_map(|key| drained.get(key)).min() {
                causes.entry(target).or_default().command = Some(*since);
            }
        }
        causes
    }
}

impl Cause {
    /// Who says that it drains.
    pub(super) fn said(self) -> Vec<Said> {
        let says = |by, reason: &str, since| {
            let (state, reason) = (Some(State::Draining), reason.to_owned());
            Said { by, state, reason, since }
        };
        let file = self.file.then(|| says(Voice::Source, "drained by its file", None));
        let command = |since| says(Voice::Command, "drained by command", Some(since));
        file.into_iter().chain(self.command.map(command)).collect()
    }
}

impl Engine {
    /// Drains endpoints of a service, or ends that. Gives them as they are then.
    pub(super) fn drain(&mut self, query: &DrainQuery) -> Result<Vec<types::Backend>, ViewError> {
        let DrainQuery { service, address, port, drain } = query;
        let name = ServiceName::new(service);
        let entry = self.catalog.get(service).ok_or_else(|| ViewError::no_service(service))?;
        if let Some(why) = self.why_held(&name) {
            return Err(ViewError::Unavailable(why));
        }
        let place = (*address, *port);
        let meant: BTreeSet<SocketAddr> =
            targets(entry).filter(|target| is_at(*target, place)).collect();
        let shown = match port {
            Some(port) => SocketAddr::new(*address, *port).to_string(),
            None => address.to_string(),
        };
        if meant.is_empty() {
            return Err(ViewError::NotFound(format!(
                "service {service} has no endpoint {shown}: `mesh-agent backends {service}` lists \
                 them"
            )));
        }
        if *drain {
            let drained = self.drains.0.entry(name.clone()).or_default();
            let before = drained.len();
            drained.entry(place).or_insert_with(SystemTime::now);
            if drained.len() == before {
                return Ok(self.shown(&name, &meant));
            }
        } else {
            let by_file = by_file(entry).any(|target| meant.contains(&target));
            if !self.drains.end(&name, entry, &meant) {
                return Err(ViewError::BadRequest(match by_file {
                    true => format!(
                        "{shown} of service {service} is drained by its file ({}): remove `drain` \
                         there",
                        entry.origin.item
                    ),
                    false => format!(
                        "{shown} of service {service} is not drained: `mesh-agent backends \
                         {service}` shows what is"
                    ),
                }));
            }
        }
        for target in &meant {
            let kind = if *drain { "drained" } else { "undrained" };
            tracing::info!(%service, endpoint = %target, "{kind}");
            self.journal.push(Event {
                service: Some(service.clone()),
                backend: Some(target.to_string()),
                detail: "by command".to_owned(),
                ..journal::event(kind, SystemTime::now())
            });
        }
        self.update(BTreeSet::from([name.clone()]));
        Ok(self.shown(&name, &meant))
    }

    /// These backends of a service, as they are now.
    fn shown(&self, name: &ServiceName, meant: &BTreeSet<SocketAddr>) -> Vec<types::Backend> {
        let entry = self.catalog.get(name.as_str());
        let meant: BTreeSet<String> = meant.iter().map(ToString::to_string).collect();
        let mut backends = self.backends(name, entry);
        backends.retain(|backend| meant.contains(&backend.address));
        backends
    }
}

// === functions ===

/// What an endpoint is to the tables that takes no new connections.
pub(super) const fn state(found: State, drains: bool) -> State {
    if drains && found.is_usable() { State::Draining } else { found }
}

/// Where the endpoints of a service listen.
fn targets(entry: &Entry) -> impl Iterator<Item = SocketAddr> {
    let service = &entry.service;
    service
        .ports
        .iter()
        .flat_map(|port| service.endpoints.iter().map(move |e| compile::target(e, port)))
}

/// Those that its file drains.
fn by_file(entry: &Entry) -> impl Iterator<Item = SocketAddr> {
    let service = &entry.service;
    let drained = service.endpoints.iter().filter(|endpoint| endpoint.drain);
    drained.flat_map(|endpoint| service.ports.iter().map(|port| compile::target(endpoint, port)))
}

/// Whether an address with a port is meant by an address with or without one.
fn is_at(target: SocketAddr, (ip, port): Place) -> bool {
    target.ip() == ip && port.is_none_or(|port| target.port() == port)
}
