//! Active health checks: who is checked, when, and what comes of it.
//!
//! One task keeps a queue of due checks; checks run as tasks of their own, a bounded number at a
//! time. Each check is followed by the next one an interval later, give or take a tenth, so that
//! endpoints that were added together drift apart.

mod probe;
mod state;

use std::collections::{BTreeSet, HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use mesh_common::State;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::time::{DelayQueue, delay_queue};

use crate::model::{HealthPolicy, ServiceName};
use state::Checked;

/// How many checks run at a time; the others wait. A check takes one socket.
const CONCURRENCY: usize = 256;

/// The first checks of endpoints that come together are spread over at most this.
const FIRST_SPREAD: Duration = Duration::from_millis(200);

/// An endpoint's state has changed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Verdict {
    /// The service.
    pub service: ServiceName,
    /// The endpoint.
    pub address: SocketAddr,
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
    pub targets: BTreeSet<SocketAddr>,
}

/// The checks of all services. Dropping it, or cancelling its token, ends them.
#[derive(Debug)]
pub struct Monitor {
    plans: mpsc::UnboundedSender<(ServiceName, Option<Plan>)>,
}

impl Monitor {
    /// Starts without anything to check; changes of state go to `verdicts`.
    pub fn spawn(verdicts: mpsc::UnboundedSender<Verdict>, cancel: CancellationToken) -> Self {
        let (plans, receiver) = mpsc::unbounded_channel();
        let task = Task {
            services: HashMap::new(),
            queue: DelayQueue::new(),
            probes: JoinSet::new(),
            permits: Arc::new(Semaphore::new(CONCURRENCY)),
            next_life: 0,
            verdicts,
        };
        tokio::spawn(task.run(receiver, cancel));
        Self { plans }
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
    result: Result<(), String>,
}

struct Service {
    policy: HealthPolicy,
    targets: HashMap<SocketAddr, Target>,
}

struct Target {
    checked: Checked,
    life: u64,
    /// Its place in the queue; nothing while it is being checked.
    queued: Option<delay_queue::Key>,
}

struct Task {
    services: HashMap<ServiceName, Service>,
    queue: DelayQueue<Due>,
    probes: JoinSet<Outcome>,
    permits: Arc<Semaphore>,
    next_life: u64,
    verdicts: mpsc::UnboundedSender<Verdict>,
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
                    Err(error) => tracing::error!(%error, "a health check ended abnormally"),
                },
            }
        }
    }

    fn plan(&mut self, name: &ServiceName, plan: Plan) {
        let Plan { policy, targets } = plan;
        let service = self
            .services
            .entry(name.clone())
            .or_insert_with(|| Service { policy: policy.clone(), targets: HashMap::new() });
        service.policy = policy;
        let gone: HashSet<SocketAddr> =
            service.targets.keys().filter(|address| !targets.contains(address)).copied().collect();
        for address in gone {
            if let Some(key) = service.targets.remove(&address).and_then(|target| target.queued) {
                self.queue.remove(&key);
            }
        }
        let spread = service.policy.interval.min(FIRST_SPREAD);
        for address in targets {
            service.targets.entry(address).or_insert_with(|| {
                self.next_life += 1;
                let due = Due { service: name.clone(), address };
                let queued = Some(self.queue.insert(due, spread.mul_f64(fastrand::f64())));
                Target { checked: Checked::default(), life: self.next_life, queued }
            });
        }
    }

    fn forget(&mut self, service: &ServiceName) {
        let gone = self.services.remove(service);
        for target in gone.into_iter().flat_map(|service| service.targets.into_values()) {
            if let Some(key) = target.queued {
                self.queue.remove(&key);
            }
        }
    }

    fn start(&mut self, due: Due) {
        let Some(service) = self.services.get_mut(&due.service) else { return };
        let Some(target) = service.targets.get_mut(&due.address) else { return };
        target.queued = None;
        let (life, permits) = (target.life, Arc::clone(&self.permits));
        let (check, timeout) = (service.policy.check, service.policy.timeout);
        self.probes.spawn(async move {
            let permit = permits.acquire_owned().await;
            let started = Instant::now();
            let result = probe::probe(check, due.address, timeout).await;
            drop(permit);
            Outcome { due, life, started, result }
        });
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
        target.queued = Some(self.queue.insert_at(due.clone(), next));
        let Some(state) = target.checked.observe(result.is_ok(), &service.policy) else { return };
        let reason = match result {
            Ok(()) => "tcp checks pass".to_owned(),
            Err(error) => format!("{} tcp checks failed: {error}", service.policy.fall),
        };
        // The receiver only goes away when the agent stops.
        let _ = self.verdicts.send(Verdict {
            service: due.service,
            address: due.address,
            state,
            reason,
        });
    }
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

    /// A real listener goes away and comes back.
    #[tokio::test]
    async fn follows_a_listener() {
        let (sender, mut verdicts) = mpsc::unbounded_channel();
        let cancel = CancellationToken::new();
        let monitor = Monitor::spawn(sender, cancel.clone());
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
        let address = listener.local_addr().expect("address");
        let service = ServiceName::new("s");
        let plan = Plan { policy: policy(), targets: BTreeSet::from([address]) };
        monitor.set(service.clone(), Some(plan));
        let next = async |verdicts: &mut mpsc::UnboundedReceiver<Verdict>| {
            let verdict = tokio::time::timeout(Duration::from_secs(30), verdicts.recv()).await;
            verdict.expect("in time").expect("a verdict")
        };
        assert_eq!(next(&mut verdicts).await.state, State::Healthy);
        drop(listener);
        let down = next(&mut verdicts).await;
        assert_eq!(down.state, State::Unhealthy);
        assert!(down.reason.contains("refused"), "{}", down.reason);
        let _listener = TcpListener::bind(address).await.expect("bind again");
        assert_eq!(next(&mut verdicts).await.state, State::Healthy);
        monitor.set(service, None);
        cancel.cancel();
        assert_eq!(verdicts.recv().await, None, "the task has ended");
    }
}
