//! What the benchmark runs: an agent or none, and the processes that connect.

use std::io::{BufReader, Read, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use mesh_tests::process::{Echo, until};
use mesh_tests::{Agent, Node, Service};
use serde::Deserialize;

use crate::plan::{Block, Choice, Services, Subject, Table, Variant};
use crate::worker;

/// Connects of each thread in a round.
pub const CONNECTS: usize = 500;
/// Services of the large set.
const MANY: u32 = 10_000;
/// Services in one file: files have a limit of their own.
const PER_FILE: u32 = 1_000;
/// Places in the table of records: so many open connections fill it.
const RECORDS: usize = 131_072;
/// Where the backends of all services listen.
const BACKENDS: [&str; 3] = ["10.0.0.1", "10.0.0.2", "10.0.0.3"];
/// The second address of the first service.
const ADDRESS_V6: &str = "fd00:96::1";
/// The backend behind it.
const BACKEND_V6: &str = "::1";
/// The port of the backends that are dialled directly.
const DIRECT_PORT: u16 = 8001;
/// The port of the backends of services.
const TARGET_PORT: u16 = 8002;
/// Files that a process needs besides those connections.
const SPARE_FILES: usize = 500;
/// What the kernel still frees, and the agent still settles, after one of them came or went.
const SETTLE: Duration = Duration::from_millis(300);

/// Everything that runs. The order of the fields is the order in which it ends.
pub struct Setup {
    direct: Worker,
    balanced: Worker,
    /// Have the connections that fill the table, each as many as a process may have.
    holders: Vec<Worker>,
    /// Whether they have them now.
    held: bool,
    one: Agent,
    /// By [`Choice`].
    others: Vec<Agent>,
    many: Agent,
    running: Option<Services>,
    _nodes: Vec<Node>,
}

/// A process that connects.
pub struct Worker {
    port: u16,
    child: Child,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
}

/// What the benchmark reads of `status -o json`.
#[derive(Deserialize)]
pub struct Status {
    /// The kernel programs.
    pub programs: Vec<Program>,
    sources: Vec<Source>,
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

#[derive(Deserialize)]
struct Source {
    services: usize,
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
    /// Starts the processes that connect. No agent runs yet.
    ///
    /// # Errors
    ///
    /// Something is missing on this machine, or does not start.
    pub fn make() -> Result<Self> {
        let (first, second) = (node()?, node()?);
        let outside = first.cgroup().child("direct")?;
        let cgroup = first.cgroup().child("balanced")?;
        let mut dialled: Vec<_> = (0..MANY).map(|n| format!("{}:80", address(n))).collect();
        dialled.push(format!("[{ADDRESS_V6}]:80"));
        let places = BACKENDS.map(|ip| format!("{ip}:{DIRECT_PORT}"));
        // Not in the namespaces in which others look for a port.
        let around: Vec<_> = (0..holders()?).map(|_| node()).collect::<Result<_>>()?;
        let holders =
            around.iter().map(|node| Worker::start(&[node], &cgroup, TARGET_PORT, &dialled));
        let lanes = [&first, &second];
        Ok(Self {
            direct: Worker::start(&lanes, &outside, DIRECT_PORT, &places)?,
            balanced: Worker::start(&lanes, &cgroup, TARGET_PORT, &dialled)?,
            holders: holders.collect::<Result<_>>()?,
            held: false,
            one: agent(&first, &cgroup, "one", 1, "balance: random")?,
            others: Choice::ALL
                .into_iter()
                .map(|choice| agent(&first, &cgroup, choice.name(), 1, &choice.key()))
                .collect::<Result<_>>()?,
            many: agent(&first, &cgroup, "many", MANY, "balance: random")?,
            running: None,
            _nodes: around.into_iter().chain([first, second]).collect(),
        })
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
                self.agent_of(services).stop()?;
            }
            if block.services.is_some() {
                // They have no record with the agent that comes.
                self.release()?;
            }
            if let Some(services) = block.services {
                self.start(services)?;
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
            Variant::Random => (&mut self.balanced, MANY as usize),
            _ => (&mut self.balanced, 1),
        };
        let threads = subject.threads;
        worker.times(CONNECTS, span, threads).context(subject.variant.name())
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
    pub fn status(&self) -> Result<Status> {
        let agent = match self.running.context("no agent runs")? {
            Services::One => &self.one,
            Services::By(choice) => &self.others[choice as usize],
            Services::Many => &self.many,
        };
        agent.get("/v1/status")
    }

    fn start(&mut self, services: Services) -> Result<()> {
        let wanted = span(services);
        let agent = self.agent_of(services);
        agent.start()?;
        until(&format!("{wanted} services"), Duration::from_secs(60), || {
            let status: Status = agent.get("/v1/status")?;
            let found: usize = status.sources.iter().map(|source| source.services).sum();
            Ok((found == wanted).then_some(()))
        })?;
        self.running = Some(services);
        Ok(())
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

    fn agent_of(&mut self, services: Services) -> &mut Agent {
        match services {
            Services::One => &mut self.one,
            Services::By(choice) => &mut self.others[choice as usize],
            Services::Many => &mut self.many,
        }
    }
}

// === impl Worker ===

impl Worker {
    fn start(lanes: &[&Node], cgroup: &Path, port: u16, addresses: &[String]) -> Result<Self> {
        let node = lanes.first().context("a worker is somewhere")?;
        let mut command = node.command_in(cgroup, std::env::current_exe()?)?;
        command.args(["worker", &port.to_string()]);
        command.args(lanes.iter().map(|lane| namespace(lane)));
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let (to, from) = child.stdin.take().zip(child.stdout.take()).context("pipes")?;
        let mut worker = Self { port, child, to, from: BufReader::new(from) };
        writeln!(worker.to, "{}\n", addresses.join("\n"))?;
        Ok(worker)
    }

    /// Has an order of [`worker::Arguments`] done that is not answered by durations.
    ///
    /// # Errors
    ///
    /// It was not done; the worker has said why.
    pub fn order(&mut self, order: &str) -> Result<()> {
        let answer = self.ask(order, 1)?;
        ensure!(answer == [worker::DONE], "the worker answered {answer:?} to {order:?}");
        Ok(())
    }

    fn times(&mut self, connects: usize, span: usize, threads: usize) -> Result<Vec<u32>> {
        let bytes =
            self.ask(&format!("time {connects} {span} {threads}"), connects * threads * 4)?;
        Ok(bytes.as_chunks::<4>().0.iter().copied().map(u32::from_ne_bytes).collect())
    }

    fn ask(&mut self, order: &str, answer: usize) -> Result<Vec<u8>> {
        writeln!(self.to, "{order}")?;
        let mut bytes = vec![0; answer];
        self.from.read_exact(&mut bytes).with_context(|| {
            format!("the worker on port {} ended early; its message is above", self.port)
        })?;
        Ok(bytes)
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // It is reaped, however it ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

// === functions ===

/// How many IPv4 addresses there are to dial.
pub const fn span(services: Services) -> usize {
    match services {
        Services::Many => MANY as usize,
        _ => 1,
    }
}

/// How many processes it takes to have a connection for each place in the table of records.
fn holders() -> Result<usize> {
    let each = usize::try_from(worker::open_files()?)?.saturating_sub(SPARE_FILES);
    ensure!(each > RECORDS / 64, "too few open files are allowed here: see `ulimit -H -n`");
    Ok(RECORDS.div_ceil(each))
}

/// A network namespace with the addresses of the backends, and the cgroup that comes with it.
fn node() -> Result<Node> {
    let node = Node::builder().quiet().start_without_agent()?;
    for ip in BACKENDS {
        node.add_address(ip.parse()?)?;
    }
    Ok(node)
}

/// Where a process finds the namespace of a node of this process.
fn namespace(node: &Node) -> PathBuf {
    let descriptor = node.netns().as_raw_fd();
    format!("/proc/{}/fd/{descriptor}", std::process::id()).into()
}

/// An agent with this many services that have this key, not running.
fn agent(node: &Node, cgroup: &Path, name: &str, services: u32, key: &str) -> Result<Agent> {
    let agent = Agent::new(&node.directory().join(name), cgroup, node.namespace(), &[], Echo::Off)?;
    for first in (0..services).step_by(PER_FILE as usize) {
        let numbers = first..services.min(first + PER_FILE);
        let file: Vec<_> = numbers.map(|number| service(number).key(key)).collect();
        agent.write_services(&format!("{first:05}.yaml"), &Service::file(&file))?;
    }
    Ok(agent)
}

fn service(number: u32) -> Service {
    let mut service =
        Service::new(&format!("s{number}")).address(&address(number)).port(80, TARGET_PORT);
    if number == 0 {
        service = service.address(ADDRESS_V6).endpoint(BACKEND_V6);
    }
    BACKENDS.iter().fold(service, |service, ip| service.endpoint(ip))
}

fn address(number: u32) -> String {
    format!("10.96.{}.{}", number / 250, number % 250 + 1)
}
