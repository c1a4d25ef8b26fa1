//! When something that failed may be tried again: soon at first, then less and less often.

use std::time::Duration;

use tokio::time::Instant;

/// The first pause.
const FIRST: Duration = Duration::from_millis(50);

/// The longest one.
const LONGEST: Duration = Duration::from_secs(5);

/// A pause that may be on.
#[derive(Debug, Default)]
pub(super) struct Pause {
    /// Until when, and how long the last one was.
    on: Option<(Instant, Duration)>,
    /// It is over, and what it was for may be tried; how it ends is not known yet.
    over: bool,
}

impl Pause {
    /// Begins a first pause, unless one is on: what goes well elsewhere puts nothing off.
    pub(super) fn begin(&mut self) {
        if !self.is_on() {
            self.set(FIRST);
        }
    }

    /// It failed again: begins a pause twice as long as the last one.
    pub(super) fn lengthen(&mut self) {
        self.set(self.on.map_or(FIRST, |(_, last)| (last * 2).min(LONGEST)));
    }

    /// There is reason to hope: the pause lasts no longer than a first one.
    pub(super) fn hasten(&mut self) {
        let soon = Instant::now() + FIRST;
        let (until, length) = self.on.unwrap_or((soon, FIRST));
        self.on = Some((until.min(soon), length));
        self.over = false;
    }

    /// It went well: the next pause is a first one.
    pub(super) fn end(&mut self) {
        *self = Self::default();
    }

    /// Whether a pause is on.
    pub(super) fn is_on(&self) -> bool {
        self.on.is_some() && !self.over
    }

    /// Waits for the end of the pause; for ever when none is on.
    pub(super) async fn over(&mut self) {
        match self.on {
            Some((until, _)) if !self.over => {
                tokio::time::sleep_until(until).await;
                self.over = true;
            }
            _ => std::future::pending().await,
        }
    }

    fn set(&mut self, length: Duration) {
        self.on = Some((Instant::now() + length, length));
        self.over = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn grows_until_it_goes_well() {
        let start = Instant::now();
        let mut pause = Pause::default();
        pause.begin();
        pause.over().await;
        assert!(!pause.is_on() && start.elapsed() == FIRST);
        pause.lengthen();
        pause.begin();
        pause.over().await;
        assert_eq!(start.elapsed(), 3 * FIRST, "50 ms, then 100 ms, whatever began meanwhile");
        for _ in 0..10 {
            pause.lengthen();
        }
        let now = Instant::now();
        pause.hasten();
        pause.over().await;
        assert_eq!(now.elapsed(), FIRST);
        pause.lengthen();
        pause.over().await;
        assert_eq!(now.elapsed(), FIRST + LONGEST, "but what failed again waits on");
        pause.end();
        pause.begin();
        pause.over().await;
        assert_eq!(now.elapsed(), 2 * FIRST + LONGEST);
    }
}
