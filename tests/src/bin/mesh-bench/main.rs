//! What a connect costs through a service, against a direct one.
//!
//! All variants are measured in one run, in rounds of shuffled order, so that whatever the machine
//! does meanwhile happens to all of them. Each variant is a process of its own in a cgroup of its
//! own, with the agent's programs on that cgroup, or none.

mod report;
mod worker;

use std::io::{self, IsTerminal as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use clap::{Parser, Subcommand};
use mesh_tests::process::{Echo, until};
use mesh_tests::sys::bpf::{self, Attached, StatsGuard};
use mesh_tests::{Agent, Node, Service};

use report::{Costs, Program, Report, Variant};
use worker::Worker;

/// Benchmarks of the data plane.
#[derive(Parser)]
struct Bench {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// connect(2) through a service, with 1 and with 10,000 services loaded, against a direct one.
    Connect {
        /// One JSON object instead of tables.
        #[arg(long)]
        json: bool,
        /// Rounds; in each, every variant connects 500 times.
        #[arg(long, default_value_t = 40, value_parser = clap::value_parser!(u32).range(1..))]
        runs: u32,
    },
    /// What the benchmark runs for each variant.
    #[command(hide = true)]
    Worker(worker::Arguments),
}

/// Connects of a variant in each round.
const CONNECTS: usize = 500;
/// Rounds in which the programs are measured.
const STATS_ROUNDS: usize = 8;
/// How often each program runs in those rounds.
const RUNS: u64 = (STATS_ROUNDS * CONNECTS) as u64;
/// Services of the large set.
const MANY: u32 = 10_000;
/// Services in one file: files have a limit of their own.
const PER_FILE: u32 = 1_000;
/// Where the backends of all services listen.
const BACKENDS: [&str; 3] = ["10.0.0.1", "10.0.0.2", "10.0.0.3"];
/// The second address of the first service.
const ADDRESS_V6: &str = "fd00:96::1";
/// The backend behind it.
const BACKEND_V6: &str = "::1";

fn main() -> ExitCode {
    let result = match Bench::parse().command {
        Command::Connect { json, runs } => connect(json, runs),
        Command::Worker(arguments) => worker::serve(&arguments),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mesh-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn connect(json: bool, runs: u32) -> Result<()> {
    let progress = !json && io::stderr().is_terminal();
    let mut setup = Setup::make()?;
    for subject in &SUBJECTS {
        setup.round(subject)?; // not counted: caches, and the first use of everything
    }
    let mut order: Vec<_> = (0..SUBJECTS.len()).collect();
    let mut variants: Vec<_> = SUBJECTS.iter().map(|s| Variant::new(s.name)).collect();
    for run in 0..runs {
        if progress {
            eprint!("\rround {} of {runs}", run + 1);
            io::stderr().flush()?;
        }
        fastrand::shuffle(&mut order);
        for &index in &order {
            variants[index].add_round(setup.round(&SUBJECTS[index])?);
        }
    }
    if progress {
        eprintln!();
    }
    // Apart, because measuring the programs makes every connect dearer.
    let costs = setup.measure_programs()?;
    let report = Report::new(&variants, costs)?;
    if json {
        println!("{}", report.json()?);
    } else {
        report.print();
    }
    Ok(())
}

/// A variant: which worker measures it, and to how many of its addresses it connects.
struct Subject {
    name: &'static str,
    worker: usize,
    span: usize,
}

const SUBJECTS: [Subject; 4] = [
    Subject { name: report::DIRECT, worker: 0, span: BACKENDS.len() },
    Subject { name: report::ONE, worker: 1, span: 1 },
    Subject { name: report::MANY, worker: 2, span: 1 },
    Subject { name: report::MANY_RANDOM, worker: 2, span: MANY as usize },
];

/// Everything that is measured, running. The order of the fields is the order in which it ends.
struct Setup {
    workers: [Worker; 3],
    _agents: [Agent; 2],
    /// Where programs are attached.
    cgroups: [(&'static str, PathBuf); 2],
    _node: Node,
}

impl Setup {
    fn make() -> Result<Self> {
        let node = Node::builder().quiet().start_without_agent()?;
        for ip in BACKENDS {
            node.add_address(ip.parse()?)?;
        }
        let (direct, one, many) = (
            node.cgroup().child(report::DIRECT)?,
            node.cgroup().child(report::ONE)?,
            node.cgroup().child(report::MANY)?,
        );
        let workers = [
            Worker::start(&node, &direct, 8001, &places(8001))?,
            Worker::start(&node, &one, 8002, &addresses(1))?,
            Worker::start(&node, &many, 8003, &addresses(MANY))?,
        ];
        let agents = [agent(&node, &one, 1, 8002)?, agent(&node, &many, MANY, 8003)?];
        let cgroups = [(report::ONE, one), (report::MANY, many)];
        Ok(Self { workers, _agents: agents, cgroups, _node: node })
    }

    fn round(&mut self, subject: &Subject) -> Result<Vec<u32>> {
        self.workers[subject.worker].round(CONNECTS, subject.span).context(subject.name)
    }

    /// Runs the programs, first for sockets that they leave alone, then for sockets that they
    /// balance. Always for the same service: what a random one costs is seen in the connects.
    fn measure_programs(&mut self) -> Result<Costs> {
        let stats = StatsGuard::enable().context("cannot measure the programs")?;
        let passed = self.measure(|worker| worker.pass(CONNECTS))?;
        let balanced = self.measure(|worker| worker.balance(CONNECTS))?;
        drop(stats);
        for program in &balanced {
            // What ran for anything else would be part of the figure.
            ensure!(
                program.runs == RUNS,
                "{} of {} ran {} times for {RUNS} balanced sockets: is another process in the \
                 benchmark's cgroup?",
                program.name,
                program.variant,
                program.runs,
            );
        }
        Ok(Costs { empty_run_ns: report::mean(&passed)?, programs: balanced })
    }

    /// What the programs took while every worker that has programs did this, some rounds long.
    fn measure(&mut self, work: impl Fn(&mut Worker) -> Result<()>) -> Result<Vec<Program>> {
        // Differences, because a kernel that measures always has counted the timed rounds as well.
        let before = self.attached()?;
        for _ in 0..STATS_ROUNDS {
            for worker in &mut self.workers[1..] {
                work(worker)?;
            }
        }
        let after = self.attached()?;
        let pairs = before.iter().zip(&after);
        pairs.map(|((on, before), (_, after))| Program::between(on, before, after)).collect()
    }

    fn attached(&self) -> Result<Vec<(&'static str, Attached)>> {
        let mut found = Vec::new();
        for (variant, cgroup) in &self.cgroups {
            let programs = bpf::attached(cgroup)?;
            ensure!(programs.len() == 4, "{} programs are on {variant}, not 4", programs.len());
            found.extend(programs.into_iter().map(|program| (*variant, program)));
        }
        Ok(found)
    }
}

/// An agent with this many services, ready.
fn agent(node: &Node, cgroup: &Path, services: u32, target: u16) -> Result<Agent> {
    let name = cgroup.file_name().context("a cgroup has a name")?;
    let mut agent =
        Agent::new(&node.directory().join(name), cgroup, node.namespace(), &[], Echo::Off)?;
    for first in (0..services).step_by(PER_FILE as usize) {
        let numbers = first..services.min(first + PER_FILE);
        let file: Vec<_> = numbers.map(|number| service(number, target)).collect();
        agent.write_services(&format!("{first:05}.yaml"), &Service::file(&file))?;
    }
    agent.start()?;
    until(&format!("{services} services"), std::time::Duration::from_secs(60), || {
        let found: usize = agent.status()?.sources.iter().map(|source| source.services).sum();
        Ok((found == services as usize).then_some(()))
    })?;
    Ok(agent)
}

fn service(number: u32, target: u16) -> Service {
    let mut service =
        Service::new(&format!("s{number}")).address(&address(number)).port(80, target);
    if number == 0 {
        service = service.address(ADDRESS_V6).endpoint(BACKEND_V6);
    }
    BACKENDS.iter().fold(service, |service, ip| service.endpoint(ip))
}

fn address(number: u32) -> String {
    format!("10.96.{}.{}", number / 250, number % 250 + 1)
}

/// What a worker dials: the IPv4 addresses, which are timed, and then the IPv6 address.
fn addresses(count: u32) -> Vec<String> {
    let v4 = (0..count).map(|number| format!("{}:80", address(number)));
    v4.chain([format!("[{ADDRESS_V6}]:80")]).collect()
}

fn places(port: u16) -> Vec<String> {
    BACKENDS.iter().map(|ip| format!("{ip}:{port}")).collect()
}
