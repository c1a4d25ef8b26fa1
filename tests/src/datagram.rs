//! A datagram socket that does as it is told, one step after the other.

use std::collections::BTreeMap;
use std::io::{self, BufRead, BufReader, Write};
use std::net::{IpAddr, SocketAddr};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use serde::{Deserialize, Serialize};
use socket2::{Domain, Protocol, Socket, Type};

use crate::client::{QUESTION, errno_name};
use crate::sys;

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// What came of a step.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Reply {
    /// Who answered.
    pub backend: Option<String>,
    /// Whose address the answer had, as the application sees it.
    pub from: Option<SocketAddr>,
    /// What getpeername(2) says.
    pub peer: Option<SocketAddr>,
    /// What getsockname(2) says.
    pub own: Option<SocketAddr>,
    /// What failed.
    pub error: Option<String>,
    /// How often each backend answered, or each error came.
    pub counts: BTreeMap<String, u32>,
}

/// A `mesh-client datagrams`. Dropped, it is killed and reaped.
#[derive(Debug)]
pub struct Datagrams {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

// === impl Datagrams ===

impl Datagrams {
    /// Starts it with what runs `mesh-client`.
    ///
    /// # Errors
    ///
    /// It cannot be run.
    pub fn start(mut command: Command) -> Result<Self> {
        command.arg("datagrams").stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn()?;
        let input = child.stdin.take().context("its input")?;
        let output = BufReader::new(child.stdout.take().context("its output")?);
        Ok(Self { child, input, output })
    }

    /// Its process.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// One step:
    ///
    /// * `open 4`, `open 6`: a new socket in place of the one before
    /// * `connect ADDRESS`, `disconnect`
    /// * `ask`, `ask ADDRESS`: sends, and waits for the answer
    /// * `send`, `send ADDRESS`: does not wait
    /// * `receive`: waits for what was not waited for
    /// * `error`: fails with what `SO_ERROR` says, which is no more afterwards
    /// * `readable`: waits until poll(2) says that something, or an error, is there
    /// * `peer`, `own`: whom the socket is connected to, and its own address
    /// * `count ADDRESS TIMES`: as many new sockets of the address's family ask once each
    /// * `close`: the socket, and all that was kept
    /// * `keep`: a new socket beside the one before, which stays open
    ///
    /// # Errors
    ///
    /// It has ended. A step that fails is a [`Reply`].
    pub fn step(&mut self, step: &str) -> Result<Reply> {
        writeln!(self.input, "{step}")?;
        let mut line = String::new();
        self.output.read_line(&mut line)?;
        serde_json::from_str(&line).with_context(|| format!("{step}: {line:?}"))
    }

    /// A step that must answer with the name of a backend, which is given with the sender.
    ///
    /// # Errors
    ///
    /// It fails.
    pub fn ask(&mut self, step: &str) -> Result<(String, SocketAddr)> {
        let reply = self.step(step)?;
        match (reply.backend.clone(), reply.from) {
            (Some(backend), Some(from)) => Ok((backend, from)),
            _ => bail!("{step}: {reply:?}"),
        }
    }

    /// A step that must not fail.
    ///
    /// # Errors
    ///
    /// It does.
    pub fn did(&mut self, step: &str) -> Result<Reply> {
        let reply = self.step(step)?;
        match &reply.error {
            None => Ok(reply),
            Some(error) => bail!("{step}: {error}"),
        }
    }
}

impl Drop for Datagrams {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            let _ = self.child.kill();
        }
        let _ = self.child.wait();
    }
}

// === the other side ===

/// Does what the lines say until there are none, and prints what came of each.
///
/// # Errors
///
/// A line that means nothing, or a socket that cannot be made.
pub fn obey(lines: impl BufRead) -> Result<()> {
    let mut kept = Vec::new();
    let mut socket = open(Domain::IPV4)?;
    for line in lines.lines() {
        let line = line?;
        let mut reply = Reply::default();
        let result = match line.split(' ').collect::<Vec<_>>()[..] {
            ["open", family] => {
                socket = open(if family == "6" { Domain::IPV6 } else { Domain::IPV4 })?;
                Ok(())
            }
            ["keep"] => {
                let domain = socket.domain()?;
                kept.push(std::mem::replace(&mut socket, open(domain)?));
                Ok(())
            }
            ["close"] => {
                kept.clear();
                socket = open(Domain::IPV4)?;
                Ok(())
            }
            ["connect", address] => socket.connect(&target(&socket, address)?.into()),
            ["disconnect"] => sys::socket::disconnect(&socket),
            ["ask"] => socket.send(QUESTION).and_then(|_| receive(&socket, &mut reply)),
            ["ask", address] => {
                let to = target(&socket, address)?.into();
                socket.send_to(QUESTION, &to).and_then(|_| receive(&socket, &mut reply))
            }
            ["send"] => socket.send(QUESTION).map(drop),
            ["send", address] => {
                socket.send_to(QUESTION, &target(&socket, address)?.into()).map(drop)
            }
            ["receive"] => receive(&socket, &mut reply),
            ["error"] => socket.take_error().and_then(|error| error.map_or(Ok(()), Err)),
            ["readable"] => sys::socket::wait_readable(&socket, PATIENCE),
            ["peer"] => socket.peer_addr().map(|peer| reply.peer = peer.as_socket()),
            ["own"] => socket.local_addr().map(|own| reply.own = own.as_socket()),
            ["count", address, times] => {
                count(address.parse()?, times.parse()?, &mut reply.counts)?;
                Ok(())
            }
            _ => bail!("{line:?} means nothing"),
        };
        reply.error = result.err().map(|error| errno_name(&error));
        println!("{}", serde_json::to_string(&reply)?);
    }
    Ok(())
}

fn open(domain: Domain) -> Result<Socket> {
    let socket = Socket::new(domain, Type::DGRAM, Some(Protocol::UDP))?;
    socket.set_read_timeout(Some(PATIENCE))?;
    Ok(socket)
}

/// An IPv4 address is mapped for a socket of IPv6.
fn target(socket: &Socket, address: &str) -> Result<SocketAddr> {
    let address: SocketAddr = address.parse()?;
    Ok(match address.ip() {
        IpAddr::V4(ip) if socket.domain()? == Domain::IPV6 => {
            SocketAddr::new(ip.to_ipv6_mapped().into(), address.port())
        }
        _ => address,
    })
}

fn receive(socket: &Socket, reply: &mut Reply) -> io::Result<()> {
    // The one of the standard library receives into memory that is initialised.
    let socket = std::net::UdpSocket::from(socket.try_clone()?);
    let mut buffer = [0; 2048];
    let (length, from) = socket.recv_from(&mut buffer)?;
    reply.backend = Some(String::from_utf8_lossy(&buffer[..length]).into_owned());
    reply.from = Some(from);
    Ok(())
}

fn count(address: SocketAddr, times: u32, counts: &mut BTreeMap<String, u32>) -> Result<()> {
    for _ in 0..times {
        let socket = open(Domain::for_address(address))?;
        let mut reply = Reply::default();
        let asked = socket.send_to(QUESTION, &address.into());
        let result = asked.and_then(|_| receive(&socket, &mut reply));
        let name = match (result, reply.backend) {
            (Ok(()), Some(name)) if reply.from == Some(address) => name,
            (Ok(()), _) => format!("from {:?}", reply.from),
            (Err(error), _) => errno_name(&error),
        };
        *counts.entry(name).or_default() += 1;
    }
    Ok(())
}

/// How many sockets a thread of [`spray`] has at the most.
const SOCKETS: usize = 24;

/// Does with datagram sockets whatever can be done with them, in random order, from so many threads, for
/// so long: opens, connects, disconnects, sends by name and without, receives, closes. What fails, fails.
/// Gives how often something was done.
///
/// # Errors
///
/// A thread panicked.
pub fn spray(addresses: &[SocketAddr], threads: u64, duration: Duration) -> Result<u64> {
    let end = Instant::now() + duration;
    thread::scope(|scope| {
        let spray = |seed| scope.spawn(move || one_spray(addresses, seed, end));
        let threads: Vec<_> = (0..threads).map(spray).collect();
        let done = threads.into_iter().map(thread::ScopedJoinHandle::join);
        done.map(|done| done.map_err(|_| anyhow!("a thread panicked"))).sum()
    })
}

fn one_spray(addresses: &[SocketAddr], seed: u64, end: Instant) -> u64 {
    let mut random = fastrand::Rng::with_seed(seed);
    let (mut sockets, mut done): (Vec<Socket>, u64) = (Vec::new(), 0);
    while Instant::now() < end {
        done += 1;
        let (what, address) = (random.u8(..16), random.choice(addresses).copied());
        let Some(address) = address else { break };
        if sockets.is_empty() || what == 0 && sockets.len() < SOCKETS {
            let family = if random.bool() { Domain::IPV4 } else { Domain::IPV6 };
            if let Ok(socket) = open(family) {
                let _ = socket.set_nonblocking(true);
                sockets.push(socket);
            }
            continue;
        }
        let place = random.usize(..sockets.len());
        let socket = &sockets[place];
        let Ok(to) = target(socket, &address.to_string()) else { continue };
        let result = match what {
            1 => {
                drop(sockets.swap_remove(place));
                Ok(())
            }
            2 | 3 => socket.connect(&to.into()),
            4 => sys::socket::disconnect(socket),
            5 | 6 => socket.send(QUESTION).map(drop),
            7..=12 => socket.send_to(QUESTION, &to.into()).map(drop),
            _ => receive(socket, &mut Reply::default()),
        };
        drop(result);
    }
    done
}
