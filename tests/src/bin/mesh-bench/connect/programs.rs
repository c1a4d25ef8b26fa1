//! What each kernel program takes, and how often it runs, over whole connections.
//!
//! Measured apart from the connects, because measuring the programs makes every connect dearer.

use anyhow::{Context, Result, bail, ensure};
use mesh_tests::sys::bpf::{self, StatsGuard};
use serde::Serialize;

use super::plan::{Block, Choice, Services, Size, Table, Variant};
use super::setup::{Setup, span};

/// Connections of each case.
const CONNECTIONS: u32 = 4_000;
/// What the names of the agent's programs begin with.
const PREFIX: &str = "mesh_";
/// Not counted, before each case.
const WARM_UP: u32 = 200;

/// A kernel program's cost. Times in nanoseconds, as the kernel shows them.
#[derive(Debug, Serialize)]
pub struct Program {
    /// What was dialled.
    pub variant: &'static str,
    /// Its name.
    pub name: String,
    /// Mean of its runs.
    pub ns_per_run: f64,
    /// How often it ran.
    pub runs: u64,
    /// How often it ran for each connection. The tracers run for both ends, and for everybody
    /// else's sockets too.
    pub runs_per_connection: f64,
    /// Without what measuring takes.
    pub ns_per_run_net: f64,
    /// Where it is attached.
    pub hook: String,
    /// The address family.
    pub family: &'static str,
    /// The table of records.
    pub table: &'static str,
}

/// What all programs together take of a connection, from open to close. Nanoseconds.
#[derive(Debug, Serialize)]
pub struct Connection {
    /// What was dialled.
    pub variant: &'static str,
    /// The address family.
    pub family: &'static str,
    /// The table of records.
    pub table: &'static str,
    /// How many connections were measured.
    pub connections: u32,
    /// Runs of all programs, for each connection.
    pub runs: f64,
    /// As the kernel shows it: with its measuring.
    pub ns: f64,
    /// Without.
    pub ns_net: f64,
}

/// What the kernel programs cost.
#[derive(Debug, Default, Serialize)]
pub struct Costs {
    /// A run of a program at a cgroup's hook that returns at its first look (the end of a TCP socket): almost only the kernel's
    /// measuring, which every run includes. Nanoseconds.
    pub empty_run_ns: f64,
    /// A run of a tracer for a socket without a record, likewise.
    pub empty_tracer_run_ns: f64,
    /// Each program that ran, for each kind of connection.
    pub programs: Vec<Program>,
    /// The sums.
    pub connections: Vec<Connection>,
}

/// A kind of connection.
struct Case {
    variant: Variant,
    table: Table,
    family: &'static str,
    /// The order for so many of them.
    order: &'static str,
}

const fn case(variant: Variant, table: Table) -> Case {
    Case { variant, table, family: "IPv4", order: "live" }
}

const CASES: [Case; 13] = [
    case(Variant::One, Table::Fresh),
    Case { variant: Variant::One, table: Table::Fresh, family: "IPv6", order: "live6" },
    case(Variant::One, Table::Full),
    case(Variant::By(Choice::RoundRobin), Table::Fresh),
    case(Variant::By(Choice::LeastConnections), Table::Fresh),
    case(Variant::By(Choice::Latency), Table::Fresh),
    case(Variant::By(Choice::ConsistentHash), Table::Fresh),
    case(Variant::By(Choice::Affinity), Table::Fresh),
    case(Variant::Many(Size::Ten), Table::Fresh),
    case(Variant::Random(Size::Ten), Table::Fresh),
    case(Variant::Random(Size::Ten), Table::Full),
    case(Variant::Many(Size::Sixty), Table::Fresh),
    case(Variant::Random(Size::Sixty), Table::Fresh),
];

/// What ran in a time.
struct Ran {
    hook: String,
    name: String,
    time_ns: u64,
    runs: u64,
}

/// Runs the programs: first for sockets in which they have no interest, then for connections of
/// each kind.
///
/// # Errors
///
/// The kernel does not measure, or programs ran for something else too.
pub fn measure(setup: &mut Setup) -> Result<Costs> {
    let mut costs = Costs::default();
    for case in CASES {
        let services = match case.variant {
            Variant::One => Services::One,
            Variant::By(choice) => Services::By(choice),
            Variant::Many(size) | Variant::Random(size) => Services::Many(size),
            other => bail!("no program runs for {}", other.name()),
        };
        setup.enter(Block { services: Some(services), table: case.table, variants: &[] })?;
        if costs.programs.is_empty() {
            costs.empty_run_ns = empty(setup, "idle", "cgroup/sock_release")?;
            costs.empty_tracer_run_ns = empty(setup, "idle", "tp_btf/tcp_destroy_sock")?;
        }
        costs.add(setup, &case)?;
    }
    Ok(costs)
}

/// Whether another agent has programs on this machine. Asked while none of the benchmark's runs.
///
/// # Errors
///
/// Those of bpf(2).
pub fn other_agents() -> Result<bool> {
    let loaded = bpf::loaded().context("cannot list the machine's programs")?;
    Ok(loaded.iter().any(|program| program.name.starts_with(PREFIX)))
}

// === impl Costs ===

impl Costs {
    fn add(&mut self, setup: &mut Setup, case: &Case) -> Result<()> {
        let order = |count| match case.variant {
            _ if case.order == "live6" => format!("live6 {count}"),
            Variant::Random(size) => format!("live {count} {}", span(Services::Many(size))),
            _ => format!("live {count} 1"),
        };
        let (variant, table, family) = (case.variant.name(), case.table.name(), case.family);
        let each = |value: u64| value as f64 / f64::from(CONNECTIONS);
        let mut sum = Connection {
            variant,
            family,
            table,
            connections: CONNECTIONS,
            runs: 0.0,
            ns: 0.0,
            ns_net: 0.0,
        };
        for ran in ran(setup, order)? {
            let is_tracer = ran.hook.starts_with("tp_btf/");
            // The accepted sockets are closed there too.
            let both_ends = ran.hook == "cgroup/sock_release";
            // What ran for anything else would be part of the figure. The tracers do run for other
            // sockets of the machine; how often they ran is in the report.
            ensure!(
                is_tracer || both_ends || ran.runs == 0 || ran.runs == u64::from(CONNECTIONS),
                "{} ran {} times for {CONNECTIONS} connections: is another process in the \
                 benchmark's cgroup?",
                ran.name,
                ran.runs,
            );
            if ran.runs == 0 {
                continue;
            }
            let empty = if is_tracer { self.empty_tracer_run_ns } else { self.empty_run_ns };
            let ns_per_run = ran.time_ns as f64 / ran.runs as f64;
            let runs_per_connection = each(ran.runs);
            sum.runs += runs_per_connection;
            sum.ns += each(ran.time_ns);
            sum.ns_net += runs_per_connection * (ns_per_run - empty);
            self.programs.push(Program {
                variant,
                name: ran.name,
                ns_per_run,
                runs: ran.runs,
                runs_per_connection,
                ns_per_run_net: ns_per_run - empty,
                hook: ran.hook,
                family,
                table,
            });
        }
        ensure!(sum.runs >= 3.0, "only {} runs of programs were seen for a connection", sum.runs);
        self.connections.push(sum);
        Ok(())
    }
}

// === functions ===

/// The mean run of the program at `hook` while `order` was done, in nanoseconds.
fn empty(setup: &mut Setup, order: &str, hook: &str) -> Result<f64> {
    let all = ran(setup, |count| format!("{order} {count}"))?;
    let ran = all.iter().find(|ran| ran.hook == hook);
    let ran = ran.with_context(|| format!("the agent has no program at {hook}"))?;
    ensure!(ran.runs >= u64::from(CONNECTIONS), "{} ran {} times", ran.name, ran.runs);
    Ok(ran.time_ns as f64 / ran.runs as f64)
}

/// What the agent's programs did while an order was done so many times.
fn ran(setup: &mut Setup, order: impl Fn(u32) -> String) -> Result<Vec<Ran>> {
    let programs = setup.status()?.programs;
    let look = || {
        let all = programs.iter().map(|program| bpf::program(program.id));
        all.collect::<Result<Vec<_>, _>>().context("the agent's programs")
    };
    setup.balanced().order(&order(WARM_UP))?;
    let stats = StatsGuard::enable().context("cannot measure the programs")?;
    let before = look()?;
    setup.balanced().order(&order(CONNECTIONS))?;
    let after = look()?;
    drop(stats);
    let pairs = before.into_iter().zip(after);
    let ran = pairs.zip(programs).map(|((before, after), program)| Ran {
        hook: program.hook,
        name: after.name,
        time_ns: after.run_time_ns - before.run_time_ns,
        runs: after.run_count - before.run_count,
    });
    Ok(ran.collect())
}
