//! What consecutive results make of an endpoint: a pure state machine.
//!
//! | state | passes | failures |
//! | --- | --- | --- |
//! | unknown | the first one: healthy | `fall` in a row: unhealthy |
//! | healthy | – | `fall` in a row: unhealthy |
//! | unhealthy | `rise` in a row: healthy | – |
//!
//! Results in a row are counted, not results in all: one of the other kind starts the count anew.
//!
//! An endpoint that is healthy for less than [`CALM`] before it fails again is *flapping*: each time that
//! happens in a row, it takes twice as many passes to be healthy again, as many as come in [`LONGEST`] at
//! the most. So clients meet one that comes and goes ever less often.

use std::time::Duration;

use mesh_common::State;

use crate::model::HealthPolicy;

/// An endpoint that was healthy for so long does not flap.
const CALM: Duration = Duration::from_secs(60);

/// No endpoint has to pass its checks for longer than this, unless `rise` asks for more.
const LONGEST: Duration = Duration::from_secs(60);

/// More doublings than any policy needs to come to [`LONGEST`].
const MOST: u32 = 31;

/// An endpoint under checks. Times are since any one moment.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Checked {
    state: State,
    /// Consecutive results that speak against the state.
    against: u32,
    /// How often in a row it was healthy only for a short time.
    flaps: u32,
    /// Since when it is healthy again, after it was not.
    recovered: Option<Duration>,
}

impl Checked {
    /// An endpoint of which something is known already.
    #[must_use]
    pub fn new(state: State) -> Self {
        Self { state, ..Self::default() }
    }

    /// What the results have made of it.
    #[must_use]
    pub const fn state(&self) -> State {
        self.state
    }

    /// Whether its state is known, and nothing speaks against it.
    #[must_use]
    pub fn is_settled(&self) -> bool {
        self.state != State::Unknown && self.against == 0
    }

    /// Whether it passes again, after it was unhealthy, and has not flapped.
    #[must_use]
    pub fn recovers(&self, policy: &HealthPolicy) -> bool {
        let passes = self.state == State::Unhealthy && self.against > 0;
        passes && self.needed(policy) == policy.rise
    }

    /// How many consecutive passes make it healthy again.
    #[must_use]
    pub fn needed(&self, policy: &HealthPolicy) -> u32 {
        let most = LONGEST.as_nanos() / policy.interval.as_nanos().max(1);
        let needed = u128::from(policy.rise) << self.flaps;
        u32::try_from(needed.min(most)).unwrap_or(u32::MAX).max(policy.rise)
    }

    /// Takes a result. Returns the new state when it changes.
    pub fn observe(&mut self, passed: bool, now: Duration, policy: &HealthPolicy) -> Option<State> {
        let (other, needed) = match (self.state, passed) {
            (State::Unhealthy, true) => (State::Healthy, self.needed(policy)),
            (State::Unhealthy, false) | (State::Healthy, true) => {
                self.against = 0;
                return None;
            }
            (_, true) => (State::Healthy, 1),
            (_, false) => (State::Unhealthy, policy.fall),
        };
        self.against += 1;
        if self.against < needed {
            return None;
        }
        self.against = 0;
        let before = std::mem::replace(&mut self.state, other);
        match (before, other) {
            (State::Unhealthy, _) => self.recovered = Some(now),
            (_, State::Unhealthy) => {
                let flaps = self.recovered.is_some_and(|since| now.saturating_sub(since) < CALM);
                self.flaps = if flaps { (self.flaps + 1).min(MOST) } else { 0 };
            }
            _ => {}
        }
        Some(other)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Ending, HealthCheck, Pace};

    fn policy(rise: u32, fall: u32) -> HealthPolicy {
        HealthPolicy {
            check: HealthCheck::Tcp,
            port: None,
            pace: Pace::Always,
            interval: Duration::from_secs(1),
            timeout: HealthPolicy::TIMEOUT,
            rise,
            fall,
            ending: Ending::Never,
        }
    }

    /// Takes results (`+` passed, `-` failed), one a second, and writes the state after each.
    fn run_from(mut checked: Checked, policy: &HealthPolicy, results: &str) -> String {
        let results = results.chars().zip(1..);
        let after = results.map(|(result, second)| {
            let before = checked.state();
            let change = checked.observe(result == '+', Duration::from_secs(second), policy);
            assert_eq!(change, (before != checked.state()).then(|| checked.state()));
            match checked.state() {
                State::Healthy => 'H',
                State::Unhealthy => 'U',
                _ => '?',
            }
        });
        after.collect()
    }

    fn run(rise: u32, fall: u32, results: &str) -> String {
        run_from(Checked::default(), &policy(rise, fall), results)
    }

    #[test]
    fn rise_and_fall_are_consecutive() {
        assert_eq!(run(2, 3, "+"), "H");
        assert_eq!(run(2, 3, "--+--+---"), "??HHHHHHU");
        assert_eq!(run(2, 3, "---"), "??U");
        assert_eq!(run(2, 3, "---+-+-++"), "??UUUUUUH");
    }

    #[test]
    fn what_was_known_before_counts() {
        let from = |state, results| run_from(Checked::new(state), &policy(2, 2), results);
        assert_eq!(from(State::Unhealthy, "+-++"), "UUUH");
        assert_eq!(from(State::Healthy, "-+--"), "HHHU");
    }

    /// Each time that it comes back for a short time only, it takes twice as long to come back.
    #[test]
    fn flapping_takes_ever_longer() {
        assert_eq!(run(1, 1, "+-+-+"), "HUHUU");
        assert_eq!(run(1, 1, "+-+-++-+++++"), "HUHUUHUUUUHH");
        // An end of what it needs, and no overflow.
        let fast = HealthPolicy { interval: Duration::from_secs(10), ..policy(2, 1) };
        let mut checked = Checked { state: State::Unhealthy, flaps: MOST, ..Checked::default() };
        assert_eq!(checked.needed(&fast), 6, "60 s");
        assert_eq!(checked.needed(&HealthPolicy { rise: 100, ..fast.clone() }), 100, "as it says");
        checked.flaps = 1;
        assert_eq!(checked.needed(&fast), 4);
        assert_eq!(
            checked.needed(&HealthPolicy { interval: Duration::from_millis(10), ..fast }),
            4
        );
    }

    /// What is on its way back is checked more often, unless it flaps.
    #[test]
    fn what_recovers() {
        let policy = policy(3, 1);
        let mut checked = Checked::default();
        let mut after = |passed, second| {
            checked.observe(passed, Duration::from_secs(second), &policy);
            checked.recovers(&policy)
        };
        let found = [true, false, true, true, true].into_iter().zip(1..);
        let found: Vec<bool> = found.map(|(passed, second)| after(passed, second)).collect();
        assert_eq!(found, [false, false, true, true, false]);
        assert!(!after(false, 6) && !after(true, 7), "it flaps");
    }

    /// One that was well for long has not flapped.
    #[test]
    fn calm_forgives() {
        let well = "+".repeat(58);
        let short = format!("-+{well}-+");
        let long = format!("-+{well}+-+");
        assert!(run(1, 1, &short).ends_with("UU"), "{}", run(1, 1, &short));
        assert!(run(1, 1, &long).ends_with("UH"), "{}", run(1, 1, &long));
    }
}
