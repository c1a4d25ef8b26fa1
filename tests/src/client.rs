//! Ways in which programs connect, and what came of it.
//!
//! `mesh-client` runs these in a process of its own, because a socket belongs to the cgroup that
//! its process was in when it made the socket.

use std::io::{self, Read, Write};
use std::mem::MaybeUninit;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use crate::sys;

/// No step of a connection takes longer.
const LIMIT: Duration = Duration::from_secs(10);

/// What a client sends to learn who answers.
pub const QUESTION: &[u8] = b"who\n";

/// How a client connects.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub enum Way {
    /// connect(2) that waits.
    Blocking,
    /// connect(2) that does not wait, then poll(2) and `SO_ERROR`.
    Nonblocking,
    /// The same, but what poll(2) tells first is believed, also an error alone: curl, Go's and Python's.
    Prompt,
    /// The same of a socket of `AF_INET6` and the IPv4-mapped form of the address.
    PromptMapped,
    /// The same, and a close by a reset, whatever came of it (`SO_LINGER` 0).
    PromptReset,
    /// The same, and the queue of errors is read before `SO_ERROR`.
    PromptQueue,
    /// connect(2) that does not wait, and `SO_ERROR` at once; then as [`Way::Nonblocking`].
    AtOnce,
    /// An io_uring request.
    Uring,
    /// sendto(2) with `MSG_FASTOPEN`: the question travels in the SYN when the server allows it.
    FastOpen,
    /// A socket of `IPPROTO_MPTCP`.
    Mptcp,
    /// A socket of `AF_INET6` and the IPv4-mapped form of the address.
    Mapped,
    /// connect(2) that waits, and a close that waits for nothing to be left: not a reset, as all others
    /// have it to leave no port behind.
    Orderly,
    /// A socket of `AF_INET6` that is given an IPv4 address as `sockaddr_in`.
    WrongFamily,
}

/// What came of a connection.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Outcome {
    /// Who answered.
    pub backend: Option<String>,
    /// What getpeername(2) says.
    pub peer: Option<SocketAddr>,
    /// Whether the SYN carried the question.
    pub question_in_syn: bool,
    /// What failed: `connect: ECONNREFUSED`, for instance.
    pub error: Option<String>,
}

/// A step that failed.
#[derive(Debug)]
pub struct Failure {
    step: &'static str,
    error: io::Error,
}

/// Connects, asks, and tells what came of it.
#[must_use]
pub fn ask(way: Way, address: SocketAddr) -> Outcome {
    let mut outcome = Outcome::default();
    if let Err(failure) = attempt(way, address, &mut outcome) {
        outcome.error = Some(failure.to_string());
    }
    outcome
}

/// Makes a socket, calls `before`, connects it and asks who answers, and has it open until `after`
/// is done, which gets what came of it.
pub fn ask_between(
    address: SocketAddr,
    before: impl FnOnce() -> io::Result<()>,
    after: impl FnOnce(&Outcome),
) {
    let mut outcome = Outcome::default();
    let made = open(Domain::for_address(address), Protocol::TCP);
    let result = made.and_then(|socket| {
        before().at("before connect")?;
        socket.connect(&address.into()).at("connect")?;
        outcome.peer = peer(&socket)?;
        outcome.backend = Some(exchange(&socket, true)?);
        Ok(socket)
    });
    outcome.error = result.as_ref().err().map(ToString::to_string);
    after(&outcome);
}

/// Connects to `first`, dissolves that, connects *the same socket* to `second`, and asks there.
/// Both outcomes carry what getpeername(2) said; only the second asks.
#[must_use]
pub fn reconnect(first: SocketAddr, second: SocketAddr) -> [Outcome; 2] {
    let mut outcomes = [Outcome::default(), Outcome::default()];
    let [before, after] = &mut outcomes;
    let result = (|| {
        let socket = open(Domain::for_address(first), Protocol::TCP)?;
        socket.connect(&first.into()).at("connect")?;
        before.peer = peer(&socket)?;
        sys::socket::disconnect(&socket).at("disconnect")?;
        socket.connect(&second.into()).at("reconnect")?;
        after.peer = peer(&socket)?;
        after.backend = Some(exchange(&socket, true)?);
        Ok::<_, Failure>(())
    })();
    if let Err(failure) = result {
        after.error = Some(failure.to_string());
    }
    outcomes
}

/// Begins to connect to `first`, dissolves that, begins to connect *the same socket* to `second`, and closes:
/// nobody asks what came of either.
#[must_use]
pub fn abandon(first: SocketAddr, second: SocketAddr) -> Outcome {
    let result = (|| {
        let socket = open(Domain::for_address(first), Protocol::TCP)?;
        socket.set_nonblocking(true).at("O_NONBLOCK")?;
        begin(&socket, &first.into())?;
        sys::socket::disconnect(&socket).at("disconnect")?;
        begin(&socket, &second.into())
    })();
    Outcome { error: result.err().map(|failure| failure.to_string()), ..Outcome::default() }
}

fn attempt(way: Way, address: SocketAddr, outcome: &mut Outcome) -> Result<(), Failure> {
    let domain = match way {
        Way::Mapped | Way::PromptMapped | Way::WrongFamily => Domain::IPV6,
        _ => Domain::for_address(address),
    };
    let protocol = if way == Way::Mptcp { Protocol::MPTCP } else { Protocol::TCP };
    let socket = open(domain, protocol)?;
    let is_mapped = matches!(way, Way::Mapped | Way::PromptMapped);
    let target = SockAddr::from(if is_mapped { mapped(address) } else { address });
    if way == Way::PromptReset {
        socket.set_linger(Some(Duration::ZERO)).at("SO_LINGER")?;
    }
    match way {
        Way::Nonblocking
        | Way::Prompt
        | Way::PromptMapped
        | Way::PromptReset
        | Way::PromptQueue
        | Way::AtOnce => connect_nonblocking(&socket, &target, way)?,
        Way::Uring => sys::socket::connect_by_uring(&socket, &target).at("connect")?,
        Way::FastOpen => {
            socket
                .send_to_with_flags(QUESTION, &target, libc::MSG_FASTOPEN)
                .at("sendto MSG_FASTOPEN")?;
        }
        _ => socket.connect(&target).at("connect")?,
    }
    outcome.peer = peer(&socket)?;
    outcome.backend = Some(exchange(&socket, way != Way::FastOpen)?);
    if way == Way::Orderly {
        socket.set_linger(None).at("SO_LINGER")?;
    }
    if way == Way::FastOpen {
        outcome.question_in_syn = sys::socket::syn_carried_data(&socket).at("TCP_INFO")?;
    }
    Ok(())
}

fn open(domain: Domain, protocol: Protocol) -> Result<Socket, Failure> {
    let socket = Socket::new(domain, Type::STREAM, Some(protocol)).at("socket")?;
    socket.set_write_timeout(Some(LIMIT)).at("SO_SNDTIMEO")?;
    socket.set_read_timeout(Some(LIMIT)).at("SO_RCVTIMEO")?;
    Ok(socket)
}

fn connect_nonblocking(socket: &Socket, target: &SockAddr, way: Way) -> Result<(), Failure> {
    socket.set_nonblocking(true).at("O_NONBLOCK")?;
    begin(socket, target)?;
    match way {
        Way::Nonblocking => {}
        Way::AtOnce => succeeded(socket)?,
        _ => sys::socket::wait_told(socket, LIMIT).at("poll")?,
    }
    if way == Way::PromptQueue {
        // Mostly there is nothing.
        let _ = socket.recv_with_flags(&mut [MaybeUninit::uninit(); 64], libc::MSG_ERRQUEUE);
    }
    if matches!(way, Way::Nonblocking | Way::AtOnce) {
        sys::socket::wait_writable(socket, LIMIT).at("poll")?;
    }
    succeeded(socket)?;
    socket.set_nonblocking(false).at("O_NONBLOCK")
}

/// connect(2) of a socket that does not wait.
fn begin(socket: &Socket, target: &SockAddr) -> Result<(), Failure> {
    match socket.connect(target) {
        Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => Ok(()),
        other => other.at("connect"),
    }
}

fn succeeded(socket: &Socket) -> Result<(), Failure> {
    match socket.take_error().at("SO_ERROR")? {
        Some(error) => Err(error).at("connect"),
        None => Ok(()),
    }
}

fn peer(socket: &Socket) -> Result<Option<SocketAddr>, Failure> {
    Ok(socket.peer_addr().at("getpeername")?.as_socket())
}

/// Asks who is there, and closes without leaving the port in TIME_WAIT.
fn exchange(mut socket: &Socket, send: bool) -> Result<String, Failure> {
    if send {
        socket.write_all(QUESTION).at("send")?;
    }
    let mut answer = String::new();
    socket.read_to_string(&mut answer).at("receive")?;
    if answer.is_empty() {
        // A server that was killed: its kernel had accepted the connection.
        return Err(io::ErrorKind::UnexpectedEof.into()).at("receive");
    }
    socket.set_linger(Some(Duration::ZERO)).at("SO_LINGER")?;
    Ok(answer.trim_end().to_owned())
}

/// The plain way, as fast as possible: for [`crate::storm`].
pub(crate) fn ask_fast(address: SocketAddr) -> Result<String, Failure> {
    let socket = open(Domain::for_address(address), Protocol::TCP)?;
    socket.connect(&address.into()).at("connect")?;
    exchange(&socket, true)
}

fn mapped(address: SocketAddr) -> SocketAddr {
    match address.ip() {
        IpAddr::V4(ip) => SocketAddr::new(ip.to_ipv6_mapped().into(), address.port()),
        IpAddr::V6(_) => address,
    }
}

// === impl Failure ===

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.step, errno_name(&self.error))
    }
}

trait At<T> {
    fn at(self, step: &'static str) -> Result<T, Failure>;
}

impl<T> At<T> for io::Result<T> {
    fn at(self, step: &'static str) -> Result<T, Failure> {
        self.map_err(|error| Failure { step, error })
    }
}

/// The symbol of the error numbers that a connect may meet; others in words.
pub(crate) fn errno_name(error: &io::Error) -> String {
    let name = match error.raw_os_error() {
        Some(libc::ECONNREFUSED) => "ECONNREFUSED",
        Some(libc::ENETUNREACH) => "ENETUNREACH",
        Some(libc::EHOSTUNREACH) => "EHOSTUNREACH",
        Some(libc::ECONNRESET) => "ECONNRESET",
        Some(libc::ETIMEDOUT) => "ETIMEDOUT",
        Some(libc::EAFNOSUPPORT) => "EAFNOSUPPORT",
        Some(libc::EINVAL) => "EINVAL",
        Some(libc::EPERM) => "EPERM",
        Some(libc::EADDRNOTAVAIL) => "EADDRNOTAVAIL",
        Some(libc::EAGAIN) => "EAGAIN",
        Some(libc::ECONNABORTED) => "ECONNABORTED",
        Some(libc::EDESTADDRREQ) => "EDESTADDRREQ",
        Some(libc::ENOTCONN) => "ENOTCONN",
        _ => return error.to_string(),
    };
    name.to_owned()
}
