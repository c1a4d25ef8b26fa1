//! What the benchmark runs: an agent or none, what it is compared with, and the processes that
//! connect.

use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use mesh_tests::{Agent, Node, Service};
use serde::Deserialize;

use super::plan::{self, Block, Choice, Services, Size, Subject, Table, Variant};
use super::worker::{self, Worker};
use crate::peers::Peer;
use crate::scene::{self, BACKENDS, MOST_SERVICES, PORT, TARGET_PORT, address};

/// Connects of each thread in a round.
pub const CONNECTS: usize = 500;
/// Places in the table of records, once it has grown: so many open connections fill it.
const RECORDS: usize = 131_072;
/// The second address of the first service.
const ADDRESS_V6: &str = "fd00:96::1";
/// The backend behind it.
const BACKEND_V6: &str = "::1";
/// The port of the backends that are dialled directly.
const DIRECT_PORT: u16 = 8001;
/// Files that a process needs besides those connections.
const SPARE_FILES: usize = 500;
/// What the kernel still frees, and the agent still settles, after one of them came or went.
const SETTLE: Duration = Duration::from_millis(300);

/// Everything that runs. The order of the fields is the order in which it ends.
pub struct Setup {
    direct: Worker,
    balanced: Worker,
    /// Dials backends where address translation is.
    untranslated: Option<Worker>,
    /// Each with the worker whose connections it brings to the backends.
    peers: Vec<(plan::Peer, Worker, Peer)>,
    /// Have the connections that fill the table, each as many as a process may have.
    holders: Vec<Worker>,
    /// Whether they have them now.
    held: bool,
    agents: Vec<(Services, Agent)>,
    running: Option<Services>,
    _nodes: Vec<Node>,
}

/// What the benchmark reads of `status -o json`.
#[derive(Deserialize)]
pub struct Status {
    /// The kernel programs.
    pub programs: Vec<Program>,
    /// The data plane's counters.
    pub counters: Counters,
}

/// A kernel program in `status`.
#[derive(Deserialize)]
pub struct Program {
    /// Where it is attached.
    pub hook: String,
    /// The kernel's number for it.
    pub id: u32,
}

/// Counters in `status`.
#[derive(Clone, Copy, Deserialize)]
pub struct Counters {
    /// Connects that were given a backend.
    pub balanced: u64,
    /// How many of those found their place in the table of records taken.
    pub collisions: u64,
}

// === impl Setup ===

impl Setup {
    /// Starts the processes that connect, and what they are compared with; `say` is told what takes
    /// long. No agent runs yet.
    ///
    /// # Errors
    ///
    /// Something is missing on this machine, or does not start.
    pub fn make(peers: &[plan::Peer], say: impl Fn(&str) -> Result<()>) -> Result<Self> {
        let (first, second) = (scene::node()?, scene::node()?);
        let outside = first.cgroup().child("direct")?;
        let cgroup = first.cgroup().child("balanced")?;
        let mut dialled = services(MOST_SERVICES);
        dialled.push(format!("[{ADDRESS_V6}]:{PORT}"));
        let places = BACKENDS.map(|ip| format!("{ip}:{DIRECT_PORT}"));
        // Not in the namespaces in which others look for a port.
        let around: Vec<_> = (0..holders()?).map(|_| scene::node()).collect::<Result<_>>()?;
        let holders =
            around.iter().map(|node| Worker::start(&[node], &cgroup, TARGET_PORT, &dialled));
        let lanes = [&first, &second];
        let mut setup = Self {
            direct: Worker::start(&lanes, &outside, DIRECT_PORT, &places)?,
            balanced: Worker::start(&lanes, &cgroup, TARGET_PORT, &dialled)?,
            untranslated: None,
            peers: Vec::new(),
            holders: holders.collect::<Result<_>>()?,
            held: false,
            agents: agents(&first, &cgroup)?,
            running: None,
            _nodes: around.into_iter().chain([first, second]).collect(),
        };
        for &peer in peers {
            say(&format!("{} gets its services", Variant::Peer(peer).name()))?;
            setup.add(peer, &places).with_context(|| Variant::Peer(peer).name())?;
        }
        Ok(setup)
    }

    fn add(&mut self, peer: plan::Peer, places: &[String]) -> Result<()> {
        let running = peer.kind().start()?;
        let node = &running.node;
        let cgroup = node.cgroup().child("clients")?;
        if peer == plan::Peer::NftablesOne {
            let worker = Worker::start(&[node], &cgroup, DIRECT_PORT, places)?;
            self.untranslated = Some(worker);
        }
        let worker = Worker::start(&[node], &cgroup, TARGET_PORT, &services(peer_span(peer)))?;
        self.peers.push((peer, worker, running));
        Ok(())
    }

    /// Makes everything as it is to be in a block.
    ///
    /// # Errors
    ///
    /// An agent does not start or end, or connections cannot be made.
    pub fn enter(&mut self, block: Block) -> Result<()> {
        let mut changed = false;
        if self.running != block.services {
            if let Some(services) = self.running.take() {
                self.agent_of(services)?.stop()?;
            }
            if block.services.is_some() {
                // They have no record with the agent that comes.
                self.release()?;
            }
            if let Some(services) = block.services {
                let agent = self.agent_of(services)?;
                agent.start()?;
                scene::until_services(agent, span(services))?;
                self.running = Some(services);
            }
            changed = true;
        }
        match block.table {
            Table::Fresh => changed |= self.release()?,
            Table::Full if !self.held => {
                self.held = true;
                let span = self.running.map_or(1, span);
                let each = RECORDS.div_ceil(self.holders.len());
                for holder in &mut self.holders {
                    holder.order(&format!("hold {each} {span}"))?;
                }
                changed = true;
            }
            Table::Full => {}
        }
        if changed {
            thread::sleep(SETTLE);
        }
        Ok(())
    }

    /// The durations of so many connects in each of the subject's threads, in nanoseconds.
    ///
    /// # Errors
    ///
    /// A connect failed.
    pub fn round(&mut self, subject: Subject) -> Result<Vec<u32>> {
        let (worker, span) = match subject.variant {
            Variant::Direct | Variant::Beside => (&mut self.direct, BACKENDS.len()),
            Variant::Random(size) => (&mut self.balanced, size.services() as usize),
            Variant::One | Variant::By(_) | Variant::Many(_) => (&mut self.balanced, 1),
            Variant::Untranslated => {
                let worker = self.untranslated.as_mut();
                (worker.context("there is no address translation")?, BACKENDS.len())
            }
            Variant::Peer(wanted) => {
                let mut found = self.peers.iter_mut().filter(|(peer, ..)| *peer == wanted);
                let (_, worker, _) = found.next().context("it was not started")?;
                (worker, peer_span(wanted) as usize)
            }
        };
        worker.times(subject.kind, CONNECTS, span, subject.threads).context(subject.variant.name())
    }

    /// The process whose connections are balanced.
    pub fn balanced(&mut self) -> &mut Worker {
        &mut self.balanced
    }

    /// What the running agent says.
    ///
    /// # Errors
    ///
    /// None runs, or it does not answer.
    pub fn status(&mut self) -> Result<Status> {
        let services = self.running.context("no agent runs")?;
        self.agent_of(services)?.get("/v1/status")
    }

    /// Closes the connections that fill the table; whether there were any.
    fn release(&mut self) -> Result<bool> {
        if self.held {
            for holder in &mut self.holders {
                holder.order("release")?;
            }
        }
        Ok(std::mem::take(&mut self.held))
    }

    fn agent_of(&mut self, wanted: Services) -> Result<&mut Agent> {
        let mut found = self.agents.iter_mut().filter(|(services, _)| *services == wanted);
        let (_, agent) = found.next().context("there is no such agent")?;
        Ok(agent)
    }
}

// === functions ===

/// How many IPv4 addresses there are to dial.
pub const fn span(services: Services) -> usize {
    match services {
        Services::Many(size) => size.services() as usize,
        Services::One | Services::By(_) => 1,
    }
}

/// How many services there are to dial by another way.
fn peer_span(peer: plan::Peer) -> u32 {
    match peer {
        plan::Peer::Nftables(size) => size.services(),
        plan::Peer::NftablesOne | plan::Peer::Haproxy | plan::Peer::Envoy => 1,
    }
}

/// The addresses of so many services.
fn services(count: u32) -> Vec<String> {
    (0..count).map(|number| format!("{}:{PORT}", address(number))).collect()
}

/// How many processes it takes to have a connection for each place in the table of records.
fn holders() -> Result<usize> {
    let each = usize::try_from(worker::open_files()?)?.saturating_sub(SPARE_FILES);
    ensure!(each > RECORDS / 64, "too few open files are allowed here: see `ulimit -H -n`");
    Ok(RECORDS.div_ceil(each))
}

/// One for each set of services, not running.
fn agents(node: &Node, cgroup: &Path) -> Result<Vec<(Services, Agent)>> {
    let agent = |services: Services, name: &str, key: &str| {
        let agent = scene::agent(node, cgroup, name)?;
        let larger = match services {
            Services::Many(Size::Sixty) => "frontends: 131072, backends: 262144, ",
            _ => "",
        };
        agent.append(&format!("limits: {{{larger}connections: {RECORDS}}}\n"))?;
        let count = u32::try_from(span(services))?;
        for (name, text) in scene::files(count, |number| service(number).key(key)) {
            agent.write_services(&name, &text)?;
        }
        Ok::<_, anyhow::Error>((services, agent))
    };
    let mut agents = vec![agent(Services::One, "one", "balance: random")?];
    for choice in Choice::ALL {
        agents.push(agent(Services::By(choice), choice.name(), &choice.key())?);
    }
    for (size, name) in [(Size::Ten, "10k"), (Size::Sixty, "60k")] {
        agents.push(agent(Services::Many(size), name, "balance: random")?);
    }
    Ok(agents)
}

fn service(number: u32) -> Service {
    let service = scene::service(number, BACKENDS);
    if number == 0 {
        // Datagrams too.
        service.udp(PORT, TARGET_PORT).address(ADDRESS_V6).endpoint(BACKEND_V6)
    } else {
        service
    }
}
