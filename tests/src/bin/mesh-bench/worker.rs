//! One variant: a process in the variant's cgroup that connects when told, and accepts in the same
//! thread, so that no scheduler has a part in what is measured.

use std::io::{BufReader, Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use mesh_tests::Node;
use rustix::net::accept;
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

/// What a worker is started with. It reads the addresses from standard input, one a line, up to an
/// empty line. After that each line is an order:
///
/// * `time CONNECTS SPAN`: so many connects, each to one of the first SPAN addresses by chance. It
///   is answered by as many durations in nanoseconds (u32, native order).
/// * `balance CONNECTS`: so many connects, each with one getpeername(2), to the first IPv4 address
///   and as many to the first IPv6 address. It is answered by [`DONE`].
/// * `pass CONNECTS`: so many connects of UDP to loopback in each family, which are not balanced. It
///   is answered by [`DONE`].
#[derive(Args)]
pub struct Arguments {
    /// The port on which the backends listen.
    port: u16,
}

/// The answer to an order that gives no durations.
const DONE: u8 = b'.';

/// A worker, seen from the benchmark.
pub struct Worker {
    port: u16,
    child: Child,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
}

// === impl Worker ===

impl Worker {
    /// Starts a worker in a cgroup, where it listens on `port` and may connect to `addresses`.
    pub fn start(node: &Node, cgroup: &Path, port: u16, addresses: &[String]) -> Result<Self> {
        let mut command = node.command_in(cgroup, std::env::current_exe()?)?;
        command.args(["worker", &port.to_string()]);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let (to, from) = child.stdin.take().zip(child.stdout.take()).context("pipes")?;
        let mut worker = Self { port, child, to, from: BufReader::new(from) };
        writeln!(worker.to, "{}\n", addresses.join("\n"))?;
        Ok(worker)
    }

    /// Connects so many times, each time to one of the first `span` addresses; gives the durations
    /// in nanoseconds.
    pub fn round(&mut self, connects: usize, span: usize) -> Result<Vec<u32>> {
        let bytes = self.order(&format!("time {connects} {span}"), connects * 4)?;
        Ok(bytes.as_chunks::<4>().0.iter().copied().map(u32::from_ne_bytes).collect())
    }

    /// Runs each of the four programs so many times, for a connection that is balanced.
    pub fn balance(&mut self, connects: usize) -> Result<()> {
        self.order(&format!("balance {connects}"), 1).map(drop)
    }

    /// Runs each of the two connect programs so many times, for a socket that it leaves alone at
    /// its first look.
    pub fn pass(&mut self, connects: usize) -> Result<()> {
        self.order(&format!("pass {connects}"), 1).map(drop)
    }

    fn order(&mut self, order: &str, answer: usize) -> Result<Vec<u8>> {
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

// === the worker itself ===

/// Does what it is told until standard input ends.
pub fn serve(arguments: &Arguments) -> Result<()> {
    let mut lines = std::io::stdin().lines();
    let mut addresses = Vec::new();
    for line in lines.by_ref() {
        let line = line?;
        if line.is_empty() {
            break;
        }
        let address: SocketAddr = line.parse().with_context(|| line.clone())?;
        addresses.push(SockAddr::from(address));
    }
    ensure!(!addresses.is_empty(), "no addresses");
    let any_v4 = SocketAddr::from((Ipv4Addr::UNSPECIFIED, arguments.port));
    let any_v6 = SocketAddr::from((Ipv6Addr::UNSPECIFIED, arguments.port));
    let (v4, v6) = (listen(any_v4)?, listen(any_v6)?);
    let mut out = std::io::stdout().lock();
    for line in lines {
        let line = line?;
        let answer = match line.split(' ').collect::<Vec<_>>()[..] {
            ["time", connects, span] => {
                let targets =
                    addresses.get(..span.parse()?).context("fewer addresses than that")?;
                time(&v4, targets, connects.parse()?)?
            }
            ["balance", connects] => {
                let (to_v4, to_v6) = of_both_families(&addresses)?;
                for _ in 0..connects.parse()? {
                    balance(&v4, to_v4)?;
                    balance(&v6, to_v6)?;
                }
                vec![DONE]
            }
            ["pass", connects] => {
                for _ in 0..connects.parse()? {
                    pass((Ipv4Addr::LOCALHOST, arguments.port).into())?;
                    pass((Ipv6Addr::LOCALHOST, arguments.port).into())?;
                }
                vec![DONE]
            }
            _ => bail!("{line:?} is no order"),
        };
        out.write_all(&answer)?;
        out.flush()?;
    }
    Ok(())
}

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

fn of_both_families(addresses: &[SockAddr]) -> Result<(&SockAddr, &SockAddr)> {
    let v4 = addresses.iter().find(|address| address.is_ipv4());
    let v6 = addresses.iter().find(|address| address.is_ipv6());
    v4.zip(v6).context("an address of each family is needed")
}

/// The durations of so many connects, as they are answered.
fn time(listener: &Socket, targets: &[SockAddr], connects: usize) -> Result<Vec<u8>> {
    let mut times = Vec::with_capacity(connects * 4);
    for _ in 0..connects {
        let time = connect(listener, &targets[fastrand::usize(..targets.len())])?;
        let nanos = u32::try_from(time.as_nanos()).unwrap_or(u32::MAX);
        times.extend(nanos.to_ne_bytes());
    }
    Ok(times)
}

/// One connect, timed; the socket exists already, and nothing else is inside the measurement.
fn connect(listener: &Socket, address: &SockAddr) -> Result<Duration> {
    let client = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP))?;
    let started = Instant::now();
    client.connect(address).with_context(|| format!("connect to {:?}", address.as_socket()))?;
    let time = started.elapsed();
    let (server, _) = listener.accept()?;
    reset(&client, &server)?;
    Ok(time)
}

/// One connect and one getpeername(2) that finds the record of it: it shows the service's address,
/// which it could not without.
fn balance(listener: &Socket, address: &SockAddr) -> Result<()> {
    let place = address.as_socket();
    let client = Socket::new(address.domain(), Type::STREAM, Some(Protocol::TCP))?;
    client.connect(address).with_context(|| format!("connect to {place:?}"))?;
    let peer = client.peer_addr()?.as_socket();
    ensure!(peer == place, "getpeername shows {peer:?} after a connect to {place:?}");
    // Without asking for the peer's address: the kernel would run the getpeername program for this
    // end too, which has no record.
    let server = Socket::from(accept(listener)?);
    reset(&client, &server)
}

/// Both ends are reset when they are closed, so that no port is left in TIME_WAIT.
fn reset(client: &Socket, server: &Socket) -> Result<()> {
    client.set_linger(Some(Duration::ZERO))?;
    server.set_linger(Some(Duration::ZERO))?;
    Ok(())
}

/// One connect of UDP. The program sees the protocol and returns: no run of it can be shorter.
fn pass(place: SocketAddr) -> Result<()> {
    let client = Socket::new(Domain::for_address(place), Type::DGRAM, Some(Protocol::UDP))?;
    client.connect(&place.into()).with_context(|| format!("UDP, connect to {place}"))
}
