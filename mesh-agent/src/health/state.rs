//! What consecutive results make of an endpoint: a pure state machine.
//!
//! | state | passes | failures |
//! | --- | --- | --- |
//! | unknown | the first one: healthy | `fall` in a row: unhealthy |
//! | healthy | – | `fall` in a row: unhealthy |
//! | unhealthy | `rise` in a row: healthy | – |
//!
//! Results in a row are counted, not results in all: one of the other kind starts the count anew.

use mesh_common::State;

use crate::model::HealthPolicy;

/// An endpoint under checks.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Checked {
    state: State,
    /// Consecutive results that speak against the state.
    against: u32,
}

impl Checked {
    /// Takes a result. Returns the new state when it changes.
    pub fn observe(&mut self, passed: bool, policy: &HealthPolicy) -> Option<State> {
        let (other, needed) = match (self.state, passed) {
            (State::Unhealthy, true) => (State::Healthy, policy.rise),
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
        *self = Self { state: other, against: 0 };
        Some(other)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::HealthCheck;

    /// Runs results (`+` passed, `-` failed) and writes the state after each.
    fn run(rise: u32, fall: u32, results: &str) -> String {
        let policy = HealthPolicy {
            check: HealthCheck::Tcp,
            interval: HealthPolicy::INTERVAL,
            timeout: HealthPolicy::TIMEOUT,
            rise,
            fall,
        };
        let mut checked = Checked::default();
        results
            .chars()
            .map(|result| {
                let before = checked.state;
                let change = checked.observe(result == '+', &policy);
                assert_eq!(change.is_some(), before != checked.state);
                match checked.state {
                    State::Healthy => 'H',
                    State::Unhealthy => 'U',
                    _ => '?',
                }
            })
            .collect()
    }

    #[test]
    fn rise_and_fall_are_consecutive() {
        assert_eq!(run(2, 3, "+"), "H");
        assert_eq!(run(2, 3, "--+--+---"), "??HHHHHHU");
        assert_eq!(run(2, 3, "---"), "??U");
        assert_eq!(run(2, 3, "---+-+-++"), "??UUUUUUH");
        assert_eq!(run(1, 1, "+-+-"), "HUHU");
    }
}
