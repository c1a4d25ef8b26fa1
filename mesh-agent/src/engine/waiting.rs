//! Connects that wait for an endpoint that was found dead: those of a service that says so are ended, so that
//! their programs connect again, elsewhere, instead of waiting for as long as the kernel does, which is two
//! minutes. `docs/connect-that-does-not-fail.md` has what else was tried.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use mesh_common::{Backend, Client, Protocol, State};
use tokio::time::Instant;

use super::ending::{Ended, Life, Looks, Next};
use super::{Engine, out};
use crate::audit::Record;
use crate::audit::sockets::Socket;
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

/// So much passes at least between two looks, each of which goes over all records and sockets.
const APART: Duration = Duration::from_millis(200);

/// Endpoints for which nobody has to wait any more.
#[derive(Debug)]
pub(super) struct Waiting {
    /// The next look at each, and how many there are to come.
    endpoints: BTreeMap<Life, (LetGo, Instant, u32)>,
    /// No look before.
    rests: Instant,
    looks: Looks,
}

impl Waiting {
    pub(super) fn new() -> Self {
        Self { endpoints: BTreeMap::new(), rests: Instant::now(), looks: Looks::new() }
    }

    /// Waits until there is something to do.
    pub(super) async fn next(&mut self) -> Next {
        let first = self.endpoints.values().map(|(_, at, _)| *at).min();
        self.looks.next(first.map(|at| at.max(self.rests))).await
    }
}

impl Engine {
    /// An endpoint is out for all, or its checks fail: who waits for it is told, of its service and of those that
    /// fall back to it, if they say so.
    pub(super) fn end_waiting(&mut self, service: &ServiceName, address: SocketAddr) {
        for name in self.holders(service) {
            let own = name == *service;
            if !self.ends_waiting(&name) || !own && self.defines(&name, address) {
                continue;
            }
            for (key, id) in self.reconciler.backends(&name) {
                let is_meant = key.address == address && key.protocol == Protocol::Tcp;
                let backend = self.reconciler.maps().backend(id).filter(|_| is_meant);
                let Some(Backend { generation, .. }) = backend else { continue };
                let gone = LetGo { service: name.clone(), key, id, generation };
                self.awaited.endpoints.insert((id, generation), (gone, Instant::now(), LOOKS));
            }
        }
    }

    fn ends_waiting(&self, service: &ServiceName) -> bool {
        let entry = self.catalog.get(service.as_str());
        entry.is_some_and(|entry| entry.service.end_waiting)
    }

    /// Whether nobody is led to a backend any more: not when its checks fail, but it is used for want of any
    /// better one, nor when it is back.
    fn is_left(&self, gone: &LetGo) -> bool {
        let maps = self.reconciler.maps();
        let backend = maps.backend(gone.id).filter(|there| there.generation == gone.generation);
        backend.is_some_and(|backend| {
            let fails = backend.marks.state() == State::Unhealthy && !backend.marks.is_listed();
            fails || out::is_out(maps.counts(gone.id).ejection, Client::NOBODY)
        })
    }

    /// Looks for connects that wait, or tells what was ended.
    pub(super) fn take_awaited(&mut self, next: Next) {
        match next {
            Next::Due => self.look_for_waiting(),
            Next::Looked(Ended { counts, problems }) => {
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
        let mut endpoints = std::mem::take(&mut self.awaited.endpoints);
        endpoints.retain(|_, (gone, ..)| self.ends_waiting(&gone.service) && self.is_left(gone));
        let mut gone = Vec::new();
        endpoints.retain(|_, (backend, at, left)| {
            if *at <= now {
                gone.push(backend.clone());
                (*at, *left) = (now + STEP, *left - 1);
            }
            *left > 0
        });
        (self.awaited.endpoints, self.awaited.rests) = (endpoints, now + APART);
        if gone.is_empty() {
            return;
        }
        let choose = |_: &Record, socket: &Socket| waits(socket);
        self.awaited.looks.begin(self.auditor.clone(), gone, choose, || {});
    }
}

/// Whether a connect waits that has not been answered for a second. It may be one that tries whether the endpoint
/// is back: then that is not, and nobody has to wait for longer.
fn waits(socket: &Socket) -> bool {
    socket.state == SYN_SENT && socket.retransmits > 0
}
