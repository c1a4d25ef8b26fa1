//! The connections of checks.

use std::io;
use std::net::SocketAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use mesh_common::socket::CHECK_PRIORITY;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::connect_unspec;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::TcpStream;

/// A connection. It is reset when it is dropped: nothing that was sent is waited for then, and it
/// does not stay in TIME_WAIT for a minute, of which 5,000 checks a second would have 300,000.
pub(super) enum Connection {
    /// Made at once, and known to nobody but the kernel.
    Made(Socket),
    /// Waited for.
    Awaited(TcpStream),
}

/// Sockets that were connected and are not any more: a third of what a check costs is to make one. Those of
/// IPv4, and of IPv6.
static IDLE: [Mutex<Vec<Socket>>; 2] = [Mutex::new(Vec::new()), Mutex::new(Vec::new())];

/// How many of each are kept: what begins together in a slot.
const KEPT: usize = 64;

/// Those for an address.
fn idle(is_v4: bool) -> MutexGuard<'static, Vec<Socket>> {
    IDLE[usize::from(!is_v4)].lock().unwrap_or_else(PoisonError::into_inner)
}

/// A socket that is not connected.
fn socket(address: SocketAddr) -> io::Result<Socket> {
    if let Some(socket) = idle(address.is_ipv4()).pop() {
        return Ok(socket);
    }
    let kind = Type::STREAM.nonblocking().cloexec();
    let socket = Socket::new(Domain::for_address(address), kind, Some(Protocol::TCP))?;
    socket.set_linger(Some(Duration::ZERO))?;
    // Who may not say so does not run the kernel programs either.
    let _ = socket.set_priority(CHECK_PRIORITY);
    Ok(socket)
}

/// Connects.
///
/// The check dials the endpoint itself: the kernel programs leave it alone, also when the agent runs inside the
/// balanced cgroup, and the endpoint is some service's frontend, or lies inside `virtual-ips`.
///
/// When nothing is going to be said (`is_all`), the endpoint's answer is not acknowledged: it is reset before
/// that is sent. So the endpoint's program, which has no use for such a connection, never sees it, and neither end
/// makes one.
pub(super) async fn connect(address: SocketAddr, is_all: bool) -> io::Result<Connection> {
    let socket = socket(address)?;
    if is_all {
        // The acknowledgement is delayed as if data were to come with it (`tcp_rcv_synsent_state_process`). A
        // socket forgets that with its connection.
        socket.set_tcp_quickack(false)?;
    }
    match socket.connect(&address.into()) {
        Ok(()) => return made(socket, address),
        Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => {}
        Err(error) => return Err(error),
    }
    // An endpoint of this node has answered by now, and is not worth being watched: that takes as long as
    // all the rest.
    if is_over(&socket)? {
        return socket.take_error()?.map_or_else(|| made(socket, address), Err);
    }
    let stream = TcpStream::from_std(socket.into())?;
    stream.writable().await?;
    if let Some(error) = stream.take_error()? {
        return Err(error);
    }
    refuse_itself(stream.local_addr()?, address)?;
    Ok(Connection::Awaited(stream))
}

/// It is connected, to somebody else.
fn made(socket: Socket, address: SocketAddr) -> io::Result<Connection> {
    let own = socket.local_addr()?.as_socket();
    refuse_itself(own.unwrap_or(address), address)?;
    Ok(Connection::Made(socket))
}

/// Where nobody listens on this node, a socket that happens to be given the same port as its own meets itself
/// (RFC 9293, 3.5: simultaneous open): once in as many connects as there are ports in
/// `net.ipv4.ip_local_port_range`. Whoever is asked for the peer may name another address: the one that was dialled is what counts.
fn refuse_itself(own: SocketAddr, dialled: SocketAddr) -> io::Result<()> {
    if (own.ip(), own.port()) != (dialled.ip(), dialled.port()) {
        return Ok(());
    }
    let text = "Connection refused: nothing listens there, and the connect reached its own socket";
    Err(io::Error::new(io::ErrorKind::ConnectionRefused, text))
}

/// Whether a connect has succeeded or failed.
fn is_over(socket: &Socket) -> io::Result<bool> {
    let mut polled = [PollFd::new(socket, PollFlags::OUT)];
    Ok(poll(&mut polled, Some(&Timespec::default()))? > 0)
}

impl Connection {
    /// It is reset. A socket that nobody watches, and over which nothing was said, may be connected again.
    pub(super) fn end(self, address: SocketAddr) {
        let Self::Made(socket) = self else { return };
        // It is as it was made then, but for options (`tcp_disconnect`).
        if connect_unspec(&socket).is_ok() {
            let mut idle = idle(address.is_ipv4());
            if idle.len() < KEPT {
                idle.push(socket);
            }
        }
    }

    /// For what is said over it, in small writes.
    pub(super) fn stream(self) -> io::Result<TcpStream> {
        let stream = match self {
            Self::Made(socket) => TcpStream::from_std(socket.into())?,
            Self::Awaited(stream) => stream,
        };
        stream.set_nodelay(true)?;
        Ok(stream)
    }
}
