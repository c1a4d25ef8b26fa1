//! What was measured, for people and for machines.

use serde::Serialize;

use crate::machine::Machine;

/// An agent of many services is ready again within so many milliseconds.
const AIM_READY: f64 = 1_000.0;
/// No change waits longer, whoever follows whom.
const AIM_WAIT: f64 = 2_000.0;

/// All of it.
#[derive(Debug, Serialize)]
pub struct Report {
    machine: Machine,
    /// Until the first agent of many services was ready, which found nothing, in milliseconds.
    first_ready_ms: f64,
    /// Until those were that followed one that was killed.
    ready_ms: Spread,
    ready_aim_ms: f64,
    restarts: Vec<Restart>,
    wait_aim_ms: f64,
    successions: Vec<Succession>,
}

/// An agent after one that was killed.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Restart {
    /// From its start until `/readyz` said so, in milliseconds.
    pub ready_ms: f64,
    /// How many changes of the maps it had made then.
    pub map_writes: u64,
}

/// Who follows an agent.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Next {
    /// One whose programs are those that are attached.
    Same,
    /// One that replaces them.
    Other,
}

/// Agents of one kind that follow others, beside so many services.
#[derive(Debug, Serialize)]
pub struct Succession {
    services: u32,
    next: Next,
    /// The longest that a change waited before the first agent ended, in milliseconds.
    pub undisturbed_ms: f64,
    waited_ms: Spread,
    ready_ms: Spread,
    /// Each.
    pub waits: Vec<Wait>,
}

/// What waited for one of them, in milliseconds.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Wait {
    /// The longest time from before a change was written until a connect had ended that saw it.
    pub waited_ms: f64,
    /// From before the former one was told to end until it was ready.
    pub ready_ms: f64,
}

/// Least, median and most.
#[derive(Clone, Copy, PartialEq, Debug, Serialize)]
struct Spread {
    least: f64,
    median: f64,
    most: f64,
}

// === impl Report ===

impl Report {
    /// Sums up.
    pub fn new(
        machine: Machine,
        first_ready_ms: f64,
        restarts: Vec<Restart>,
        successions: Vec<Succession>,
    ) -> Self {
        let ready_ms = Spread::of(restarts.iter().map(|restart| restart.ready_ms));
        let (ready_aim_ms, wait_aim_ms) = (AIM_READY, AIM_WAIT);
        Self { machine, first_ready_ms, ready_ms, ready_aim_ms, restarts, wait_aim_ms, successions }
    }

    /// For people.
    pub fn print(&self) {
        println!("An agent of 10,000 services with 10 endpoints each, killed and started again");
        println!("{}", self.machine);
        println!();
        println!(
            "{:<26}{:>8}{:>10}{:>12}{:>10}{:>10}{:>13}",
            "UNTIL READY", "TIMES", "LEAST ms", "MEDIAN ms", "MOST ms", "AIM ms", "MAP WRITES"
        );
        let Spread { least, median, most } = self.ready_ms;
        let writes = self.restarts.iter().map(|restart| restart.map_writes);
        println!(
            "{:<26}{:>8}{least:>10.0}{median:>12.0}{most:>10.0}{:>10.0}{:>13}",
            "after one that was killed",
            self.restarts.len(),
            self.ready_aim_ms,
            writes.max().unwrap_or_default()
        );
        let first = self.first_ready_ms;
        println!(
            "{:<26}{:>8}{first:>10.0}{first:>12.0}{first:>10.0}",
            "the first, from nothing", 1
        );
        println!();
        println!("The longest that a change of endpoints waits while one agent follows another");
        println!();
        println!(
            "{:<26}{:>8}{:>8}{:>12}{:>10}{:>10}{:>12}{:>14}",
            "NEXT AGENT",
            "BESIDE",
            "TIMES",
            "MEDIAN ms",
            "MOST ms",
            "AIM ms",
            "READY ms",
            "OTHERWISE ms"
        );
        for line in &self.successions {
            println!(
                "{:<26}{:>8}{:>8}{:>12.0}{:>10.0}{:>10.0}{:>12.0}{:>14.1}",
                line.next.describe(),
                line.services,
                line.waits.len(),
                line.waited_ms.median,
                line.waited_ms.most,
                self.wait_aim_ms,
                line.ready_ms.median,
                line.undisturbed_ms
            );
        }
        println!();
        println!(
            "Ready: /readyz says 200, asked every 2 ms. Map writes: the most that one of them had made by\n\
             then. While no agent runs, a connect to each of the services is answered.\n\
             A service file of one endpoint is renamed into place about every 10 ms, each time with another\n\
             one, and a process connects every millisecond: who answers says which change is in force. A\n\
             change waits from before its rename until a connect has ended that was given its endpoint or\n\
             that of a later one; for each agent the longest of these counts. The former agent is told to\n\
             end (SIGTERM), and the next one started when it has ended; ready: both, the median. Otherwise:\n\
             the longest of 300 changes before. Beside: services that are loaded and do not change."
        );
    }
}

// === impl Next ===

impl Next {
    /// For people.
    fn describe(self) -> &'static str {
        match self {
            Self::Same => "of the same build",
            Self::Other => "of another build",
        }
    }
}

// === impl Succession ===

impl Succession {
    /// Sums up.
    pub fn new(services: u32, next: Next, undisturbed_ms: f64, waits: Vec<Wait>) -> Self {
        let waited_ms = Spread::of(waits.iter().map(|wait| wait.waited_ms));
        let ready_ms = Spread::of(waits.iter().map(|wait| wait.ready_ms));
        Self { services, next, undisturbed_ms, waited_ms, ready_ms, waits }
    }
}

// === impl Spread ===

impl Spread {
    /// Of no value, all are 0.
    fn of(values: impl Iterator<Item = f64>) -> Self {
        let mut sorted: Vec<_> = values.collect();
        sorted.sort_by(f64::total_cmp);
        let at = |place: usize| sorted.get(place).copied().unwrap_or_default();
        // Of an even number, the mean of the two in the middle.
        let median = f64::midpoint(at(sorted.len().saturating_sub(1) / 2), at(sorted.len() / 2));
        Self { least: at(0), median, most: at(sorted.len().saturating_sub(1)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_of_even_and_odd_numbers() {
        let of = |values: &[f64]| {
            let Spread { least, median, most } = Spread::of(values.iter().copied());
            [least, median, most]
        };
        assert_eq!(of(&[3.0, 1.0, 2.0]), [1.0, 2.0, 3.0]);
        assert_eq!(of(&[4.0, 1.0, 2.0, 3.0]), [1.0, 2.5, 4.0]);
        assert_eq!(of(&[7.0]), [7.0; 3]);
        assert_eq!(of(&[]), [0.0; 3]);
    }
}
