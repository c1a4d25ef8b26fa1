//! The audit as a task: from time to time, and whenever somebody asks.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use super::{Audit, Record, Report};
use crate::dataplane::grace::Grace;
use crate::dataplane::records::{Records, Used};

/// How often it is made by itself.
const INTERVAL: Duration = Duration::from_secs(60);

/// How often it is looked whether the table of records is too small.
const CROWDED: Duration = Duration::from_secs(1);

/// How many times it is not looked after it could not be made larger.
const REST: u32 = 60;

/// What the last pass found, and how it was dealt with.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Audited {
    /// When it ended.
    pub time: SystemTime,
    /// How many passes there were.
    pub passes: u64,
    /// What it found.
    pub report: Report,
    /// Records that it released.
    pub released: u64,
    /// Records that were released by all passes so far.
    pub released_ever: u64,
    /// Whether every record is where the table has it now.
    pub settled: bool,
    /// Why it could not be made.
    pub error: Option<String>,
}

/// The records of sockets, as they are shared by those who look at them.
pub type Shared = Arc<Mutex<Records>>;

/// A way to ask for a pass, and for what the last one found.
#[derive(Clone)]
pub struct Auditor {
    records: Shared,
    asks: mpsc::Sender<oneshot::Sender<Audited>>,
    last: watch::Receiver<Option<Audited>>,
}

impl Auditor {
    /// The auditor, and its work until `cancel`.
    pub fn new(
        records: Records,
        grace: Arc<Grace>,
        cancel: CancellationToken,
    ) -> (Self, impl Future<Output = ()> + Send + use<>) {
        let records = Arc::new(Mutex::new(records));
        let (asks, asked) = mpsc::channel(8);
        let (told, last) = watch::channel(None);
        let work = work(Arc::clone(&records), grace, asked, told, cancel);
        (Self { records, asks, last }, work)
    }

    /// Makes a pass now, after those that were asked for before. Nothing when the agent is stopping.
    pub async fn pass(&self) -> Option<Audited> {
        let (answer, answered) = oneshot::channel();
        self.asks.send(answer).await.ok()?;
        answered.await.ok()
    }

    /// What the last pass found; nothing before the first.
    #[must_use]
    pub fn last(&self) -> Option<Audited> {
        self.last.borrow().clone()
    }

    /// Every record in use now, in no order.
    #[must_use]
    pub fn records(&self) -> Vec<Record> {
        lock(&self.records).snapshot()
    }

    /// Bytes of the table of records.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        lock(&self.records).bytes()
    }

    /// Whether this very reservation is still there.
    #[must_use]
    pub fn still(&self, record: &Record) -> bool {
        lock(&self.records).still(record)
    }

    /// How many records are in use in each of the two tables.
    #[must_use]
    pub fn used(&self) -> [Used; 2] {
        lock(&self.records).used()
    }
}

async fn work(
    records: Shared,
    grace: Arc<Grace>,
    mut asked: mpsc::Receiver<oneshot::Sender<Audited>>,
    told: watch::Sender<Option<Audited>>,
    cancel: CancellationToken,
) {
    let mut audit = Audit::default();
    let (mut passes, mut released_ever) = (0, 0);
    let mut tick = tokio::time::interval(INTERVAL);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    // The first is due at once.
    tick.tick().await;
    let mut look = tokio::time::interval(CROWDED);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut rest = 0;
    loop {
        let asker = tokio::select! {
            () = cancel.cancelled() => return,
            _ = look.tick() => {
                rest = if rest == 0 { grow(&records).await } else { rest - 1 };
                continue;
            }
            _ = tick.tick() => None,
            Some(asker) = asked.recv() => Some(asker),
        };
        settle(&records, &grace).await;
        let snapshot = lock(&records).snapshot();
        let still = |record: &_| lock(&records).still(record);
        let pass = cancel.run_until_cancelled(audit.pass(snapshot, still));
        let Some(result) = pass.await else { return };
        passes += 1;
        let (report, gone, error) = match result {
            Ok((report, gone)) => (report, gone, None),
            Err(error) => (Report::default(), Vec::new(), Some(error.to_string())),
        };
        let released = gone.iter().filter(|record| lock(&records).end(record)).count() as u64;
        released_ever += released;
        if released > 0 {
            tracing::warn!(released, "records without a connection: released by the audit");
        }
        if let Some(error) = &error {
            tracing::warn!(%error, "the audit of records could not be made");
        }
        let settled = !lock(&records).has_former();
        let audited = Audited {
            time: SystemTime::now(),
            passes,
            report,
            released,
            released_ever,
            settled,
            error,
        };
        told.send_replace(Some(audited.clone()));
        if let Some(asker) = asker {
            // Whoever asked may have gone.
            let _ = asker.send(audited);
        }
    }
}

/// Makes the table of records larger when that is due. Returns for how many looks that is not tried again.
async fn grow(records: &Shared) -> u32 {
    if !lock(records).is_crowded() {
        return 0;
    }
    let growing = Arc::clone(records);
    // The kernel clears the memory, and waits for running programs.
    match tokio::task::spawn_blocking(move || lock(&growing).grow()).await {
        Ok(Ok((from, to))) => tracing::info!(from, to, "the table of records of sockets has grown"),
        Ok(Err(error)) => {
            tracing::warn!(
                %error,
                "the table of records of sockets cannot grow; further ones go to OVERFLOW"
            );
            return REST;
        }
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
    0
}

/// Ends that programs look for records where they were before the table grew, when none is there.
async fn settle(records: &Shared, grace: &Arc<Grace>) {
    if !lock(records).has_former() {
        return;
    }
    let (records, grace) = (Arc::clone(records), Arc::clone(grace));
    let settling = move || grace.wait().map(|()| lock(&records).settle());
    if let Ok(Err(error)) = tokio::task::spawn_blocking(settling).await {
        tracing::warn!(%error, "waiting for running programs");
    }
}

fn lock(records: &Mutex<Records>) -> MutexGuard<'_, Records> {
    records.lock().unwrap_or_else(PoisonError::into_inner)
}
