//! What was measured, for people and for machines.

use std::time::Duration;

use serde::Serialize;

use super::Change;
use super::memory::Memory;
use crate::machine::Machine;
use crate::prober::Took;
use crate::timeline::Percentile;

/// All of it.
#[derive(Debug, Serialize)]
pub struct Report {
    machine: Machine,
    changes: Vec<Summary>,
    loads: Vec<Load>,
}

/// Changes of one kind, and how long each took.
pub struct Changes {
    /// Which.
    pub kind: Change,
    /// How many services were loaded beside those that change.
    pub services: u32,
    /// Each.
    pub took: Vec<Took>,
}

#[derive(Debug, Serialize)]
struct Summary {
    change: Change,
    services: u32,
    changes: usize,
    p50_us: f64,
    p99_us: f64,
    most_us: f64,
    /// The call alone: a rename, a request with its answer, a command.
    call_p50_us: f64,
    call_p99_us: f64,
}

/// Many services, loaded from nothing.
#[derive(Debug, Serialize)]
pub struct Load {
    /// The agent before, if it ran already and had none; otherwise its start is part of it.
    pub empty: Option<Empty>,
    /// Until the last service answered, in milliseconds.
    pub answered_ms: f64,
    /// Until the agent said that it has them all, likewise.
    pub said_ms: f64,
    /// The agent's memory after it.
    pub memory: Memory,
}

/// An agent without services.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Empty {
    /// From its start until it was ready, in milliseconds: most of it, the kernel verifies the
    /// programs.
    pub ready_ms: f64,
    /// Its memory then.
    pub memory: Memory,
}

// === impl Report ===

impl Report {
    /// Sums up.
    pub fn new(machine: Machine, mut changes: Vec<Changes>, loads: Vec<Load>) -> Self {
        changes.sort_by_key(|changes| (changes.services, changes.kind as u8));
        Self { machine, changes: changes.iter().map(Summary::new).collect(), loads }
    }

    /// For people.
    pub fn print(&self) {
        println!("Changes, from before the call until a connect that saw them had ended");
        println!("{}", self.machine);
        println!();
        println!(
            "{:<26}{:>8}{:>9}{:>10}{:>10}{:>10}{:>13}{:>13}",
            "CHANGE",
            "BESIDE",
            "CHANGES",
            "P50 µs",
            "P99 µs",
            "MOST µs",
            "CALL P50 µs",
            "CALL P99 µs"
        );
        for line in &self.changes {
            println!(
                "{:<26}{:>8}{:>9}{:>10.0}{:>10.0}{:>10.0}{:>13.0}{:>13.0}",
                line.change.describe(),
                line.services,
                line.changes,
                line.p50_us,
                line.p99_us,
                line.most_us,
                line.call_p50_us,
                line.call_p99_us
            );
        }
        println!();
        println!("10,000 services with 10 endpoints each, from nothing");
        println!();
        println!(
            "{:<26}{:>12}{:>12}{:>15}{:>14}{:>10}",
            "AGENT", "ANSWERED ms", "SAID ms", "ANONYMOUS MiB", "RESIDENT MiB", "MAPS MiB"
        );
        for load in &self.loads {
            let agent = if load.empty.is_some() { "running, empty" } else { "started" };
            let Memory { anonymous, resident, maps } = load.memory;
            let [anonymous, resident, maps] = [anonymous, resident, maps].map(mib);
            println!(
                "{agent:<26}{:>12.0}{:>12.0}{anonymous:>15.1}{resident:>14.1}{maps:>10.1}",
                load.answered_ms, load.said_ms
            );
        }
        for Empty { ready_ms, memory } in self.loads.iter().filter_map(|load| load.empty) {
            let anonymous = mib(memory.anonymous);
            println!(
                "An agent without services: ready after {ready_ms:.0} ms, {anonymous:.1} MiB anonymous."
            );
        }
        println!();
        println!(
            "Beside: services that are loaded and do not change. One process connects without pause\n\
             and accepts itself, and takes a processor. Files are written before, and renamed after\n\
             the clock was started. Call: that alone, a rename, a request with its answer, or a\n\
             command; a rename may wait for the disk. Answered: until the last service answered; that is looked for at\n\
             one of 50 services, and then all are tried. Said: until the agent said so. The start of an\n\
             agent that is started is part of it. Maps are in the kernel; those that the agent has\n\
             mapped are in the resident memory, and not in the anonymous."
        );
    }
}

// === impl Summary ===

impl Summary {
    fn new(changes: &Changes) -> Self {
        let sorted = |of: fn(&Took) -> Duration| {
            let nanos = |took| u32::try_from(of(took).as_nanos()).unwrap_or(u32::MAX);
            let mut all: Vec<_> = changes.took.iter().map(nanos).collect();
            all.sort_unstable();
            all
        };
        let (seen, call) = (sorted(|took| took.seen), sorted(|took| took.call));
        let micros = |nanos: u32| f64::from(nanos) / 1e3;
        Self {
            change: changes.kind,
            services: changes.services,
            changes: changes.took.len(),
            p50_us: micros(Percentile::P50.of(&seen)),
            p99_us: micros(Percentile::P99.of(&seen)),
            most_us: micros(seen.last().copied().unwrap_or_default()),
            call_p50_us: micros(Percentile::P50.of(&call)),
            call_p99_us: micros(Percentile::P99.of(&call)),
        }
    }
}

// === functions ===

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}
