//! Connections to endpoints that were removed: those of a service with a `drain-timeout` are ended when
//! that is over, and connected datagram sockets soon, so that their programs look for another endpoint.
//! What a datagram socket sends without being connected goes to another one by itself.

use std::collections::HashMap;
use std::io;
use std::time::{Duration, SystemTime};

use mesh_common::{Held, Protocol};
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::{Engine, journal};
use crate::api::types::Event;
use crate::audit::task::Auditor;
use crate::audit::{self, Found, Record, sockets};
use crate::dataplane::reconcile::LetGo;
use crate::model::ServiceName;

/// A connect that had its backend already when that was removed has its record by then.
const SOON: Duration = Duration::from_millis(100);

/// When it is looked again for what was not seen the first time.
const AGAIN: Duration = Duration::from_secs(2);

/// What is to be ended, and when.
#[derive(Clone, Debug)]
struct Due {
    at: Instant,
    what: LetGo,
    again: bool,
}

/// What came of it.
#[derive(Debug)]
pub(super) struct Ended {
    what: LetGo,
    /// How many connections.
    count: io::Result<usize>,
}

/// Removed backends whose connections will be ended.
#[derive(Debug)]
pub(super) struct Removed {
    /// As the last definition of each service had it.
    timeouts: HashMap<ServiceName, Duration>,
    due: Vec<Due>,
    sender: mpsc::UnboundedSender<Ended>,
    /// Where what was done is told.
    receiver: mpsc::UnboundedReceiver<Ended>,
}

impl Removed {
    pub(super) fn new() -> Self {
        let (sender, receiver) = mpsc::unbounded_channel();
        Self { timeouts: HashMap::new(), due: Vec::new(), sender, receiver }
    }

    /// Follows a definition; of a service that goes, the last one counts until [`Removed::forget`].
    pub(super) fn follow(&mut self, service: &ServiceName, timeout: Option<Duration>) {
        match timeout {
            Some(timeout) => drop(self.timeouts.insert(service.clone(), timeout)),
            None => drop(self.timeouts.remove(service)),
        }
    }

    pub(super) fn forget(&mut self, service: &ServiceName) {
        self.timeouts.remove(service);
    }

    fn add(&mut self, gone: Vec<LetGo>) {
        let now = Instant::now();
        for what in gone {
            let after = match what.key.protocol {
                Protocol::Udp => SOON,
                Protocol::Tcp => match self.timeouts.get(&what.service) {
                    Some(timeout) => SOON.max(*timeout),
                    None => continue,
                },
            };
            self.due.push(Due { at: now + after, what, again: true });
        }
    }

    /// Ends what becomes due, and waits until there is something to tell of that.
    pub(super) async fn ended(&mut self, auditor: &Auditor) -> Ended {
        loop {
            let next = self.due.iter().map(|due| due.at).min();
            let due = async {
                match next {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                Some(ended) = self.receiver.recv() => return ended,
                () = due => self.end(auditor),
            }
        }
    }

    /// Ends, in a task of its own, what is due.
    fn end(&mut self, auditor: &Auditor) {
        let now = Instant::now();
        let (due, later): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.due).into_iter().partition(|due| due.at <= now);
        let again = due.iter().filter(|due| due.again);
        let again = again.map(|due| Due { at: now + AGAIN, again: false, ..due.clone() });
        self.due = later.into_iter().chain(again).collect();
        let (auditor, sender) = (auditor.clone(), self.sender.clone());
        let due: Vec<LetGo> = due.into_iter().map(|due| due.what).collect();
        tokio::spawn(async move {
            let wanted: HashMap<(u32, u32), &LetGo> =
                due.iter().map(|due| ((due.id, due.generation), due)).collect();
            let mut found: HashMap<(u32, u32), Vec<Record>> = HashMap::new();
            for record in auditor.records() {
                let which = (Held(record.word).backend(), record.given.generation);
                let concerned = !record.is_datagram() || record.given.role.is_connected();
                if concerned && wanted.contains_key(&which) {
                    found.entry(which).or_default().push(record);
                }
            }
            for (which, records) in found {
                let count = end_all(records).await;
                // Nobody listens once the agent stops.
                let _ = sender.send(Ended { what: wanted[&which].clone(), count });
            }
        });
    }
}

/// Ends the sockets of these records, and gives how many there were.
async fn end_all(records: Vec<Record>) -> io::Result<usize> {
    let (count, counted) = std::sync::mpsc::channel();
    let inside = move |found: &Found| {
        for socket in found.sockets.values() {
            // Whoever counts is there until this returns.
            let _ = count.send(sockets::destroy(socket));
        }
    };
    audit::visit(&records, inside).await?;
    let mut ended = 0;
    for destroyed in counted.try_iter() {
        ended += usize::from(destroyed?);
    }
    Ok(ended)
}

impl Engine {
    /// Takes note of what services have let go of.
    pub(super) fn take_let_go(&mut self) {
        let gone = self.reconciler.take_let_go();
        self.removed.add(gone);
    }

    /// Tells what was ended.
    pub(super) fn take_ended(&mut self, ended: Ended) {
        let Ended { what: LetGo { service, key, .. }, count } = ended;
        let detail = match count {
            Ok(0) => return,
            Ok(count) => format!("{count} connections to an endpoint that was removed were ended"),
            Err(error) => {
                let text = format!(
                    "connections of service {service} to {}, which was removed, cannot be ended: \
                     {error}; a kernel without CONFIG_INET_DIAG_DESTROY cannot do it at all",
                    key.address
                );
                tracing::error!("{text}");
                return self.fail(text);
            }
        };
        tracing::info!(%service, endpoint = %key.address, "{detail}");
        self.journal.push(Event {
            service: Some(service.to_string()),
            backend: Some(key.address.to_string()),
            detail,
            ..journal::event("ended", SystemTime::now())
        });
    }
}
