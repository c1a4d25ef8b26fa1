//! The agent from start to end: what is started in which order, and ended in the reverse one.
//!
//! Where nothing is balanced yet, the programs are attached after every source has been heard and its services
//! are in the maps, so that no connect is refused only because the agent has just begun; a source that does
//! not answer delays that by [`PATIENCE`] at the most. Where a former agent's programs are attached, they are
//! replaced at once.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use rustix::process::Resource;
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::task::{JoinError, JoinSet};
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use crate::api::{server, socket};
use crate::audit::task::Auditor;
use crate::canary::Canary;
use crate::claim::{refuse_second, take_cgroup, take_pins, try_cgroup};
use crate::commands::{Commands, Runner};
use crate::config::{Config, Exclude, Source};
use crate::dataplane::exclusions::Exclusions;
use crate::dataplane::load::{self, Loaded, Options};
use crate::dataplane::pindir::PinDir;
use crate::dataplane::programs::{self, Attachment, Programs};
use crate::dataplane::reconcile::{Adopted, Reconciler};
use crate::dataplane::sys::heap;
use crate::discovery::files;
use crate::engine::journal::Journal;
use crate::engine::{Engine, Handle, Inputs, Prover, Watchers};
use crate::health::{self, Monitor};
use crate::metrics;
use crate::observe;
use crate::patience::Patience;
use crate::signals::Signals;
use crate::supervisor;
use crate::text;
use crate::upkeep::{self, Upkeep};

/// How long a source that does not answer can delay the start.
const PATIENCE: Duration = Duration::from_secs(5);

/// More files than this are of no use.
const MOST_FILES: u64 = 65_536;

/// How often what the programs log is read.
const LOG_INTERVAL: Duration = Duration::from_millis(100);

/// How many messages of sources may wait for the engine.
const EVENTS: usize = 64;

/// How often the kernel is asked whether the programs are still attached.
const WATCH: Duration = Duration::from_secs(1);

/// How long tasks may take to end once they are told to.
const ENDING: Duration = Duration::from_secs(2);

/// The agent's tasks, by what people call them. None ends before it is told to.
type Tasks = JoinSet<&'static str>;

/// Runs the agent until SIGTERM, which leaves the kernel balancing, or SIGINT or SIGHUP, which do not.
/// `runner` runs the commands of health checks, if it could be started.
///
/// # Errors
///
/// When something that it needs cannot be had, or one of its tasks ends; each error says what, and
/// what to do.
pub async fn run(
    mut config: Config,
    options: Options,
    runner: Result<Runner, String>,
) -> anyhow::Result<()> {
    let Some(cgroup) = config.cgroup.clone() else {
        bail!("no cgroup is named: use --cgroup, or `cgroup:` in the agent file");
    };
    let mut signals = Signals::listen()?;
    let open_files = raise_open_files();
    let claim = socket::Claim::take(&config.socket).await?;
    let pin_dir = Arc::new(take_pins(&config.pin_dir).await?);
    let mut lock = Some(take_cgroup(&cgroup, &programs::known(&pin_dir)?).await?);
    let mut fresh = Fresh::new(&pin_dir);

    let loaded = load::load(options, &pin_dir)?;
    config.limits = loaded.limits;
    let config = Arc::new(config);
    let Loaded { mut programs, maps, grace, mut records, mut exclusions, pins, units, .. } = loaded;
    // Before anybody is balanced.
    exclusions.refresh(&config.exclude);
    // Before anything is written: another version's programs have tables of their own, and see nothing of it.
    // What is in force is in these tables, too, so nobody has to be waited for.
    let takes_over = pin_dir.former().is_some() || programs.are_in_force(&cgroup)?;
    let attachment = match takes_over {
        true => Some(programs.attach(&cgroup)?),
        false => None,
    };
    records.resume().context("the records of sockets")?;
    // Whatever ran when a former agent ended has ended afterwards.
    grace.wait()?;
    let (mut reconciler, adopted) = Reconciler::adopt(maps).context("taking over the maps")?;
    if !pin_dir.is_new() {
        tell(adopted, loaded.are_kept, &pin_dir);
    }
    reconciler.set_virtual_ips(&config.virtual_ips).context("virtual-ips of the agent file")?;

    // Reading the kernel's types took more than all that follows.
    heap::trim();
    let cancel = CancellationToken::new();
    let mut tasks = Tasks::new();
    if options.log {
        follow_log(&mut programs, &mut tasks, &cancel)?;
    }
    let (events, sources) = mpsc::channel(EVENTS);
    let (sender, findings) = mpsc::unbounded_channel();
    // Half of the file descriptors are for everything else.
    let concurrency = health::CONCURRENCY.min(open_files / 2);
    let (commands, talk) = Commands::new(runner, cancel.clone());
    spawn(&mut tasks, "the talk with the process that runs commands", talk);
    let (monitor, checks) = Monitor::new(concurrency, commands, sender, cancel.clone());
    let (batches, observed) = mpsc::channel(observe::events::BATCHES);
    let watch = observe::events::watch(loaded.events, &cgroup, batches, cancel.clone())
        .context("waiting for what the kernel programs tell")?;
    spawn(&mut tasks, "the kernel programs' events", watch);
    let journal = Journal::default();
    let inputs = Inputs { sources, findings, observed };
    let grace = Arc::new(grace);
    let (auditor, audit) = Auditor::new(records, Arc::clone(&grace), cancel.clone());
    spawn(&mut tasks, "the audit", audit);
    spawn(&mut tasks, "exclusions", exclude(exclusions, Arc::clone(&config), cancel.clone()));
    let ((units_wanted, wanted), (there, units_there)) =
        (watch::channel(false), watch::channel(false));
    let (unit_keys, units_again) = (units.keys(), Arc::new(Notify::new()));
    let asked = observe::units::Signals { wanted, again: Arc::clone(&units_again), there };
    let follow = observe::units::follow(units, cgroup.clone(), asked, cancel.clone());
    spawn(&mut tasks, "the units of cgroups", follow);
    let pinned = pins.used();
    spawn(&mut tasks, "affinity", pins.tend(cancel.clone()));
    // Should it not work now, it is tried again, and said, once connects are balanced.
    let canary = match config.canary {
        true => Canary::new(&cgroup, &config.exclude).await.ok(),
        false => None,
    };
    let (engine, heard, work) = Engine::prepare(
        &config,
        reconciler,
        grace,
        monitor,
        inputs,
        Watchers {
            journal: journal.clone(),
            auditor,
            pinned,
            units: units_wanted.clone(),
            unit_keys,
            canary: canary.as_ref().and_then(|canary| canary.address().ok()),
        },
        cancel.clone(),
    );
    spawn(&mut tasks, "the health checks", alone(checks)?);
    spawn(&mut tasks, "the engine", work);
    for (index, source) in config.sources.iter().enumerate() {
        let Source::Files { directory } = source;
        let watch = files::spawn(index, directory.clone(), events.clone(), cancel.clone());
        spawn(&mut tasks, "a source of service files", async {
            if let Err(error) = watch.await {
                std::panic::resume_unwind(error.into_panic());
            }
        });
    }
    if let Some(listen) = config.metrics {
        spawn(&mut tasks, "the metrics", metrics::serve(listen, engine.clone(), cancel.clone()));
    }
    let alive = supervisor::watchdog(engine.clone(), cancel.clone());
    spawn(&mut tasks, "the watchdog", alive);
    let units = Clients { wanted: units_wanted, there: units_there, again: units_again };
    let listener = claim.listen()?;
    let away = upkeep::tell_of_socket(listener.watch(), engine.clone(), cancel.clone());
    spawn(&mut tasks, "the upkeep of the socket", away);
    let serve = server::serve(listener, engine.clone(), journal, cancel.clone());
    spawn(&mut tasks, "the API", async {
        if let Err(error) = serve.await {
            tracing::error!(%error, "the API");
        }
    });

    let plane = Plane {
        programs: &mut programs,
        pins: &pin_dir,
        cgroup: &cgroup,
        lock: &mut lock,
        config: &config,
        canary,
        attachment,
    };
    let result = tokio::select! {
        signal = signals.next() => Ok(signal),
        ended = tasks.join_next() => Err(ended_early(ended)),
        error = balance(plane, &mut fresh, &engine, heard, units) => Err(error),
    };
    let detaches = result.as_ref().is_ok_and(|signal| options.detach || signal.detaches());
    if detaches {
        // No new connect is balanced from here on; what is open stays as it is.
        programs.detach();
        fresh.begin();
    }
    let reason = match &result {
        Ok(signal) if detaches => format!("{}: detached, nothing is balanced", signal.name()),
        Ok(signal) if !programs.are_in_force(&cgroup).unwrap_or_default() => {
            format!("{}: the agent ends, and nothing is balanced", signal.name())
        }
        Ok(signal) => format!(
            "{}: the agent ends, and balancing goes on as it is; `mesh-agent cleanup` ends that",
            signal.name()
        ),
        Err(error) => format!("{error:#}"),
    };
    if result.is_ok() {
        tracing::info!("{reason}");
    }
    supervisor::stopping(reason).await;
    cancel.cancel();
    let all = async { while tasks.join_next().await.is_some() {} };
    if tokio::time::timeout(ENDING, all).await.is_err() {
        tracing::warn!("some tasks do not end; leaving them");
    }
    result.map(drop)
}

/// What was pinned by this agent and was never in force: it is removed with this value.
struct Fresh {
    pins: Arc<PinDir>,
    is_fresh: bool,
}

impl Fresh {
    /// All of it, if there was nothing before.
    fn new(pins: &Arc<PinDir>) -> Self {
        Self { pins: Arc::clone(pins), is_fresh: pins.is_new() }
    }

    /// Nothing is in force.
    fn begin(&mut self) {
        self.is_fresh = true;
    }

    /// It is in force.
    fn end(&mut self) {
        self.is_fresh = false;
    }
}

impl Drop for Fresh {
    fn drop(&mut self) {
        if self.is_fresh {
            self.pins.clear();
        }
    }
}

/// Says what was found.
fn tell(adopted: Adopted, are_kept: bool, pins: &PinDir) {
    let Adopted { services, frontends, backends, wrong } = adopted;
    tracing::info!(
        services,
        frontends,
        backends,
        "taken over from {}; {}",
        pins.directory().display(),
        if are_kept { "its programs stay" } else { "its programs are replaced" }
    );
    if wrong > 0 {
        tracing::warn!(
            wrong,
            "entries of FRONTENDS made no sense and were removed: somebody else has written into the \
             pinned maps"
        );
    }
}

/// What is attached, and what keeps it.
struct Plane<'a> {
    programs: &'a mut Programs,
    pins: &'a PinDir,
    cgroup: &'a Path,
    lock: &'a mut Option<File>,
    config: &'a Config,
    canary: Option<Canary>,
    /// Nothing, if nothing was attached before.
    attachment: Option<Attachment>,
}

/// Follows what the agent file excludes: it may be made, removed and made again.
async fn exclude(mut exclusions: Exclusions, config: Arc<Config>, cancel: CancellationToken) {
    let mut tick = tokio::time::interval(WATCH);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while cancel.run_until_cancelled(tick.tick()).await.is_some() {
        if config.exclude == Exclude::default() {
            return cancel.cancelled().await;
        }
        let config = Arc::clone(&config);
        let refreshed = tokio::task::spawn_blocking(move || {
            exclusions.refresh(&config.exclude);
            exclusions
        });
        match refreshed.await {
            Ok(back) => exclusions = back,
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        }
    }
}

/// What is known of the units of clients.
struct Clients {
    /// Whether a service asks for them.
    wanted: watch::Sender<bool>,
    /// Whether they were looked for.
    there: watch::Receiver<bool>,
    /// To be told when the balanced cgroup is another one.
    again: Arc<Notify>,
}

impl Clients {
    /// Those that are told apart by unit are so from the first connect on.
    async fn known(&mut self) {
        if !*self.wanted.borrow() {
            return;
        }
        let known = self.there.wait_for(|there| *there);
        if Patience::new(PATIENCE).wait(known).await.is_none() {
            tracing::warn!("finding the units of cgroups takes long; starting without");
        }
    }
}

/// Attaches the programs once the sources have been heard, and again whenever they are lost: a
/// cgroup can be removed and made again. Returns only when they cannot be attached at the start.
async fn balance(
    plane: Plane<'_>,
    fresh: &mut Fresh,
    engine: &Handle,
    heard: oneshot::Receiver<()>,
    mut units: Clients,
) -> anyhow::Error {
    let Plane { programs, pins, cgroup, lock, config, canary, mut attachment } = plane;
    engine.set_attachment(attachment.clone()).await;
    match Patience::new(PATIENCE).wait(heard).await {
        Some(Ok(())) => {}
        Some(Err(_)) => return anyhow!("the engine ended before it began; please report this"),
        None => {
            tracing::warn!("a source has not answered; starting with what the others define");
            engine.gather_no_more().await;
        }
    }
    units.known().await;
    if attachment.is_none() {
        let alone = programs.ids().map_err(Into::into).and_then(|ids| refuse_second(cgroup, &ids));
        match alone.and_then(|()| Ok(programs.attach(cgroup)?)) {
            Ok(attached) => attachment = Some(attached),
            Err(error) => return error,
        }
    }
    fresh.end();
    engine.set_attachment(attachment.clone()).await;
    tracing::info!(cgroup = %cgroup.display(), "balancing");
    let mut prover = Prover::new(config, cgroup, canary, engine);
    if let Some(attachment) = &attachment {
        prover.prove(attachment).await;
    }
    let (mut hindrance, mut upkeep) = (None, Upkeep::new(pins, engine));
    let mut tick = tokio::time::interval(WATCH);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        upkeep.look().await;
        if let Some(attachment) = attachment.as_ref().filter(|attachment| attachment.is_whole()) {
            prover.prove_if_due(attachment).await;
            continue;
        }
        if attachment.take().is_some() {
            let what = what_happened(programs);
            tracing::error!(cgroup = %cgroup.display(), "the programs are no longer attached: {what}");
            let lost = format!("no longer attached to {}: nothing is balanced", cgroup.display());
            supervisor::status(lost).await;
        }
        engine.set_proof(None).await;
        // Another cgroup of that name has another lock, which another agent may have taken.
        *lock = None;
        let ids = programs.ids().map_err(anyhow::Error::from);
        let again = ids.and_then(|ids| try_cgroup(cgroup, &ids)).and_then(|taken| {
            *lock = Some(taken);
            Ok(programs.attach(cgroup)?)
        });
        match again {
            Ok(again) => {
                tracing::info!(cgroup = %cgroup.display(), "balancing again");
                units.again.notify_one();
                engine.set_attachment(Some(again.clone())).await;
                prover.look_again();
                prover.prove(&again).await;
                attachment = Some(again);
                hindrance = None;
            }
            Err(error) => {
                let error = text::chain(error.as_ref());
                if hindrance.as_ref() != Some(&error) {
                    tracing::error!("attaching again: {error}");
                    engine.set_lost(error.clone()).await;
                    hindrance = Some(error);
                }
            }
        }
    }
}

/// Why the programs are not attached any more.
fn what_happened(programs: &Programs) -> String {
    let replaced = programs.replaced();
    if replaced.is_empty() {
        return "the cgroup was removed, or somebody detached them; attaching again as soon as it is there"
            .to_owned();
    }
    let others = replaced.iter().map(|(name, id)| format!("program {id} in place of {name}"));
    let others: Vec<_> = others.collect();
    format!("somebody has put {}; they are put back", others.join(", "))
}

fn spawn(tasks: &mut Tasks, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
    tasks.spawn(async move {
        task.await;
        name
    });
}

/// Work that is done on a thread of its own: many short tasks that wake each other cost half of what they do
/// among several threads, and nothing that the others are busy with holds them up.
fn alone(
    work: impl Future<Output = ()> + Send + 'static,
) -> anyhow::Result<impl Future<Output = ()> + Send> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    Ok(async move {
        let ended = tokio::task::spawn_blocking(move || runtime.block_on(work)).await;
        if let Err(error) = ended {
            std::panic::resume_unwind(error.into_panic());
        }
    })
}

fn ended_early(ended: Option<Result<&'static str, JoinError>>) -> anyhow::Error {
    match ended {
        Some(Ok(name)) => anyhow!("{name} ended without being told to; please report this"),
        Some(Err(error)) => anyhow!("a task of the agent failed: {error}; please report this"),
        None => anyhow!("the agent has no tasks; please report this"),
    }
}

/// Raises the number of files that this process may open, as far as it may by itself, and returns
/// it. The default of 1,024 is for programs that use `select(2)`.
fn raise_open_files() -> usize {
    let mut limit = rustix::process::getrlimit(Resource::Nofile);
    let now = limit.current.unwrap_or(MOST_FILES);
    limit.current = Some(limit.maximum.unwrap_or(MOST_FILES).min(MOST_FILES).max(now));
    let reached = match rustix::process::setrlimit(Resource::Nofile, limit) {
        Ok(()) => limit.current.unwrap_or(now),
        Err(_) => now,
    };
    usize::try_from(reached).unwrap_or(usize::MAX)
}

/// Hands what the kernel programs log to `tracing`, through the `log` crate.
fn follow_log(
    programs: &mut Programs,
    tasks: &mut Tasks,
    cancel: &CancellationToken,
) -> anyhow::Result<()> {
    let Some(mut logger) = programs.logger().context("opening the programs' log")? else {
        return Ok(());
    };
    let cancel = cancel.clone();
    spawn(tasks, "the programs' log", async move {
        // Read from time to time instead of by events: it is for debugging, and a ring that is
        // full drops what comes.
        let mut tick = tokio::time::interval(LOG_INTERVAL);
        while cancel.run_until_cancelled(tick.tick()).await.is_some() {
            logger.flush();
        }
    });
    Ok(())
}
