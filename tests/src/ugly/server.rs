//! The backends: what a client sends, one letter for each request, says what it wants done to it.
//!
//! | request | the server |
//! | --- | --- |
//! | `a` | answers with its address |
//! | `c` | answers and closes |
//! | `r` | answers and resets |
//! | `x` | resets without an answer |
//! | `e` | closes without an answer |

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::event::epoll::{self, EventData, EventFlags};
use socket2::{Domain, Protocol, Socket, Type};

use super::plan::{ANSWERS, Target, listeners, own_addresses};
use crate::process::until;
use crate::sys::socket::allow_fast_open;

/// Threads that serve.
const THREADS: usize = 2;

/// The network namespace is ready within this time.
const LIMIT: Duration = Duration::from_secs(10);

/// Connections that a listener keeps for later: a SYN that finds this queue full is dropped, and
/// the client's time is short.
const BACKLOG: i32 = 4096;

struct Listener {
    socket: Socket,
    target: Target,
    name: String,
}

/// What one thread serves.
struct Loop {
    epoll: OwnedFd,
    listeners: Arc<[Listener]>,
    connections: HashMap<u64, (Socket, usize)>,
    next: u64,
}

/// Listens everywhere, and serves from threads that never end.
///
/// # Errors
///
/// It cannot listen: then where; or the namespace is not made for it.
pub fn start() -> Result<()> {
    routed()?;
    let listeners: Result<Vec<_>> =
        listeners().into_iter().map(|(target, place)| Listener::new(target, place)).collect();
    let listeners: Arc<[Listener]> = listeners?.into();
    for _ in 0..THREADS {
        let mut served = Loop::new(Arc::clone(&listeners))?;
        thread::spawn(move || {
            loop {
                // What one client did must not end the service of the others.
                let _ = served.turn();
            }
        });
    }
    reached()
}

/// Waits until there is a route to each backend: the kernel makes those of IPv6 addresses some time
/// after `ip` has added the address.
fn routed() -> Result<()> {
    let prober = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0))?;
    for ip in own_addresses() {
        let IpAddr::V6(ip) = ip else { continue };
        until(&format!("a route to {ip}"), LIMIT, || Ok(prober.connect((ip, 9)).ok()))?;
    }
    Ok(())
}

/// Waits until each backend is reached: with a route out, the way in may still be missing.
fn reached() -> Result<()> {
    for (_, place) in listeners() {
        until(&format!("a connection to {place}"), LIMIT, || {
            Ok(TcpStream::connect_timeout(&place, LIMIT).ok())
        })?;
    }
    Ok(())
}

// === impl Listener ===

impl Listener {
    fn new(target: Target, place: SocketAddr) -> Result<Self> {
        let multipath = target == Target::Answer(ANSWERS - 1);
        let protocol = if multipath { Protocol::MPTCP } else { Protocol::TCP };
        let socket = Socket::new(Domain::for_address(place), Type::STREAM, Some(protocol))?;
        socket.set_reuse_address(true)?;
        socket.bind(&place.into()).with_context(|| format!("cannot listen on {place}"))?;
        if !multipath {
            allow_fast_open(&socket, 1024)?;
        }
        socket.listen(BACKLOG)?;
        socket.set_nonblocking(true)?;
        Ok(Self { socket, target, name: format!("{place}\n") })
    }
}

// === impl Loop ===

impl Loop {
    fn new(listeners: Arc<[Listener]>) -> Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        for (number, listener) in (0..).zip(listeners.iter()) {
            let events = EventFlags::IN | EventFlags::EXCLUSIVE;
            epoll::add(&epoll, &listener.socket, EventData::new_u64(number), events)?;
        }
        let next = listeners.len() as u64;
        Ok(Self { epoll, listeners, connections: HashMap::new(), next })
    }

    fn turn(&mut self) -> io::Result<()> {
        let mut events = Vec::with_capacity(64);
        epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), None)?;
        for event in &events {
            let number = event.data.u64();
            if number < self.listeners.len() as u64 {
                self.accept(usize::try_from(number).unwrap_or_default())?;
            } else if let Some((socket, listener)) = self.connections.get(&number)
                && !serve(socket, &self.listeners[*listener].name)
            {
                self.connections.remove(&number);
            }
        }
        Ok(())
    }

    fn accept(&mut self, number: usize) -> io::Result<()> {
        let listener = &self.listeners[number];
        for _ in 0..64 {
            let Ok((socket, _)) = listener.socket.accept() else { break };
            if listener.target == Target::Reset {
                // Closed as it goes out of scope.
                let _ = socket.set_linger(Some(Duration::ZERO));
                continue;
            }
            socket.set_nonblocking(true)?;
            epoll::add(&self.epoll, &socket, EventData::new_u64(self.next), EventFlags::IN)?;
            self.connections.insert(self.next, (socket, number));
            self.next += 1;
        }
        Ok(())
    }
}

/// Does what a client wants; `false` when the connection is to be closed.
fn serve(mut socket: &Socket, name: &str) -> bool {
    let mut requests = [0; 64];
    let count = match socket.read(&mut requests) {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => return true,
        Ok(0) | Err(_) => return false,
        Ok(count) => count,
    };
    for request in &requests[..count] {
        if matches!(request, b'a' | b'c' | b'r') && socket.write_all(name.as_bytes()).is_err() {
            return false;
        }
        if matches!(request, b'r' | b'x') {
            let _ = socket.set_linger(Some(Duration::ZERO));
        }
        if *request != b'a' {
            return false;
        }
    }
    true
}
