//! What was measured, for people and for machines.

use anyhow::{Context, Result, ensure};
use mesh_tests::sys::bpf::Attached;
use serde::Serialize;

/// The variant without programs.
pub const DIRECT: &str = "direct";
/// The variant with one service.
pub const ONE: &str = "1-service";
/// The variant with 10,000 services, always connecting to the same.
pub const MANY: &str = "10k-services";
/// The variant with 10,000 services, connecting to any of them.
pub const MANY_RANDOM: &str = "10k-services-random";

/// What was measured of a variant. Times in nanoseconds.
#[derive(Debug)]
pub struct Variant {
    name: &'static str,
    times: Vec<u32>,
    /// Of each round.
    p50s: Vec<u32>,
    p99s: Vec<u32>,
}

/// A kernel program's cost.
#[derive(Debug, Serialize)]
pub struct Program {
    /// On whose cgroup it is.
    pub variant: &'static str,
    /// Its name.
    pub name: String,
    /// Nanoseconds, the kernel's measuring included.
    ns_per_run: f64,
    /// How often it ran.
    pub runs: u64,
}

/// What the kernel programs cost.
#[derive(Debug, Serialize)]
pub struct Costs {
    /// Nanoseconds of a run that returns at its first look: almost only the kernel's measuring,
    /// which every run of `programs` includes too.
    pub empty_run_ns: f64,
    /// Each program of each variant, for sockets that are balanced.
    pub programs: Vec<Program>,
}

/// All of it. The order of the fields is that of the JSON: `p50_ratio` is first.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Connect through a service against direct: the median over the rounds of the ratio of both
    /// medians of one round, so that a disturbance counts in one round only.
    p50_ratio: f64,
    p50_ratio_10k: f64,
    p50_ratio_10k_random: f64,
    p99_ratio: f64,
    p99_ratio_10k: f64,
    p99_ratio_10k_random: f64,
    rounds: usize,
    variants: Vec<Summary>,
    #[serde(flatten)]
    costs: Costs,
}

#[derive(Debug, Serialize)]
struct Summary {
    name: &'static str,
    connects: usize,
    p50_ns: u32,
    p99_ns: u32,
    p50_ratio: f64,
    p99_ratio: f64,
}

// === impl Variant ===

impl Variant {
    /// Nothing measured yet.
    pub fn new(name: &'static str) -> Self {
        Self { name, times: Vec::new(), p50s: Vec::new(), p99s: Vec::new() }
    }

    /// Adds the times of a round, which must not be empty.
    pub fn add_round(&mut self, mut times: Vec<u32>) {
        times.sort_unstable();
        self.p50s.push(percentile(&times, 50));
        self.p99s.push(percentile(&times, 99));
        self.times.append(&mut times);
    }

    fn summary(&self, direct: &Self) -> Summary {
        let mut times = self.times.clone();
        times.sort_unstable();
        Summary {
            name: self.name,
            connects: times.len(),
            p50_ns: percentile(&times, 50),
            p99_ns: percentile(&times, 99),
            p50_ratio: median_ratio(&self.p50s, &direct.p50s),
            p99_ratio: median_ratio(&self.p99s, &direct.p99s),
        }
    }
}

// === impl Program ===

impl Program {
    /// What the kernel says about a program of a variant, for the time between two looks.
    pub fn between(variant: &'static str, before: &Attached, after: &Attached) -> Result<Self> {
        ensure!(
            before.id == after.id,
            "{} of {variant} was replaced while it was measured",
            before.name
        );
        let runs = after.run_count - before.run_count;
        let time = after.run_time_ns - before.run_time_ns;
        let ns_per_run = time as f64 / runs.max(1) as f64;
        Ok(Self { variant, name: after.name.clone(), ns_per_run, runs })
    }
}

/// Nanoseconds of a run of any of these programs, the ones that did not run left out.
pub fn mean(programs: &[Program]) -> Result<f64> {
    let runs: u64 = programs.iter().map(|program| program.runs).sum();
    ensure!(runs > 0, "none of the programs ran while they were measured");
    let time: f64 = programs.iter().map(|program| program.ns_per_run * program.runs as f64).sum();
    Ok(time / runs as f64)
}

// === impl Report ===

impl Report {
    /// Sums up.
    pub fn new(variants: &[Variant], costs: Costs) -> Result<Self> {
        let find = |name| variants.iter().find(|v| v.name == name).context("a variant is missing");
        let direct = find(DIRECT)?;
        let [one, many, random] =
            [find(ONE)?, find(MANY)?, find(MANY_RANDOM)?].map(|variant| variant.summary(direct));
        Ok(Self {
            p50_ratio: one.p50_ratio,
            p50_ratio_10k: many.p50_ratio,
            p50_ratio_10k_random: random.p50_ratio,
            p99_ratio: one.p99_ratio,
            p99_ratio_10k: many.p99_ratio,
            p99_ratio_10k_random: random.p99_ratio,
            rounds: direct.p50s.len(),
            variants: vec![direct.summary(direct), one, many, random],
            costs,
        })
    }

    /// For machines.
    pub fn json(&self) -> Result<String> {
        Ok(serde_json::to_string_pretty(self)?)
    }

    /// For people.
    pub fn print(&self) {
        println!("connect(2) over loopback, {} rounds, order shuffled in each", self.rounds);
        println!();
        println!(
            "{:<22}{:>10}{:>10}{:>10}{:>12}{:>12}",
            "VARIANT", "CONNECTS", "P50 µs", "P99 µs", "P50 RATIO", "P99 RATIO"
        );
        for variant in &self.variants {
            println!(
                "{:<22}{:>10}{:>10.2}{:>10.2}{:>12.3}{:>12.3}",
                variant.name,
                variant.connects,
                f64::from(variant.p50_ns) / 1e3,
                f64::from(variant.p99_ns) / 1e3,
                variant.p50_ratio,
                variant.p99_ratio,
            );
        }
        println!();
        println!("{:<22}{:<22}{:>10}{:>12}", "PROGRAM", "ON", "RUNS", "NS PER RUN");
        for program in &self.costs.programs {
            println!(
                "{:<22}{:<22}{:>10}{:>12.0}",
                program.name, program.variant, program.runs, program.ns_per_run
            );
        }
        println!();
        println!(
            "Ratios are medians over the rounds of the ratio to direct in the same round. Times of\n\
             programs are the kernel's (BPF_ENABLE_STATS), for balanced sockets, and include its\n\
             measuring: {:.0} ns, as a run takes that returns at once (connect of a UDP socket).",
            self.costs.empty_run_ns
        );
    }
}

/// Of sorted times, by the nearest rank.
fn percentile(sorted: &[u32], percent: usize) -> u32 {
    let rank = (sorted.len() * percent).div_ceil(100);
    sorted.get(rank.saturating_sub(1)).copied().unwrap_or_default()
}

fn median_ratio(ours: &[u32], theirs: &[u32]) -> f64 {
    let mut ratios: Vec<_> =
        ours.iter().zip(theirs).map(|(a, b)| f64::from(*a) / f64::from((*b).max(1))).collect();
    ratios.sort_by(f64::total_cmp);
    ratios.get(ratios.len() / 2).copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_by_nearest_rank() {
        let times: Vec<_> = (1..=200).collect();
        assert_eq!((percentile(&times, 50), percentile(&times, 99)), (100, 198));
        assert_eq!(percentile(&[7], 99), 7);
    }

    #[test]
    fn a_disturbed_round_does_not_count() {
        assert!((median_ratio(&[11, 22, 5000], &[10, 20, 30]) - 1.1).abs() < 1e-9);
    }
}
