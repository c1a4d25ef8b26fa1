//! Waiting for somebody else, by a clock that rests while this process does.
//!
//! A machine, a cgroup or a process that was paused, or had no processor, wakes up after every deadline. What had
//! arrived by then has not been looked at yet, and what was to be said next was not said. So a wait is made of short steps, and
//! a step that ends much later than it should is not counted: whoever is waited for has the whole of its time
//! while this process runs. Whoever judges can ask how much was [lost](Patience::lost).

use std::ops::RangeInclusive;
use std::pin::pin;
use std::time::Duration;

use tokio::time::{Instant, timeout};

/// A wait has so many steps, or more.
const STEPS: u32 = 8;

/// No step but the last is shorter than this, and none is longer: within one, nothing is noticed.
const STEP: RangeInclusive<Duration> = Duration::from_millis(5)..=Duration::from_millis(250);

/// A step is late when it takes longer than its length by as much again, but not by less than this: timers are
/// late by some milliseconds on a machine that has other things to do ...
const LEAST: Duration = Duration::from_millis(10);

/// ... and in any case when it is by this.
const MOST: Duration = Duration::from_millis(100);

/// So many late steps are not counted; further ones are, so that every wait ends.
const FORGIVEN: u32 = 4 * STEPS;

/// How long somebody may take, over one or more waits.
#[derive(Debug)]
pub struct Patience {
    left: Duration,
    step: Duration,
    lost: Duration,
    late: u32,
}

impl Patience {
    /// For so long.
    #[must_use]
    pub fn new(time: Duration) -> Self {
        let step = (time / STEPS).clamp(*STEP.start(), *STEP.end());
        Self { left: time, step, lost: Duration::ZERO, late: 0 }
    }

    /// Waits for something; nothing when the time is over first. What is there by then counts as in time.
    pub async fn wait<F: Future>(&mut self, what: F) -> Option<F::Output> {
        let mut what = pin!(what);
        loop {
            let planned = self.step.min(self.left);
            let began = Instant::now();
            let found = timeout(planned, what.as_mut()).await.ok();
            self.passed(planned, began.elapsed());
            if found.is_some() || self.left.is_zero() {
                return found;
            }
        }
    }

    /// For how long this process did not run during the waits, as far as that was noticed.
    #[must_use]
    pub fn lost(&self) -> Option<Duration> {
        (!self.lost.is_zero()).then_some(self.lost)
    }

    /// A step took so long.
    fn passed(&mut self, planned: Duration, took: Duration) {
        let late = took.saturating_sub(planned);
        if late <= planned.clamp(LEAST, MOST) {
            self.left = self.left.saturating_sub(took);
            return;
        }
        self.lost += late;
        self.late += 1;
        if self.late > FORGIVEN {
            self.left = self.left.saturating_sub(planned);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);
    const SECOND: Duration = Duration::from_secs(1);

    #[tokio::test(start_paused = true)]
    async fn a_wait_ends_after_its_time() {
        for time in [Duration::ZERO, MS, 40 * MS, 300 * MS, 10 * SECOND] {
            let began = Instant::now();
            let mut patience = Patience::new(time);
            assert_eq!(patience.wait(std::future::pending::<()>()).await, None);
            // Timers have steps of a millisecond, and there are forty of them at the most.
            let took = began.elapsed();
            assert!((time..=time + 40 * MS).contains(&took), "{time:?}: {took:?}");
            assert_eq!(patience.lost(), None);
        }
        let mut patience = Patience::new(SECOND);
        assert_eq!(patience.wait(tokio::time::sleep(600 * MS)).await, Some(()));
        assert_eq!(patience.wait(tokio::time::sleep(300 * MS)).await, Some(()));
        assert_eq!(
            patience.wait(tokio::time::sleep(300 * MS)).await,
            None,
            "it is one time for all"
        );
    }

    /// Whatever is slept through: all of the time is left to whoever is waited for, less than a step excepted.
    #[test]
    fn what_is_slept_through_is_not_counted() {
        let mut patience = Patience::new(SECOND);
        let step = patience.step;
        patience.passed(step, step);
        patience.passed(step, step + 3 * SECOND);
        assert_eq!(patience.lost(), Some(3 * SECOND));
        assert_eq!(patience.left, SECOND - step);
        // A little late is not paused.
        patience.passed(step, step + LEAST);
        assert_eq!((patience.lost(), patience.left), (Some(3 * SECOND), SECOND - 2 * step - LEAST));
    }

    /// One that never runs in time judges in the end.
    #[test]
    fn every_wait_ends() {
        let mut patience = Patience::new(SECOND);
        let mut steps = 0;
        while !patience.left.is_zero() {
            patience.passed(patience.step, SECOND);
            steps += 1;
        }
        assert_eq!(steps, FORGIVEN + STEPS);
    }

    /// The thread itself sleeps, as if the process were stopped, and wakes up after the deadline.
    #[tokio::test]
    async fn what_has_arrived_meanwhile_is_in_time() {
        let (sender, receiver) = tokio::sync::oneshot::channel();
        std::thread::spawn(move || {
            std::thread::sleep(100 * MS);
            let _ = sender.send(());
        });
        tokio::spawn(async { std::thread::sleep(SECOND) });
        let answered = async {
            receiver.await.expect("sent");
            // One more turn, which nobody could have taken meanwhile.
            tokio::time::sleep(50 * MS).await;
        };
        let mut patience = Patience::new(200 * MS);
        assert_eq!(patience.wait(answered).await, Some(()));
        assert!(patience.lost().is_some_and(|lost| lost > SECOND / 2), "{patience:?}");
    }
}
