//! A second opinion: when the kernel suspects a backend for one client, the agent connects to it
//! once. If that fails too, the backend is ejected for all. If it succeeds, the client may have a
//! firewall or a network of its own, and stays alone with what it saw.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::time::{Duration, SystemTime};

use mesh_common::ejection::{Phase, ticks};
use mesh_common::event::Kind;
use mesh_common::stats::change;
use mesh_common::translate::share_allows;
use mesh_common::{Client, FrontendKey, Protocol, Service, Table, Tables as _};
use tokio::sync::mpsc;

use super::observed::dialled;
use super::{Engine, journal};
use crate::api::types::Event;
use crate::dataplane::clock;
use crate::health::probe::{Failure, Probe};
use crate::model::ServiceName;
use crate::observe::events::Observed;

/// How long a backend has to answer.
const PATIENCE: Duration = Duration::from_secs(1);

/// How many probes are under way at the most. A suspicion that finds no room is looked at when it
/// is renewed.
const MOST: usize = 64;

/// Which backend is asked, and why.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(super) struct Question {
    pub(super) backend: u32,
    pub(super) generation: u32,
    pub(super) address: SocketAddr,
    pub(super) purpose: Purpose,
}

/// Why it is.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(super) enum Purpose {
    /// The kernel suspects it for a client of this frontend.
    Confirm(FrontendKey),
    /// It is out of this service, and no connect tries it.
    Try(ServiceName),
}

/// What a probe of the agent's found.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Opinion {
    question: Question,
    /// Why it failed, if it did; nothing when it could not be made.
    found: Option<Result<(), String>>,
}

/// The probes.
#[derive(Debug)]
pub(super) struct Opinions {
    under_way: HashSet<Question>,
    sender: mpsc::UnboundedSender<Opinion>,
    /// Where they come in.
    pub(super) receiver: mpsc::UnboundedReceiver<Opinion>,
}

impl Opinions {
    pub(super) fn new() -> Self {
        let (sender, receiver) = mpsc::unbounded_channel();
        Self { under_way: HashSet::new(), sender, receiver }
    }

    /// Asks, unless that is under way, or too much is. Tries leave room for second opinions.
    pub(super) fn ask(&mut self, question: Question) {
        let most = match question.purpose {
            Purpose::Confirm(_) => MOST,
            Purpose::Try(_) => MOST / 2,
        };
        if self.under_way.len() >= most || !self.under_way.insert(question.clone()) {
            return;
        }
        let sender = self.sender.clone();
        tokio::spawn(async move {
            let found = match Probe::Tcp.insist(question.address, PATIENCE).await {
                Ok(()) => Some(Ok(())),
                Err(Failure::Endpoint(failure)) => Some(Err(failure)),
                Err(Failure::Local(_) | Failure::Paused(_)) => None,
            };
            // Nobody listens once the agent stops.
            let _ = sender.send(Opinion { question, found });
        });
    }
}

impl Engine {
    /// Asks for a second opinion about a backend that the kernel has just suspected.
    pub(super) fn confirm(&mut self, observed: &Observed) {
        let event = &observed.event;
        if observed.kind == Kind::Suspected
            // Nothing can be asked of a datagram service without knowing what it speaks.
            && event.frontend.protocol == Protocol::Tcp as u8
            && let Some(address) = self.backend_at(observed)
        {
            self.opinions.ask(Question {
                backend: event.backend,
                generation: event.generation,
                address,
                purpose: Purpose::Confirm(event.frontend),
            });
        }
    }

    /// Takes the answer.
    pub(super) fn take_opinion(&mut self, opinion: Opinion) {
        self.opinions.under_way.remove(&opinion.question);
        let Opinion { question: Question { backend, generation, address, purpose }, found } =
            opinion;
        match (purpose, found) {
            (Purpose::Confirm(frontend), Some(Err(failure))) => {
                self.confirmed(backend, generation, address, frontend, failure);
            }
            (Purpose::Try(service), Some(found)) => {
                self.tried(&service, (backend, generation), address, found.is_ok());
            }
            (Purpose::Confirm(_), Some(Ok(()))) | (_, None) => {}
        }
    }

    /// Ejects for all what failed for the agent too, as far as the share allows.
    fn confirmed(
        &mut self,
        backend: u32,
        generation: u32,
        address: SocketAddr,
        frontend: FrontendKey,
        failure: String,
    ) {
        let Some((service, _)) = self.reconciler.giver(backend, generation) else { return };
        if self.reconciler.owner(&frontend) != Some(service) {
            // What was dialled is another service's now, and says nothing of the share that is out.
            return;
        }
        let service = service.clone();
        // The kernel's, not the catalog's: what happened while no agent ran is read before the sources are.
        let policy = self.reconciler.rules(&service).policy;
        let maps = self.reconciler.maps();
        let Some(stats) = maps.stats(backend).filter(|stats| stats.is_life(generation)) else {
            return;
        };
        let now = ticks(clock::monotonic());
        let allowed = || share_allows(maps, self.table(&frontend), policy, Client::NOBODY, false);
        let changed =
            change(&stats.ejection, |ejection| ejection.confirm(policy, now).filter(|_| allowed()));
        let Some((_, after)) = changed else { return };
        self.make_room(&frontend);
        debug_assert!(matches!(after.phase(), Phase::Ejected | Phase::Trying), "{after:?}");
        tracing::info!(%service, backend = %address, "ejected: the agent cannot connect either: {failure}");
        self.journal.push(Event {
            service: Some(service.to_string()),
            frontend: Some(dialled(&frontend)),
            backend: Some(address.to_string()),
            reason: Some(failure),
            detail: "out for all clients: the agent's own connect failed as well".to_owned(),
            ..journal::event("ejected", SystemTime::now())
        });
        self.end_waiting(&service, address);
        self.reconsider(vec![(service, None)]);
    }

    /// What is ejected for all comes before what single clients suspect: when more than the share of
    /// a table is out for anybody, as many suspicions are dropped, so that the share holds for each
    /// client.
    pub(super) fn make_room(&self, frontend: &FrontendKey) {
        let maps = self.reconciler.maps();
        let Some(owner) = self.reconciler.owner(frontend) else { return };
        let policy = self.reconciler.rules(owner).policy;
        let table = self.table(frontend);
        let slots = table.base()..table.base() + table.len();
        let out: u64 = slots.clone().map(|slot| maps.is_out(slot, Client::SEVERAL)).sum();
        let mut excess = out.saturating_sub(policy.share() * u64::from(table.len()) / 100);
        for slot in slots {
            if excess == 0 {
                return;
            }
            let Some(slot) = maps.slot(slot) else { return };
            let Some(stats) = maps.stats(slot.backend) else { continue };
            let ejection = stats.ejection();
            // Whoever is faster makes it something else.
            if ejection.phase() == Phase::Suspected
                && stats.is_life(slot.generation)
                && stats.ejection.replace(ejection.0, 0)
            {
                excess -= 1;
            }
        }
    }

    /// The table that is in force for a frontend.
    pub(super) fn table(&self, frontend: &FrontendKey) -> Table {
        let maps = self.reconciler.maps();
        let value = maps.frontend(frontend);
        let service = value.and_then(|value| maps.service(value.service));
        service.filter(|service| service.key == *frontend).map_or(Table(0), Service::table)
    }
}
