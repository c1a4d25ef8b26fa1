//! Ways to connect a socket that the standard library and `socket2` do not have, and the clock
//! against which connects are timed.

use std::io;
use std::os::fd::AsRawFd;
use std::thread;
use std::time::{Duration, Instant};

use io_uring::{IoUring, opcode, types};
use socket2::{SockAddr, Socket};

use super::checked;

/// Dissolves the association of a socket: connect(2) to `AF_UNSPEC`.
///
/// # Errors
///
/// Those of connect(2).
pub fn disconnect(socket: &Socket) -> io::Result<()> {
    let unspecified = libc::sockaddr {
        sa_family: libc::sa_family_t::try_from(libc::AF_UNSPEC).unwrap_or_default(),
        sa_data: [0; 14],
    };
    let len = libc::socklen_t::try_from(size_of::<libc::sockaddr>()).unwrap_or_default();
    // SAFETY: the address is a whole `sockaddr` and lives through the call; the kernel only reads.
    checked(unsafe { libc::connect(socket.as_raw_fd(), &raw const unspecified, len) }).map(drop)
}

/// Connects by an io_uring request, and waits for its completion.
///
/// # Errors
///
/// Those of io_uring_setup(2), and those of connect(2) that the completion carries.
pub fn connect_by_uring(socket: &Socket, address: &SockAddr) -> io::Result<()> {
    let mut ring = IoUring::new(2)?;
    let fd = types::Fd(socket.as_raw_fd());
    let request = opcode::Connect::new(fd, address.as_ptr().cast(), address.len()).build();
    // SAFETY: the socket and the address outlive the request: this function returns only after its
    // completion, or after a failed submission, which consumes nothing.
    unsafe { ring.submission().push(&request) }.map_err(io::Error::other)?;
    ring.submit_and_wait(1)?;
    let completion = ring.completion().next().ok_or(io::ErrorKind::UnexpectedEof)?;
    match completion.result() {
        result if result < 0 => Err(io::Error::from_raw_os_error(-result)),
        _ => Ok(()),
    }
}

/// Waits until a connect in progress has ended, well or not.
///
/// That a socket has an error does not say so: over IPv4, an ICMP answer that comes while the socket is
/// locked is only queued (`tcp_v4_err`), and connecting goes on. poll(2) says so all the while.
///
/// # Errors
///
/// Those of poll(2), and `ETIMEDOUT`.
pub fn wait_writable(socket: &Socket, timeout: Duration) -> io::Result<()> {
    const PAUSE: Duration = Duration::from_millis(1);
    let end = Instant::now() + timeout;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let events = poll(socket, libc::POLLOUT, left)?;
        if events & (libc::POLLOUT | libc::POLLHUP) != 0 {
            return Ok(());
        }
        if left.is_zero() {
            return Err(io::Error::from_raw_os_error(libc::ETIMEDOUT));
        }
        // With an error queued, the next one returns at once.
        if events != 0 {
            thread::sleep(PAUSE);
        }
    }
}

/// Waits until poll(2) tells of anything, while it was asked whether the socket can be written to.
///
/// # Errors
///
/// Those of poll(2), and `ETIMEDOUT`.
pub fn wait_told(socket: &Socket, timeout: Duration) -> io::Result<()> {
    match poll(socket, libc::POLLOUT, timeout)? {
        0 => Err(io::Error::from_raw_os_error(libc::ETIMEDOUT)),
        _ => Ok(()),
    }
}

/// Waits until there is something to read, or an error.
///
/// # Errors
///
/// Those of poll(2), and `ETIMEDOUT`.
pub fn wait_readable(socket: &Socket, timeout: Duration) -> io::Result<()> {
    match poll(socket, libc::POLLIN, timeout)? {
        0 => Err(io::Error::from_raw_os_error(libc::ETIMEDOUT)),
        _ => Ok(()),
    }
}

/// Whether a connect in progress has failed.
///
/// That it has an error does not say so, see [`wait_writable`].
///
/// # Errors
///
/// Those of poll(2).
pub fn hung_up(socket: &Socket) -> io::Result<bool> {
    Ok(poll(socket, 0, Duration::ZERO)? & libc::POLLHUP != 0)
}

/// What poll(2) says of a socket; 0 when there was nothing for this long.
fn poll(socket: &Socket, events: i16, timeout: Duration) -> io::Result<i16> {
    let mut entry = libc::pollfd { fd: socket.as_raw_fd(), events, revents: 0 };
    let millis = libc::c_int::try_from(timeout.as_millis()).unwrap_or(libc::c_int::MAX);
    // SAFETY: one valid entry, which outlives the call.
    checked(unsafe { libc::poll(&raw mut entry, 1, millis) })?;
    Ok(entry.revents)
}

/// Whether the SYN of a TCP connection carried data that the peer acknowledged (TCP fast open).
///
/// # Errors
///
/// Those of getsockopt(2).
pub fn syn_carried_data(socket: &Socket) -> io::Result<bool> {
    const TCPI_OPT_SYN_DATA: u8 = 32; // linux/tcp.h
    Ok(info(socket)?.tcpi_options & TCPI_OPT_SYN_DATA != 0)
}

/// Whether a TCP socket is connecting: its SYN is sent or about to be.
///
/// # Errors
///
/// Those of getsockopt(2).
pub fn is_connecting(socket: &Socket) -> io::Result<bool> {
    const TCP_SYN_SENT: u8 = 2; // net/tcp_states.h
    Ok(info(socket)?.tcpi_state == TCP_SYN_SENT)
}

fn info(socket: &Socket) -> io::Result<libc::tcp_info> {
    // SAFETY: plain integers, for all of which zero is a value.
    let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
    let mut len = libc::socklen_t::try_from(size_of::<libc::tcp_info>()).unwrap_or_default();
    let value = (&raw mut info).cast();
    // SAFETY: `value` points to `len` writable bytes; the kernel writes at most that many.
    checked(unsafe {
        libc::getsockopt(socket.as_raw_fd(), libc::IPPROTO_TCP, libc::TCP_INFO, value, &raw mut len)
    })?;
    Ok(info)
}

/// Allows TCP fast open on a listening socket. Without effect unless the namespace allows it too
/// (`net.ipv4.tcp_fastopen`).
///
/// # Errors
///
/// Those of setsockopt(2).
pub fn allow_fast_open(listener: &impl AsRawFd, queue: libc::c_int) -> io::Result<()> {
    set_tcp(listener, libc::TCP_FASTOPEN, queue)
}

/// How often a SYN is sent again before a connect fails (`TCP_SYNCNT`).
///
/// # Errors
///
/// Those of setsockopt(2): `EOPNOTSUPP` with MPTCP.
pub fn set_syn_count(socket: &Socket, count: libc::c_int) -> io::Result<()> {
    set_tcp(socket, libc::TCP_SYNCNT, count)
}

/// Makes connect(2) wait for the first data, to send it with the SYN (`TCP_FASTOPEN_CONNECT`).
///
/// # Errors
///
/// Those of setsockopt(2).
pub fn set_fast_open_connect(socket: &Socket) -> io::Result<()> {
    set_tcp(socket, libc::TCP_FASTOPEN_CONNECT, 1)
}

fn set_tcp(socket: &impl AsRawFd, option: libc::c_int, value: libc::c_int) -> io::Result<()> {
    let len = libc::socklen_t::try_from(size_of::<libc::c_int>()).unwrap_or_default();
    let value = (&raw const value).cast();
    // SAFETY: `value` points to an integer of the length given, which lives through the call.
    checked(unsafe { libc::setsockopt(socket.as_raw_fd(), libc::IPPROTO_TCP, option, value, len) })
        .map(drop)
}

/// `CLOCK_MONOTONIC` in nanoseconds: the same for every process of the machine, which `Instant`
/// does not promise.
#[must_use]
pub fn monotonic_nanos() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `now` is writable; this clock always exists, so the call cannot fail.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    now.tv_sec.cast_unsigned() * 1_000_000_000 + now.tv_nsec.cast_unsigned()
}
