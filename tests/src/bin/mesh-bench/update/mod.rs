//! How long it takes until a change is in force: from before the call that makes it to the first
//! connect that sees it. And how long, and how much memory, many services take.

mod memory;
mod report;

use std::iter;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use mesh_tests::agent::Staged;
use mesh_tests::{Agent, Node, Service, process};
use serde::Serialize;
use serde::de::IgnoredAny;

use self::memory::Memory;
use self::report::{Changes, Empty, Load, Report};
use crate::machine::Machine;
use crate::output::{Output, Progress};
use crate::prober::{Prober, Took};
use crate::scene::{self, BACKENDS};

/// What people choose.
#[derive(clap::Args)]
pub struct Options {
    /// Changes of each kind, beside each number of services.
    #[arg(long, default_value_t = 300, value_parser = clap::value_parser!(u32).range(1..))]
    changes: u32,
    /// How often many services are loaded in each way.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    loads: u32,
}

/// How a change is made.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Change {
    /// A service file of one service is renamed into place; its only endpoint is another one.
    File,
    /// The same in a file of 1,000 services.
    LargeFile,
    /// An endpoint is drained, or not any more, by a request to the agent's socket.
    Request,
    /// The same by `mesh-agent drain` and `undrain`, whose start is part of it.
    Command,
}

/// How many services are loaded beside those that change.
const BESIDE: [u32; 2] = [1, 10_000];
/// How many services are in the large file.
const LARGE: u32 = 1_000;
/// How many services are loaded from nothing, with ten endpoints each.
const LOADED: u32 = 10_000;
/// Of those, one of so many is looked at to see when all are there; and then all are.
const STEP: u32 = 50;
/// Changes of each kind for each agent that is started: they come in turns with other numbers of
/// services.
const TURN: u32 = 50;

/// What runs. The order of the fields is the order in which it ends.
struct Setup {
    prober: Prober,
    agents: Vec<(u32, Agent)>,
    /// How many agents have loaded many services.
    loads: u32,
    node: Node,
}

/// Measures, and shows it.
///
/// # Errors
///
/// Something is missing on this machine, or is not as it should be.
pub fn run(options: &Options, output: Output) -> Result<()> {
    let machine = Machine::with([])?;
    let turns = options.changes.div_ceil(TURN);
    let steps = turns as usize * BESIDE.len() + 2 * options.loads as usize;
    let progress = Progress::of(steps, output);
    let mut setup = Setup::make()?;
    let (mut all, mut loads) = (Vec::<Changes>::new(), Vec::new());
    let mut step = 0;
    for turn in 0..turns {
        let count = TURN.min(options.changes - turn * TURN);
        for services in BESIDE {
            progress.say(step, &format!("changes beside {services} services"))?;
            for changes in setup.changes(services, count)? {
                let same =
                    all.iter_mut().find(|of| of.kind == changes.kind && of.services == services);
                match same {
                    Some(same) => same.took.extend(changes.took),
                    None => all.push(changes),
                }
            }
            step += 1;
        }
    }
    for _ in 0..options.loads {
        for running in [true, false] {
            progress.say(step, &format!("{LOADED} services from nothing"))?;
            loads.push(setup.load(running)?);
            step += 1;
        }
    }
    progress.end();
    output.publish("update", &Report::new(machine, all, loads), Report::print)
}

// === impl Change ===

impl Change {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::File, Self::LargeFile, Self::Request, Self::Command];

    /// For people.
    pub fn describe(self) -> &'static str {
        match self {
            Self::File => "file of one service",
            Self::LargeFile => "file of 1,000 services",
            Self::Request => "drain, by the socket",
            Self::Command => "drain, by command",
        }
    }

    /// Whether it can be made beside so many services.
    fn is_possible(self, services: u32) -> bool {
        self != Self::LargeFile || services >= LARGE
    }

    /// The service that it changes.
    fn service(self) -> u32 {
        match self {
            Self::File => 50_000,
            Self::LargeFile => 0,
            Self::Request => 50_001,
            Self::Command => 50_002,
        }
    }

    /// Its service file, when the service is to lead to the first backend, or to the second.
    fn stage(self, agent: &Agent, second: bool) -> Result<Staged> {
        let number = self.service();
        let only = [BACKENDS[usize::from(second)]];
        let file = match self {
            Self::File => Service::file(&[scene::service(number, only)]),
            Self::LargeFile => {
                let beside = (0..LARGE).filter(|beside| *beside != number);
                let beside = beside.map(|beside| scene::service(beside, BACKENDS));
                Service::file(
                    &iter::once(scene::service(number, only)).chain(beside).collect::<Vec<_>>(),
                )
            }
            // The second one has next to everything while it is not drained.
            Self::Request | Self::Command => {
                let service = scene::service(number, []).weighted(BACKENDS[0], 1);
                Service::file(&[service.weighted(BACKENDS[1], 65_535)])
            }
        };
        let name = if self == Self::LargeFile {
            "00000.yaml".to_owned()
        } else {
            format!("{number}.yaml")
        };
        agent.stage_services(&name, &file)
    }

    /// The request that lets the second backend be used, or not any more.
    fn request(self, second: bool) -> String {
        let what = if second { "undrain" } else { "drain" };
        format!("/v1/{what}?service=s{}&address={}", self.service(), BACKENDS[1])
    }

    /// Makes it, and gives how long it took.
    fn time(self, agent: &Agent, prober: &mut Prober, second: bool) -> Result<Took> {
        let (service, wanted) = (self.service(), BACKENDS[usize::from(second)]);
        match self {
            Self::File | Self::LargeFile => {
                let staged = self.stage(agent, second)?;
                prober.until(service, wanted, || staged.publish())
            }
            Self::Request => {
                let request = self.request(second);
                prober.until(service, wanted, || agent.post::<IgnoredAny>(&request).map(drop))
            }
            Self::Command => {
                let what = if second { "undrain" } else { "drain" };
                let command = agent.cli(&[what, &format!("s{service}"), BACKENDS[1]])?;
                prober.until(service, wanted, || process::stdout(command).map(drop))
            }
        }
    }
}

// === impl Setup ===

impl Setup {
    fn make() -> Result<Self> {
        let node = scene::node()?;
        for ip in scene::ten() {
            node.add_address(ip.parse()?)?;
        }
        let mut agents = Vec::new();
        for services in BESIDE {
            let agent = scene::agent(&node, node.cgroup().path(), &format!("beside-{services}"))?;
            for (name, text) in scene::files(services, |n| scene::service(n, BACKENDS)) {
                agent.write_services(&name, &text)?;
            }
            agents.push((services, agent));
        }
        Ok(Self { prober: Prober::start(&node)?, agents, loads: 0, node })
    }

    /// So many changes of each kind that is possible beside so many services.
    fn changes(&mut self, services: u32, count: u32) -> Result<Vec<Changes>> {
        let Self { prober, agents, .. } = self;
        let mut found = agents.iter_mut().filter(|(of, _)| *of == services);
        let (_, agent) = found.next().context("there is no such agent")?;
        let kinds: Vec<_> =
            Change::ALL.into_iter().filter(|kind| kind.is_possible(services)).collect();
        for kind in &kinds {
            kind.stage(agent, false)?.publish()?;
        }
        agent.start()?;
        // What changes has files of its own, but for one.
        scene::until_services(agent, services as usize + 3)?;
        for kind in [Change::Request, Change::Command] {
            agent.post::<IgnoredAny>(&kind.request(false))?;
        }
        let mut all: Vec<_> =
            kinds.into_iter().map(|kind| Changes { kind, services, took: Vec::new() }).collect();
        for number in 0..count {
            fastrand::shuffle(&mut all);
            for Changes { kind, took, .. } in &mut all {
                let time = kind.time(agent, prober, number % 2 == 0);
                let time =
                    time.with_context(|| format!("{}, beside {services}", kind.describe()))?;
                took.push(time);
            }
        }
        agent.stop()?;
        Ok(all)
    }

    /// Many services at once: for an agent that runs and has none, or for one that starts.
    fn load(&mut self, running: bool) -> Result<Load> {
        self.loads += 1;
        let name = format!("load-{}", self.loads);
        let mut agent = scene::agent(&self.node, self.node.cgroup().path(), &name)?;
        let files = scene::files(LOADED, |number| scene::service(number, scene::ten()));
        let stage = |(name, text): &(String, String)| agent.stage_services(name, text);
        let mut staged = files.iter().map(stage).collect::<Result<Vec<_>>>()?;
        let empty = if running {
            let started = Instant::now();
            agent.start()?;
            let (ready_ms, memory) = (millis(started.elapsed()), Memory::of(&agent)?);
            Some(Empty { ready_ms, memory })
        } else {
            staged.drain(..).try_for_each(Staged::publish)?;
            None
        };
        let mut started = Instant::now();
        let answered = self.prober.answer(LOADED, STEP, || {
            started = Instant::now();
            if running { staged.drain(..).try_for_each(Staged::publish) } else { agent.launch() }
        })?;
        // Asked only now: to answer that takes an agent milliseconds.
        agent.until_ready()?;
        scene::until_services(&agent, LOADED as usize)?;
        let said = started.elapsed();
        self.prober.all(LOADED)?;
        let memory = Memory::of(&agent)?;
        agent.stop()?;
        let (answered_ms, said_ms) = (millis(answered.seen), millis(said));
        Ok(Load { empty, answered_ms, said_ms, memory })
    }
}

// === functions ===

fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}
