//! What connects: a process in a cgroup of the benchmark, which does as it is told and accepts in
//! the same thread, so that no scheduler has a part in what is measured.
//!
//! Each of its threads has a network namespace and a processor of its own. So threads share what
//! the data plane shares (services, backends, counters, records), and not a listener or a table of
//! ports, whose contention is the kernel's affair and would hide ours.

use std::fs::File;
use std::io::{BufRead, Write};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use mesh_tests::Node;
use mesh_tests::sys::netns;
use rustix::net::accept;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::thread::{CpuSet, sched_setaffinity};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use super::plan::Kind;
use crate::remote::{DONE, Remote};
use crate::scene::{namespace, processor};

/// What a worker is started with. It reads the addresses from standard input, one a line, up to an
/// empty line. After that each line is an order:
///
/// * `time KIND CONNECTS SPAN THREADS`: so many of a [`Kind`] in each of so many threads, each to one
///   of the first SPAN addresses by chance. It is answered by as many durations in nanoseconds (u32,
///   native order), those of the first thread first.
/// * `live CONNECTIONS SPAN` and `live6 CONNECTIONS`: so many whole connections, each with one
///   getpeername(2), to one of the first SPAN addresses by chance, or to the IPv6 address.
/// * `idle COUNT`: so many TCP sockets that are opened and closed and do nothing else.
/// * `hold CONNECTIONS SPAN`: so many more connections that stay open.
/// * `release`: closes what is held.
///
/// All but the first are answered by [`DONE`].
#[derive(Args)]
pub struct Arguments {
    /// The port on which the backends listen.
    port: u16,
    /// The network namespace of each thread.
    #[arg(required = true)]
    namespaces: Vec<PathBuf>,
}

/// How many connects a thread makes before it begins to measure: its stack and its sockets'
/// memory are warm then.
const WARM_UP: usize = 20;

/// What a datagram has in it.
const DATAGRAM: &[u8] = b"a datagram of a few bytes";

/// A datagram that is not there by then was not delivered.
const PATIENCE: Duration = Duration::from_secs(5);

/// A place to connect in: a network namespace, and what listens in it.
struct Lane {
    netns: OwnedFd,
    /// The processor on which its threads stay.
    cpu: CpuSet,
    v4: Socket,
    v6: Socket,
    /// Where datagrams arrive.
    datagrams: UdpSocket,
}

/// A process that connects, as its parent has it.
pub struct Worker(Remote);

/// What a thread is to measure.
#[derive(Clone, Copy)]
struct Task<'a> {
    kind: Kind,
    targets: &'a [SockAddr],
    connects: usize,
    start: &'a Barrier,
}

/// Does what standard input says, until it ends.
///
/// # Errors
///
/// An order that is none, a connect that fails, or a connection that is not as it should be.
pub fn serve(arguments: &Arguments) -> Result<()> {
    open_files()?;
    let mut lines = std::io::stdin().lock().lines();
    let mut addresses = Vec::new();
    for line in &mut lines {
        let line = line?;
        if line.is_empty() {
            break;
        }
        let address: SocketAddr = line.parse().with_context(|| line.clone())?;
        addresses.push(SockAddr::from(address));
    }
    let places = arguments.namespaces.iter().enumerate();
    let lanes: Vec<_> = places
        .map(|(number, path)| Lane::open(path, number, arguments.port))
        .collect::<Result<_>>()?;
    let first = lanes.first().context("no namespace")?;
    let targets = |span: &str| -> Result<_> {
        addresses.get(..span.parse()?).context("fewer addresses than that")
    };
    let mut held = Vec::new();
    let mut out = std::io::stdout().lock();
    for line in lines {
        let line = line?;
        let mut answer = vec![DONE];
        match line.split(' ').collect::<Vec<_>>()[..] {
            ["time", kind, connects, span, threads] => {
                let lanes =
                    lanes.get(..threads.parse()?).context("more threads than namespaces")?;
                let kind = Kind::ALL.into_iter().find(|known| known.name() == kind);
                let kind = kind.with_context(|| line.clone())?;
                answer = time(lanes, kind, targets(span)?, connects.parse()?)?;
            }
            ["live", count, span] => {
                let (count, targets) = (count.parse()?, targets(span)?);
                first.inside(|| repeat(count, || live(&first.v4, any(targets))))?;
            }
            ["live6", count] => {
                let count = count.parse()?;
                let to = addresses.iter().find(|a| a.is_ipv6()).context("no IPv6 address")?;
                first.inside(|| repeat(count, || live(&first.v6, to)))?;
            }
            ["idle", count] => {
                let count = count.parse()?;
                first.inside(|| repeat(count, idle))?;
            }
            ["hold", count, span] => {
                let (count, targets) = (count.parse()?, targets(span)?);
                held.reserve(count);
                first.inside(|| {
                    repeat(count, || {
                        held.push(hold(&first.v4, any(targets))?);
                        Ok(())
                    })
                })?;
            }
            ["release"] => held = Vec::new(),
            _ => bail!("{line:?} is no order"),
        }
        out.write_all(&answer)?;
        out.flush()?;
    }
    Ok(())
}

// === impl Worker ===

impl Worker {
    /// Starts one in these namespaces, which has backends on `port` and dials these addresses.
    ///
    /// # Errors
    ///
    /// It cannot be started.
    pub fn start(lanes: &[&Node], cgroup: &Path, port: u16, addresses: &[String]) -> Result<Self> {
        let node = lanes.first().context("a worker is somewhere")?;
        let mut command = node.command_in(cgroup, std::env::current_exe()?)?;
        command.args(["worker", &port.to_string()]);
        command.args(lanes.iter().map(|lane| namespace(lane)));
        let mut remote = Remote::start(&format!("the worker on port {port}"), command)?;
        remote.tell(&format!("{}\n", addresses.join("\n")))?;
        Ok(Self(remote))
    }

    /// Has an order of [`Arguments`] done that is not answered by durations.
    ///
    /// # Errors
    ///
    /// It was not done; the worker has said why.
    pub fn order(&mut self, order: &str) -> Result<()> {
        self.0.order(order)
    }

    /// The durations of so many of a kind in each of so many threads, in nanoseconds.
    ///
    /// # Errors
    ///
    /// One failed; the worker has said why.
    pub fn times(
        &mut self,
        kind: Kind,
        count: usize,
        span: usize,
        threads: usize,
    ) -> Result<Vec<u32>> {
        let order = format!("time {} {count} {span} {threads}", kind.name());
        let bytes = self.0.bytes(&order, count * threads * 4)?;
        Ok(bytes.as_chunks::<4>().0.iter().copied().map(u32::from_ne_bytes).collect())
    }
}

// === impl Lane ===

impl Lane {
    fn open(path: &Path, number: usize, port: u16) -> Result<Self> {
        let netns = OwnedFd::from(File::open(path).with_context(|| path.display().to_string())?);
        let any_v4 = SocketAddr::from((Ipv4Addr::UNSPECIFIED, port));
        let any_v6 = SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
        let cpu = processor(number)?;
        let (v4, v6, datagrams) = netns::inside(&netns, || {
            // Tried here: a thread that finds out later leaves others waiting for it.
            sched_setaffinity(None, &cpu)?;
            Ok::<_, anyhow::Error>((listen(any_v4)?, listen(any_v6)?, UdpSocket::bind(any_v4)?))
        })??;
        datagrams.set_read_timeout(Some(PATIENCE))?;
        Ok(Self { netns, cpu, v4, v6, datagrams })
    }

    /// Runs `work` on a new thread in this namespace and on this processor.
    fn inside<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        netns::inside(&self.netns, || {
            sched_setaffinity(None, &self.cpu)?;
            work()
        })?
    }

    /// The durations of what is measured, as they are answered.
    fn time(&self, task: Task<'_>) -> Result<Vec<u8>> {
        let socket = open_datagrams()?;
        let once = || match task.kind {
            Kind::Connect => connect(&self.v4, any(task.targets)).map(|(connected, _)| connected),
            Kind::Reach => connect(&self.v4, any(task.targets)).map(|(_, reached)| reached),
            Kind::DatagramConnect => connect_datagrams(any(task.targets)),
            Kind::DatagramFirst => self.send(&open_datagrams()?, any(task.targets)),
            Kind::DatagramNext => self.send(&socket, any(task.targets)),
        };
        let warm = repeat(WARM_UP, || once().map(drop));
        // Also after a failure: the other thread waits here.
        task.start.wait();
        warm?;
        let mut times = Vec::with_capacity(task.connects * 4);
        for _ in 0..task.connects {
            let nanos = u32::try_from(once()?.as_nanos()).unwrap_or(u32::MAX);
            times.extend(nanos.to_ne_bytes());
        }
        Ok(times)
    }

    /// One datagram, timed; it has arrived at a backend when this returns.
    fn send(&self, socket: &Socket, address: &SockAddr) -> Result<Duration> {
        let started = Instant::now();
        socket
            .send_to(DATAGRAM, address)
            .with_context(|| format!("send to {:?}", address.as_socket()))?;
        let time = started.elapsed();
        let mut buffer = [0; DATAGRAM.len()];
        self.datagrams.recv(&mut buffer).context("a datagram did not arrive")?;
        Ok(time)
    }
}

// === functions ===

fn listen(on: SocketAddr) -> Result<Socket> {
    let listener = Socket::new(Domain::for_address(on), Type::STREAM, Some(Protocol::TCP))?;
    if on.is_ipv6() {
        // Beside the listener of the other family, on the same port.
        listener.set_only_v6(true)?;
    }
    listener.bind(&on.into())?;
    listener.listen(64)?;
    Ok(listener)
}

/// Lets this process have as many open files as it may, and says how many that is.
pub fn open_files() -> Result<u64> {
    let maximum = getrlimit(Resource::Nofile).maximum;
    setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }).context("open files")?;
    Ok(maximum.unwrap_or(u64::MAX))
}

fn repeat(count: usize, mut work: impl FnMut() -> Result<()>) -> Result<()> {
    (0..count).try_for_each(|_| work())
}

fn any(targets: &[SockAddr]) -> &SockAddr {
    &targets[fastrand::usize(..targets.len())]
}

/// What all threads measured.
fn time(lanes: &[Lane], kind: Kind, targets: &[SockAddr], connects: usize) -> Result<Vec<u8>> {
    let start = Barrier::new(lanes.len());
    let task = Task { kind, targets, connects, start: &start };
    thread::scope(|scope| {
        let threads: Vec<_> =
            lanes.iter().map(|lane| scope.spawn(move || lane.inside(|| lane.time(task)))).collect();
        let mut times = Vec::new();
        for thread in threads {
            let result = thread.join();
            times.extend(result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?);
        }
        Ok(times)
    })
}

/// A connection, when it was begun, and how long connect(2) took.
fn connected(address: &SockAddr) -> Result<(Socket, Instant, Duration)> {
    let client = Socket::new(address.domain(), Type::STREAM, Some(Protocol::TCP))?;
    let started = Instant::now();
    client.connect(address).with_context(|| format!("connect to {:?}", address.as_socket()))?;
    Ok((client, started, started.elapsed()))
}

/// One connect; the socket exists already, and nothing else is inside the measurement. How long it
/// took, and how long until a backend had the connection.
fn connect(listener: &Socket, address: &SockAddr) -> Result<(Duration, Duration)> {
    let (client, started, time) = connected(address)?;
    let server = accept(listener)?;
    let reached = started.elapsed();
    // The client resets when it closes, so that no port is left in TIME_WAIT. It does so first: a
    // backend that resets before it has answered a byte is a backend that fails.
    client.set_linger(Some(Duration::ZERO))?;
    drop(client);
    drop(server);
    Ok((time, reached))
}

/// The same for a UDP socket, which sends nothing.
fn connect_datagrams(address: &SockAddr) -> Result<Duration> {
    let socket = open_datagrams()?;
    let started = Instant::now();
    socket.connect(address).with_context(|| format!("connect to {:?}", address.as_socket()))?;
    Ok(started.elapsed())
}

fn open_datagrams() -> Result<Socket> {
    Ok(Socket::new(Domain::IPV4, Type::DGRAM, Some(Protocol::UDP))?)
}

/// One connection from open to close, as applications have them: the getpeername(2) finds the
/// record (it shows the service's address, which it could not without), and both ends close in
/// peace, the client first.
fn live(listener: &Socket, address: &SockAddr) -> Result<()> {
    let place = address.as_socket();
    let (client, ..) = connected(address)?;
    let peer = client.peer_addr()?.as_socket();
    ensure!(peer == place, "getpeername shows {peer:?} after a connect to {place:?}");
    // Without asking for the peer's address: the kernel would run the getpeername program for this
    // end too, which has no record.
    let server = accept(listener)?;
    drop(client);
    drop(server);
    Ok(())
}

/// One connection that stays open at the client only, at half the price: a closed server becomes a
/// few bytes of TIME_WAIT. Dropped, it resets.
fn hold(listener: &Socket, address: &SockAddr) -> Result<Socket> {
    let (client, ..) = connected(address)?;
    client.set_linger(Some(Duration::ZERO))?;
    drop(accept(listener)?);
    Ok(client)
}

/// One socket without a record that ends: the program that sees it has nothing to do.
fn idle() -> Result<()> {
    drop(Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP))?);
    Ok(())
}
