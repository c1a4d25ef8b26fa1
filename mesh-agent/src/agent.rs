//! The agent from start to end: what is started in which order, and ended in the reverse one.
//!
//! The programs are attached after every source has been heard and its services are in the maps,
//! so that no connect is refused only because the agent has just begun; a source that does not
//! answer delays that by [`PATIENCE`] at the most.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::api::{server, socket};
use crate::check;
use crate::config::{Config, Source};
use crate::dataplane::load::{self, Options, Programs};
use crate::discovery::files;
use crate::engine::{Engine, Inputs};
use crate::health::Monitor;

/// How long a source that does not answer can delay the start.
const PATIENCE: Duration = Duration::from_secs(5);

/// How often what the programs log is read.
const LOG_INTERVAL: Duration = Duration::from_millis(100);

/// How many messages of sources may wait for the engine.
const EVENTS: usize = 64;

/// Runs the agent until SIGTERM or SIGINT, then detaches everything.
///
/// # Errors
///
/// When something that it needs cannot be had; each error says what, and what to do.
pub async fn run(config: Config, options: Options) -> anyhow::Result<()> {
    let config = Arc::new(config);
    let Some(cgroup) = config.cgroup.clone() else {
        bail!("no cgroup is named: use --cgroup, or `cgroup:` in the agent file");
    };
    let mut terminate = signal(SignalKind::terminate()).context("listening for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listening for SIGINT")?;
    let claim = socket::Claim::take(&config.socket).await?;
    refuse_second(&cgroup)?;

    let (mut programs, mut maps, grace) = load::load(options)?;
    maps.set_virtual_ips(&config.virtual_ips).context("virtual-ips")?;
    let cancel = CancellationToken::new();
    if options.log {
        follow_log(&mut programs, &cancel)?;
    }

    let (events, sources) = mpsc::channel(EVENTS);
    let (sender, verdicts) = mpsc::unbounded_channel();
    let monitor = Monitor::spawn(sender, cancel.clone());
    let inputs = Inputs { sources, verdicts };
    let (engine, heard, engine_task) =
        Engine::spawn(Arc::clone(&config), maps, grace, monitor, inputs, cancel.clone());
    for (index, source) in config.sources.iter().enumerate() {
        let Source::Files { directory } = source;
        files::spawn(index, directory.clone(), events.clone(), cancel.clone());
    }
    let listener = claim.listen()?;
    let server = tokio::spawn(server::serve(listener, engine.clone(), cancel.clone()));

    let mut stopped = std::pin::pin!(async {
        tokio::select! {
            _ = terminate.recv() => "SIGTERM",
            _ = interrupt.recv() => "SIGINT",
        }
    });
    let started = tokio::select! {
        result = tokio::time::timeout(PATIENCE, heard) => {
            if result.is_err() {
                tracing::warn!("a source has not answered; starting with what the others define");
            }
            None
        }
        signal = &mut stopped => Some(signal),
    };
    let signal = match started {
        Some(signal) => signal,
        None => {
            programs.attach(&cgroup)?;
            engine.set_attached(true).await;
            tracing::info!(cgroup = %cgroup.display(), node = config.node, "balancing");
            stopped.await
        }
    };

    tracing::info!("{signal}: detaching");
    // No new connect is balanced from here on; what is open stays as it is.
    drop(programs);
    cancel.cancel();
    engine_task.await.context("the engine ended abnormally")?;
    server.await.context("the API ended abnormally")??;
    Ok(())
}

/// Two agents on one cgroup would count and translate twice.
fn refuse_second(cgroup: &Path) -> anyhow::Result<()> {
    let ours = check::hooks::ours(cgroup)
        .with_context(|| format!("asking for the programs attached to {}", cgroup.display()))?;
    if let Some((directory, id)) = ours.first() {
        bail!(
            "kernel programs of another agent are attached to {} (program id {id}); stop that \
             agent first, or name a cgroup outside it",
            directory.display()
        );
    }
    Ok(())
}

/// Hands what the kernel programs log to `tracing`, through the `log` crate.
fn follow_log(programs: &mut Programs, cancel: &CancellationToken) -> anyhow::Result<()> {
    let mut logger = programs.logger().context("opening the programs' log")?;
    let cancel = cancel.clone();
    tokio::spawn(async move {
        // Read from time to time instead of by events: it is for debugging, and a ring that is
        // full drops what comes.
        let mut tick = tokio::time::interval(LOG_INTERVAL);
        while cancel.run_until_cancelled(tick.tick()).await.is_some() {
            logger.flush();
        }
    });
    Ok(())
}
