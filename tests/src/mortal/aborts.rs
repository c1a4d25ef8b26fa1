//! Connects that end by the client's own doing, mixed with ordinary ones: none of them says
//! anything about a backend.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr};
use std::thread;
use std::time::Duration;

use socket2::{Domain, Protocol, Socket, Type};

use super::storm::ask;
use crate::sys::socket::{disconnect, is_connecting, set_fast_open_connect, wait_writable};

/// No step takes longer.
const LIMIT: Duration = Duration::from_secs(6);

/// Where to connect to.
#[derive(Clone, Copy, Debug)]
pub struct Targets {
    /// A healthy service over IPv4.
    pub four: SocketAddr,
    /// The same over IPv6.
    pub six: SocketAddr,
    /// A service whose endpoint no route leads to.
    pub nowhere: SocketAddr,
    /// A local address for sockets that are bound to the same port.
    pub local: Ipv4Addr,
}

/// How often what was done came to which end.
pub type Tally = BTreeMap<String, u64>;

/// Makes at least `connects` connects in `threads` threads. The mixture follows from `seed`.
#[must_use]
pub fn run(targets: Targets, connects: u64, threads: u64, seed: u64) -> Tally {
    let share = connects.div_ceil(threads);
    thread::scope(|scope| {
        let workers: Vec<_> =
            (0..threads).map(|n| scope.spawn(move || mix(targets, share, seed ^ n, n))).collect();
        workers.into_iter().fold(Tally::new(), |mut sum, worker| {
            let tally = worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            tally.into_iter().for_each(|(end, count)| *sum.entry(end).or_default() += count);
            sum
        })
    })
}

fn mix(targets: Targets, connects: u64, seed: u64, thread: u64) -> Tally {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut tally = Tally::new();
    for _ in 0..connects {
        let address = if random.bool() { targets.four } else { targets.six };
        let (what, result) = match random.u32(0..20) {
            0 => ("closed while connecting", abandoned(address, drop)),
            1 => ("AF_UNSPEC while connecting", abandoned(address, |s| drop(disconnect(&s)))),
            2 => (
                "shut down while connecting",
                abandoned(address, |s| drop(s.shutdown(Shutdown::Both))),
            ),
            3 => ("connected again", again(address)),
            4 => ("closed unanswered", connected(address).map(drop)),
            5 => ("reset unanswered", connected(address).and_then(|s| reset(&s))),
            6 => ("AF_UNSPEC when connected", connected(address).and_then(|s| disconnect(&s))),
            7 => ("answer not read", unread(address)),
            8 => ("no route", ends_with(connected(targets.nowhere), libc::ENETUNREACH)),
            9 => ("same port twice", twice(targets, thread, &mut random)),
            10 => ("happy eyeballs", race(targets)),
            11 => ("reset after the answer", answered(address).and_then(|s| reset(&s))),
            12 => ("fast open without data", deferred(address).map(drop)),
            _ => ("answered", answered(address).map(drop)),
        };
        let end = match result {
            Ok(()) => what.to_owned(),
            Err(error) => format!("{what}: failed: {error}"),
        };
        *tally.entry(end).or_default() += 1;
    }
    tally
}

fn open(address: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_read_timeout(Some(LIMIT))?;
    Ok(socket)
}

fn connected(address: SocketAddr) -> io::Result<Socket> {
    let socket = open(address)?;
    socket.connect(&address.into())?;
    Ok(socket)
}

fn answered(address: SocketAddr) -> io::Result<Socket> {
    let socket = connected(address)?;
    ask(&socket, true).map_err(|(_, error)| error)?;
    Ok(socket)
}

/// A connect that is under way when `then` gets it.
fn connecting(address: SocketAddr) -> io::Result<Socket> {
    let socket = open(address)?;
    socket.set_nonblocking(true)?;
    match socket.connect(&address.into()) {
        Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => Err(error),
        _ => Ok(socket),
    }
}

fn abandoned(address: SocketAddr, then: impl FnOnce(Socket)) -> io::Result<()> {
    connecting(address).map(then)
}

fn again(address: SocketAddr) -> io::Result<()> {
    let socket = connecting(address)?;
    disconnect(&socket)?;
    socket.set_nonblocking(false)?;
    socket.connect(&address.into())?;
    ask(&socket, true).map_err(|(_, error)| error)?;
    Ok(())
}

/// A connect that has succeeded and sent nothing yet: it waits for data.
fn deferred(address: SocketAddr) -> io::Result<Socket> {
    let socket = open(address)?;
    set_fast_open_connect(&socket)?;
    socket.connect(&address.into())?;
    // connect(2) has succeeded: one that sent its SYN would be connected.
    if is_connecting(&socket)? { Ok(socket) } else { Err(io::Error::other("not deferred")) }
}

fn reset(socket: &Socket) -> io::Result<()> {
    socket.set_linger(Some(Duration::ZERO))
}

/// The answer comes, and is not read: the kernel closes by a reset.
fn unread(address: SocketAddr) -> io::Result<()> {
    let socket = connected(address)?;
    socket.send(crate::client::QUESTION)?;
    socket.peek(&mut [std::mem::MaybeUninit::uninit()]).map(drop)
}

/// Two sockets at the same port: where both are given the same backend, the second fails.
fn twice(targets: Targets, thread: u64, random: &mut fastrand::Rng) -> io::Result<()> {
    // Outside the range that the kernel gives out, and another for each thread.
    let port =
        10_000 + u16::try_from(thread % 16).unwrap_or_default() * 1_000 + random.u16(0..1_000);
    let local = SocketAddr::new(IpAddr::V4(targets.local), port);
    let mut sockets = Vec::new();
    for _ in 0..4 {
        let socket = open(targets.four)?;
        socket.set_reuse_address(true)?;
        socket.bind(&local.into())?;
        let error = socket.connect(&targets.four.into()).err();
        match error.as_ref().and_then(io::Error::raw_os_error) {
            None if error.is_none() => {}
            Some(libc::EADDRNOTAVAIL) => {}
            _ => return error.map_or(Ok(()), Err),
        }
        sockets.push(socket);
    }
    // By a reset, so that nothing waits at these ports.
    sockets.iter().try_for_each(reset)
}

/// Both families at once; the first that is connected wins, and the other is closed.
fn race(targets: Targets) -> io::Result<()> {
    let (six, four) = (connecting(targets.six)?, connecting(targets.four)?);
    wait_writable(&six, LIMIT)?;
    drop(four);
    if let Some(error) = six.take_error()? {
        return Err(error);
    }
    six.set_nonblocking(false)?;
    ask(&six, true).map(drop).map_err(|(_, error)| error)
}

fn ends_with<T>(result: io::Result<T>, expected: i32) -> io::Result<()> {
    match result {
        Err(error) if error.raw_os_error() == Some(expected) => Ok(()),
        Err(error) => Err(error),
        Ok(_) => Err(io::Error::other("it did not fail")),
    }
}
