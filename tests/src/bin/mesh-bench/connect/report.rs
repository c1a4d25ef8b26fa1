//! What was measured, for people and for machines.

use anyhow::Result;
use serde::Serialize;

use crate::plan::{Choice, Subject, Table, Variant, subjects};
use crate::programs::Costs;
use crate::timeline::{Percentile, Ratio, Timeline};

/// All of it. The order of the fields is that of the JSON: `p50_ratio` is first.
///
/// Ratios are those of [`Timeline::ratio`]; where a name says nothing else, of one thread and a
/// fresh table of records.
#[derive(Debug, Serialize)]
pub struct Report {
    p50_ratio: f64,
    p50_ratio_round_robin: f64,
    p50_ratio_least_connections: f64,
    p50_ratio_latency: f64,
    p50_ratio_consistent_hash: f64,
    p50_ratio_affinity: f64,
    p50_ratio_10k: f64,
    p50_ratio_10k_random: f64,
    p99_ratio: f64,
    p99_ratio_10k: f64,
    p99_ratio_10k_random: f64,
    p50_ratio_2_threads: f64,
    p50_ratio_10k_random_2_threads: f64,
    p50_ratio_full_table: f64,
    p50_ratio_10k_random_full_table: f64,
    p50_ratio_beside: f64,
    /// Direct against direct: how far from 1 the machine alone moves a ratio.
    p50_ratio_control: f64,
    #[serde(flatten)]
    conditions: Conditions,
    variants: Vec<Summary>,
    #[serde(flatten)]
    costs: Costs,
}

/// How it was measured.
#[derive(Debug, Serialize)]
pub struct Conditions {
    /// Rounds of each variant with a fresh table.
    pub rounds: usize,
    /// Direct blocks during which another agent had programs on the machine.
    pub disturbed_blocks: usize,
    /// With the full table, which share of the connects found their place taken.
    pub full_table_collisions: f64,
}

#[derive(Debug, Serialize)]
struct Summary {
    name: &'static str,
    connects: usize,
    p50_ns: u32,
    p99_ns: u32,
    p50_ratio: f64,
    p99_ratio: f64,
    p50_ratio_spread: f64,
    threads: usize,
    table: &'static str,
}

// === impl Report ===

impl Report {
    /// Sums up.
    pub fn new(timeline: &Timeline, conditions: Conditions, costs: Costs) -> Self {
        let ratio = |percentile, variant, threads, table| {
            timeline.ratio(Subject { variant, table, threads }, percentile).median
        };
        let p50 = |variant, threads, table| ratio(Percentile::P50, variant, threads, table);
        let by = |choice| p50(Variant::By(choice), 1, Table::Fresh);
        let p99 = |variant| ratio(Percentile::P99, variant, 1, Table::Fresh);
        Self {
            p50_ratio: p50(Variant::One, 1, Table::Fresh),
            p50_ratio_round_robin: by(Choice::RoundRobin),
            p50_ratio_least_connections: by(Choice::LeastConnections),
            p50_ratio_latency: by(Choice::Latency),
            p50_ratio_consistent_hash: by(Choice::ConsistentHash),
            p50_ratio_affinity: by(Choice::Affinity),
            p50_ratio_10k: p50(Variant::Many, 1, Table::Fresh),
            p50_ratio_10k_random: p50(Variant::Random, 1, Table::Fresh),
            p99_ratio: p99(Variant::One),
            p99_ratio_10k: p99(Variant::Many),
            p99_ratio_10k_random: p99(Variant::Random),
            p50_ratio_2_threads: p50(Variant::One, 2, Table::Fresh),
            p50_ratio_10k_random_2_threads: p50(Variant::Random, 2, Table::Fresh),
            p50_ratio_full_table: p50(Variant::One, 1, Table::Full),
            p50_ratio_10k_random_full_table: p50(Variant::Random, 1, Table::Full),
            p50_ratio_beside: p50(Variant::Beside, 1, Table::Fresh),
            p50_ratio_control: p50(Variant::Direct, 1, Table::Fresh),
            conditions,
            variants: subjects().into_iter().map(|s| Summary::new(timeline, s)).collect(),
            costs,
        }
    }

    /// For machines.
    ///
    /// # Errors
    ///
    /// Those of the format, which has none for these types.
    pub fn json(&self) -> Result<String> {
        Ok(serde_json::to_string_pretty(self)?)
    }

    /// For people.
    pub fn print(&self) {
        self.print_connects();
        println!();
        self.print_programs();
    }

    fn print_connects(&self) {
        println!("connect(2) over loopback, {} rounds", self.conditions.rounds);
        println!();
        println!(
            "{:<21}{:>8}{:>7}{:>10}{:>9}{:>9}{:>11}{:>9}{:>11}",
            "VARIANT",
            "THREADS",
            "TABLE",
            "CONNECTS",
            "P50 µs",
            "P99 µs",
            "P50 RATIO",
            "±",
            "P99 RATIO"
        );
        for variant in &self.variants {
            println!(
                "{:<21}{:>8}{:>7}{:>10}{:>9.2}{:>9.2}{:>11.3}{:>9.3}{:>11.3}",
                variant.name,
                variant.threads,
                variant.table,
                variant.connects,
                f64::from(variant.p50_ns) / 1e3,
                f64::from(variant.p99_ns) / 1e3,
                variant.p50_ratio,
                variant.p50_ratio_spread,
                variant.p99_ratio,
            );
        }
        println!();
        println!(
            "Ratios are medians over blocks of rounds, each block against the direct connects just\n\
             before and after it, when no agent runs on the machine; ± is half the distance of the\n\
             quartiles. Direct is compared with itself in the same way: that is the machine's noise.\n\
             Full: as many connections are open as the table of records has places; {:.0} % of the\n\
             connects found theirs taken. With \"direct\" the same sockets are open.",
            self.conditions.full_table_collisions * 100.0
        );
        if self.conditions.disturbed_blocks > 0 {
            println!(
                "\nDisturbed: during {} of the direct blocks another agent ran on this machine.",
                self.conditions.disturbed_blocks
            );
        }
    }

    fn print_programs(&self) {
        println!(
            "{:<20}{:<17}{:<30}{:>9}{:>9}{:>11}",
            "CONNECTION", "PROGRAM", "HOOK", "RUNS", "NS/RUN", "NET NS/RUN"
        );
        for sum in &self.costs.connections {
            let about = [sum.variant, &format!("{}, {}", sum.family, sum.table)];
            let mut about = about.into_iter();
            let mut line = |name: &str, hook: &str, runs, ns, net| {
                let about = about.next().unwrap_or_default();
                println!("{about:<20}{name:<17}{hook:<30}{runs:>9.2}{ns:>9.0}{net:>11.0}");
            };
            for program in &self.costs.programs {
                let of = (program.variant, program.family, program.table);
                if of == (sum.variant, sum.family, sum.table) {
                    let (runs, net) = (program.runs_per_connection, program.ns_per_run_net);
                    line(&program.name, &program.hook, runs, program.ns_per_run, net);
                }
            }
            line("all, open to close", "", sum.runs, sum.ns, sum.ns_net);
        }
        println!();
        println!(
            "Runs are for each connection: socket, connect, getpeername, close by both ends; tracers\n\
             and mesh_release run at both ends. Times are the kernel's (BPF_ENABLE_STATS) and include its measuring;\n\
             net of that is less {:.0} ns a run, as a run of mesh_release takes for a TCP\n\
             socket, and {:.0} ns for tracers (the end of a TCP socket without a record). The\n\
             sums are nanoseconds for a whole connection. What it takes to call a program is in neither:\n\
             that is in the ratios, and for the tracers alone in that of direct-beside-agent.",
            self.costs.empty_run_ns, self.costs.empty_tracer_run_ns
        );
    }
}

// === impl Summary ===

impl Summary {
    fn new(timeline: &Timeline, subject: Subject) -> Self {
        let times = timeline.times(subject);
        let Ratio { median, spread } = timeline.ratio(subject, Percentile::P50);
        Self {
            name: subject.variant.name(),
            connects: times.len(),
            p50_ns: Percentile::P50.of(&times),
            p99_ns: Percentile::P99.of(&times),
            p50_ratio: median,
            p99_ratio: timeline.ratio(subject, Percentile::P99).median,
            p50_ratio_spread: spread,
            threads: subject.threads,
            table: subject.table.name(),
        }
    }
}
