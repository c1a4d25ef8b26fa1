//! Ends connections of backends: by their records, which name the backend's id and life; then the list of the
//! network namespace's sockets gives the address, and the kernel compares the cookie once more
//! (`SOCK_DESTROY`). A connection that has no record, or that of another backend, is never touched.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::mpsc;
use std::time::SystemTime;

use mesh_common::{Held, Protocol};
use tokio::sync::mpsc as channel;
use tokio::task::JoinError;
use tokio::time::Instant;

use super::{Engine, journal};
use crate::api::types::Event;
use crate::audit::sockets::{self, Socket};
use crate::audit::task::Auditor;
use crate::audit::{self, Found, Record};
use crate::dataplane::reconcile::LetGo;

/// `TCP_ESTABLISHED`, which is also the state of a connected datagram socket.
const CONNECTED: u8 = 1;

/// A backend's id and generation.
pub(super) type Life = (u32, u32);

/// What came of it.
#[derive(Debug, Default)]
pub(super) struct Ended {
    /// How many connections of which backends were ended.
    pub(super) counts: Vec<(LetGo, usize)>,
    /// What could not be done, and why.
    pub(super) problems: Vec<String>,
}

/// Looks at connections that are to be ended, one at a time.
#[derive(Debug)]
pub(super) struct Looks {
    is_looking: bool,
    sender: channel::UnboundedSender<Ended>,
    receiver: channel::UnboundedReceiver<Ended>,
}

/// What is to be done now, or was done.
#[derive(Debug)]
pub(super) enum Next {
    /// It is time to look.
    Due,
    /// A look is over.
    Looked(Ended),
}

impl Looks {
    pub(super) fn new() -> Self {
        let (sender, receiver) = channel::unbounded_channel();
        Self { is_looking: false, sender, receiver }
    }

    /// Waits for the end of a look, or, while there is none, for this moment.
    pub(super) async fn next(&mut self, first: Option<Instant>) -> Next {
        let due = async {
            match first.filter(|_| !self.is_looking) {
                Some(at) => tokio::time::sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            Some(ended) = self.receiver.recv() => {
                self.is_looking = false;
                Next::Looked(ended)
            }
            () = due => Next::Due,
        }
    }

    /// Begins one: [`end`], and then `after`.
    pub(super) fn begin(
        &mut self,
        auditor: Auditor,
        gone: Vec<LetGo>,
        choose: impl FnMut(&Record, &Socket) -> bool + Send + 'static,
        after: impl FnOnce() + Send + 'static,
    ) {
        self.is_looking = true;
        let tell = self.sender.clone();
        tokio::spawn(async move {
            let ended = tokio::spawn(end(auditor, gone, choose)).await;
            after();
            // A look that fails is followed by others all the same.
            let failed = |error: JoinError| {
                let problems = vec![error.to_string()];
                Ended { problems, ..Ended::default() }
            };
            // Nobody listens once the agent stops.
            let _ = tell.send(ended.unwrap_or_else(failed));
        });
    }
}

/// Ends those connections of these backends that `choose` is for; it may be asked about each a second time
/// in the same call.
pub(super) async fn end(
    auditor: Auditor,
    gone: Vec<LetGo>,
    mut choose: impl FnMut(&Record, &Socket) -> bool + Send + 'static,
) -> Ended {
    let mut ended = Ended::default();
    let gone: HashMap<Life, LetGo> =
        gone.into_iter().map(|gone| ((gone.id, gone.generation), gone)).collect();
    let concerned = {
        let gone: HashSet<Life> = gone.keys().copied().collect();
        let auditor = auditor.clone();
        // A look at each record, of which there may be many.
        tokio::task::spawn_blocking(move || {
            let mut records = auditor.records();
            records.retain(|record| gone.contains(&backend(record)) && is_held_there(record));
            records
        })
    };
    let records = match concerned.await {
        Ok(records) if records.is_empty() => return ended,
        Ok(records) => records,
        Err(error) => {
            ended.problems.push(error.to_string());
            return ended;
        }
    };
    let by_cookie: HashMap<u64, (Record, SocketAddr)> = records
        .iter()
        .filter_map(|record| {
            let address = gone.get(&backend(record))?.key.address;
            Some((record.cookie, (*record, address)))
        })
        .collect();
    let (count, counted) = mpsc::channel();
    let inside = move |found: &Found| {
        for socket in found.sockets.values() {
            let Some((record, address)) = by_cookie.get(&socket.cookie) else { continue };
            // It may have gone elsewhere since; the kernel compares what is listed, and the cookie.
            if leads_to(socket, *address) && choose(record, socket) && auditor.still(record) {
                // Whoever counts is there until this returns.
                let _ = count.send((backend(record), sockets::destroy(socket)));
            }
        }
    };
    let found = match audit::visit(&records, inside).await {
        Ok(found) => found,
        Err(error) => {
            ended.problems.push(error.to_string());
            return ended;
        }
    };
    let mut counts = HashMap::<Life, usize>::new();
    for (which, destroyed) in counted.try_iter() {
        match destroyed {
            Ok(destroyed) => *counts.entry(which).or_default() += usize::from(destroyed),
            Err(error) => ended.problems.push(format!(
                "{error} (a kernel without CONFIG_INET_DIAG_DESTROY cannot do it at all)"
            )),
        }
    }
    ended.problems.extend(found.values().flat_map(|found| found.incomplete.values().cloned()));
    let unreached = records.iter().filter(|record| !found.contains_key(&record.netns())).count();
    if unreached > 0 {
        ended.problems.push(format!("{unreached} of them are in network namespaces out of reach"));
    }
    let counts = counts.into_iter().filter(|&(_, count)| count > 0);
    ended.counts = counts.filter_map(|(which, n)| Some((gone.get(&which)?.clone(), n))).collect();
    ended
}

impl Engine {
    /// Tells that connections of a backend were ended, and `what` it is.
    pub(super) fn tell_ended(&self, backend: &LetGo, count: usize, what: &str) {
        let LetGo { service, key, .. } = backend;
        let detail = format!("{count} connections to {what} were ended");
        tracing::info!(%service, endpoint = %key.address, "{detail}");
        self.journal.push(Event {
            service: Some(service.to_string()),
            backend: Some(key.address.to_string()),
            detail,
            ..journal::event("ended", SystemTime::now())
        });
    }
}

/// The backend of a record.
pub(super) fn backend(record: &Record) -> Life {
    (Held(record.word).backend(), record.given.generation)
}

/// Whether its socket cannot go elsewhere.
const fn is_held_there(record: &Record) -> bool {
    !record.is_datagram() || record.given.role.is_connected()
}

/// What a socket is connected to.
pub(super) fn peer(socket: &Socket) -> SocketAddr {
    SocketAddr::new(socket.id.destination_address.to_canonical(), socket.id.destination_port)
}

/// Whether a socket is connected to this address; a datagram socket also when it was connected.
fn leads_to(socket: &Socket, address: SocketAddr) -> bool {
    peer(socket) == address && (socket.protocol != Protocol::Udp as u8 || socket.state == CONNECTED)
}
