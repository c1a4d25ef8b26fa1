//! What the kernel's counters say, looked at now and then: which services this node uses, since the endpoints
//! of others are checked rarely ([`Pace::WhenUsed`]), and which backends are out that nobody tries.

use std::collections::HashMap;
use std::time::Duration;

use mesh_common::ejection::ticks;
use tokio::time::{Instant, Interval, MissedTickBehavior};

use super::wanted::Health;
use super::{Engine, revive};
use crate::canary;
use crate::compile::BackendKey;
use crate::dataplane::clock;
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

/// What the counters of a service say.
#[derive(Clone, Copy, Debug)]
struct Counted {
    connects: u64,
    is_open: bool,
}

// === impl Counted ===

impl Counted {
    fn and(self, other: Self) -> Self {
        let connects = self.connects.wrapping_add(other.connects);
        Self { connects, is_open: self.is_open || other.is_open }
    }
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

    /// All that the kernel holds.
    fn begin_round(&mut self) {
        let held = self.reconciler.services().filter(|name| !canary::is(name));
        let round: Vec<ServiceName> = held.cloned().collect();
        self.usage.part = round.len().div_ceil(PARTS as usize);
        self.usage.round = round;
        let health = &self.health;
        let ended = |name: &ServiceName| !health.get(name).is_some_and(depends);
        for (name, known) in self.usage.uses.extract_if(|name, _| ended(name)) {
            if known.is_used {
                self.monitor.set_used(name, false);
            }
        }
    }

    fn look_at(&mut self, name: ServiceName) {
        let (own, idle) = self.counted(&name);
        for (key, id) in idle {
            self.try_in_place(&name, key, id);
        }
        if !self.health.get(&name).is_some_and(depends) {
            return;
        }
        // Those that fall back to it look at its endpoints.
        let others = self.spread.dependents(&name).map(|other| self.counted(other).0);
        let Counted { connects, is_open } = others.fold(own, Counted::and);
        let known = self.usage.uses.entry(name.clone()).or_insert_with(|| Use::new(connects));
        if known.look(connects, is_open, Instant::now()) {
            self.monitor.set_used(name, known.is_used);
        }
    }

    /// The counters of a service, and which of its backends are out and wait for a try.
    fn counted(&self, name: &ServiceName) -> (Counted, Vec<(BackendKey, u32)>) {
        let now = ticks(clock::monotonic());
        let mut counted = Counted { connects: self.reconciler.refusals(name), is_open: false };
        let mut idle = Vec::new();
        for (key, id) in self.reconciler.backends(name) {
            let counts = self.reconciler.maps().counts(id);
            let one = Counted { connects: counts.opened, is_open: counts.active > 0 };
            counted = counted.and(one);
            if revive::is_idle(counts.ejection, now) {
                idle.push((key, id));
            }
        }
        (counted, idle)
    }
}

/// Whether it matters to the checks whether a service is used.
fn depends(health: &Health) -> bool {
    health.plan.as_ref().is_some_and(|plan| plan.policy.pace != Pace::Always)
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
