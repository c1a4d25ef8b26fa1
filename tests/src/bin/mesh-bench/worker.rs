//! One variant: a process in the variant's cgroup that connects when told, and accepts in the same
//! thread, so that no scheduler has a part in what is measured.

use std::io::{BufReader, Read, Write};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Args;
use mesh_tests::Node;
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

/// What a worker is started with. It reads the addresses from standard input, one a line, up to an
/// empty line. After that each line is an order, `CONNECTS SPAN`: so many connects, each to one of
/// the first SPAN addresses by chance. It is answered by as many durations in nanoseconds (u32,
/// native order).
#[derive(Args)]
pub struct Arguments {
    /// The port on which the backends listen.
    port: u16,
}

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
        writeln!(self.to, "{connects} {span}")?;
        let mut bytes = vec![0; connects * 4];
        self.from.read_exact(&mut bytes).with_context(|| {
            format!("the worker on port {} ended early; its message is above", self.port)
        })?;
        Ok(bytes.as_chunks::<4>().0.iter().copied().map(u32::from_ne_bytes).collect())
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
    let listener = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP))?;
    listener.bind(&SocketAddr::from(([0, 0, 0, 0], arguments.port)).into())?;
    listener.listen(64)?;
    let mut out = std::io::stdout().lock();
    for line in lines {
        let line = line?;
        let (connects, span) = line.split_once(' ').context("an order has two numbers")?;
        let (connects, span): (usize, usize) = (connects.parse()?, span.parse()?);
        let targets = addresses.get(..span).context("fewer addresses than that")?;
        let mut times = Vec::with_capacity(connects * 4);
        for _ in 0..connects {
            let time = connect(&listener, &targets[fastrand::usize(..targets.len())])?;
            let nanos = u32::try_from(time.as_nanos()).unwrap_or(u32::MAX);
            times.extend(nanos.to_ne_bytes());
        }
        out.write_all(&times)?;
        out.flush()?;
    }
    Ok(())
}

/// One connect, timed; the socket exists already, and nothing else is inside the measurement.
fn connect(listener: &Socket, address: &SockAddr) -> Result<Duration> {
    let client = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP))?;
    let started = Instant::now();
    client.connect(address).with_context(|| format!("connect to {:?}", address.as_socket()))?;
    let time = started.elapsed();
    // Both ends are reset, so that no port is left in TIME_WAIT.
    let (server, _) = listener.accept()?;
    client.set_linger(Some(Duration::ZERO))?;
    server.set_linger(Some(Duration::ZERO))?;
    Ok(time)
}
