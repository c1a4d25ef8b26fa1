//! The kernel's sockets: which of their fields the programs read, and what these say about a
//! connection.

use crate::Failure;

/// The priority (`SO_PRIORITY`) of the sockets that the agent's checks connect with: the connect programs leave
/// them alone. It would be a class of a queueing discipline with the handle 6d65:, and means nothing to any
/// other, nor to routing, as a mark would.
pub const CHECK_PRIORITY: u32 = 0x6d65_7368;

/// A field of the kernel's sockets. Their places differ between kernels: the agent finds them in the
/// kernel's type information (BTF) and hands them to the programs, in the order of [`Field::ALL`].
#[repr(u32)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Field {
    /// 8 bytes: the socket's cookie; 0 when it has none yet.
    Cookie,
    /// 1 byte: the state of TCP.
    State,
    /// 2 bytes: the peer's port, in network byte order.
    PeerPort,
    /// 4 bytes: an `errno`, 0 for none.
    Error,
    /// 4 bytes: an `errno` that was not believed at once.
    SoftError,
    /// Two pointers: the first and the last error in its queue (`sk_buff`); the field itself when there is
    /// none.
    ErrorQueue,
    /// Not in the socket but in an error of its queue: where the kernel's code keeps its own.
    ErrorOwn,
    /// 8 bytes in that: an `errno`, who says so, and the type and the code of an ICMP message ([`Said`]).
    ErrorSaid,
    /// A pointer: who has it open; null when nobody has.
    Owner,
    /// 8 bytes: acknowledged by the peer; the SYN counts.
    BytesAcked,
    /// 8 bytes: received; the peer's FIN counts.
    BytesReceived,
    /// 4 bytes: the next sequence number expected.
    ReceiveNext,
    /// 4 bytes: segments sent.
    SegmentsOut,
    /// 4 bytes: segments sent more than once.
    Retransmitted,
    /// 4 bytes: segments that are not acknowledged.
    InFlight,
    /// 4 bytes: the smoothed round-trip time, in eighths of a microsecond.
    SmoothedRtt,
}

impl Field {
    /// All of them: the kernel's struct, and the field in it or in one that it begins with.
    pub const ALL: [(Self, &str, &str); 16] = [
        (Self::Cookie, "sock", "skc_cookie"),
        (Self::State, "sock", "skc_state"),
        (Self::PeerPort, "sock", "skc_dport"),
        (Self::Error, "sock", "sk_err"),
        (Self::SoftError, "sock", "sk_err_soft"),
        (Self::ErrorQueue, "sock", "sk_error_queue"),
        (Self::ErrorOwn, "sk_buff", "cb"),
        (Self::ErrorSaid, "sock_exterr_skb", "ee"),
        (Self::Owner, "sock", "sk_socket"),
        (Self::BytesAcked, "tcp_sock", "bytes_acked"),
        (Self::BytesReceived, "tcp_sock", "bytes_received"),
        (Self::ReceiveNext, "tcp_sock", "rcv_nxt"),
        (Self::SegmentsOut, "tcp_sock", "segs_out"),
        (Self::Retransmitted, "tcp_sock", "total_retrans"),
        (Self::InFlight, "tcp_sock", "packets_out"),
        (Self::SmoothedRtt, "tcp_sock", "srtt_us"),
    ];
}

/// Where they are, in bytes from the start of their struct.
pub type Places = [u32; Field::ALL.len()];

/// What an error that a socket reports means for its connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// It goes on.
    Nothing,
    /// It is over, which says nothing about the backend.
    Over,
    /// It is over, and the backend, or the way to it, is the reason.
    Failed(Failure),
    /// Somebody says that it fails, and it goes on until its application asks, or a SYN that is sent again
    /// gets the same answer.
    Warned(Failure),
}

/// Linux's numbers, the same on all architectures that it runs BPF programs on but MIPS.
pub mod errno {
    /// Forbidden: what an ICMPv6 message of a firewall becomes.
    pub const EACCES: i32 = 13;
    /// Reset by the peer; given up by this side.
    pub const ECONNRESET: i32 = 104;
    /// No answer.
    pub const ETIMEDOUT: i32 = 110;
    /// Refused.
    pub const ECONNREFUSED: i32 = 111;
    /// No way to the host.
    pub const EHOSTUNREACH: i32 = 113;
}

/// The last error in a socket's queue, as the kernel keeps it for `MSG_ERRQUEUE`: the first 8 bytes of
/// `sock_extended_err`. Time stamps and what was sent without a copy lie there too.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Said(pub u64);

impl Said {
    /// Nobody says anything.
    pub const NOTHING: Self = Self(0);
    /// `SO_EE_ORIGIN_ICMP` and the type of "destination unreachable".
    const ICMP: u64 = 2 | 3 << 8;
    /// `SO_EE_ORIGIN_ICMP6` likewise.
    const ICMP6: u64 = 3 | 1 << 8;

    /// From its parts: an `errno`, the origin, the type and the code.
    #[must_use]
    pub const fn new(error: i32, origin: u8, kind: u8, code: u8) -> Self {
        let said = [origin, kind, code, 0];
        let (low, high) = (error.to_ne_bytes(), said);
        let bytes = [low[0], low[1], low[2], low[3], high[0], high[1], high[2], high[3]];
        Self(u64::from_ne_bytes(bytes))
    }

    /// The `errno` of a destination that cannot be reached, and the message's code. A TTL that was too short,
    /// perhaps on purpose, and a packet that was too big are none.
    #[inline(always)]
    const fn unreachable(self) -> Option<(i32, u8)> {
        let [a, b, c, d, origin, kind, code, _] = self.0.to_ne_bytes();
        match origin as u64 | (kind as u64) << 8 {
            Self::ICMP | Self::ICMP6 => Some((i32::from_ne_bytes([a, b, c, d]), code)),
            _ => None,
        }
    }

    /// What it says of a connect that has not been answered. What fails otherwise (no route, no such protocol)
    /// is not the backend's failure.
    #[inline(always)]
    #[must_use]
    pub const fn failure(self) -> Option<Failure> {
        match self.unreachable() {
            Some((error, _)) => failure(error),
            None => None,
        }
    }

    /// The same of a datagram: only what also those are told who have not asked for it (`IP_RECVERR`), and which
    /// therefore is no router's passing trouble.
    #[inline(always)]
    const fn datagram_failure(self) -> Option<Failure> {
        match self.unreachable() {
            // A host, or anything, that is prohibited (`icmp_err_convert`).
            Some((errno::EHOSTUNREACH, 10 | 13)) => Some(Failure::Unreachable),
            Some((errno::EHOSTUNREACH, _)) | None => None,
            Some((error, _)) => failure(error),
        }
    }
}

/// What an `errno` that comes from an ICMP message for the first packet says. IPv6 has one of its own for what
/// a firewall forbids, which with IPv4 is a host that cannot be reached.
#[inline(always)]
#[must_use]
pub const fn failure(error: i32) -> Option<Failure> {
    match error {
        errno::ECONNREFUSED => Some(Failure::Refused),
        errno::EHOSTUNREACH | errno::EACCES => Some(Failure::Unreachable),
        _ => None,
    }
}

/// Judges an error that a connected datagram socket reports: what came back was an ICMP message for a
/// datagram of this very socket (`__udp4_lib_err`). Who asks for the error does so after it was reported,
/// but not always after it is looked at here: what was fetched is not counted, unless it is in the queue too,
/// where all lies that is told to those who ask for more (`IP_RECVERR`): of routers, and of a TTL that was too
/// short on purpose.
#[inline(always)]
#[must_use]
pub const fn judge_datagram(error: i32, said: Said) -> Option<Failure> {
    match (error, said) {
        (errno::ECONNREFUSED, _) | (_, Said::NOTHING) => failure(error),
        _ => said.datagram_failure(),
    }
}

/// What is seen of a TCP socket that reports an error.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Seen {
    /// `sk_err`; 0 when somebody has asked for it already.
    pub error: i32,
    /// The peer has acknowledged at least the SYN (`bytes_acked`), and the socket was not
    /// disconnected since.
    pub connected: bool,
    /// It has received data or the peer's FIN (`bytes_received`), likewise.
    pub answered: bool,
    /// Its state is `TCP_CLOSE`.
    pub closed: bool,
    /// It has no peer (any more).
    pub disconnected: bool,
    /// It has sent something more than once.
    pub repeated: bool,
    /// Somebody said that it fails, which was not believed at once (`sk_err_soft`: the socket was locked, as it
    /// is in connect(2) when the answer is there at once). It is gone when somebody asked for it (`SO_ERROR`).
    pub soft: Option<Failure>,
    /// The same from the queue of errors ([`Said::failure`]), where with IPv4 all that is said to a connect lies
    /// also when nobody asked to be told (`tcp_v4_err`), with IPv6 only what somebody asked for. It stays there
    /// when the socket connects again.
    pub said: Option<Failure>,
    /// What is said to a connect is not queued unless somebody asks for that: it is one of IPv6.
    pub unqueued: bool,
    /// The backend was blamed for this connect ([`crate::Held::is_told`]).
    pub told: bool,
}

/// Judges an error that a TCP socket reports (`sk_error_report`), which is told after the kernel has
/// woken who waits for it. So the error may have been fetched already, by an application on another
/// CPU, and is so always by the parent of an MPTCP subflow: then what the kernel did to the socket
/// says what it was. A peer's reset was seen before ([`judge_reset`]).
///
/// `tcp_disconnect` (a connect to `AF_UNSPEC`, a close with `SO_LINGER` 0) reports `ECONNRESET`, or
/// nothing, after it has taken the peer away and set the counters to 0: that says nothing about the
/// backend. Neither do `ECONNABORTED` (the socket was destroyed by an administrator), `ENETUNREACH`
/// (there is no route) and `EPERM` (this node forbids it). `EACCES` is no socket's error when this node
/// forbids it, since then connect(2) fails: a firewall's ICMPv6 message says so.
///
/// What is said while the socket is locked is first reported as no error at all; the queue says what it is.
#[inline(always)]
#[must_use]
pub const fn judge(seen: Seen) -> Outcome {
    let Seen { error, connected, answered, closed, disconnected, .. } = seen;
    match error {
        errno::ECONNREFUSED if !connected => Outcome::Failed(Failure::Refused),
        errno::EHOSTUNREACH | errno::EACCES if !connected => Outcome::Failed(Failure::Unreachable),
        errno::ETIMEDOUT if !answered => Outcome::Failed(Failure::Timeout),
        errno::ECONNRESET | errno::ETIMEDOUT => Outcome::Over,
        // Fetched.
        0 if closed && !disconnected && !answered => match reason(seen) {
            Some(failure) => Outcome::Failed(failure),
            None => Outcome::Over,
        },
        // An error that a socket reports before it is connected ends the attempt; later, the
        // application may only have asked to be told (`IP_RECVERR`).
        0 if closed => Outcome::Over,
        0 => match seen.said {
            Some(failure) if !connected && !disconnected => Outcome::Warned(failure),
            _ => Outcome::Nothing,
        },
        _ if closed || !connected => Outcome::Over,
        _ => Outcome::Nothing,
    }
}

/// Why the kernel gave a connection up, when nobody says: what has sent its SYN or its data again has
/// waited for an answer; otherwise somebody said at once that there will be none.
#[inline(always)]
const fn reason(seen: Seen) -> Option<Failure> {
    if seen.connected {
        return if seen.repeated && seen.soft.is_none() { Some(Failure::Timeout) } else { None };
    }
    match warned(seen) {
        None if seen.repeated => Some(Failure::Timeout),
        None => Some(Failure::Unreachable),
        warned => warned,
    }
}

/// What somebody said of a connect that has not been answered.
#[inline(always)]
const fn warned(seen: Seen) -> Option<Failure> {
    if seen.soft.is_some() { seen.soft } else { seen.said }
}

/// Judges the end of a TCP socket whose record nobody has released: nothing when that says nothing
/// about the backend. `given_up`: it has sent something, and has nothing in flight.
///
/// A connect that the kernel gave up has a peer, was never answered, and has nothing in flight any
/// more. One that the application gave up has its SYN in flight, or never sent one, because it waited
/// for data to go with it (`TCP_FASTOPEN_CONNECT`); that says something of the backend only when somebody had
/// told of a failure before. Normally the kernel has reported that error, but
/// nobody need have seen it: a tracing program is not run while it runs on the same CPU. Why it was
/// given up is judged as in [`judge`].
///
/// What is in the queue, and the soft error, may be of an earlier connect of this socket, as neither
/// `tcp_disconnect` nor the next connect clears them: they count when the backend was blamed for this one, and
/// the soft error of IPv6, where nothing else tells. A backend that was blamed before a SYN was sent again was so
/// by what somebody said, although the application may have taken all of it away (`MSG_ERRQUEUE`, `SO_ERROR`).
#[inline(always)]
#[must_use]
pub const fn judge_end(seen: Seen, given_up: bool) -> Option<Failure> {
    match given_up {
        _ if seen.connected || seen.disconnected => None,
        true => reason(seen),
        false if seen.told && !seen.repeated => reason(seen),
        false if seen.told => warned(seen),
        false if seen.unqueued => seen.soft,
        false => None,
    }
}

/// Judges the end of a connection that its application dissolved (`tcp_disconnect`: a close with `SO_LINGER` 0, a
/// connect to `AF_UNSPEC`), when [`judge`] says that it is over: it has failed when that was said before, and its
/// SYN was not answered since. The queue outlives that, the counters do not.
#[inline(always)]
#[must_use]
pub const fn judge_dissolved(seen: Seen, was_answered: bool) -> Option<Failure> {
    if seen.told && seen.disconnected && !was_answered { seen.said } else { None }
}

/// Judges a peer's reset of a socket that its application has not closed: nothing when the peer had
/// answered before. See [`Seen`].
#[inline(always)]
#[must_use]
pub const fn judge_reset(connected: bool, answered: bool) -> Option<Failure> {
    match (connected, answered) {
        (false, _) => Some(Failure::Refused),
        (true, false) => Some(Failure::Reset),
        (true, true) => None,
    }
}

const _: () = {
    let mut at = 0;
    while at < Field::ALL.len() {
        assert!(Field::ALL[at].0 as usize == at);
        at += 1;
    }
};

#[cfg(test)]
mod tests;
