//! What the kernel programs tell, in the words of people: who it concerns, and what it means.

use std::net::SocketAddr;
use std::time::{Duration, SystemTime};

use mesh_common::ejection::TICK_SHIFT;
use mesh_common::event::Kind;
use mesh_common::{Ejection, Failure, FrontendKey, Protocol, Reason, State};

use super::{Engine, journal};
use crate::api::types::Event;
use crate::dataplane::clock;
use crate::model::ServiceName;
use crate::observe::events::{Batch, Observed};

/// The backend of an event that concerns none.
const NO_BACKEND: u32 = u32::MAX;

/// The same moment by both clocks.
#[derive(Clone, Copy)]
struct Clock {
    wall: SystemTime,
    /// Nanoseconds of `CLOCK_MONOTONIC`.
    monotonic: u64,
}

impl Engine {
    /// Writes down what the kernel programs have told.
    pub(super) fn take_observed(&mut self, batch: Batch) {
        let lost = batch.dropped.saturating_add(batch.malformed);
        if lost > 0 {
            let words = format!(
                "events of the kernel programs were lost: {} because the agent was busy, {} that \
                 could not be read",
                batch.dropped, batch.malformed
            );
            tracing::warn!("{lost} {words}");
            self.journal.push(journal::missed(lost, &words));
        }
        let clock = Clock::now();
        let mut moved = Vec::new();
        for observed in batch.events {
            let service = self.service_of(&observed).cloned();
            let event = tell(&observed, service.as_ref(), self.backend_at(&observed), clock);
            self.journal.push(event);
            if matches!(observed.kind, Kind::Ejected | Kind::Recovered)
                && let Some(service) = service.clone()
            {
                // What was out for one client only was in for all others.
                let known = (observed.event.backend, observed.event.generation);
                let for_all = self.suspect(known.0, known.1).is_none();
                let back = (observed.kind == Kind::Recovered && for_all)
                    .then(|| self.backend_at(&observed));
                moved.push((service, back.flatten()));
            }
            self.confirm(&observed);
            if observed.kind == Kind::Ejected {
                self.make_room(&observed.event.frontend);
                if let Some((service, address)) = service.zip(self.backend_at(&observed)) {
                    self.end_waiting(&service, address);
                }
            }
            self.note_suspect(observed);
        }
        if lost > 0 {
            // One of them may have said that something went out, or came back.
            moved.extend(self.catalog.iter().map(|(name, _)| (name.clone(), None)));
        }
        self.reconsider(moved);
    }

    /// The service that an event is of: that of its backend, whoever has by now what was dialled.
    fn service_of(&self, observed: &Observed) -> Option<&ServiceName> {
        let event = &observed.event;
        if event.backend == NO_BACKEND {
            return self.reconciler.refuser(&event.frontend, event.time);
        }
        self.reconciler.giver(event.backend, event.generation).map(|(name, _)| name)
    }

    /// Where the backend of an event is, or was.
    pub(super) fn backend_at(&self, observed: &Observed) -> Option<SocketAddr> {
        let event = &observed.event;
        self.reconciler.giver(event.backend, event.generation).map(|(_, key)| key.address)
    }

    fn note_suspect(&mut self, observed: Observed) {
        let Observed { kind, event, client } = observed;
        match kind {
            Kind::Suspected => {
                self.suspects.insert(event.backend, (event.generation, client));
            }
            Kind::Ejected | Kind::Recovered => {
                self.suspects.remove(&event.backend);
            }
            Kind::Refused | Kind::Failed | Kind::Spared => {}
        }
    }

    /// The client that a backend was last taken out for alone: its cgroup's place in the hierarchy,
    /// or `cgroup 1234`. Whether it still is out, the backend's `Ejection` says.
    #[must_use]
    pub fn suspect(&self, id: u32, generation: u32) -> Option<&str> {
        let (suspected, client) = self.suspects.get(&id)?;
        (*suspected == generation).then_some(client)
    }
}

/// The checks have found another state.
pub(super) fn checked(
    service: &ServiceName,
    endpoint: SocketAddr,
    state: State,
    reason: &str,
) -> Event {
    Event {
        service: Some(service.to_string()),
        backend: Some(endpoint.to_string()),
        reason: Some(reason.to_owned()),
        detail: "health check".to_owned(),
        ..journal::event(state.name(), SystemTime::now())
    }
}

fn tell(
    observed: &Observed,
    service: Option<&ServiceName>,
    backend: Option<SocketAddr>,
    clock: Clock,
) -> Event {
    let Observed { kind, event, client } = observed;
    let failure = Failure::from_number(event.detail);
    let reason = match kind {
        Kind::Refused => Some(Reason::from_number(event.detail).name()),
        Kind::Recovered => None,
        Kind::Failed | Kind::Suspected | Kind::Ejected | Kind::Spared => failure.map(Failure::name),
    };
    let until = Ejection(event.ejection).until() << TICK_SHIFT;
    let out = Duration::from_nanos(until.saturating_sub(event.time)).as_secs_f64();
    let detail = match kind {
        Kind::Refused => Reason::from_number(event.detail).describe().to_owned(),
        Kind::Failed => failure.map_or("", describe).to_owned(),
        Kind::Suspected => {
            format!("out for this client for {out:.1} s, then one of its connects tries it")
        }
        Kind::Ejected => format!("out for all clients for {out:.1} s, then one connect tries it"),
        Kind::Recovered => "a try succeeded".to_owned(),
        Kind::Spared => "not taken out: as large a share of the service's is out as may be".into(),
    };
    Event {
        service: service.map(ToString::to_string),
        frontend: Some(dialled(&event.frontend)),
        backend: backend.map(|backend| backend.to_string()),
        reason: reason.map(str::to_owned),
        client: Some(client.to_string()),
        detail,
        ..journal::event(name(*kind), clock.at(event.time))
    }
}

/// The name of a kind in tables and JSON.
fn name(kind: Kind) -> &'static str {
    match kind {
        Kind::Refused => "refused",
        Kind::Failed => "failed",
        Kind::Suspected => "suspected",
        Kind::Ejected => "ejected",
        Kind::Recovered => "recovered",
        Kind::Spared => "spared",
    }
}

fn describe(failure: Failure) -> &'static str {
    match failure {
        Failure::Refused => "the backend, or a firewall on the way, refused the connection",
        Failure::Timeout => "the backend never answered",
        Failure::Unreachable => "the backend's host cannot be reached",
        Failure::Reset => "the connection was reset before the first byte came back",
    }
}

/// `ip:port/protocol`, as `explain` writes it.
pub(super) fn dialled(key: &FrontendKey) -> String {
    let protocol = Protocol::from_number(key.protocol).map_or("", Protocol::name);
    format!("{}/{protocol}", SocketAddr::new(key.addr.ip(), key.host_port()))
}

// === impl Clock ===

impl Clock {
    fn now() -> Self {
        Self { wall: SystemTime::now(), monotonic: clock::monotonic() }
    }

    /// The time of day of a moment that has passed.
    fn at(self, monotonic: u64) -> SystemTime {
        let age = Duration::from_nanos(self.monotonic.saturating_sub(monotonic));
        self.wall.checked_sub(age).unwrap_or(self.wall)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_common::{Addr, Client, Policy, Token};

    const SECOND: u64 = 1_000_000_000;

    fn told(kind: Kind, detail: u8, ejection: Ejection) -> Event {
        let wall = humantime::parse_rfc3339("2026-01-10T00:00:10Z").expect("time");
        let frontend =
            FrontendKey::new(Addr::from(std::net::Ipv4Addr::new(10, 96, 0, 10)), 80, Protocol::Tcp);
        let event = mesh_common::Event {
            time: 40 * SECOND,
            frontend,
            ejection: ejection.0,
            kind: kind as u8,
            detail,
            ..mesh_common::Event::default()
        };
        let observed = Observed { kind, event, client: "/web".into() };
        let clock = Clock { wall, monotonic: 42 * SECOND };
        let backend = "10.0.0.1:8080".parse().expect("address");
        tell(&observed, Some(&ServiceName::new("app")), Some(backend), clock)
    }

    #[test]
    fn events_are_told_in_names() {
        let failed = told(Kind::Failed, Failure::Timeout as u8, Ejection::NONE);
        let expected = Event {
            seq: 0,
            time: "2026-01-10T00:00:08.000Z".into(),
            kind: "failed".into(),
            service: Some("app".into()),
            frontend: Some("10.96.0.10:80/tcp".into()),
            backend: Some("10.0.0.1:8080".into()),
            reason: Some("timeout".into()),
            client: Some("/web".into()),
            detail: "the backend never answered".into(),
            missed: None,
        };
        assert_eq!(failed, expected);
        let refused = told(Kind::Refused, Reason::NoEndpoint as u8, Ejection::NONE);
        assert_eq!(refused.reason.as_deref(), Some("no-endpoint"));
        let recovered = told(Kind::Recovered, 0, Ejection::NONE);
        assert_eq!((recovered.kind.as_str(), recovered.reason), ("recovered", None));
    }

    #[test]
    fn how_long_it_is_out_is_said() {
        let now = (40 * SECOND) >> TICK_SHIFT;
        let policy = Policy::new(1, 120, 1_200, 50);
        let client = Client::of_cgroup(7);
        let out = Ejection::NONE.fail(policy, client, Token::NONE, now).expect("a change");
        let suspected = told(Kind::Suspected, Failure::Refused as u8, out);
        assert!(suspected.detail.starts_with("out for this client for 2.0 s"), "{suspected:?}");
        // What is over before it is told, or was never.
        let suspected = told(Kind::Suspected, Failure::Refused as u8, Ejection::NONE);
        assert!(suspected.detail.contains("for 0.0 s"), "{suspected:?}");
    }
}
