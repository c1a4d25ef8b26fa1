//! What is counted of checks.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::probe::Failure;
use crate::api::types::Checks;

/// A check that begins so much later than it was due is late.
const LATE: Duration = Duration::from_millis(100);

/// Since the agent began. Written by the schedule, read by whoever asks; no number depends on another.
#[derive(Debug, Default)]
pub struct Tally {
    passed: AtomicU64,
    failed: AtomicU64,
    unmade: AtomicU64,
    unjudged: AtomicU64,
    late: AtomicU64,
    longest_delay_us: AtomicU64,
}

impl Tally {
    /// A check is over, which began so long after it was due.
    pub(super) fn note(&self, result: &Result<(), Failure>, delay: Duration) {
        let which = match result {
            Ok(()) => &self.passed,
            Err(Failure::Endpoint(_)) => &self.failed,
            Err(Failure::Local(_)) => &self.unmade,
            Err(Failure::Paused(_)) => &self.unjudged,
        };
        which.fetch_add(1, Ordering::Relaxed);
        if delay > LATE {
            self.late.fetch_add(1, Ordering::Relaxed);
        }
        let delay = u64::try_from(delay.as_micros()).unwrap_or(u64::MAX);
        self.longest_delay_us.fetch_max(delay, Ordering::Relaxed);
    }

    /// As people see it.
    pub fn read(&self) -> Checks {
        let read = |word: &AtomicU64| word.load(Ordering::Relaxed);
        Checks {
            passed: read(&self.passed),
            failed: read(&self.failed),
            unmade: read(&self.unmade),
            unjudged: read(&self.unjudged),
            late: read(&self.late),
            longest_delay_us: read(&self.longest_delay_us),
        }
    }
}
