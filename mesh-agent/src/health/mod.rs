//! Active health checks: who is checked, when, and what comes of it.

pub mod probe;
mod schedule;
mod state;
mod tally;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;

use mesh_common::State;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::commands::Commands;
use crate::model::{HealthPolicy, ServiceName};
use schedule::Schedule;
use tally::Tally;

/// The most checks that run at a time; the others wait. Each takes one file descriptor, and those that read
/// an answer count for several ([`probe::Probe::weight`]), so this is also what bounds their memory.
pub const CONCURRENCY: usize = 4_096;

/// What the checks find out.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Finding {
    /// What is known of an endpoint has changed.
    Verdict(Verdict),
    /// Checks of a service cannot be made any more, for this reason; or they can again. Its endpoints keep
    /// the state that they had.
    Trouble(ServiceName, Option<String>),
}

/// What is known of an endpoint has changed: its state, or only the reason.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Verdict {
    /// The service.
    pub service: ServiceName,
    /// The endpoint.
    pub address: SocketAddr,
    /// Which life of it: the number that the plan gave.
    pub life: u64,
    /// Its state from now on.
    pub state: State,
    /// Why, for people.
    pub reason: String,
}

/// What is to be checked for a service.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Plan {
    /// How.
    pub policy: HealthPolicy,
    /// Whom.
    pub targets: BTreeMap<SocketAddr, Life>,
}

/// An endpoint from when it comes to when it goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Life {
    /// Differs between its lives: an endpoint that was removed and came back is another one, and a verdict
    /// on the former says nothing about it.
    pub number: u64,
    /// What was known of it when it came.
    pub state: State,
}

/// The checks of all services. Dropping it ends them too.
#[derive(Debug)]
pub struct Monitor {
    orders: mpsc::UnboundedSender<(ServiceName, Order)>,
    tally: Arc<Tally>,
}

/// What is to become of the checks of a service.
#[derive(Debug)]
enum Order {
    /// Check this from now on, or nothing.
    Follow(Option<Plan>),
    /// Somebody on this node uses the service, or nobody does any more.
    Used(bool),
}

impl Monitor {
    /// Nothing to check yet; what is found goes to `findings`. The future does the checks,
    /// `concurrency` at a time, until `cancel`; those that are programs run through `commands`.
    pub fn new(
        concurrency: usize,
        commands: Commands,
        findings: mpsc::UnboundedSender<Finding>,
        cancel: CancellationToken,
    ) -> (Self, impl Future<Output = ()> + Send) {
        let (orders, receiver) = mpsc::unbounded_channel();
        let tally = Arc::default();
        let schedule = Schedule::new(concurrency, findings, Arc::clone(&tally), commands);
        (Self { orders, tally }, schedule.run(receiver, cancel))
    }

    /// From now on checks this for a service, or nothing. Endpoints that stay keep their state.
    pub fn set(&self, service: ServiceName, plan: Option<Plan>) {
        self.order(service, Order::Follow(plan));
    }

    /// Somebody on this node uses a service that is checked, or nobody does any more. Nobody does at first.
    pub fn set_used(&self, service: ServiceName, is_used: bool) {
        self.order(service, Order::Used(is_used));
    }

    /// What is counted of checks.
    #[must_use]
    pub fn tally(&self) -> &Tally {
        &self.tally
    }

    fn order(&self, service: ServiceName, order: Order) {
        // The receiver only goes away when the agent stops.
        let _ = self.orders.send((service, order));
    }
}
