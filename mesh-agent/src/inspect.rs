//! What the kernel holds, without an agent: the pinned maps, read as an agent would that takes them over,
//! and left as they are.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, bail};
use mesh_common::ABI_VERSION;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use crate::audit::task::Auditor;
use crate::check::cgroup;
use crate::commands::Commands;
use crate::config::Config;
use crate::dataplane::grace::Grace;
use crate::dataplane::kernel::KernelMaps;
use crate::dataplane::opened::Opened;
use crate::dataplane::reconcile::Reconciler;
use crate::dataplane::records::Records;
use crate::dataplane::units::Units;
use crate::dataplane::{pindir, programs};
use crate::engine::journal::Journal;
use crate::engine::{Engine, Handle, Inputs, Watchers};
use crate::health::Monitor;

/// Asks what an agent would be asked that had just been started, and had heard of no source yet.
///
/// # Errors
///
/// Nothing is pinned, or not by this version, or it cannot be read; or the question has no answer.
pub async fn ask<T, E>(
    mut config: Config,
    question: impl AsyncFnOnce(Handle) -> Result<T, E>,
) -> anyhow::Result<T>
where
    E: std::error::Error + Send + Sync + 'static,
{
    let directory = pinned(&config.pin_dir)?;
    let maps = Opened::at(&directory);
    let limits = maps.limits_in_force(config.limits)?;
    let kernel = KernelMaps::look(&maps, limits)?;
    let (reconciler, _) = Reconciler::adopt(kernel).context("reading the maps")?;
    let records = Records::look(&maps, limits)?;
    let units = Units::open(&maps)?;
    config.limits = limits;
    config.sources.clear();
    if config.cgroup.is_none() {
        config.cgroup = programs::cgroup(&directory)?.and_then(cgroup::directory_of);
    }
    let cancel = CancellationToken::new();
    let grace = Arc::new(Grace::open(&maps)?);
    let (auditor, _) = Auditor::new(records, Arc::clone(&grace), cancel.clone());
    // Nobody says anything to this engine.
    let (_sources, sources) = mpsc::channel(1);
    let (finder, findings) = mpsc::unbounded_channel();
    let (_observer, observed) = mpsc::channel(1);
    let (monitor, _) =
        Monitor::new(1, Commands::none("nothing is checked"), finder, cancel.clone());
    let watchers = Watchers {
        journal: Journal::default(),
        auditor,
        pinned: Arc::default(),
        units: watch::channel(false).0,
        unit_keys: units.keys(),
        canary: None,
    };
    let inputs = Inputs { sources, findings, observed };
    let config = Arc::new(config);
    let (handle, _heard, engine) =
        Engine::prepare(&config, reconciler, grace, monitor, inputs, watchers, cancel);
    tokio::select! {
        () = engine => bail!("the maps could not be read to the end; please report this"),
        answer = question(handle) => Ok(answer?),
    }
}

/// The directory of what is pinned by this version.
fn pinned(root: &Path) -> anyhow::Result<PathBuf> {
    let found = match pindir::in_force(root) {
        Err(error) if error.kind() == ErrorKind::NotFound => None,
        found => found.with_context(|| format!("looking at {}", root.display()))?,
    };
    match found {
        Some((ABI_VERSION, directory)) => Ok(directory),
        Some((other, _)) => bail!(
            "{} holds what another version has pinned (map layout {other}, this one reads \
             {ABI_VERSION}): ask with that version",
            root.display()
        ),
        None => bail!("nothing is pinned at {}: nothing is balanced", root.display()),
    }
}
