//! What was measured, for people and for machines.

use serde::Serialize;

use super::plan::{Measure, Subject, TRAFFIC, Traffic, WAYS, Way};
use crate::machine::Machine;
use crate::timeline::{Percentile, Ratio, Timeline};

/// All of it.
#[derive(Debug, Serialize)]
pub struct Report {
    machine: Machine,
    runs: u32,
    traffic: Vec<Summary>,
}

/// Traffic by one way. Ratios are those of [`Timeline::ratio`].
#[derive(Debug, Serialize)]
struct Summary {
    traffic: String,
    way: &'static str,
    /// Requests, or MiB, in a second.
    per_second: f64,
    p50_us: f64,
    p99_us: f64,
    /// How long a request, or a MiB, took, by how long all of them took.
    ratio: f64,
    ratio_spread: f64,
    p50_ratio: f64,
    p99_ratio: f64,
}

// === impl Report ===

impl Report {
    /// Sums up.
    pub fn new(machine: Machine, runs: u32, timeline: &Timeline<Subject>) -> Self {
        let ways = || [Way::Direct].into_iter().chain(WAYS);
        let all = TRAFFIC.into_iter().flat_map(|traffic| ways().map(move |way| (traffic, way)));
        let traffic = all.map(|(traffic, way)| Summary::new(timeline, traffic, way)).collect();
        Self { machine, runs, traffic }
    }

    /// For people.
    pub fn print(&self) {
        println!("Traffic over loopback, {} runs", self.runs);
        println!("{}", self.machine);
        println!();
        println!(
            "{:<22}{:<10}{:>12}{:>10}{:>10}{:>8}{:>8}{:>11}{:>11}",
            "TRAFFIC",
            "WAY",
            "PER SECOND",
            "P50 µs",
            "P99 µs",
            "RATIO",
            "±",
            "P50 RATIO",
            "P99 RATIO"
        );
        for line in &self.traffic {
            println!(
                "{:<22}{:<10}{:>12.0}{:>10.1}{:>10.1}{:>8.3}{:>8.3}{:>11.3}{:>11.3}",
                line.traffic,
                line.way,
                line.per_second,
                line.p50_us,
                line.p99_us,
                line.ratio,
                line.ratio_spread,
                line.p50_ratio,
                line.p99_ratio,
            );
        }
        println!();
        println!(
            "Kept: requests of 64 bytes and answers of 1,024, on so many connections, each with one\n\
             request under way. Bulk: one answer of 256 MiB, in MiB a second. Ratio: how long a\n\
             request took (a MiB), by how long all took, against the direct ones just before and\n\
             after it, when no agent runs on the machine; the median over the runs, ± half the\n\
             distance of the quartiles. Direct is compared with itself in the same way: that is the\n\
             machine's noise. Client and backends each stay on a processor of their own; proxies\n\
             use both. All answers say which backend they come from."
        );
    }
}

// === impl Summary ===

impl Summary {
    fn new(timeline: &Timeline<Subject>, traffic: Traffic, way: Way) -> Self {
        let of = |measure| Subject { way, traffic, measure };
        let each = Percentile::P50.of(&timeline.times(of(Measure::All)));
        let times = timeline.times(of(Measure::Request));
        let Ratio { median, spread } = timeline.ratio(of(Measure::All), Percentile::P50);
        let ratio = |percentile| timeline.ratio(of(Measure::Request), percentile).median;
        let micros = |percentile: Percentile| f64::from(percentile.of(&times)) / 1e3;
        Self {
            traffic: traffic.name(),
            way: way.name(),
            per_second: 1e9 / f64::from(each.max(1)),
            p50_us: micros(Percentile::P50),
            p99_us: micros(Percentile::P99),
            ratio: median,
            ratio_spread: spread,
            p50_ratio: ratio(Percentile::P50),
            p99_ratio: ratio(Percentile::P99),
        }
    }
}
