//! Fields of the kernel's sockets. Their places differ between kernels; the agent finds them in the
//! kernel's type information (BTF) and sets them here before it loads the programs.

use core::ffi::c_void;

use aya_ebpf::helpers::bpf_skc_to_tcp_sock;
use aya_ebpf::programs::SockAddrContext;
use mesh_common::stats::errno;

/// `sock.__sk_common.skc_cookie`, 8 bytes.
#[unsafe(no_mangle)]
static SK_COOKIE: u32 = 0;
/// `sock.__sk_common.skc_state`, 1 byte.
#[unsafe(no_mangle)]
static SK_STATE: u32 = 0;
/// `sock.sk_err`, 4 bytes.
#[unsafe(no_mangle)]
static SK_ERR: u32 = 0;
/// `sock.sk_err_soft`, 4 bytes.
#[unsafe(no_mangle)]
static SK_ERR_SOFT: u32 = 0;
/// `tcp_sock.bytes_acked`, 8 bytes.
#[unsafe(no_mangle)]
static BYTES_ACKED: u32 = 0;
/// `tcp_sock.bytes_received`, 8 bytes.
#[unsafe(no_mangle)]
static BYTES_RECEIVED: u32 = 0;

/// `tcp_sock.rcv_nxt`, 4 bytes.
#[unsafe(no_mangle)]
static RCV_NXT: u32 = 0;

/// `sock.__sk_common.skc_flags`, 8 bytes.
#[unsafe(no_mangle)]
static SK_FLAGS: u32 = 0;
/// `sock.__sk_common.skc_dport`, 2 bytes.
#[unsafe(no_mangle)]
static SK_DPORT: u32 = 0;
/// `tcp_sock.total_retrans`, 4 bytes.
#[unsafe(no_mangle)]
static TOTAL_RETRANS: u32 = 0;

/// `tcp_sock.packets_out`, 4 bytes.
#[unsafe(no_mangle)]
static PACKETS_OUT: u32 = 0;

/// `SOCK_DEAD` of `enum sock_flags`: no application has it any more.
const SOCK_DEAD: u64 = 1;

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
        read(self.0, &raw const SK_COOKIE)
    }

    /// Its error, if it has one.
    #[inline(always)]
    pub fn error(self) -> i32 {
        read(self.0, &raw const SK_ERR)
    }

    /// Whether somebody said that its peer's host cannot be reached, which was not believed at once.
    #[inline(always)]
    pub fn is_unreachable(self) -> bool {
        read::<i32>(self.0, &raw const SK_ERR_SOFT) == errno::EHOSTUNREACH
    }

    /// Whether its state is `TCP_CLOSE`.
    #[inline(always)]
    pub fn is_closed(self) -> bool {
        read::<u8>(self.0, &raw const SK_STATE) == TCP_CLOSE
    }

    /// Whether the application has closed it.
    #[inline(always)]
    pub fn is_dead(self) -> bool {
        read::<u64>(self.0, &raw const SK_FLAGS) & SOCK_DEAD != 0
    }

    /// Whether it has no peer: it was disconnected (`tcp_disconnect`), or its connect failed before
    /// anything was sent.
    #[inline(always)]
    pub fn is_disconnected(self) -> bool {
        read::<u16>(self.0, &raw const SK_DPORT) == 0
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
        read(self.0, &raw const BYTES_ACKED)
    }

    /// How many bytes it has received; the peer's FIN counts.
    #[inline(always)]
    pub fn bytes_received(self) -> u64 {
        read(self.0, &raw const BYTES_RECEIVED)
    }

    /// Whether something that it sent has not been acknowledged. What the kernel gives up is not in
    /// flight any more (`tcp_write_queue_purge`).
    #[inline(always)]
    pub fn is_in_flight(self) -> bool {
        read::<u32>(self.0, &raw const PACKETS_OUT) != 0
    }

    /// Whether it has sent anything more than once.
    #[inline(always)]
    pub fn has_retransmitted(self) -> bool {
        read::<u32>(self.0, &raw const TOTAL_RETRANS) != 0
    }

    /// Whether the peer answered the SYN of the connection that was just given up. This is what
    /// `tcp_disconnect` leaves: the next sequence number expected, which is 0 from the connect
    /// (`tcp_connect_init`) until the answer.
    #[inline(always)]
    pub fn was_answered(self) -> bool {
        read::<u32>(self.0, &raw const RCV_NXT) != 0
    }
}

/// The cookie of the socket that a hook was called for; 0 when it has none yet.
#[inline(always)]
pub fn cookie_of(ctx: &SockAddrContext) -> u64 {
    // SAFETY: one load of the field's own width from a valid context.
    let sk = unsafe { (&raw const (*ctx.sock_addr).__bindgen_anon_1.sk).read_volatile() };
    // SAFETY: the helper looks at the socket, and gives null when it is not TCP's.
    let tcp = unsafe { bpf_skc_to_tcp_sock(sk.cast()) };
    if tcp.is_null() { 0 } else { read(tcp.cast(), &raw const SK_COOKIE) }
}

/// Reads a field of a socket.
#[inline(always)]
fn read<T: Copy>(sk: *const u8, place: *const u32) -> T {
    // SAFETY: a static of this crate; volatile, so that the compiler does not take the value that
    // it has here. To the verifier it is a constant, since the agent freezes it.
    let offset = unsafe { place.read_volatile() } as usize;
    // SAFETY: the verifier checks place and width against the kernel's own type of the socket. The
    // kernel turns a fault of such a load into 0.
    unsafe { sk.wrapping_add(offset).cast::<T>().read_volatile() }
}
