//! Fields of the kernel's sockets (`mesh_common::socket::Field`).

use core::ffi::c_void;

use aya_ebpf::helpers::{bpf_probe_read_kernel, bpf_skc_to_tcp_sock};
use aya_ebpf::programs::SockAddrContext;
use mesh_common::socket::{Field, Places, Said};

/// The places of the fields in this kernel, set by the agent.
#[unsafe(no_mangle)]
static SOCKET_FIELDS: Places = [0; Field::ALL.len()];

/// `TCP_CLOSE`.
const TCP_CLOSE: u8 = 7;

/// A `struct sock *` as a tracing program gets it.
#[derive(Clone, Copy)]
pub struct Sock(*const u8);

/// The same, known to be a `struct tcp_sock *`.
#[derive(Clone, Copy)]
pub struct TcpSock(*const u8);

impl Sock {
    /// From the argument of a program.
    #[inline(always)]
    pub fn new(sk: *const c_void) -> Self {
        Self(sk.cast())
    }

    /// Its cookie; 0 when it has none yet: then no program of ours has seen it connect.
    #[inline(always)]
    pub fn cookie(self) -> u64 {
        read(self.0, Field::Cookie)
    }

    /// Its error, if it has one.
    #[inline(always)]
    pub fn error(self) -> i32 {
        read(self.0, Field::Error)
    }

    /// The error that was not believed at once.
    #[inline(always)]
    pub fn soft_error(self) -> i32 {
        read(self.0, Field::SoftError)
    }

    /// The last error in its queue. Who is told of it may take it away at the same time: then what is read may
    /// be anything.
    #[inline(always)]
    pub fn said(self) -> Said {
        let empty = self.0.wrapping_add(place(Field::ErrorQueue));
        let last = read_at::<*const u8>(self.0, place(Field::ErrorQueue) + size_of::<usize>());
        if last == empty {
            return Said::NOTHING;
        }
        let at = last.wrapping_add(place(Field::ErrorOwn) + place(Field::ErrorSaid));
        // SAFETY: the helper checks the address itself.
        unsafe { bpf_probe_read_kernel(at.cast::<u64>()) }.map_or(Said::NOTHING, Said)
    }

    /// Whether its state is `TCP_CLOSE`.
    #[inline(always)]
    pub fn is_closed(self) -> bool {
        read::<u8>(self.0, Field::State) == TCP_CLOSE
    }

    /// Whether the application has closed it. `SOCK_DEAD` would not tell of a subflow of MPTCP, which
    /// goes on for a while without its owner (`__mptcp_close`).
    #[inline(always)]
    pub fn is_orphaned(self) -> bool {
        read::<u64>(self.0, Field::Owner) == 0
    }

    /// Whether it has no peer: it was disconnected (`tcp_disconnect`), or its connect failed before
    /// anything was sent.
    #[inline(always)]
    pub fn is_disconnected(self) -> bool {
        read::<u16>(self.0, Field::PeerPort) == 0
    }

    /// As a TCP socket; also a subflow of MPTCP is one.
    #[inline(always)]
    pub fn tcp(self) -> Option<TcpSock> {
        // SAFETY: the helper looks at the socket, and gives null when it is not TCP's.
        let tcp = unsafe { bpf_skc_to_tcp_sock(self.0.cast_mut().cast()) };
        if tcp.is_null() { None } else { Some(TcpSock(tcp.cast())) }
    }
}

impl TcpSock {
    /// How many bytes the peer has acknowledged; the SYN counts.
    #[inline(always)]
    pub fn bytes_acked(self) -> u64 {
        read(self.0, Field::BytesAcked)
    }

    /// How many bytes it has received; the peer's FIN counts.
    #[inline(always)]
    pub fn bytes_received(self) -> u64 {
        read(self.0, Field::BytesReceived)
    }

    /// Whether something that it sent has not been acknowledged. What the kernel gives up is not in
    /// flight any more (`tcp_write_queue_purge`).
    #[inline(always)]
    pub fn is_in_flight(self) -> bool {
        read::<u32>(self.0, Field::InFlight) != 0
    }

    /// Whether it has sent anything.
    #[inline(always)]
    pub fn has_sent(self) -> bool {
        read::<u32>(self.0, Field::SegmentsOut) != 0
    }

    /// Its smoothed round-trip time, in microseconds; 0 before there was one.
    #[inline(always)]
    pub fn round_trip(self) -> u32 {
        read::<u32>(self.0, Field::SmoothedRtt) >> 3
    }

    /// Whether it has sent anything more than once.
    #[inline(always)]
    pub fn has_retransmitted(self) -> bool {
        self.retransmitted() != 0
    }

    /// How many segments it has sent again.
    #[inline(always)]
    pub fn retransmitted(self) -> u32 {
        read(self.0, Field::Retransmitted)
    }

    /// Whether the peer answered the SYN of the connection that was just given up. This is what
    /// `tcp_disconnect` leaves: the next sequence number expected, which is 0 from the connect
    /// (`tcp_connect_init`) until the answer.
    #[inline(always)]
    pub fn was_answered(self) -> bool {
        read::<u32>(self.0, Field::ReceiveNext) != 0
    }
}

/// The cookie of the socket that a hook was called for; 0 when it has none yet.
#[inline(always)]
pub fn cookie_of(ctx: &SockAddrContext) -> u64 {
    // SAFETY: one load of the field's own width from a valid context.
    let sk = unsafe { (&raw const (*ctx.sock_addr).__bindgen_anon_1.sk).read_volatile() };
    // SAFETY: the helper looks at the socket, and gives null when it is not TCP's.
    let tcp = unsafe { bpf_skc_to_tcp_sock(sk.cast()) };
    if tcp.is_null() { 0 } else { read(tcp.cast(), Field::Cookie) }
}

/// Where a field is, in bytes from the start of the socket.
#[inline(always)]
fn place(field: Field) -> usize {
    // SAFETY: an element of a static of this crate; volatile, so that the compiler does not take the
    // value that it has here. To the verifier it is a constant, since the agent freezes it.
    unsafe { (&raw const SOCKET_FIELDS[field as usize]).read_volatile() as usize }
}

/// Reads a field of a socket.
#[inline(always)]
fn read<T: Copy>(sk: *const u8, field: Field) -> T {
    read_at(sk, place(field))
}

/// Reads what is so many bytes from the start of a socket.
#[inline(always)]
fn read_at<T: Copy>(sk: *const u8, place: usize) -> T {
    // SAFETY: the verifier checks place and width against the kernel's own type of the socket. The
    // kernel turns a fault of such a load into 0.
    unsafe { sk.wrapping_add(place).cast::<T>().read_volatile() }
}
