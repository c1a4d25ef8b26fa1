//! What traffic costs through a service, against a direct connection and against other ways to a
//! backend.
//!
//! Everything is measured in one run, in turns; before and after each way comes the direct one, and
//! only neighbours are compared.

mod backend;
mod client;
mod plan;
mod report;

use std::collections::BTreeMap;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use mesh_tests::{Agent, Node};

pub use self::backend::serve as serve_backends;
pub use self::client::{Arguments as ClientArguments, serve as serve_client};

use self::client::Answered;
use self::plan::{Measure, Subject, TRAFFIC, WAYS, Way};
use self::report::Report;
use crate::machine::Machine;
use crate::output::{Output, Progress};
use crate::peers::Peer;
use crate::remote::Remote;
use crate::scene::{self, BACKENDS, PORT, TARGET_PORT, address};
use crate::timeline::Timeline;

/// Where the client stays, and where the backends do: the scheduler would put both on the same
/// processor now and then. Proxies go where they like.
const CLIENT_PROCESSOR: usize = 0;
const BACKEND_PROCESSOR: usize = 1;

/// What the kernel still frees, and the agent still settles, after it came or went.
const SETTLE: Duration = Duration::from_millis(300);

/// What people choose.
#[derive(clap::Args)]
pub struct Options {
    /// How often each way is measured, about a tenth of a second for each kind of traffic.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
}

/// What runs. The order of the fields is the order in which it ends.
struct Setup {
    clients: Vec<(Way, Remote)>,
    agent: Agent,
    _backends: Vec<Remote>,
    _peers: Vec<Peer>,
    _node: Node,
}

/// Measures, and shows it.
///
/// # Errors
///
/// Something is missing on this machine, or is not as it should be.
pub fn run(options: &Options, output: Output) -> Result<()> {
    let peers = WAYS.into_iter().filter_map(|way| match way {
        Way::Peer(kind) => Some(kind),
        Way::Direct | Way::Service => None,
    });
    let machine = Machine::with(peers)?;
    let once = WAYS.into_iter().flat_map(|way| [Way::Direct, way]);
    let all = (0..options.runs).flat_map(|_| once.clone()).chain([Way::Direct]);
    let all: Vec<_> = all.collect();
    let progress = Progress::of(all.len(), output);
    let mut setup = Setup::make()?;
    let mut timeline = Timeline::new();
    let mut answered = BTreeMap::<_, [u64; BACKENDS.len()]>::new();
    for (block, &way) in all.iter().enumerate() {
        progress.say(block, way.name())?;
        if way == Way::Service {
            setup.agent.start()?;
            scene::until_services(&setup.agent, 1)?;
            thread::sleep(SETTLE);
        }
        let sums = answered.entry(way.name()).or_default();
        setup.measure(way, block, &mut timeline, sums).with_context(|| way.name())?;
        if way == Way::Service {
            let balanced = setup.agent.status()?.counters.balanced;
            ensure!(balanced > 0, "nothing was balanced");
            setup.agent.stop()?;
            thread::sleep(SETTLE);
        }
    }
    progress.end();
    for (way, backends) in answered {
        ensure!(backends.iter().all(|count| *count > 0), "{way}: who answered: {backends:?}");
    }
    output.publish("traffic", &Report::new(machine, options.runs, &timeline), Report::print)
}

// === impl Setup ===

impl Setup {
    fn make() -> Result<Self> {
        let node = scene::node()?;
        let outside = node.cgroup().child("direct")?;
        let cgroup = node.cgroup().child("balanced")?;
        let agent = scene::agent(&node, &cgroup, "agent")?;
        for (name, text) in scene::files(1, |number| scene::service(number, BACKENDS)) {
            agent.write_services(&name, &text)?;
        }
        let places = BACKENDS.map(|ip| format!("{ip}:{TARGET_PORT}"));
        let service = [format!("{}:{PORT}", address(0))];
        let mut backends = vec![start_backends(&node)?];
        let client = |node: &Node, cgroup: &_, addresses: &[String]| {
            let mut command = node.command_in(cgroup, std::env::current_exe()?)?;
            command.arg("client").args(addresses);
            Remote::start("a client", command)
        };
        let mut clients = vec![
            (Way::Direct, client(&node, &outside, &places)?),
            (Way::Service, client(&node, &cgroup, &service)?),
        ];
        let mut peers = Vec::new();
        for way in WAYS {
            let Way::Peer(kind) = way else { continue };
            let peer = kind.start().with_context(|| way.name())?;
            backends.push(start_backends(&peer.node)?);
            let cgroup = peer.node.cgroup().child("clients")?;
            clients.push((way, client(&peer.node, &cgroup, &service)?));
            peers.push(peer);
        }
        Ok(Self { clients, agent, _backends: backends, _peers: peers, _node: node })
    }

    /// All traffic by one way.
    fn measure(
        &mut self,
        way: Way,
        block: usize,
        timeline: &mut Timeline<Subject>,
        backends: &mut [u64; BACKENDS.len()],
    ) -> Result<()> {
        let mut found = self.clients.iter_mut().filter(|(of, _)| *of == way);
        let (_, client) = found.next().context("it was not started")?;
        for traffic in TRAFFIC {
            client.tell(&traffic.order())?;
            let answered: Answered = client.answer()?;
            let each = answered.elapsed / u64::from(traffic.units());
            let each = vec![u32::try_from(each).unwrap_or(u32::MAX)];
            timeline.add(block, Subject { way, traffic, measure: Measure::All }, each);
            let measure = Measure::Request;
            timeline.add(block, Subject { way, traffic, measure }, answered.times);
            backends.iter_mut().zip(answered.backends).for_each(|(sum, count)| *sum += count);
        }
        Ok(())
    }
}

// === functions ===

/// Starts the backends of a node, and waits until they listen.
fn start_backends(node: &Node) -> Result<Remote> {
    // In no cgroup that is balanced.
    let cgroup = node.cgroup().child("backends")?;
    let mut command = node.command_in(&cgroup, std::env::current_exe()?)?;
    command.arg("backend");
    let mut backends = Remote::start("the backends", command)?;
    ensure!(backends.answer::<bool>()?, "the backends do not listen");
    Ok(backends)
}
