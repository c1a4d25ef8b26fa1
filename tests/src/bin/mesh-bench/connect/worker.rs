//! What connects: a process in a cgroup of the benchmark, which does as it is told and accepts in
//! the same thread, so that no scheduler has a part in what is measured.
//!
//! Each of its threads has a network namespace and a processor of its own. So threads share what
//! the data plane shares (services, backends, counters, records), and not a listener or a table of
//! ports, whose contention is the kernel's affair and would hide ours.

use std::fs::File;
use std::io::{BufRead, Write};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use mesh_tests::sys::netns;
use rustix::net::accept;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

/// What a worker is started with. It reads the addresses from standard input, one a line, up to an
/// empty line. After that each line is an order:
///
/// * `time CONNECTS SPAN THREADS`: so many connects in each of so many threads, each to one of the
///   first SPAN addresses by chance. It is answered by as many durations in nanoseconds (u32, native
///   order), those of the first thread first.
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

/// The answer to an order that gives no durations.
pub const DONE: u8 = b'.';

/// How many connects a thread makes before it begins to measure: its stack and its sockets'
/// memory are warm then.
const WARM_UP: usize = 20;

/// A place to connect in: a network namespace, and what listens in it.
struct Lane {
    netns: OwnedFd,
    /// The processor on which its threads stay.
    cpu: CpuSet,
    v4: Socket,
    v6: Socket,
}

/// What a thread is to measure.
#[derive(Clone, Copy)]
struct Task<'a> {
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
            ["time", connects, span, threads] => {
                let lanes =
                    lanes.get(..threads.parse()?).context("more threads than namespaces")?;
                answer = time(lanes, targets(span)?, connects.parse()?)?;
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

// === impl Lane ===

impl Lane {
    fn open(path: &Path, number: usize, port: u16) -> Result<Self> {
        let netns = OwnedFd::from(File::open(path).with_context(|| path.display().to_string())?);
        let any_v4 = SocketAddr::from((Ipv4Addr::UNSPECIFIED, port));
        let any_v6 = SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
        let cpu = processor(number)?;
        let (v4, v6) = netns::inside(&netns, || {
            // Tried here: a thread that finds out later leaves others waiting for it.
            sched_setaffinity(None, &cpu)?;
            Ok::<_, anyhow::Error>((listen(any_v4)?, listen(any_v6)?))
        })??;
        Ok(Self { netns, cpu, v4, v6 })
    }

    /// Runs `work` on a new thread in this namespace and on this processor.
    fn inside<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        netns::inside(&self.netns, || {
            sched_setaffinity(None, &self.cpu)?;
            work()
        })?
    }

    /// The durations of connects, as they are answered.
    fn time(&self, task: Task<'_>) -> Result<Vec<u8>> {
        let warm = repeat(WARM_UP, || connect(&self.v4, any(task.targets)).map(drop));
        // Also after a failure: the other thread waits here.
        task.start.wait();
        warm?;
        let mut times = Vec::with_capacity(task.connects * 4);
        for _ in 0..task.connects {
            let time = connect(&self.v4, any(task.targets))?;
            let nanos = u32::try_from(time.as_nanos()).unwrap_or(u32::MAX);
            times.extend(nanos.to_ne_bytes());
        }
        Ok(times)
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

/// One of the processors that this process may use, counted around. Threads stay on theirs: the
/// scheduler would put both on the same one now and then.
fn processor(number: usize) -> Result<CpuSet> {
    let allowed = sched_getaffinity(None)?;
    let cpus: Vec<_> = (0..CpuSet::MAX_CPU).filter(|&cpu| allowed.is_set(cpu)).collect();
    let mut one = CpuSet::new();
    one.set(*cpus.get(number % cpus.len().max(1)).context("no processor")?);
    Ok(one)
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
fn time(lanes: &[Lane], targets: &[SockAddr], connects: usize) -> Result<Vec<u8>> {
    let start = Barrier::new(lanes.len());
    let task = Task { targets, connects, start: &start };
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

fn connected(address: &SockAddr) -> Result<(Socket, Duration)> {
    let client = Socket::new(address.domain(), Type::STREAM, Some(Protocol::TCP))?;
    let started = Instant::now();
    client.connect(address).with_context(|| format!("connect to {:?}", address.as_socket()))?;
    Ok((client, started.elapsed()))
}

/// One connect, timed; the socket exists already, and nothing else is inside the measurement.
fn connect(listener: &Socket, address: &SockAddr) -> Result<Duration> {
    let (client, time) = connected(address)?;
    let server = accept(listener)?;
    // The client resets when it closes, so that no port is left in TIME_WAIT. It does so first: a
    // backend that resets before it has answered a byte is a backend that fails.
    client.set_linger(Some(Duration::ZERO))?;
    drop(client);
    drop(server);
    Ok(time)
}

/// One connection from open to close, as applications have them: the getpeername(2) finds the
/// record (it shows the service's address, which it could not without), and both ends close in
/// peace, the client first.
fn live(listener: &Socket, address: &SockAddr) -> Result<()> {
    let place = address.as_socket();
    let (client, _) = connected(address)?;
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
    let (client, _) = connected(address)?;
    client.set_linger(Some(Duration::ZERO))?;
    drop(accept(listener)?);
    Ok(client)
}

/// One socket without a record that ends: the program that sees it has nothing to do.
fn idle() -> Result<()> {
    drop(Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP))?);
    Ok(())
}
