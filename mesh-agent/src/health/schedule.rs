//! When which endpoint is checked.
//!
//! One task keeps a queue of due checks; checks run as tasks of their own, a bounded number at a
//! time, in all and for each service, so that one whose endpoints all hang does not hold up the
//! others. The first checks of endpoints that come together are soon, each at a moment of its own; the
//! second ones are spread over an interval, and from then on each follows the one before after an interval,
//! give or take a tenth. So the checks of many endpoints come evenly, however they began.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::SocketAddr;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use mesh_common::State;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::{AbortHandle, Id, JoinSet};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::time::{DelayQueue, delay_queue};

use super::probe::{Failure, Probe, UNJUDGED};
use super::state::Checked;
use super::tally::Tally;
use super::{Finding, Order, Plan, Verdict};
use crate::commands::{self, Commands};
use crate::model::{HealthPolicy, Pace, ServiceName};
use crate::patience::Patience;

/// One service may have this share of all checks that run: one in so many.
const SHARE: usize = 4;

/// A command that has waited for so long could not be run.
const PATIENCE: Duration = Duration::from_secs(30);

/// Trouble is over when there was none for so long, and for two intervals, and checks were made meanwhile.
const TROUBLE: Duration = Duration::from_secs(5);

/// Checks that would come together, since their endpoints do, are spread over this.
const SPREAD: Duration = Duration::from_millis(200);

/// Each of them comes so much later than the one before, when they are many.
const APART: Duration = Duration::from_micros(100);

/// What part of an interval passes before the second check of an endpoint.
const SECOND: Range<f64> = 0.2..1.0;

/// What passes between later ones, in intervals.
const LATER: Range<f64> = 0.9..1.1;

/// Checks that are due within one of these begin together: a processor that wakes up for each would be busy
/// with nothing else.
const SLOT: Duration = Duration::from_millis(10);

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
    /// How long after it was due that was.
    delay: Duration,
    result: Result<(), Failure>,
}

struct Service {
    policy: HealthPolicy,
    probe: Probe,
    permits: Permits,
    targets: HashMap<SocketAddr, Target>,
}

/// The right to check, of which there is a bounded amount, in all and for one service.
#[derive(Clone)]
struct Permits {
    /// To have a connection.
    connections: Arc<Semaphore>,
    /// To talk over it, by weight. Waited for with a connection, and never the other way round.
    talks: Arc<Semaphore>,
    /// To have a program run, instead of a connection.
    commands: Arc<Semaphore>,
}

struct Target {
    checked: Checked,
    /// The failure, if any, that was told last; nothing before its first result.
    said: Option<Option<String>>,
    life: u64,
    turn: Turn,
    /// How many of its checks in a row were not judged, [`UNJUDGED`] at the most.
    unjudged: u32,
}

/// Where an endpoint is between two checks.
enum Turn {
    /// Its place in the queue.
    Queued(delay_queue::Key),
    /// It is being checked, or waits for a place among those that are.
    Running(AbortHandle),
}

/// The checks of all services.
pub(super) struct Schedule {
    /// What times are told from.
    began: Instant,
    services: HashMap<ServiceName, Service>,
    /// Those that somebody uses, whether or not they are checked.
    used: HashSet<ServiceName>,
    queue: DelayQueue<Due>,
    soon: Soon,
    probes: JoinSet<Outcome>,
    permits: Permits,
    permits_of_one: usize,
    /// Services of which checks cannot be made.
    trouble: BTreeMap<ServiceName, Trouble>,
    findings: mpsc::UnboundedSender<Finding>,
    tally: Arc<Tally>,
    commands: Commands,
}

/// Checks of a service cannot be made.
struct Trouble {
    /// When it may be over.
    until: Instant,
    /// How long after the last one that could not be made.
    after: Duration,
    /// Whether one was made since.
    is_made: bool,
}

/// When the next of those may come that come as soon as they can.
struct Soon(Instant);

// === impl Soon ===

impl Soon {
    /// A moment for one more, within about `interval` if that is short.
    fn next(&mut self, interval: Duration) -> Instant {
        self.0 = self.0.max(Instant::now()) + APART;
        self.0 + SPREAD.min(interval).mul_f64(fastrand::f64())
    }
}

// === impl Turn ===

impl Turn {
    /// The endpoint goes: no check of it is to wait for anything.
    fn end(&self, queue: &mut DelayQueue<Due>) {
        match self {
            Self::Queued(key) => drop(queue.remove(key)),
            Self::Running(task) => task.abort(),
        }
    }
}

// === impl Permits ===

impl Permits {
    fn new(many: usize, commands: usize) -> Self {
        let semaphore = |many| Arc::new(Semaphore::new(many));
        Self { connections: semaphore(many), talks: semaphore(many), commands: semaphore(commands) }
    }

    /// Waits for a turn, of one service and of all. What holds up connections does not keep one waiting for
    /// long; a program that does not end may.
    async fn turn(own: &Self, all: &Self, is_command: bool) -> Result<impl Sized + use<>, Failure> {
        let [own, all] = [own, all].map(|permits| {
            Arc::clone(if is_command { &permits.commands } else { &permits.connections })
        });
        let turn = async move { (own.acquire_owned().await, all.acquire_owned().await) };
        if !is_command {
            return Ok(turn.await);
        }
        Patience::new(PATIENCE).wait(turn).await.ok_or_else(|| {
            let patience = PATIENCE.as_secs();
            Failure::Local(format!(
                "there was no turn for {patience} s: so many others run, or do not end"
            ))
        })
    }
}

// === impl Service ===

impl Service {
    /// Has all that wait be checked soon.
    fn hasten(&self, queue: &mut DelayQueue<Due>, soon: &mut Soon) {
        for target in self.targets.values() {
            if let Turn::Queued(key) = &target.turn {
                queue.reset_at(key, soon.next(self.policy.interval));
            }
        }
    }
}

// === impl Target ===

impl Target {
    /// Takes a result. Gives what is said of it when that is new.
    fn take(
        &mut self,
        result: Result<(), String>,
        now: Duration,
        policy: &HealthPolicy,
    ) -> Option<(State, String)> {
        let changed = self.checked.observe(result.is_ok(), now, policy);
        let (state, error) = (self.checked.state(), result.err());
        let kind = policy.check.name();
        let text = match (state, &error) {
            (State::Healthy, None) => format!("{kind} checks pass"),
            (State::Unhealthy, Some(error)) if changed.is_some() && policy.fall > 1 => {
                format!("{} {kind} checks failed: {error}", policy.fall)
            }
            (State::Unhealthy, Some(error)) => format!("{kind} checks fail: {error}"),
            // It is on its way to another state, perhaps.
            _ => return None,
        };
        if changed.is_none() && self.said.as_ref() == Some(&error) {
            return None;
        }
        self.said = Some(error);
        Some((state, text))
    }
}

// === impl Schedule ===

impl Schedule {
    pub(super) fn new(
        concurrency: usize,
        findings: mpsc::UnboundedSender<Finding>,
        tally: Arc<Tally>,
        commands: Commands,
    ) -> Self {
        let began = Instant::now();
        Self {
            began,
            services: HashMap::new(),
            used: HashSet::new(),
            queue: DelayQueue::new(),
            soon: Soon(began),
            probes: JoinSet::new(),
            permits: Permits::new(concurrency.max(Probe::HEAVIEST), commands::MOST),
            permits_of_one: (concurrency / SHARE).max(Probe::HEAVIEST),
            trouble: BTreeMap::new(),
            findings,
            tally,
            commands,
        }
    }

    pub(super) async fn run(
        mut self,
        mut orders: mpsc::UnboundedReceiver<(ServiceName, Order)>,
        cancel: CancellationToken,
    ) {
        loop {
            tokio::select! {
                () = cancel.cancelled() => return,
                order = orders.recv() => match order {
                    Some((service, Order::Follow(Some(plan)))) => self.follow(&service, plan),
                    Some((service, Order::Follow(None))) => self.forget(&service),
                    Some((service, Order::Used(is_used))) => self.set_used(&service, is_used),
                    None => return,
                },
                Some(due) = std::future::poll_fn(|cx| self.queue.poll_expired(cx)) => {
                    let at = due.deadline();
                    self.start(due.into_inner(), at);
                }
                Some(outcome) = self.probes.join_next_with_id() => match outcome {
                    Ok((id, outcome)) => self.take(id, outcome),
                    Err(error) if error.is_cancelled() => {}
                    // A check that panicked would never be due again: end, and be noticed.
                    Err(error) => std::panic::resume_unwind(error.into_panic()),
                },
                // Some checks may go well while others cannot be made: it is over when none failed
                // for a while.
                () = until(self.trouble.values().map(|trouble| trouble.until).min()) => self.end_trouble(Instant::now()),
            }
        }
    }

    fn follow(&mut self, name: &ServiceName, plan: Plan) {
        let Plan { policy, targets } = plan;
        let Self { services, queue, soon, permits_of_one, commands: runner, .. } = self;
        let service = services.entry(name.clone()).or_insert_with(|| Service {
            policy: policy.clone(),
            probe: Probe::new(&policy.check, name, runner),
            permits: Permits::new(*permits_of_one, commands::MOST / SHARE),
            targets: HashMap::new(),
        });
        service.targets.retain(|address, target| {
            let stays = targets.get(address).is_some_and(|life| life.number == target.life);
            if !stays {
                target.turn.end(queue);
            }
            stays
        });
        if service.policy != policy {
            // What was planned by the old interval may be far away.
            service.hasten(queue, soon);
            if service.policy.check != policy.check {
                service.probe = Probe::new(&policy.check, name, runner);
                // What the former kind of check has said does not hold for this one, nor what one of it will
                // say that is under way.
                for (address, target) in &mut service.targets {
                    target.said = None;
                    if let Turn::Running(task) = &target.turn {
                        task.abort();
                        let due = Due { service: name.clone(), address: *address };
                        target.turn =
                            Turn::Queued(queue.insert_at(due, soon.next(policy.interval)));
                    }
                }
            }
        }
        for (address, life) in targets {
            service.targets.entry(address).or_insert_with(|| {
                let due = Due { service: name.clone(), address };
                let turn = Turn::Queued(queue.insert_at(due, soon.next(policy.interval)));
                let checked = Checked::new(life.state);
                Target { checked, said: None, life: life.number, turn, unjudged: 0 }
            });
        }
        let is_other = service.policy.check != policy.check;
        service.policy = policy;
        if is_other {
            // What is in the way of the former kind may not be in that of this one.
            self.end_trouble_of(name);
        }
    }

    fn forget(&mut self, service: &ServiceName) {
        self.end_trouble_of(service);
        let gone = self.services.remove(service);
        for target in gone.into_iter().flat_map(|service| service.targets.into_values()) {
            target.turn.end(&mut self.queue);
        }
    }

    fn set_used(&mut self, name: &ServiceName, is_used: bool) {
        if !is_used {
            self.used.remove(name);
            return;
        }
        let begins = self.used.insert(name.clone());
        let Some(service) = self.services.get_mut(name) else { return };
        if begins && service.policy.pace != Pace::Always {
            // What is known of them may be old.
            service.hasten(&mut self.queue, &mut self.soon);
        }
    }

    fn start(&mut self, due: Due, at: Instant) {
        let Some(service) = self.services.get_mut(&due.service) else { return };
        let Some(target) = service.targets.get_mut(&due.address) else { return };
        let life = target.life;
        let (own, all) = (service.permits.clone(), self.permits.clone());
        let (probe, timeout) = (service.probe.clone(), service.policy.timeout);
        let mut address = due.address;
        address.set_port(service.policy.port.unwrap_or(address.port()));
        target.turn = Turn::Running(self.probes.spawn(async move {
            let admitted = Permits::turn(&own, &all, probe.is_command()).await;
            let started = Instant::now();
            let delay = started.saturating_duration_since(at);
            let _admitted = match admitted {
                Ok(admitted) => admitted,
                Err(failure) => return Outcome { due, life, started, delay, result: Err(failure) },
            };
            let weight = probe.weight().unwrap_or(0);
            // An endpoint that answers nothing holds up nobody's talks.
            let turn = async {
                (own.talks.acquire_many(weight).await, all.talks.acquire_many(weight).await)
            };
            let result = probe.run(address, timeout, turn).await;
            Outcome { due, life, started, delay, result }
        }));
    }

    fn take(&mut self, id: Id, outcome: Outcome) {
        let Outcome { due, life, started, delay, mut result } = outcome;
        let service = self.services.get(&due.service);
        let target = service.and_then(|service| service.targets.get(&due.address));
        let paused = target.filter(|_| matches!(result, Err(Failure::Paused(_))));
        let unjudged = paused.map_or(0, |target| target.unjudged + 1);
        if unjudged > UNJUDGED {
            result = result.map_err(Failure::judged);
        }
        self.tally.note(&result, delay);
        let Self { services, used, queue, began, .. } = self;
        let Some(service) = services.get_mut(&due.service) else { return };
        let Service { policy, targets, .. } = service;
        // Another check may be planned instead by now: it was over when it was to be given up.
        let is_this = |target: &&mut Target| {
            target.life == life && matches!(&target.turn, Turn::Running(task) if task.id() == id)
        };
        let Some(target) = targets.get_mut(&due.address).filter(is_this) else { return };
        let range = if target.said.is_none() { SECOND } else { LATER };
        target.unjudged = unjudged.min(UNJUDGED);
        let told = match result {
            Err(Failure::Paused(_)) => {
                // Nothing is known that was not known before.
                target.turn = Turn::Queued(queue.insert_at(due, Instant::now()));
                return;
            }
            Ok(()) => Ok(target.take(Ok(()), started - *began, policy)),
            Err(Failure::Endpoint(error)) => Ok(target.take(Err(error), started - *began, policy)),
            Err(Failure::Local(error)) => Err(error),
        };
        let factor = range.start + (range.end - range.start) * fastrand::f64();
        let pause = pause(policy, used.contains(&due.service), target.checked);
        let next = slot(*began, started + pause.mul_f64(factor));
        target.turn = Turn::Queued(queue.insert_at(due.clone(), next));
        if told.is_ok()
            && let Some(trouble) = self.trouble.get_mut(&due.service)
        {
            trouble.is_made = true;
        }
        match told {
            Ok(None) => {}
            Ok(Some((state, reason))) => {
                let Due { service, address } = due;
                let verdict = Verdict { service, address, life, state, reason };
                report(&self.findings, Finding::Verdict(verdict));
            }
            Err(error) => {
                let after = TROUBLE.max(2 * pause);
                let until = Instant::now() + after;
                let trouble = Trouble { until, after, is_made: false };
                if self.trouble.insert(due.service.clone(), trouble).is_none() {
                    report(&self.findings, Finding::Trouble(due.service, Some(error)));
                }
            }
        }
    }

    fn end_trouble(&mut self, now: Instant) {
        let mut over = Vec::new();
        for (service, trouble) in self.trouble.iter_mut().filter(|(_, one)| one.until <= now) {
            match trouble.is_made {
                true => over.push(service.clone()),
                // Nothing is known yet.
                false => trouble.until = now + trouble.after,
            }
        }
        for service in over {
            self.end_trouble_of(&service);
        }
    }

    fn end_trouble_of(&mut self, service: &ServiceName) {
        if self.trouble.remove(service).is_some() {
            report(&self.findings, Finding::Trouble(service.clone(), None));
        }
    }
}

/// How long after a check the next one of this endpoint comes, before jitter.
fn pause(policy: &HealthPolicy, is_used: bool, checked: Checked) -> Duration {
    match policy.pace {
        // It is on its way back, and clients have done without it for long enough.
        _ if checked.recovers(policy) => policy.interval / 2,
        // What is not clear yet is to become so.
        Pace::WhenUsed { background } if !is_used && checked.is_settled() => {
            background.max(policy.interval)
        }
        _ => policy.interval,
    }
}

/// The end of the slot in which a moment is: what is due within one begins together.
fn slot(began: Instant, at: Instant) -> Instant {
    let past = (at - began).as_nanos() % SLOT.as_nanos();
    // Less than a slot.
    let left = (SLOT.as_nanos() - past) % SLOT.as_nanos();
    at + Duration::from_nanos(u64::try_from(left).unwrap_or_default())
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

    /// However long the agent runs.
    #[test]
    fn what_is_due_begins_at_the_end_of_its_slot() {
        let began = Instant::now();
        for days in [0, 1, 1_000, 10_000] {
            let day = began + Duration::from_secs(days * 86_400);
            let at = |micros| slot(began, day + Duration::from_micros(micros)) - day;
            assert_eq!(at(0), Duration::ZERO);
            for micros in [1, 5_000, 9_999, 10_000] {
                assert_eq!(at(micros), SLOT, "{micros} us");
            }
            assert_eq!(at(10_001), 2 * SLOT);
        }
    }
}
