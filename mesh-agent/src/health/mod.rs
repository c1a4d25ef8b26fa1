//! Active health checks: who is checked, when, and what comes of it.
//!
//! One task keeps a queue of due checks; checks run as tasks of their own, a bounded number at a
//! time, in all and for each service, so that one whose endpoints all hang does not hold up the
//! others. Each check is followed by the next one an interval later, give or take a tenth, so that
//! endpoints that were added together drift apart.

pub mod probe;
mod state;

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use mesh_common::State;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::time::{DelayQueue, delay_queue};

use crate::model::{HealthPolicy, ServiceName};
use probe::Failure;
use state::Checked;

/// The most checks that run at a time; the others wait. A check takes one file descriptor.
pub const CONCURRENCY: usize = 512;

/// One service may have this share of them: one in so many.
const SHARE: usize = 8;

/// Trouble is over when there was none for so long.
const TROUBLE: Duration = Duration::from_secs(5);

/// The first checks of endpoints that come together are spread over at most this.
const FIRST_SPREAD: Duration = Duration::from_millis(200);

/// What the checks find out.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Finding {
    /// An endpoint's state has changed.
    Verdict(Verdict),
    /// Checks cannot be made any more, for this reason; or they can again. Endpoints keep the state
    /// that they had.
    Trouble(Option<String>),
}

/// An endpoint's state has changed.
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
    /// Whom, each with a number that differs between its lives: an endpoint that was removed and
    /// came back is another one, and a verdict on the former says nothing about it.
    pub targets: BTreeMap<SocketAddr, u64>,
}

/// The checks of all services. Dropping it ends them too.
#[derive(Debug)]
pub struct Monitor {
    plans: mpsc::UnboundedSender<(ServiceName, Option<Plan>)>,
}

impl Monitor {
    /// Nothing to check yet; what is found goes to `findings`. The future does the checks,
    /// `concurrency` at a time, until `cancel`.
    pub fn new(
        concurrency: usize,
        findings: mpsc::UnboundedSender<Finding>,
        cancel: CancellationToken,
    ) -> (Self, impl Future<Output = ()> + Send) {
        let (plans, receiver) = mpsc::unbounded_channel();
        let task = Task {
            services: HashMap::new(),
            queue: DelayQueue::new(),
            probes: JoinSet::new(),
            permits: Arc::new(Semaphore::new(concurrency.max(1))),
            permits_of_one: (concurrency / SHARE).max(1),
            trouble: None,
            findings,
        };
        (Self { plans }, task.run(receiver, cancel))
    }

    /// From now on checks this for a service, or nothing. Endpoints that stay keep their state.
    pub fn set(&self, service: ServiceName, plan: Option<Plan>) {
        // The receiver only goes away when the agent stops.
        let _ = self.plans.send((service, plan));
    }
}

/// A check that is due.
#[derive(Clone, Debug)]
struct Due {
    service: ServiceName,
    address: SocketAddr,
}

/// The result of a check.
struct Outcome {
    due: Due,
    /// Which life of the endpoint was checked: it may have been removed and come back.
    life: u64,
    started: Instant,
    result: Result<(), Failure>,
}

struct Service {
    policy: HealthPolicy,
    permits: Arc<Semaphore>,
    targets: HashMap<SocketAddr, Target>,
}

struct Target {
    checked: Checked,
    life: u64,
    turn: Turn,
}

/// Where an endpoint is between two checks.
enum Turn {
    /// Its place in the queue.
    Queued(delay_queue::Key),
    /// It is being checked, or waits for a place among those that are.
    Running(AbortHandle),
}

impl Turn {
    /// The endpoint goes: no check of it is to wait for anything.
    fn end(&self, queue: &mut DelayQueue<Due>) {
        match self {
            Self::Queued(key) => drop(queue.remove(key)),
            Self::Running(task) => task.abort(),
        }
    }
}

struct Task {
    services: HashMap<ServiceName, Service>,
    queue: DelayQueue<Due>,
    probes: JoinSet<Outcome>,
    permits: Arc<Semaphore>,
    permits_of_one: usize,
    /// When a check could not be made last.
    trouble: Option<Instant>,
    findings: mpsc::UnboundedSender<Finding>,
}

impl Task {
    async fn run(
        mut self,
        mut plans: mpsc::UnboundedReceiver<(ServiceName, Option<Plan>)>,
        cancel: CancellationToken,
    ) {
        loop {
            tokio::select! {
                () = cancel.cancelled() => return,
                plan = plans.recv() => match plan {
                    Some((service, Some(plan))) => self.plan(&service, plan),
                    Some((service, None)) => self.forget(&service),
                    None => return,
                },
                Some(due) = std::future::poll_fn(|cx| self.queue.poll_expired(cx)) => {
                    self.start(due.into_inner());
                }
                Some(outcome) = self.probes.join_next() => match outcome {
                    Ok(outcome) => self.take(outcome),
                    Err(error) if error.is_cancelled() => {}
                    // A check that panicked would never be due again: end, and be noticed.
                    Err(error) => std::panic::resume_unwind(error.into_panic()),
                },
                // Some checks may go well while others cannot be made: it is over when none failed
                // for a while.
                () = until(self.trouble.map(|last| last + TROUBLE)) => {
                    self.trouble = None;
                    report(&self.findings, Finding::Trouble(None));
                }
            }
        }
    }

    fn plan(&mut self, name: &ServiceName, plan: Plan) {
        let Plan { policy, targets } = plan;
        let Task { services, queue, permits_of_one, .. } = self;
        let service = services.entry(name.clone()).or_insert_with(|| Service {
            policy: policy.clone(),
            permits: Arc::new(Semaphore::new(*permits_of_one)),
            targets: HashMap::new(),
        });
        service.targets.retain(|address, target| {
            let stays = targets.get(address) == Some(&target.life);
            if !stays {
                target.turn.end(queue);
            }
            stays
        });
        let first = || policy.interval.min(FIRST_SPREAD).mul_f64(fastrand::f64());
        if service.policy != policy {
            // What was planned by the old interval may be far away.
            for target in service.targets.values() {
                if let Turn::Queued(key) = &target.turn {
                    queue.reset(key, first());
                }
            }
        }
        for (address, life) in targets {
            service.targets.entry(address).or_insert_with(|| {
                let due = Due { service: name.clone(), address };
                let turn = Turn::Queued(queue.insert(due, first()));
                Target { checked: Checked::default(), life, turn }
            });
        }
        service.policy = policy;
    }

    fn forget(&mut self, service: &ServiceName) {
        let gone = self.services.remove(service);
        for target in gone.into_iter().flat_map(|service| service.targets.into_values()) {
            target.turn.end(&mut self.queue);
        }
    }

    fn start(&mut self, due: Due) {
        let Some(service) = self.services.get_mut(&due.service) else { return };
        let Some(target) = service.targets.get_mut(&due.address) else { return };
        let life = target.life;
        let (own, all) = (Arc::clone(&service.permits), Arc::clone(&self.permits));
        let (check, timeout) = (service.policy.check, service.policy.timeout);
        target.turn = Turn::Running(self.probes.spawn(async move {
            let _permits = (own.acquire_owned().await, all.acquire_owned().await);
            let started = Instant::now();
            let result = probe::probe(check, due.address, timeout).await;
            Outcome { due, life, started, result }
        }));
    }

    fn take(&mut self, outcome: Outcome) {
        let Outcome { due, life, started, result } = outcome;
        let Some(service) = self.services.get_mut(&due.service) else { return };
        let Some(target) = service.targets.get_mut(&due.address) else { return };
        if target.life != life {
            return;
        }
        let jitter = 0.9 + 0.2 * fastrand::f64();
        let next = started + service.policy.interval.mul_f64(jitter);
        target.turn = Turn::Queued(self.queue.insert_at(due.clone(), next));
        if let Err(Failure::Local(error)) = result {
            if self.trouble.replace(Instant::now()).is_none() {
                report(&self.findings, Finding::Trouble(Some(error)));
            }
            return;
        }
        let Some(state) = target.checked.observe(result.is_ok(), &service.policy) else { return };
        let reason = match result {
            Err(Failure::Endpoint(error)) => {
                format!("{} tcp checks failed: {error}", service.policy.fall)
            }
            _ => "tcp checks pass".to_owned(),
        };
        let Due { service, address } = due;
        let verdict = Verdict { service, address, life, state, reason };
        report(&self.findings, Finding::Verdict(verdict));
    }
}

/// Waits until then, or for ever.
async fn until(at: Option<Instant>) {
    match at {
        None => std::future::pending().await,
        Some(at) => tokio::time::sleep_until(at).await,
    }
}

fn report(findings: &mpsc::UnboundedSender<Finding>, finding: Finding) {
    // The receiver only goes away when the agent stops.
    let _ = findings.send(finding);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::HealthCheck;
    use tokio::net::TcpListener;

    fn policy() -> HealthPolicy {
        HealthPolicy {
            check: HealthCheck::Tcp,
            interval: Duration::from_millis(20),
            timeout: Duration::from_millis(500),
            rise: 2,
            fall: 2,
        }
    }

    async fn verdict(findings: &mut mpsc::UnboundedReceiver<Finding>) -> Verdict {
        let finding = tokio::time::timeout(Duration::from_secs(30), findings.recv()).await;
        match finding.expect("in time").expect("a finding") {
            Finding::Verdict(verdict) => verdict,
            Finding::Trouble(trouble) => panic!("{trouble:?}"),
        }
    }

    /// A real listener goes away and comes back.
    #[tokio::test]
    async fn follows_a_listener() {
        let (sender, mut findings) = mpsc::unbounded_channel();
        let cancel = CancellationToken::new();
        let (monitor, task) = Monitor::new(CONCURRENCY, sender, cancel.clone());
        let task = tokio::spawn(task);
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
        let address = listener.local_addr().expect("address");
        let service = ServiceName::new("s");
        let plan = Plan { policy: policy(), targets: BTreeMap::from([(address, 1)]) };
        monitor.set(service.clone(), Some(plan));
        assert_eq!(verdict(&mut findings).await.state, State::Healthy);
        drop(listener);
        let down = verdict(&mut findings).await;
        assert_eq!(down.state, State::Unhealthy);
        assert!(down.reason.contains("refused"), "{}", down.reason);
        let _listener = TcpListener::bind(address).await.expect("bind again");
        assert_eq!(verdict(&mut findings).await.state, State::Healthy);
        monitor.set(service, None);
        cancel.cancel();
        task.await.expect("ended in order");
        assert_eq!(findings.recv().await, None);
    }
    /// A shorter interval applies at once, and an endpoint's new life starts from nothing.
    #[tokio::test]
    async fn follows_a_new_plan() {
        let (sender, mut findings) = mpsc::unbounded_channel();
        let cancel = CancellationToken::new();
        let (monitor, task) = Monitor::new(CONCURRENCY, sender, cancel.clone());
        tokio::spawn(task);
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
        let address = listener.local_addr().expect("address");
        let service = ServiceName::new("s");
        let slow = HealthPolicy { interval: Duration::from_secs(3600), ..policy() };
        let plan = |policy, life| Some(Plan { policy, targets: BTreeMap::from([(address, life)]) });
        let mut next = async |life| {
            let verdict = verdict(&mut findings).await;
            assert_eq!(verdict.life, life);
            verdict.state
        };
        monitor.set(service.clone(), plan(slow.clone(), 1));
        assert_eq!(next(1).await, State::Healthy);
        drop(listener);
        monitor.set(service.clone(), plan(policy(), 1));
        assert_eq!(next(1).await, State::Unhealthy, "before the hour is over");
        monitor.set(service, plan(slow, 2));
        // Its first life would say nothing new.
        let _listener = TcpListener::bind(address).await.expect("bind again");
        assert_eq!(next(2).await, State::Healthy);
        cancel.cancel();
    }
}
