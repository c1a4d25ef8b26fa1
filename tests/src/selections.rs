//! Selections of the connect hook at the lowest price, for tests that need very many.
//!
//! A datagram socket is connected and says where to by its own address, without a single packet: from
//! the local routing table (`ip route show table local`) the kernel takes as source of what goes to an
//! address of this machine that very address. `getpeername` would show the service. With the programs
//! detached nothing leads to a service's address, and the connect fails.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use socket2::{Domain, Protocol, Socket, Type};

use crate::client::errno_name;
use crate::process::LIMIT;
use crate::shares::Counts;
use crate::sys::fork;

/// What came of very many connects.
#[derive(Debug, Serialize, Deserialize)]
pub struct Selections {
    /// How often each address was chosen, or each error came.
    pub chosen: Counts,
    /// How many sockets did not end when this process closed them, because somebody else was looking at
    /// them: who reads the links in `/proc/PID/fd` holds each of them for a moment (`proc_fd_link`). Such
    /// a socket ends as soon, but in the context of whoever looked, which `crate::withheld` is about.
    pub held: u32,
}

/// Connects so many new sockets, one after the other, all bound to the same port: while one is there, the
/// next cannot be bound.
///
/// # Errors
///
/// The port is in use for good.
pub fn count(address: SocketAddr, times: u32) -> io::Result<Selections> {
    let mut counts = BTreeMap::<Result<IpAddr, String>, u32>::new();
    let mut held = 0;
    let mut port = any_port(address);
    let mut last = None;
    for n in 0..=times {
        let socket = datagram(address)?;
        // Closed at the last moment: who looked at it has the less time to let go unnoticed.
        drop(last.take());
        if let Err(error) = socket.bind(&port.into()) {
            held += 1;
            bind_soon(&socket, port, error)?;
        }
        // Only to know of the one before.
        if n == times {
            break;
        }
        // The first one has chosen for all of them.
        if port.port() == 0 {
            port.set_port(socket.local_addr()?.as_socket().map_or(0, |own| own.port()));
        }
        let chosen = socket.connect(&address.into()).and_then(|()| own(&socket));
        *counts.entry(chosen.map_err(|error| errno_name(&error))).or_default() += 1;
        last = Some(socket);
    }
    let name =
        |chosen: Result<IpAddr, String>| chosen.map_or_else(|error| error, |ip| ip.to_string());
    let chosen = counts.into_iter().map(|(chosen, count)| (name(chosen), count)).collect();
    Ok(Selections { chosen, held })
}

/// Binds to a port that is in use, and soon will not be.
fn bind_soon(socket: &Socket, port: SocketAddr, mut error: io::Error) -> io::Result<()> {
    let begin = Instant::now();
    while error.kind() == io::ErrorKind::AddrInUse && begin.elapsed() < LIMIT {
        match socket.bind(&port.into()) {
            Ok(()) => return Ok(()),
            Err(again) => error = again,
        }
        thread::yield_now();
    }
    Err(error)
}

/// Any port at any address of the family of this one.
fn any_port(address: SocketAddr) -> SocketAddr {
    let any: IpAddr = match address {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    (any, 0).into()
}

fn choose(address: SocketAddr) -> io::Result<IpAddr> {
    connected(address).and_then(|socket| own(&socket))
}

fn connected(address: SocketAddr) -> io::Result<Socket> {
    let socket = datagram(address)?;
    socket.connect(&address.into())?;
    Ok(socket)
}

fn datagram(address: SocketAddr) -> io::Result<Socket> {
    Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))
}

fn own(socket: &Socket) -> io::Result<IpAddr> {
    let own = socket.local_addr()?.as_socket();
    own.map(|own| own.ip()).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// Sends a datagram to this backend of a service, on one of many sockets, and gives what the next one on
/// that fails with, if it does: the answer to the first, which is there already on a loopback interface.
///
/// # Errors
///
/// No connect led there.
pub fn provoke(address: SocketAddr, backend: IpAddr) -> Result<Option<String>> {
    const ATTEMPTS: u32 = 100_000;
    for _ in 0..ATTEMPTS {
        let socket = connected(address)?;
        if own(&socket)? == backend {
            socket.send(b"?")?;
            return Ok(socket.send(b"?").err().map(|error| errno_name(&error)));
        }
    }
    bail!("none of {ATTEMPTS} connects led to {backend}")
}

/// In each cgroup right below `directory`, a process that connects so often. By the cgroup's id, the last
/// byte of the address that was chosen.
///
/// # Errors
///
/// Something cannot be made, a connect fails, or two of one process lead to different addresses.
pub fn by_cgroup(address: SocketAddr, directory: &Path, each: u32) -> Result<BTreeMap<u64, u8>> {
    let mut chosen = BTreeMap::new();
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            let cgroup = File::open(entry.path())?;
            chosen.insert(entry.metadata()?.ino(), one(address, Some(&cgroup), each)?);
        }
    }
    Ok(chosen)
}

/// So many processes that connect so often each: how many of them chose each address, by its last
/// byte.
///
/// # Errors
///
/// As [`by_cgroup`].
pub fn by_process(address: SocketAddr, processes: u32, each: u32) -> Result<BTreeMap<u8, u32>> {
    let mut counts = BTreeMap::new();
    for _ in 0..processes {
        *counts.entry(one(address, None, each)?).or_default() += 1;
    }
    Ok(counts)
}

/// Where all connects of a process lead.
fn one(address: SocketAddr, cgroup: Option<&File>, each: u32) -> Result<u8> {
    let status = fork::run(cgroup.map(AsFd::as_fd), || {
        let place = |ip| match ip {
            IpAddr::V4(ip) => ip.octets()[3],
            IpAddr::V6(ip) => ip.octets()[15],
        };
        let Ok(first) = choose(address) else { return FAILED };
        let same = (1..each).all(|_| choose(address).is_ok_and(|next| next == first));
        if same { place(first) } else { DIFFERENT }
    })
    .context("clone3")?;
    ensure!(status != FAILED, "a connect failed");
    ensure!(status != DIFFERENT, "two connects of one process led to different backends");
    Ok(status)
}

/// What a child says of itself that cannot be the end of a backend's address.
const FAILED: u8 = 0;
const DIFFERENT: u8 = 255;
