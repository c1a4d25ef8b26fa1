//! Which TCP and UDP sockets a network namespace has: a dump of `NETLINK_SOCK_DIAG` (sock_diag(7)).
//!
//! The kernel looks through its tables of sockets that have a port or a peer. **A socket in neither
//! is not found**, though an application may hold it: one that never had a port, one whose connect
//! has failed at once, one whose connection has ended on both sides, and a datagram socket that was
//! disconnected (`AF_UNSPEC`). None of these has a connection.
//!
//! Nor is a dump a snapshot: it goes on from a position in a table that changes meanwhile
//! (`inet_diag_dump_icsk`), so it can, rarely, leave out a socket that is there. Who acts on what
//! was not found looks twice.
//!
//! Of each message only the fixed part is parsed, with the crate's types. Its parser for whole
//! messages would refuse one because of an attribute that it finds malformed, and nothing here
//! needs attributes.

use std::io;
use std::time::{Duration, Instant};

use netlink_packet_core::{
    DecodeError, DoneBuffer, ErrorBuffer, NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST,
    NLMSG_DONE, NLMSG_ERROR, NLMSG_OVERRUN, NetlinkBuffer, NetlinkMessage, Parseable as _,
};
use netlink_packet_sock_diag::constants::{
    AF_INET, AF_INET6, SOCK_DESTROY, SOCK_DIAG_BY_FAMILY, TCP_SYN_RECV,
};
use netlink_packet_sock_diag::inet::{
    ExtensionFlags, InetRequest, InetResponseHeader, SocketId, StateFlags, Timer,
};
use netlink_packet_sock_diag::message::SockDiagMessage;
use netlink_sys::protocols::NETLINK_SOCK_DIAG;
use netlink_sys::{Socket as Netlink, SocketAddr};
use rustix::net::sockopt::{Timeout, set_socket_timeout};

/// The kernel makes no larger datagrams in a dump (`netlink_dump`), and as large ones as the last
/// buffer was: the larger, the fewer positions at which the dump is interrupted.
const BUFFER: usize = 32 * 1024;

/// How often an interrupted dump is begun in all.
const ATTEMPTS: usize = 3;

/// How long listing one namespace may take.
const LONGEST: Duration = Duration::from_secs(10);

/// How long the kernel may take for one datagram.
const LONGEST_READ: Duration = Duration::from_secs(2);

/// The pseudo state of sockets that are bound and nothing else (`TCPF_BOUND_INACTIVE`, Linux 6.8;
/// an older kernel ignores it).
const BOUND_INACTIVE: u32 = 1 << 13;

/// A socket that exists.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Socket {
    /// What `SO_COOKIE` and `bpf_get_socket_cookie` give. Never used again.
    pub cookie: u64,
    /// Its protocol, an IANA number.
    pub protocol: u8,
    /// Number of the state in `include/net/tcp_states.h`; of a UDP socket 1 when it is connected,
    /// otherwise 7.
    pub state: u8,
    /// The inode by which processes hold it; 0 when none does any more.
    pub inode: u32,
    /// Its family, `AF_INET` or `AF_INET6`.
    pub family: u8,
    /// Its addresses and ports.
    pub id: SocketId,
    /// How often in a row what comes first of what was sent was sent again without being acknowledged.
    pub retransmits: u8,
    /// How many bytes (and SYN or FIN) were sent or wait to be, and are not acknowledged.
    pub unacknowledged: u32,
}

/// How a dump has ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum End {
    /// Regularly.
    Complete,
    /// It was interrupted each time, or took too long: there may be more sockets.
    Incomplete,
}

/// Calls `each` for every socket of a protocol (its IANA number) in the calling thread's network
/// namespace, of IPv4 and IPv6:
/// those with a `struct sock` of their own, so not for `TIME_WAIT` and not for a connection that a
/// listening socket is still being asked for. A subflow of MPTCP is a TCP socket, with a cookie of
/// its own. When a dump is repeated, sockets are named again.
///
/// # Errors
///
/// Those of netlink(7), and what the kernel answers: `ENOENT` when it has no `tcp_diag` or `udp_diag`;
/// `InvalidData` when it is not understood.
pub fn dump(protocol: u8, mut each: impl FnMut(Socket)) -> io::Result<End> {
    let deadline = Instant::now() + LONGEST;
    for kind in [(AF_INET, protocol), (AF_INET6, protocol)] {
        let mut attempts = ATTEMPTS;
        while attempt(kind, deadline, &mut each)? == End::Incomplete {
            attempts -= 1;
            if attempts == 0 || Instant::now() >= deadline {
                return Ok(End::Incomplete);
            }
        }
    }
    Ok(End::Complete)
}

/// Of a family and a protocol.
fn attempt(kind: (u8, u8), deadline: Instant, each: &mut impl FnMut(Socket)) -> io::Result<End> {
    // A new one each time: nothing is left in it of a dump that was given up.
    let netlink = Netlink::new(NETLINK_SOCK_DIAG)?;
    set_socket_timeout(&netlink, Timeout::Recv, Some(LONGEST_READ))?;
    // From now on only the kernel can send to it.
    netlink.connect(&SocketAddr::new(0, 0))?;
    netlink.send(&request(kind), 0)?;
    let mut datagram = Vec::with_capacity(BUFFER);
    let mut end = End::Complete;
    while Instant::now() < deadline {
        datagram.clear();
        let length = match netlink.recv(&mut datagram, libc::MSG_TRUNC) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            // The kernel had no memory for a part, or no time.
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOBUFS | libc::EAGAIN)) => {
                return Ok(End::Incomplete);
            }
            result => result?,
        };
        if length > datagram.len() {
            return Ok(End::Incomplete);
        }
        let part = parse(&datagram, kind.1, each)?;
        if part.interrupted {
            end = End::Incomplete;
        }
        if part.last {
            return Ok(end);
        }
    }
    Ok(End::Incomplete)
}

/// Ends a socket of the calling thread's network namespace, as an administrator can (`ss -K`): a TCP peer
/// gets a reset, and the application `ECONNABORTED`, on a datagram socket too, which is disconnected
/// then. `false` when it has ended already.
///
/// # Errors
///
/// Those of netlink(7), and what the kernel answers: `EOPNOTSUPP` when it is built without
/// `CONFIG_INET_DIAG_DESTROY`.
pub fn destroy(socket: &Socket) -> io::Result<bool> {
    let netlink = Netlink::new(NETLINK_SOCK_DIAG)?;
    set_socket_timeout(&netlink, Timeout::Recv, Some(LONGEST_READ))?;
    netlink.connect(&SocketAddr::new(0, 0))?;
    netlink.send(&order(socket), 0)?;
    let mut datagram = Vec::with_capacity(BUFFER);
    netlink.recv(&mut datagram, 0)?;
    let message = NetlinkBuffer::new_checked(&datagram).map_err(not_understood)?;
    let error = ErrorBuffer::new_checked(message.payload()).map_err(not_understood)?;
    match check(error.code().map_or(0, i32::from)) {
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        result => result.map(|()| true),
    }
}

fn order(socket: &Socket) -> Vec<u8> {
    let mut message = NetlinkMessage::from(SockDiagMessage::InetRequest(InetRequest {
        family: socket.family,
        protocol: socket.protocol,
        extensions: ExtensionFlags::empty(),
        states: StateFlags::all(),
        // With the cookie, so it can be no other socket.
        socket_id: socket.id.clone(),
    }));
    message.header.flags = NLM_F_REQUEST | NLM_F_ACK;
    message.finalize();
    // `finalize` knows the question only, which has the same form.
    message.header.message_type = SOCK_DESTROY;
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    bytes
}

fn request((family, protocol): (u8, u8)) -> Vec<u8> {
    let socket_id = if family == AF_INET { SocketId::new_v4() } else { SocketId::new_v6() };
    let states = StateFlags::all().difference(StateFlags::TIME_WAIT).bits() | BOUND_INACTIVE;
    let mut message = NetlinkMessage::from(SockDiagMessage::InetRequest(InetRequest {
        family,
        protocol,
        extensions: ExtensionFlags::empty(),
        states: StateFlags::from_bits_retain(states),
        socket_id,
    }));
    message.header.flags = NLM_F_REQUEST | NLM_F_DUMP;
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    bytes
}

/// What a datagram says about the dump.
#[derive(PartialEq, Eq, Debug, Default)]
struct Part {
    /// The table has changed in a way that the kernel reports.
    interrupted: bool,
    /// Nothing follows.
    last: bool,
}

fn parse(datagram: &[u8], protocol: u8, each: &mut impl FnMut(Socket)) -> io::Result<Part> {
    let mut part = Part::default();
    let mut rest = datagram;
    while !rest.is_empty() && !part.last {
        let message = NetlinkBuffer::new_checked(rest).map_err(not_understood)?;
        part.interrupted |= message.flags() & NLM_F_DUMP_INTR != 0;
        match message.message_type() {
            SOCK_DIAG_BY_FAMILY => {
                let header =
                    InetResponseHeader::parse(message.payload()).map_err(not_understood)?;
                if is_whole(&header) {
                    each(Socket {
                        cookie: cookie(header.socket_id.cookie),
                        protocol,
                        state: header.state,
                        inode: header.inode,
                        family: header.family,
                        id: header.socket_id,
                        retransmits: match header.timer {
                            Some(Timer::Retransmit(_, times)) => times,
                            _ => 0,
                        },
                        unacknowledged: header.send_queue,
                    });
                }
            }
            NLMSG_ERROR => {
                let error = ErrorBuffer::new_checked(message.payload()).map_err(not_understood)?;
                check(error.code().map_or(0, i32::from))?;
            }
            NLMSG_DONE => {
                // The kernel may leave the code out.
                if !message.payload().is_empty() {
                    let done =
                        DoneBuffer::new_checked(message.payload()).map_err(not_understood)?;
                    check(done.code())?;
                }
                part.last = true;
            }
            NLMSG_OVERRUN => part.interrupted = true,
            _ => {}
        }
        // Messages begin at multiples of 4 bytes; the last one is not always padded.
        let length = message.length() as usize;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(part)
}

/// Of `idiag_cookie`: two 32-bit words in the machine's byte order, the low one first
/// (`sock_diag_save_cookie`).
fn cookie([a, b, c, d, e, f, g, h]: [u8; 8]) -> u64 {
    let (low, high) = (u32::from_ne_bytes([a, b, c, d]), u32::from_ne_bytes([e, f, g, h]));
    u64::from(high) << 32 | u64::from(low)
}

/// Whether it is a socket with a `struct sock` of its own.
fn is_whole(header: &InetResponseHeader) -> bool {
    // What is left of a socket in `TIME_WAIT` is also shown as `FIN_WAIT2`
    // (`inet_twsk_diag_fill`), and with `SYN_RECV` come the requests of listening sockets
    // (`inet_req_diag_fill`). The latter have no inode; an active open in this state has.
    let is_request = header.state == TCP_SYN_RECV && header.inode == 0;
    header.timer != Some(Timer::TimeWait) && !is_request
}

/// Of a code that is 0 or a negative `errno`.
fn check(code: i32) -> io::Result<()> {
    if code < 0 { Err(io::Error::from_raw_os_error(code.saturating_neg())) } else { Ok(()) }
}

#[expect(clippy::needless_pass_by_value, reason = "it is passed to map_err")]
fn not_understood(error: DecodeError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error.to_string())
}

#[cfg(test)]
mod tests {
    use netlink_packet_sock_diag::constants::IPPROTO_TCP;

    use super::*;

    /// A message as the kernel makes it, padded.
    fn message(kind: u16, flags: u16, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(16 + payload.len()).expect("short");
        let mut bytes = [length.to_ne_bytes(), [0; 4], [0; 4], [0; 4]].concat();
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        bytes[6..8].copy_from_slice(&flags.to_ne_bytes());
        bytes.extend_from_slice(payload);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    /// `struct inet_diag_msg`, and what follows it.
    fn socket(state: u8, timer: u8, inode: u32, cookie: [u32; 2], attributes: &[u8]) -> Vec<u8> {
        let mut payload = vec![0; 72];
        payload[..3].copy_from_slice(&[AF_INET, state, timer]);
        payload[44..48].copy_from_slice(&cookie[0].to_ne_bytes());
        payload[48..52].copy_from_slice(&cookie[1].to_ne_bytes());
        payload[68..].copy_from_slice(&inode.to_ne_bytes());
        payload.extend_from_slice(attributes);
        message(SOCK_DIAG_BY_FAMILY, 0, &payload)
    }

    fn parsed(datagram: &[u8]) -> io::Result<(Part, Vec<Socket>)> {
        let mut sockets = Vec::new();
        let part = parse(datagram, IPPROTO_TCP, &mut |socket| sockets.push(socket))?;
        Ok((part, sockets))
    }

    #[test]
    fn every_state_but_one_is_asked_for() {
        let bytes = request((AF_INET6, IPPROTO_TCP));
        let message = NetlinkBuffer::new_checked(&bytes).expect("a message");
        assert_eq!(message.flags(), NLM_F_REQUEST | NLM_F_DUMP);
        // `struct inet_diag_req_v2`.
        let payload = message.payload();
        assert_eq!((payload.len(), &payload[..4]), (56, &[AF_INET6, IPPROTO_TCP, 0, 0][..]));
        let time_wait_and_request = 1u32 << 6 | 1 << 12;
        assert_eq!(payload[4..8], (0x3ffe & !time_wait_and_request).to_ne_bytes());
    }

    /// The same question, but another verb, and an answer is asked for.
    #[test]
    fn an_order_names_one_socket() {
        let (_, sockets) = parsed(&socket(1, 0, 5, [2, 1], &[])).expect("understood");
        let bytes = order(&sockets[0]);
        let message = NetlinkBuffer::new_checked(&bytes).expect("a message");
        assert_eq!((message.message_type(), message.flags()), (21, NLM_F_REQUEST | NLM_F_ACK));
        let payload = message.payload();
        assert_eq!(payload[..2], [AF_INET, IPPROTO_TCP]);
        assert_eq!(payload[48..], [[2, 0, 0, 0], [1, 0, 0, 0]].concat());
    }

    #[test]
    fn sockets_and_the_end() {
        let datagram = [socket(1, 0, 5, [2, 1], &[]), message(NLMSG_DONE, 0, &[0; 4])].concat();
        let (part, sockets) = parsed(&datagram).expect("understood");
        assert_eq!(part, Part { interrupted: false, last: true });
        let found: Vec<_> = sockets.iter().map(|s| (s.cookie, s.state, s.inode)).collect();
        assert_eq!(found, [(0x1_0000_0002, 1, 5)]);
        let bare = message(NLMSG_DONE, 0, &[]);
        assert!(parsed(&bare).expect("understood").0.last, "an end without a code");
        assert_eq!(parsed(&[]).expect("understood"), (Part::default(), vec![]));
    }

    #[test]
    fn attributes_do_not_matter() {
        let unknown = [8, 0, 0xff, 0x3f, 1, 2, 3, 4];
        // INET_DIAG_SKMEMINFO with a single byte, then one that says it is longer than it is.
        let malformed = [5, 0, 7, 0, 1, 0, 0, 0, 0xff, 0xff, 1, 0];
        for attributes in [&unknown[..], &malformed] {
            let datagram =
                [socket(1, 0, 5, [1, 0], attributes), socket(1, 0, 5, [2, 0], &[])].concat();
            let (part, sockets) = parsed(&datagram).expect("understood");
            assert_eq!((part, sockets.len()), (Part::default(), 2));
        }
    }

    #[test]
    fn what_is_left_of_a_socket_is_none() {
        const TIME_WAIT_TIMER: u8 = 3;
        let datagram = [
            socket(5, TIME_WAIT_TIMER, 0, [1, 0], &[]),
            socket(TCP_SYN_RECV, 1, 0, [2, 0], &[]),
            socket(5, 0, 0, [3, 0], &[]),
            socket(TCP_SYN_RECV, 1, 5, [4, 0], &[]),
        ];
        let (_, sockets) = parsed(&datagram.concat()).expect("understood");
        let cookies: Vec<_> = sockets.iter().map(|socket| socket.cookie).collect();
        assert_eq!(cookies, [3, 4], "an orphan, and an active open that crossed another");
    }

    #[test]
    fn interruptions_and_errors() {
        let interrupted = message(NLMSG_DONE, NLM_F_DUMP_INTR, &[0; 4]);
        let part = parsed(&interrupted).expect("understood").0;
        assert_eq!(part, Part { interrupted: true, last: true });
        assert!(parsed(&message(NLMSG_OVERRUN, 0, &[])).expect("understood").0.interrupted);
        for kind in [NLMSG_ERROR, NLMSG_DONE] {
            let code = (-libc::ENOENT).to_ne_bytes();
            let error = parsed(&message(kind, 0, &[&code[..], &[0; 16]].concat()));
            let error = error.expect_err("the kernel says no");
            assert_eq!(error.raw_os_error(), Some(libc::ENOENT));
        }
    }

    #[test]
    fn what_is_cut_is_an_error() {
        let whole = socket(1, 0, 5, [1, 0], &[]);
        for length in 1..whole.len() {
            let error = parsed(&whole[..length]).expect_err("cut");
            assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{length}");
        }
        let short = message(SOCK_DIAG_BY_FAMILY, 0, &[0; 71]);
        assert!(parsed(&short).is_err(), "a message without all of its fixed part");
        let mut empty = message(NLMSG_DONE, 0, &[]);
        empty[0] = 0;
        assert!(parsed(&empty).is_err(), "a length that would lead nowhere");
    }
}
