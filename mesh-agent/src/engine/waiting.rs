//! Connects that wait for an endpoint that was found dead: those of a service that says so are ended, so that
//! their programs connect again, elsewhere, instead of waiting for as long as the kernel does, which is two
//! minutes. `docs/connect-that-does-not-fail.md` has what else was tried.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use mesh_common::Protocol;
use tokio::sync::mpsc;
use tokio::task::JoinError;
use tokio::time::Instant;

use super::Engine;
use super::ending::{self, Ended, Life};
use crate::audit::sockets::Socket;
use crate::compile::BackendKey;
use crate::dataplane::maps::Maps as _;
use crate::dataplane::reconcile::LetGo;
use crate::model::ServiceName;

/// `TCP_SYN_SENT`.
const SYN_SENT: u8 = 2;

/// Who began to connect just before has sent the SYN again by the next look: a second later (RFC 6298), and
/// what timers may be late.
const STEP: Duration = Duration::from_millis(1_300);

/// How often it is looked for them, for each endpoint.
const LOOKS: u32 = 3;

/// What is to be done now, or was done.
#[derive(Debug)]
pub(super) enum Next {
    /// It is time to look.
    Due,
    /// A look is over.
    Looked(Ended),
}

/// Endpoints for which nobody has to wait any more.
#[derive(Debug)]
pub(super) struct Waiting {
    /// The next look at each, and how many there are to come.
    looks: BTreeMap<Life, (LetGo, Instant, u32)>,
    is_looking: bool,
    sender: mpsc::UnboundedSender<Next>,
    receiver: mpsc::UnboundedReceiver<Next>,
}

impl Waiting {
    pub(super) fn new() -> Self {
        let (sender, receiver) = mpsc::unbounded_channel();
        Self { looks: BTreeMap::new(), is_looking: false, sender, receiver }
    }

    /// Waits until there is something to do.
    pub(super) async fn next(&mut self) -> Next {
        let first = self.looks.values().map(|(_, at, _)| *at).min();
        let due = async {
            match first.filter(|_| !self.is_looking) {
                Some(at) => tokio::time::sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            Some(next) = self.receiver.recv() => next,
            () = due => Next::Due,
        }
    }
}

impl Engine {
    /// A backend is out for all, or its checks fail: who waits for it is told, if its service says so.
    pub(super) fn end_waiting(&mut self, service: &ServiceName, key: BackendKey, id: u32) {
        let entry = self.catalog.get(service.as_str());
        let asks = entry.is_some_and(|entry| entry.service.end_waiting);
        if !asks || key.protocol != Protocol::Tcp {
            return;
        }
        let Some(backend) = self.reconciler.maps().backend(id) else { return };
        let generation = backend.generation;
        let gone = LetGo { service: service.clone(), key, id, generation };
        self.awaited.looks.insert((id, generation), (gone, Instant::now(), LOOKS));
    }

    /// The same for the backends of an endpoint.
    pub(super) fn end_waiting_at(&mut self, service: &ServiceName, address: SocketAddr) {
        let backends = self.reconciler.backends(service);
        let there: Vec<_> = backends.filter(|(key, _)| key.address == address).collect();
        for (key, id) in there {
            self.end_waiting(service, key, id);
        }
    }

    /// Looks for connects that wait, or tells what was ended.
    pub(super) fn take_awaited(&mut self, next: Next) {
        match next {
            Next::Due => self.look_for_waiting(),
            Next::Looked(Ended { counts, problems }) => {
                self.awaited.is_looking = false;
                for (backend, count) in counts {
                    self.tell_ended(&backend, count, "a dead endpoint that still waited");
                }
                if let Some(problem) = problems.first() {
                    let text =
                        format!("connects that wait for dead endpoints cannot be ended: {problem}");
                    tracing::error!("{text}");
                    self.fail(text);
                }
            }
        }
    }

    fn look_for_waiting(&mut self) {
        let now = Instant::now();
        let mut gone = Vec::new();
        self.awaited.looks.retain(|_, (backend, at, left)| {
            if *at <= now {
                gone.push(backend.clone());
                (*at, *left) = (now + STEP, *left - 1);
            }
            *left > 0
        });
        if gone.is_empty() {
            return;
        }
        self.awaited.is_looking = true;
        let (auditor, tell) = (self.auditor.clone(), self.awaited.sender.clone());
        tokio::spawn(async move {
            let ended = tokio::spawn(ending::end(auditor, gone, |_, socket| waits(socket))).await;
            // A look that fails is followed by others all the same.
            let failed = |error: JoinError| {
                let problems = vec![error.to_string()];
                Ended { problems, ..Ended::default() }
            };
            // Nobody listens once the agent stops.
            let _ = tell.send(Next::Looked(ended.unwrap_or_else(failed)));
        });
    }
}

/// Whether a connect waits that has not been answered for a second: one that tries whether the endpoint is back
/// is not meant, which begins when it has been out for a while.
fn waits(socket: &Socket) -> bool {
    socket.state == SYN_SENT && socket.retransmits > 0
}
