//! The engine: one task that takes what the sources and the health checks say, and has the kernel
//! hold what follows from it. It owns the catalog, the states of the endpoints and the reconciler;
//! everybody else asks it.

mod confirm;
mod dead;
mod drains;
mod ending;
mod findings;
pub mod journal;
mod notes;
mod observed;
mod open;
mod out;
mod outside;
mod pause;
mod proof;
mod readings;
mod removed;
mod returned;
mod revive;
mod spread;
mod stale;
mod standing;
mod usage;
mod view;
mod waiting;
mod wanted;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::time::SystemTime;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::audit::task::Auditor;
use crate::catalog::Catalog;
use crate::config::Config;
use crate::dataplane::grace::Grace;
use crate::dataplane::kernel::KernelMaps;
use crate::dataplane::maps::MapError;
use crate::dataplane::programs::Attachment;
use crate::dataplane::reconcile::{Problem, Reconciler};
use crate::dataplane::units::Keys;
use crate::discovery::{Event, SourceState};
use crate::health::{Finding, Monitor};
use crate::model::ServiceName;
use crate::observe::events::Batch;
use confirm::Opinions;
use dead::Dead;
use drains::Drains;
use journal::Journal;
pub use outside::Outside;
use outside::Wrong;
use pause::Pause;
use proof::Proof;
pub use proof::Prover;
use removed::Removed;
use spread::Spread;
use stale::Stale;
use usage::Usage;
pub use view::Handle;
use waiting::Waiting;
use wanted::{Health, Known};

/// How many messages are taken together. Together they cost one pass over the services that they
/// concern, and an address that moves between them moves without a gap.
const BATCH: usize = 256;

/// The state of the agent.
pub struct Engine {
    config: Arc<Config>,
    catalog: Catalog,
    /// By position in the list of sources.
    sources: BTreeMap<usize, SourceState>,
    health: HashMap<ServiceName, Health>,
    /// What takes no new connection because somebody said so.
    drains: Drains,
    monitor: Monitor,
    reconciler: Reconciler<KernelMaps>,
    /// What is in the way of services, in plain words.
    problems: BTreeMap<ServiceName, Vec<String>>,
    /// Services whose health checks cannot be made, and why.
    trouble: BTreeMap<ServiceName, String>,
    /// Definitions that are done otherwise than written, or are likely mistakes.
    notes: BTreeMap<ServiceName, Vec<String>>,
    /// Definitions that are not used at all.
    shadowed: BTreeSet<String>,
    /// The last thing that went wrong, and when.
    last_error: Option<(SystemTime, String)>,
    /// What is attached; nothing before the start, and after it was lost.
    attachment: Option<Attachment>,
    /// Why what was lost cannot be attached again.
    lost: Option<String>,
    /// Why nobody can ask for metrics.
    unheard: Option<String>,
    /// What is wrong with what the agent has made outside of itself.
    outside: Wrong,
    grace: Arc<Grace>,
    waiting: Option<JoinHandle<Result<(), MapError>>>,
    /// When the next grace period may start, after one that failed.
    grace_pause: Pause,
    retry: Pause,
    /// The last life given to an endpoint.
    life: u64,
    journal: Journal,
    auditor: Auditor,
    pinned: Arc<AtomicU32>,
    units: watch::Sender<bool>,
    unit_keys: Keys,
    /// Free memory is being given back.
    trimming: Option<JoinHandle<()>>,
    /// By backend id: its generation, and the client that it was last taken out for alone.
    suspects: HashMap<u32, (u32, Arc<str>)>,
    /// What the agent itself finds of backends that the kernel suspects.
    opinions: Opinions,
    /// Which endpoints of services are preferred now.
    spread: Spread,
    /// Which services this node uses.
    usage: Usage,
    /// Unhealthy endpoints whose connections will be ended.
    dead: Dead,
    /// Endpoints that nobody has to wait for any more.
    awaited: Waiting,
    /// Endpoints that were removed, whose connections will be ended.
    removed: Removed,
    /// What a former agent left, and nobody has defined yet.
    stale: Stale,
    /// What the last canary found: nothing before the first one came back, or could not be sent.
    proof: Proof,
    /// Programs of others that run before this agent's.
    rivals: Vec<String>,
    /// Where it is answered, if the agent could listen when it began.
    canary: Option<SocketAddr>,
    /// Resolved once every source has been heard.
    all_heard: Option<oneshot::Sender<()>>,
}

/// What the engine listens to.
pub struct Inputs {
    /// What the sources report.
    pub sources: mpsc::Receiver<Event>,
    /// What the health checks find.
    pub findings: mpsc::UnboundedReceiver<Finding>,
    /// What the kernel programs tell.
    pub observed: mpsc::Receiver<Batch>,
}

/// Those who watch besides.
pub struct Watchers {
    /// Where what happens is written.
    pub journal: Journal,
    /// Who compares records with sockets.
    pub auditor: Auditor,
    /// How many clients keep a backend.
    pub pinned: Arc<AtomicU32>,
    /// Who is told when a service asks for the units of its clients.
    pub units: watch::Sender<bool>,
    /// What is known of those.
    pub unit_keys: Keys,
    /// Where a canary is answered, if one can be sent.
    pub canary: Option<SocketAddr>,
}

/// How many findings are taken together: one pass over a service, however many of its endpoints
/// went.
const FINDINGS: usize = 65_536;

/// How many items of a kind are spelled out for people.
const MANY: usize = 20;

type Question = Box<dyn FnOnce(&mut Engine) + Send>;

/// Somebody who asks whether the engine is alive.
type Pulse = oneshot::Sender<()>;

/// How many of those may wait.
const PULSES: usize = 8;

impl Engine {
    /// An engine over maps, which may hold what a former agent left. The receiver hears when every source has been heard
    /// once and what it defines is in the kernel; the future is the engine's work, until `cancel`.
    /// What happens is written to the journal.
    pub fn prepare(
        config: &Arc<Config>,
        reconciler: Reconciler<KernelMaps>,
        grace: Arc<Grace>,
        monitor: Monitor,
        inputs: Inputs,
        watchers: Watchers,
        cancel: CancellationToken,
    ) -> (Handle, oneshot::Receiver<()>, impl Future<Output = ()> + Send + use<>) {
        let (questions, receiver) = mpsc::channel(BATCH);
        let (all_heard, heard) = oneshot::channel();
        let Watchers { journal, auditor, pinned, units, unit_keys, canary } = watchers;
        let (pulses, felt) = mpsc::channel(PULSES);
        let handle = Handle::new(questions, pulses, Arc::clone(config), auditor.clone());
        let engine = Self {
            catalog: Catalog::default(),
            sources: BTreeMap::new(),
            health: HashMap::new(),
            drains: Drains::default(),
            monitor,
            stale: match reconciler.maps().is_view() {
                true => Stale::default(),
                false => Stale::new(&reconciler, &config.sources),
            },
            reconciler,
            problems: BTreeMap::new(),
            trouble: BTreeMap::new(),
            notes: BTreeMap::new(),
            shadowed: BTreeSet::new(),
            last_error: None,
            attachment: None,
            lost: None,
            unheard: None,
            outside: Wrong::new(),
            grace,
            waiting: None,
            grace_pause: Pause::default(),
            retry: Pause::default(),
            life: 0,
            journal,
            auditor,
            pinned,
            units,
            unit_keys,
            trimming: None,
            suspects: HashMap::new(),
            all_heard: Some(all_heard),
            proof: Proof::default(),
            rivals: Vec::new(),
            canary,
            opinions: Opinions::new(),
            removed: Removed::new(),
            spread: Spread::default(),
            usage: Usage::new(),
            dead: Dead::new(),
            awaited: Waiting::new(),
            config: Arc::clone(config),
        };
        (handle, heard, engine.run(inputs, receiver, felt, cancel))
    }

    async fn run(
        mut self,
        mut inputs: Inputs,
        mut questions: mpsc::Receiver<Question>,
        mut pulses: mpsc::Receiver<Pulse>,
        cancel: CancellationToken,
    ) {
        let (mut events, mut findings) = (Vec::new(), Vec::new());
        let looks = self.reconciler.maps().is_view();
        if !looks {
            self.begin_proof();
            // Without any source, all has been heard.
            self.settle();
        }
        self.tell_all_heard();
        loop {
            tokio::select! {
                // In this order, so that a flood of what comes later holds up nothing.
                biased;
                () = cancel.cancelled() => break,
                // Who is busy is alive.
                Some(pulse) = pulses.recv() => { let _ = pulse.send(()); }
                waited = joined(&mut self.waiting) => self.end_grace(&waited),
                () = self.retry.over() => self.try_again(),
                1.. = inputs.findings.recv_many(&mut findings, FINDINGS) => {
                    self.take_findings(findings.drain(..));
                }
                1.. = inputs.sources.recv_many(&mut events, BATCH) => {
                    self.take_events(events.drain(..));
                }
                Some(opinion) = self.opinions.receiver.recv() => self.take_opinion(opinion),
                next = self.removed.next() => self.take_next(next),
                next = self.dead.next() => self.take_dead(next),
                next = self.awaited.next() => self.take_awaited(next),
                names = self.spread.due() => self.update(names),
                Some(question) = questions.recv() => question(&mut self),
                // `start_grace` below is what it was for.
                () = self.grace_pause.over() => {}
                Some(batch) = inputs.observed.recv() => self.take_observed(batch),
                () = self.usage.due(), if !looks => self.look_at_usage(),
            }
            if !looks {
                self.start_grace();
            }
        }
    }

    // === inputs ===

    fn take_events(&mut self, events: impl Iterator<Item = Event>) {
        let (mut changed, mut answered) = (BTreeSet::new(), false);
        for event in events {
            match event {
                Event::Changed { upserts, removed } => {
                    changed.extend(self.catalog.apply(upserts, removed));
                }
                Event::State(state) => {
                    self.take_source(state);
                    answered = true;
                }
            }
        }
        self.spread.follow(&changed, &self.catalog);
        let changed = self.spread.with_dependents(changed);
        self.note_definitions(&changed);
        self.update(changed);
        if answered || self.has_shrunk() {
            self.settle();
        }
        self.tell_all_heard();
    }

    /// A source that can say what is wrong with it has answered too.
    fn all_answered(&self) -> bool {
        self.sources.len() == self.config.sources.len()
            && self.sources.values().all(|source| source.ready || !source.errors.is_empty())
    }

    fn tell_all_heard(&mut self) {
        if self.all_answered()
            && let Some(heard) = self.all_heard.take()
        {
            // Nobody listens once the agent stops.
            let _ = heard.send(());
        }
    }

    fn take_source(&mut self, state: SourceState) {
        // The source itself logs them.
        let before = self.sources.get(&state.source);
        let known = |error| before.is_some_and(|before| before.errors.contains(error));
        if let Some(error) = state.errors.iter().find(|error| !known(*error)) {
            self.fail(error.clone());
        }
        self.sources.insert(state.source, state);
    }

    fn all_ready(&self) -> bool {
        self.sources.len() == self.config.sources.len()
            && self.sources.values().all(|source| source.ready)
    }

    // === to the kernel ===

    fn try_again(&mut self) {
        let outcome = self.reconciler.retry();
        self.note(outcome);
        self.take_let_go();
        self.take_returned();
        if self.reconciler.is_unfinished() {
            self.retry.lengthen();
        } else {
            self.retry.end();
        }
    }

    /// Notes what was in the way.
    fn note(&mut self, outcome: Vec<(ServiceName, Vec<Problem>)>) {
        for (name, problems) in outcome {
            let lasting = problems.iter().filter(|problem| !problem.is_passing());
            let mut texts: Vec<String> = lasting.map(ToString::to_string).collect();
            texts.dedup();
            let texts = few(texts);
            if texts.is_empty() {
                self.problems.remove(&name);
                continue;
            }
            if self.problems.get(&name) != Some(&texts) {
                tracing::error!(service = %name, "{}", texts.join("; "));
                self.fail(format!("service {name}: {}", texts.join("; ")));
            }
            self.problems.insert(name, texts);
        }
    }

    /// Keeps what went wrong for `status`.
    fn fail(&mut self, error: String) {
        self.last_error = Some((SystemTime::now(), error));
    }

    fn start_grace(&mut self) {
        if self.waiting.is_none() && !self.grace_pause.is_on() && self.reconciler.begin_grace() {
            let grace = Arc::clone(&self.grace);
            self.waiting = Some(tokio::task::spawn_blocking(move || grace.wait()));
        }
    }

    fn end_grace(&mut self, waited: &Result<(), String>) {
        self.waiting = None;
        self.reconciler.end_grace(waited.is_ok());
        match waited {
            Ok(()) => {
                self.grace_pause.end();
                // Room was made, perhaps for what did not fit.
                if self.reconciler.is_unfinished() {
                    self.retry.hasten();
                }
            }
            Err(error) => {
                // What was retired stays so until a later wait succeeds.
                tracing::error!("waiting for running programs: {error}");
                self.fail(format!("waiting for running programs: {error}"));
                self.grace_pause.lengthen();
            }
        }
    }
}

// === functions ===

/// At most so many texts, the last of which says how many there are more.
fn few(mut texts: Vec<String>) -> Vec<String> {
    if texts.len() > MANY {
        let more = texts.len() - MANY;
        texts.truncate(MANY);
        texts.push(format!("and {more} more"));
    }
    texts
}

/// Waits for a task, or for ever when there is none.
async fn joined(task: &mut Option<JoinHandle<Result<(), MapError>>>) -> Result<(), String> {
    match task {
        None => std::future::pending().await,
        Some(task) => match task.await {
            Ok(result) => result.map_err(|error| error.to_string()),
            Err(error) => Err(error.to_string()),
        },
    }
}
