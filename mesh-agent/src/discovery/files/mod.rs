//! Service files: a directory of `*.yaml` and `*.yml`, watched, with the last good state of each.
//!
//! Two things are believed at once and two are not. A file that its writer has closed, or that was
//! renamed into place, is whole: it is read in the same moment. A file that a writer may still hold
//! open is read only when it has been still for a while. A file that is gone may be the first sign
//! of the whole directory going (`rm -rf`, `umount`): it counts as removed when the directory
//! has outlived it. And a directory that is gone, or that is another and an empty one, says
//! nothing: everything stays as it was.
//!
//! Parts: `directory` reads the disk, `watch` hears of changes, `schedule` decides what is
//! believed when, `definitions` knows what each file defines and what changed. The last two are
//! pure.

mod definitions;
mod directory;
mod schedule;
#[cfg(test)]
mod tests;
mod watch;

use std::collections::{BTreeSet, HashSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tokio::task::{JoinError, JoinHandle};
use tokio_util::sync::CancellationToken;

use self::definitions::{Changes, Definitions};
use self::directory::{Identity, Loaded, Survey};
use self::schedule::{Schedule, Trust};
use self::watch::{Ear, Signal, Watch};
use super::{Event, SourceState};
use crate::config::Source;

/// How often the directory is read although nothing was heard: network file systems, an overflow,
/// a directory that was mounted over.
const RESCAN: Duration = Duration::from_secs(5);

/// How often a directory that is not there is looked for.
const RETRY: Duration = Duration::from_millis(250);

/// Starts watching `directory` as the source at position `source` of the agent file.
///
/// It reports into `events` until `cancel` is cancelled or the receiver is gone, and never
/// fails: what goes wrong is in the states that it sends, and is tried again.
pub fn spawn(
    source: usize,
    directory: PathBuf,
    events: mpsc::Sender<Event>,
    cancel: CancellationToken,
) -> JoinHandle<()> {
    start(Files::new(source, directory, events, RESCAN), cancel)
}

fn start(files: Files, cancel: CancellationToken) -> JoinHandle<()> {
    tokio::spawn(async move {
        // An error only says that nobody listens any more.
        let _stopped = cancel.run_until_cancelled(files.run()).await;
    })
}

/// The receiver of events is gone.
struct Closed;

/// What the source knows of its directory.
enum Place {
    /// Not there, or not to be believed.
    Lost,
    /// There.
    Found { identity: Identity, ear: Option<Ear> },
}

struct Files {
    directory: Arc<Path>,
    events: mpsc::Sender<Event>,
    definitions: Definitions,
    schedule: Schedule,
    place: Place,
    /// The directory that was believed last.
    last: Option<Identity>,
    /// What is wrong with the directory itself.
    trouble: Vec<String>,
    next_scan: Instant,
    rescan: Duration,
    ready: bool,
    state: SourceState,
}

/// What ended a wait.
enum Wake {
    Timer,
    Signals(io::Result<Vec<Signal>>),
}

// === impl Files ===

impl Files {
    fn new(
        source: usize,
        directory: PathBuf,
        events: mpsc::Sender<Event>,
        rescan: Duration,
    ) -> Self {
        let name = Source::Files { directory: directory.clone() }.name();
        let (ready, is_empty) = (false, true);
        let state = SourceState { source, name, ready, is_empty, errors: Vec::new() };
        Self {
            definitions: Definitions::new(source, &directory),
            directory: directory.into(),
            events,
            schedule: Schedule::new(rescan),
            rescan,
            place: Place::Lost,
            last: None,
            trouble: Vec::new(),
            next_scan: Instant::now(),
            ready: false,
            state,
        }
    }

    async fn run(mut self) -> Result<(), Closed> {
        loop {
            match self.wait().await {
                Wake::Timer => self.on_timer().await?,
                Wake::Signals(Ok(signals)) => self.on_signals(signals).await?,
                Wake::Signals(Err(error)) => {
                    self.trouble = vec![format!("the watch failed: {error}; it is made anew")];
                    self.place = Place::Lost;
                    self.next_scan = Instant::now() + RETRY;
                }
            }
            self.publish().await?;
        }
    }

    async fn wait(&mut self) -> Wake {
        let at = self.schedule.next().map_or(self.next_scan, |at| at.min(self.next_scan));
        let timer = tokio::time::sleep_until(at.into());
        match &mut self.place {
            Place::Found { ear: Some(ear), .. } => tokio::select! {
                signals = ear.next() => Wake::Signals(signals),
                () = timer => Wake::Timer,
            },
            _ => {
                timer.await;
                Wake::Timer
            }
        }
    }

    async fn on_timer(&mut self) -> Result<(), Closed> {
        if let Place::Lost = self.place {
            return self.find(Trust::Old).await;
        }
        let now = Instant::now();
        if self.schedule.removals_due(now) {
            self.remove().await?;
        }
        let regular = now >= self.next_scan;
        match &self.place {
            // What kept it from being watched may have gone.
            Place::Found { ear: None, .. } if regular => self.find(Trust::Still).await,
            _ if regular || self.schedule.look_due(now) => self.scan(Trust::Still).await,
            _ => Ok(()),
        }
    }

    async fn on_signals(&mut self, signals: Vec<Signal>) -> Result<(), Closed> {
        let now = Instant::now();
        let mut whole = BTreeSet::new();
        let mut scan = None;
        for signal in signals {
            match signal {
                Signal::Whole(name) => {
                    self.schedule.appeared(&name);
                    whole.insert(name);
                }
                Signal::Removed(name) => {
                    whole.remove(&name);
                    if self.definitions.has(&name) {
                        self.schedule.vanished(name, now);
                    }
                }
                // The swap of a mounted ConfigMap: every file is another one, and whole.
                Signal::Swapped => scan = Some(Trust::Whole),
                Signal::Overflow => scan = scan.or(Some(Trust::Old)),
                // Perhaps only to make room for another one.
                Signal::Gone => return self.lose().await,
            }
        }
        self.load(whole).await?;
        // What had to wait at the first listing may have been read meanwhile, because it was heard to be whole.
        self.ready |= !self.schedule.is_looking();
        match scan {
            Some(trust) => self.scan(trust).await,
            None => Ok(()),
        }
    }

    /// Looks for the directory and begins to watch it.
    async fn find(&mut self, trust: Trust) -> Result<(), Closed> {
        self.next_scan = Instant::now() + RETRY;
        let path = Arc::clone(&self.directory);
        // The watch is first, so that nothing can change between the reading and the watching.
        let (watch, survey) = blocking(move || (Watch::new(&path), directory::survey(&path))).await;
        let survey = match survey {
            Ok(survey) => survey,
            Err(error) => {
                self.trouble = vec![self.unreadable(&error)];
                return Ok(());
            }
        };
        let lost = matches!(self.place, Place::Lost);
        let other = lost && self.last.is_some_and(|last| !last.is_certainly(&survey.identity));
        if other && survey.files.is_empty() && !self.definitions.is_empty() {
            self.trouble = vec![EMPTY.into()];
            return Ok(());
        }
        self.trouble.clear();
        let ear = match watch.and_then(Watch::listen) {
            Ok(ear) => Some(ear),
            Err(error) => {
                self.trouble.push(format!(
                    "changes are found by reading the directory every {} s, because it cannot be \
                     watched: {error}; check the sysctls fs.inotify.max_user_instances and \
                     fs.inotify.max_user_watches",
                    self.rescan.as_secs()
                ));
                None
            }
        };
        self.last = Some(survey.identity);
        self.place = Place::Found { identity: survey.identity, ear };
        if other {
            self.schedule.replaced(Instant::now());
        }
        self.take(survey, trust).await
    }

    /// Forgets where the directory is, but nothing of what it defined, and looks for it.
    async fn lose(&mut self) -> Result<(), Closed> {
        self.place = Place::Lost;
        self.schedule.forget_pending();
        self.find(Trust::Old).await
    }

    /// Reads the directory again.
    async fn scan(&mut self, trust: Trust) -> Result<(), Closed> {
        let path = Arc::clone(&self.directory);
        let survey = blocking(move || directory::survey(&path)).await;
        match (&self.place, survey) {
            (Place::Found { identity, .. }, Ok(survey)) if *identity == survey.identity => {
                self.take(survey, trust).await
            }
            _ => self.lose().await,
        }
    }

    /// Compares what the directory holds with what is known.
    async fn take(&mut self, survey: Survey, trust: Trust) -> Result<(), Closed> {
        let now = Instant::now();
        self.next_scan = now + self.rescan;
        self.definitions.unnamed(survey.unnamed);
        let mut wanted = BTreeSet::new();
        let mut present = HashSet::new();
        for file in survey.files {
            self.schedule.appeared(&file.name);
            if self.schedule.look(&file, trust, now) {
                wanted.insert(Arc::clone(&file.name));
            }
            present.insert(file.name);
        }
        self.schedule.keep(&present);
        for name in self.definitions.names().filter(|name| !present.contains(*name)) {
            self.schedule.vanished(Arc::clone(name), now);
        }
        self.load(wanted).await?;
        // Files that are still being written at the first reading come into the state with it.
        self.ready |= !self.schedule.is_looking();
        Ok(())
    }

    /// Reads files and reports what they change, all in one message.
    async fn load(&mut self, names: BTreeSet<Arc<str>>) -> Result<(), Closed> {
        if names.is_empty() {
            return Ok(());
        }
        let path = Arc::clone(&self.directory);
        let loaded = blocking(move || {
            let names: Vec<_> = names.into_iter().collect();
            directory::load_all(&path, &names)
        })
        .await;
        let now = Instant::now();
        let mut changes = Changes::default();
        for (name, (stamp, loaded)) in loaded {
            match loaded {
                Loaded::Services(services) => {
                    self.definitions.good(&name, services, &mut changes);
                }
                Loaded::Bad(errors) => self.definitions.bad(&name, errors),
                // Not noted as read: each listing tries again.
                Loaded::Unreadable(error) => {
                    self.definitions.bad(&name, vec![error]);
                    continue;
                }
                Loaded::Changing => {
                    self.schedule.changing(name, stamp, now);
                    continue;
                }
                Loaded::Absent => {
                    if self.definitions.has(&name) {
                        self.schedule.vanished(name, now);
                    }
                    continue;
                }
            }
            self.schedule.read(name, stamp);
        }
        self.send(changes).await
    }

    /// Believes the removals that have settled, if the directory is still there.
    async fn remove(&mut self) -> Result<(), Closed> {
        let path = Arc::clone(&self.directory);
        let survey = blocking(move || directory::survey(&path)).await;
        let removed = self.schedule.take_removals();
        match (&self.place, survey) {
            (Place::Found { identity, .. }, Ok(survey)) if *identity == survey.identity => {
                let present: HashSet<_> = survey.files.into_iter().map(|file| file.name).collect();
                let mut changes = Changes::default();
                for name in removed.iter().filter(|name| !present.contains(*name)) {
                    self.schedule.removed(name);
                    self.definitions.gone(name, &mut changes);
                }
                self.send(changes).await
            }
            _ => self.lose().await,
        }
    }

    async fn send(&self, changes: Changes) -> Result<(), Closed> {
        if changes.is_empty() {
            return Ok(());
        }
        let Changes { upserts, removed } = changes;
        self.events.send(Event::Changed { upserts, removed }).await.map_err(|_| Closed)
    }

    /// Sends and logs the state if it is another one.
    async fn publish(&mut self) -> Result<(), Closed> {
        let place = self.directory.display().to_string();
        let trouble = self.trouble.iter().map(|trouble| format!("{place}: {trouble}"));
        let errors: Vec<String> = trouble.chain(self.definitions.errors()).collect();
        let is_empty = self.definitions.is_empty();
        let before = &self.state;
        if errors == before.errors && self.ready == before.ready && is_empty == before.is_empty {
            return Ok(());
        }
        let known: HashSet<_> = self.state.errors.iter().collect();
        for error in errors.iter().filter(|error| !known.contains(error)) {
            tracing::error!(source = %self.state.name, "{error}");
        }
        if errors.is_empty() && !self.state.errors.is_empty() {
            tracing::info!(source = %self.state.name, "all files are good again");
        }
        self.state.errors = errors;
        self.state.ready = self.ready;
        self.state.is_empty = is_empty;
        self.events.send(Event::State(self.state.clone())).await.map_err(|_| Closed)
    }

    fn unreadable(&self, error: &io::Error) -> String {
        if self.last.is_some() && error.kind() == io::ErrorKind::NotFound {
            return GONE.into();
        }
        let advice = match error.kind() {
            io::ErrorKind::NotFound => "create it, or correct `sources` in the agent file",
            io::ErrorKind::NotADirectory => "name a directory in `sources` of the agent file",
            _ => "check its permissions; services that it defined stay as they were",
        };
        format!("cannot read the directory: {error}; {advice}")
    }
}

const EMPTY: &str = "the directory was replaced by an empty one; its services stay as they were: \
                     put the files back, or one that says `services: []` to remove them";

const GONE: &str = "the directory is gone; its services stay as they were: put it back, or one with \
                    a file that says `services: []` to remove them";

/// Runs what may wait for a disk, or parse for long, where it delays nobody.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await.map_err(JoinError::try_into_panic) {
        Ok(value) => value,
        Err(Ok(panic)) => std::panic::resume_unwind(panic),
        // The runtime ends, and this task with it.
        Err(Err(_)) => std::future::pending().await,
    }
}
