//! What was measured, for people and for machines.

use serde::Serialize;

use super::plan::{Choice, Kind, Peer, Size, Subject, Table, Variant};
use super::programs::Costs;
use crate::machine::Machine;
use crate::timeline::{Percentile, Ratio, Timeline};

/// All of it. The order of the fields is that of the JSON: `p50_ratio` is first.
///
/// Ratios are those of [`Timeline::ratio`]; where a name says nothing else, of connect(2), one
/// thread and a fresh table of records. What was not measured is null.
#[derive(Debug, Serialize)]
pub struct Report {
    p50_ratio: Option<f64>,
    p50_ratio_round_robin: Option<f64>,
    p50_ratio_least_connections: Option<f64>,
    p50_ratio_latency: Option<f64>,
    p50_ratio_consistent_hash: Option<f64>,
    p50_ratio_affinity: Option<f64>,
    p50_ratio_10k: Option<f64>,
    p50_ratio_10k_random: Option<f64>,
    p50_ratio_60k: Option<f64>,
    p50_ratio_60k_random: Option<f64>,
    p50_ratio_nftables: Option<f64>,
    p50_ratio_nftables_10k_random: Option<f64>,
    p50_ratio_nftables_60k_random: Option<f64>,
    /// What the data plane adds to a connect, for each nanosecond that nftables adds.
    overhead_of_nftables: Option<f64>,
    overhead_of_nftables_10k_random: Option<f64>,
    overhead_of_nftables_60k_random: Option<f64>,
    p50_ratio_reach: Option<f64>,
    p50_ratio_reach_nftables: Option<f64>,
    p50_ratio_reach_haproxy: Option<f64>,
    p50_ratio_reach_envoy: Option<f64>,
    p50_ratio_udp_connect: Option<f64>,
    p50_ratio_udp_first_sendto: Option<f64>,
    p50_ratio_udp_sendto: Option<f64>,
    p99_ratio: Option<f64>,
    p99_ratio_10k: Option<f64>,
    p99_ratio_10k_random: Option<f64>,
    p99_ratio_60k_random: Option<f64>,
    p50_ratio_2_threads: Option<f64>,
    p50_ratio_10k_random_2_threads: Option<f64>,
    p50_ratio_60k_random_2_threads: Option<f64>,
    p50_ratio_full_table: Option<f64>,
    p50_ratio_10k_random_full_table: Option<f64>,
    p50_ratio_beside: Option<f64>,
    p50_ratio_beside_nftables: Option<f64>,
    /// Direct against direct: how far from 1 the machine alone moves a ratio.
    p50_ratio_control: Option<f64>,
    #[serde(flatten)]
    conditions: Conditions,
    variants: Vec<Summary>,
    #[serde(flatten)]
    costs: Costs,
}

/// How it was measured.
#[derive(Debug, Serialize)]
pub struct Conditions {
    /// Where.
    pub machine: Machine,
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
    kind: &'static str,
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
    pub fn new(
        timeline: &Timeline<Subject>,
        subjects: &[Subject],
        conditions: Conditions,
        costs: Costs,
    ) -> Self {
        let ratio = |percentile, subject: Subject| {
            let ratio = || timeline.ratio(subject, percentile).median;
            subjects.contains(&subject).then(ratio)
        };
        let p50 = |kind, variant, threads, table| {
            ratio(Percentile::P50, Subject { kind, variant, table, threads })
        };
        let alone = |kind, variant| p50(kind, variant, 1, Table::Fresh);
        let connect = |variant| alone(Kind::Connect, variant);
        let two = |variant| p50(Kind::Connect, variant, 2, Table::Fresh);
        let full = |variant| p50(Kind::Connect, variant, 1, Table::Full);
        let p99 = |variant| {
            let (kind, table) = (Kind::Connect, Table::Fresh);
            ratio(Percentile::P99, Subject { kind, variant, table, threads: 1 })
        };
        let peer = |peer| connect(Variant::Peer(peer));
        let share = |ours, theirs| Some((connect(ours)? - 1.0) / (peer(theirs)? - 1.0));
        let (ten, sixty) = (Variant::Random(Size::Ten), Variant::Random(Size::Sixty));
        Self {
            p50_ratio: connect(Variant::One),
            p50_ratio_round_robin: connect(Variant::By(Choice::RoundRobin)),
            p50_ratio_least_connections: connect(Variant::By(Choice::LeastConnections)),
            p50_ratio_latency: connect(Variant::By(Choice::Latency)),
            p50_ratio_consistent_hash: connect(Variant::By(Choice::ConsistentHash)),
            p50_ratio_affinity: connect(Variant::By(Choice::Affinity)),
            p50_ratio_10k: connect(Variant::Many(Size::Ten)),
            p50_ratio_10k_random: connect(ten),
            p50_ratio_60k: connect(Variant::Many(Size::Sixty)),
            p50_ratio_60k_random: connect(sixty),
            p50_ratio_nftables: peer(Peer::NftablesOne),
            p50_ratio_nftables_10k_random: peer(Peer::Nftables(Size::Ten)),
            p50_ratio_nftables_60k_random: peer(Peer::Nftables(Size::Sixty)),
            overhead_of_nftables: share(Variant::One, Peer::NftablesOne),
            overhead_of_nftables_10k_random: share(ten, Peer::Nftables(Size::Ten)),
            overhead_of_nftables_60k_random: share(sixty, Peer::Nftables(Size::Sixty)),
            p50_ratio_reach: alone(Kind::Reach, Variant::One),
            p50_ratio_reach_nftables: alone(Kind::Reach, Variant::Peer(Peer::NftablesOne)),
            p50_ratio_reach_haproxy: alone(Kind::Reach, Variant::Peer(Peer::Haproxy)),
            p50_ratio_reach_envoy: alone(Kind::Reach, Variant::Peer(Peer::Envoy)),
            p50_ratio_udp_connect: alone(Kind::DatagramConnect, Variant::One),
            p50_ratio_udp_first_sendto: alone(Kind::DatagramFirst, Variant::One),
            p50_ratio_udp_sendto: alone(Kind::DatagramNext, Variant::One),
            p99_ratio: p99(Variant::One),
            p99_ratio_10k: p99(Variant::Many(Size::Ten)),
            p99_ratio_10k_random: p99(ten),
            p99_ratio_60k_random: p99(sixty),
            p50_ratio_2_threads: two(Variant::One),
            p50_ratio_10k_random_2_threads: two(ten),
            p50_ratio_60k_random_2_threads: two(sixty),
            p50_ratio_full_table: full(Variant::One),
            p50_ratio_10k_random_full_table: full(ten),
            p50_ratio_beside: connect(Variant::Beside),
            p50_ratio_beside_nftables: connect(Variant::Untranslated),
            p50_ratio_control: connect(Variant::Direct),
            conditions,
            variants: subjects.iter().map(|s| Summary::new(timeline, *s)).collect(),
            costs,
        }
    }

    /// For people.
    pub fn print(&self) {
        self.print_connects();
        println!();
        self.print_programs();
    }

    fn print_connects(&self) {
        println!("connect(2) over loopback, {} rounds", self.conditions.rounds);
        println!("{}", self.conditions.machine);
        println!();
        println!(
            "{:<18}{:<24}{:>8}{:>7}{:>10}{:>9}{:>9}{:>11}{:>9}{:>11}",
            "TIMED",
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
                "{:<18}{:<24}{:>8}{:>7}{:>10}{:>9.2}{:>9.2}{:>11.3}{:>9.3}{:>11.3}",
                variant.kind,
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
             connects found theirs taken. With \"direct\" the same sockets are open.\n\
             A connect to a proxy ends at the proxy: connect-to-accept is until a backend has the\n\
             connection. nftables, haproxy and envoy have one service where nothing else is said.",
            self.conditions.full_table_collisions * 100.0
        );
        self.print_shares();
        if self.conditions.disturbed_blocks > 0 {
            println!(
                "\nDisturbed: during {} of the direct blocks another agent ran on this machine.",
                self.conditions.disturbed_blocks
            );
        }
    }

    fn print_shares(&self) {
        let shares = [
            ("1 service", self.overhead_of_nftables),
            ("10,000, spread", self.overhead_of_nftables_10k_random),
            ("60,000, spread", self.overhead_of_nftables_60k_random),
        ];
        println!();
        for (services, share) in shares {
            if let Some(share) = share {
                println!(
                    "What is added to a connect, against what nftables adds, {services}: {share:.2}"
                );
            }
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
    fn new(timeline: &Timeline<Subject>, subject: Subject) -> Self {
        let times = timeline.times(subject);
        let Ratio { median, spread } = timeline.ratio(subject, Percentile::P50);
        Self {
            name: subject.variant.name(),
            kind: subject.kind.name(),
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
