//! Which services this node uses, as the kernel's counters say: the endpoints of others are checked now and
//! then only ([`Pace::WhenUsed`]).

use std::collections::HashMap;
use std::time::Duration;

use tokio::time::{Instant, Interval, MissedTickBehavior};

use super::Engine;
use super::wanted::Health;
use crate::dataplane::maps::Maps as _;
use crate::model::{Pace, ServiceName};

/// How often each service is looked at. Passive ejection is what a client has until then.
const LOOK: Duration = Duration::from_secs(1);

/// In so many parts, so that nothing else waits for all of them.
const PARTS: u32 = 10;

/// A service is in use for so long after its last connect, and while a connection is open.
const IDLE: Duration = Duration::from_secs(60);

/// What is known of the use of services.
#[derive(Debug)]
pub(super) struct Usage {
    tick: Interval,
    /// Those whose turn comes in this round, and how many of them at a time.
    round: Vec<ServiceName>,
    part: usize,
    uses: HashMap<ServiceName, Use>,
}

/// The use of a service.
#[derive(Clone, Copy, Debug)]
struct Use {
    /// Connects so far, refused ones included.
    connects: u64,
    /// When the last one was seen.
    last: Option<Instant>,
    /// What the checks were told.
    is_used: bool,
}

// === impl Use ===

impl Use {
    /// Connects of before somebody looked were any time ago.
    const fn new(connects: u64) -> Self {
        Self { connects, last: None, is_used: false }
    }

    /// Looks at the counters. Whether it is used has changed.
    fn look(&mut self, connects: u64, is_open: bool, now: Instant) -> bool {
        if std::mem::replace(&mut self.connects, connects) != connects || is_open {
            self.last = Some(now);
        }
        let is_used = self.last.is_some_and(|last| now - last < IDLE);
        std::mem::replace(&mut self.is_used, is_used) != is_used
    }
}

// === impl Usage ===

impl Usage {
    pub(super) fn new() -> Self {
        let mut tick = tokio::time::interval(LOOK / PARTS);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Self { tick, round: Vec::new(), part: 0, uses: HashMap::new() }
    }

    /// Waits until it is time to look again.
    pub(super) async fn due(&mut self) {
        self.tick.tick().await;
    }
}

impl Engine {
    /// Looks at the next part of the services.
    pub(super) fn look_at_usage(&mut self) {
        if self.usage.round.is_empty() {
            self.begin_round();
        }
        for _ in 0..self.usage.part {
            let Some(name) = self.usage.round.pop() else { return };
            self.look_at(name);
        }
    }

    /// All whose checks depend on it.
    fn begin_round(&mut self) {
        let depends = |health: &Health| {
            health.plan.as_ref().is_some_and(|plan| plan.policy.pace != Pace::Always)
        };
        let concerned = self.health.iter().filter(|(_, health)| depends(health));
        let round: Vec<ServiceName> = concerned.map(|(name, _)| name.clone()).collect();
        self.usage.part = round.len().div_ceil(PARTS as usize);
        self.usage.uses.retain(|name, _| self.health.get(name).is_some_and(depends));
        self.usage.round = round;
    }

    fn look_at(&mut self, name: ServiceName) {
        let counted = |name: &ServiceName| {
            let mut counted = (self.reconciler.refusals(name), false);
            for (_, id) in self.reconciler.backends(name) {
                let counts = self.reconciler.maps().counts(id);
                counted.0 = counted.0.wrapping_add(counts.opened);
                counted.1 |= counts.active > 0;
            }
            counted
        };
        // Those that fall back to it look at its endpoints.
        let dependents = self.spread.dependents(&name);
        let (connects, is_open) = dependents
            .chain([&name])
            .map(counted)
            .fold((0u64, false), |sum, one| (sum.0.wrapping_add(one.0), sum.1 | one.1));
        let now = Instant::now();
        let known = self.usage.uses.entry(name.clone()).or_insert_with(|| Use::new(connects));
        if known.look(connects, is_open, now) {
            self.monitor.set_used(name, known.is_used);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn used_while_it_is_and_for_a_while() {
        let begin = Instant::now();
        let at = |seconds| begin + Duration::from_secs(seconds);
        let mut known = Use::new(7);
        // Nobody has connected since it was looked at first.
        assert!(!known.look(7, false, at(1)) && !known.is_used);
        assert!(known.look(8, false, at(2)) && known.is_used);
        assert!(!known.look(8, false, at(61)) && known.is_used);
        assert!(known.look(8, false, at(62)) && !known.is_used);
        // An open connection is a use, and a counter that went back, since a backend has gone, may be.
        assert!(known.look(8, true, at(70)));
        assert!(!known.look(8, true, at(1_000)) && known.is_used);
        assert!(known.look(8, false, at(2_000)) && !known.is_used);
        assert!(known.look(3, false, at(2_001)) && known.is_used);
    }
}
