//! Connections to endpoints that were removed: those of a service with a `drain-timeout` are ended when
//! that is over, and connected datagram sockets soon, so that their programs look for another endpoint.
//! What a datagram socket sends without being connected goes to another one by itself.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::time::Duration;

use mesh_common::{FrontendKey, Protocol};
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::Engine;
use super::ending::{self, Ended};
use crate::audit::Record;
use crate::audit::sockets::Socket;
use crate::audit::task::Auditor;
use crate::compile::{self, BackendKey};
use crate::dataplane::reconcile::LetGo;
use crate::model::{Service, ServiceName, ServicePort};

/// A connect that had its backend already when that was removed has its record by then.
const SOON: Duration = Duration::from_millis(100);

/// When it is looked again for what was not seen the first time.
const AGAIN: Duration = Duration::from_secs(2);

/// A removed endpoint.
#[derive(Clone, Debug)]
struct Gone {
    what: LetGo,
    since: Instant,
    /// Its connections were ended once.
    again: bool,
}

/// What is to be done now, or was done.
#[derive(Debug)]
pub(super) enum Next {
    /// The time of some endpoints is over.
    Due,
    /// So many connections to this one were ended.
    Ended(LetGo, usize),
    /// Why connections could not be ended.
    Failed(String),
}

/// Removed endpoints whose connections will be ended.
#[derive(Debug)]
pub(super) struct Removed {
    /// As the last definition of each service had it.
    timeouts: HashMap<ServiceName, Duration>,
    gone: Vec<Gone>,
    sender: mpsc::UnboundedSender<Next>,
    receiver: mpsc::UnboundedReceiver<Next>,
}

impl Removed {
    pub(super) fn new() -> Self {
        let (sender, receiver) = mpsc::unbounded_channel();
        Self { timeouts: HashMap::new(), gone: Vec::new(), sender, receiver }
    }

    /// Follows a definition. Of a service that is defined no more, the last one counts.
    pub(super) fn follow(&mut self, service: &ServiceName, timeout: Option<Duration>) {
        match timeout {
            Some(timeout) => drop(self.timeouts.insert(service.clone(), timeout)),
            None => drop(self.timeouts.remove(service)),
        }
    }

    fn add(&mut self, gone: Vec<LetGo>) {
        let since = Instant::now();
        self.gone.extend(gone.into_iter().map(|what| Gone { what, since, again: false }));
        self.gone.retain(|gone| due(gone, &self.timeouts).is_some());
    }

    /// The services of what will be ended.
    fn services(&self) -> impl Iterator<Item = &ServiceName> {
        self.gone.iter().map(|gone| &gone.what.service)
    }

    /// Waits until there is something to do.
    pub(super) async fn next(&mut self) -> Next {
        let first = self.gone.iter().filter_map(|gone| due(gone, &self.timeouts)).min();
        let due = async {
            match first {
                Some(at) => tokio::time::sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            Some(done) = self.receiver.recv() => done,
            () = due => Next::Due,
        }
    }

    /// Those whose time is over, among those for which `is_back` does not say otherwise; forgets those
    /// for which it does, and the timeouts of services of which nothing is left.
    fn take_due(
        &mut self,
        is_back: impl Fn(&LetGo) -> bool,
        is_defined: impl Fn(&ServiceName) -> bool,
    ) -> Vec<LetGo> {
        let (now, timeouts) = (Instant::now(), &self.timeouts);
        self.gone.retain(|gone| !is_back(&gone.what) && due(gone, timeouts).is_some());
        let mut taken = Vec::new();
        self.gone.retain_mut(|gone| {
            if due(gone, timeouts).is_none_or(|at| at > now) {
                return true;
            }
            taken.push(gone.what.clone());
            let first = !gone.again;
            (gone.since, gone.again) = (now, true);
            first
        });
        let left: HashSet<&ServiceName> = self.gone.iter().map(|gone| &gone.what.service).collect();
        self.timeouts.retain(|service, _| is_defined(service) || left.contains(service));
        taken
    }
}

/// When the connections to an endpoint are ended; never, when nobody asks for it.
fn due(gone: &Gone, timeouts: &HashMap<ServiceName, Duration>) -> Option<Instant> {
    let after = match (gone.again, gone.what.key.protocol) {
        (true, _) => AGAIN,
        (false, Protocol::Udp) => SOON,
        (false, Protocol::Tcp) => SOON.max(*timeouts.get(&gone.what.service)?),
    };
    Some(gone.since + after)
}

/// What clients dial, and where that leads.
type Ways = HashSet<(FrontendKey, SocketAddr)>;

/// Ends the connections of all these, but those that go where they would be led now as well; and tells how many
/// there were.
async fn end(auditor: Auditor, gone: Vec<LetGo>, ways: Ways, tell: mpsc::UnboundedSender<Next>) {
    let choose = move |record: &Record, socket: &Socket| {
        !ways.contains(&(record.given.frontend, ending::peer(socket)))
    };
    let Ended { counts, problems } = ending::end(auditor, gone, choose).await;
    let failed = problems.into_iter().map(Next::Failed);
    for next in failed.chain(counts.into_iter().map(|(what, count)| Next::Ended(what, count))) {
        // Nobody listens once the agent stops.
        let _ = tell.send(next);
    }
}

impl Engine {
    /// Every backend that a service defines, those of the service that it falls back to included.
    pub(super) fn keys(&self, name: &ServiceName) -> HashSet<BackendKey> {
        let Some(entry) = self.catalog.get(name.as_str()) else { return HashSet::new() };
        let behind = self.behind(entry).map(|(_, entry)| &entry.service);
        let mut keys = HashSet::new();
        for port in &entry.service.ports {
            let mut add = |service: &Service, listens: &ServicePort| {
                keys.extend(service.endpoints.iter().map(|end| BackendKey {
                    port: port.port,
                    protocol: port.protocol,
                    address: compile::target(end, listens),
                }));
            };
            add(&entry.service, port);
            let same = |p: &&ServicePort| (p.port, p.protocol) == (port.port, port.protocol);
            if let Some(other) = behind
                && let Some(listens) = other.ports.iter().find(same)
            {
                add(other, listens);
            }
        }
        keys
    }

    /// Where other services lead to endpoints of services that are defined no more: one of them may have the
    /// same addresses now, under another name.
    fn ways(&self, gone: &[LetGo]) -> Ways {
        let is_gone = |gone: &&LetGo| self.catalog.get(gone.service.as_str()).is_none();
        let wanted: HashSet<BackendKey> =
            gone.iter().filter(is_gone).map(|gone| gone.key).collect();
        let mut ways = Ways::new();
        if wanted.is_empty() {
            return ways;
        }
        for name in self.reconciler.services() {
            let backends = self.reconciler.backends(name).map(|(key, _)| key);
            for key in backends.filter(|key| wanted.contains(key)) {
                let of_port = |frontend: &FrontendKey| {
                    frontend.host_port() == key.port && frontend.protocol == key.protocol as u8
                };
                let frontends = self.reconciler.frontends(name).filter(of_port);
                ways.extend(frontends.map(|frontend| (frontend, key.address)));
            }
        }
        ways
    }

    /// Takes note of what services have let go of.
    pub(super) fn take_let_go(&mut self) {
        let gone = self.reconciler.take_let_go();
        if !gone.is_empty() {
            self.removed.add(gone);
        }
    }

    /// Ends what is due, or tells what was ended.
    pub(super) fn take_next(&mut self, next: Next) {
        match next {
            Next::Due => {
                // What is defined again goes on, under another number.
                let services: HashSet<&ServiceName> = self.removed.services().collect();
                let defined: HashMap<ServiceName, HashSet<BackendKey>> =
                    services.into_iter().map(|name| (name.clone(), self.keys(name))).collect();
                let is_back = |gone: &LetGo| {
                    defined.get(&gone.service).is_some_and(|keys| keys.contains(&gone.key))
                };
                let is_defined = |name: &ServiceName| self.catalog.get(name.as_str()).is_some();
                let due = self.removed.take_due(is_back, is_defined);
                if !due.is_empty() {
                    let (ways, tell) = (self.ways(&due), self.removed.sender.clone());
                    tokio::spawn(end(self.auditor.clone(), due, ways, tell));
                }
            }
            Next::Ended(backend, count) => {
                self.tell_ended(&backend, count, "an endpoint that was removed");
            }
            Next::Failed(error) => {
                let text =
                    format!("connections to endpoints that were removed cannot be ended: {error}");
                tracing::error!("{text}");
                self.fail(text);
            }
        }
    }
}
