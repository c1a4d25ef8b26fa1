//! Reading and writing `bpf_sock_addr`, the context of all hooks here.

use aya_ebpf::bindings::{bpf_sock, bpf_sock_addr};
use aya_ebpf::programs::SockAddrContext;
use mesh_common::Addr;

/// Which of the two families a hook is for: what differs between them, and nothing else.
pub trait Family {
    /// The address in the context: what is dialled, or the peer.
    fn addr(ctx: &SockAddrContext) -> Addr;
    /// Replaces it. `false` when the address does not fit the family.
    fn set_addr(ctx: &SockAddrContext, addr: Addr) -> bool;
}

/// `AF_INET` sockets, and `AF_INET6` sockets that were given a `sockaddr_in`.
pub struct V4;

/// `AF_INET6` sockets, also with v4-mapped addresses.
pub struct V6;

/// The port in the context, in network byte order.
#[inline(always)]
pub fn port(ctx: &SockAddrContext) -> u16 {
    // SAFETY: the kernel passes a valid context; one volatile load of the field's own width is
    // what the verifier accepts (`sock_addr_is_valid_access`). The port is in the lower half.
    unsafe { (&raw const (*ctx.sock_addr).user_port).read_volatile() as u16 }
}

/// Replaces the port, in network byte order.
#[inline(always)]
pub fn set_port(ctx: &SockAddrContext, port: u16) {
    // SAFETY: as in `port`; the hooks here may write it.
    unsafe { (&raw mut (*ctx.sock_addr).user_port).write_volatile(u32::from(port)) }
}

/// The socket's protocol (`sk_protocol`, an IANA number, or 262 for MPTCP).
#[inline(always)]
pub fn protocol(ctx: &SockAddrContext) -> u32 {
    // SAFETY: as in `port`.
    unsafe { (&raw const (*ctx.sock_addr).protocol).read_volatile() }
}

/// The socket's priority (`SO_PRIORITY`).
#[inline(always)]
pub fn priority(ctx: &SockAddrContext) -> u32 {
    // SAFETY: as in `port`; the socket of a hook is a whole one, of which this may be read
    // (`bpf_sock_is_valid_access`).
    unsafe { (&raw const (*sk(ctx)).priority).read_volatile() }
}

/// `TCP_ESTABLISHED`, which a datagram socket is in while it is connected.
const ESTABLISHED: u32 = 1;

/// `AF_INET`.
const AF_INET: u32 = 2;

/// Whether the socket is connected now.
#[inline(always)]
pub fn is_connected(ctx: &SockAddrContext) -> bool {
    // SAFETY: as in `priority`.
    unsafe { (&raw const (*sk(ctx)).state).read_volatile() == ESTABLISHED }
}

/// Whether the socket is connected to this address and this port (network byte order), as the kernel
/// knows its peer.
///
/// An `AF_INET6` socket is asked for its IPv6 peer, which is v4-mapped where it is one of IPv4
/// (`__ip6_datagram_connect`), since its IPv4 peer says nothing while it is connected by IPv6.
#[inline(always)]
pub fn is_connected_to(ctx: &SockAddrContext, addr: Addr, port: u16) -> bool {
    if !is_connected(ctx) {
        return false;
    }
    let sk = sk(ctx);
    // SAFETY: as in `priority`; the port is a field of two bytes, in network byte order like the
    // addresses (`bpf_sock_is_valid_access`).
    unsafe {
        if (&raw const (*sk).dst_port).read_volatile() != port {
            return false;
        }
        if (&raw const (*sk).family).read_volatile() == AF_INET {
            return addr == Addr::from_v4_word((&raw const (*sk).dst_ip4).read_volatile());
        }
        let words: *const u32 = (&raw const (*sk).dst_ip6).cast();
        addr == Addr::from_words([
            words.read_volatile(),
            words.add(1).read_volatile(),
            words.add(2).read_volatile(),
            words.add(3).read_volatile(),
        ])
    }
}

/// The socket that a hook was called for: of these hooks always a whole one.
#[inline(always)]
fn sk(ctx: &SockAddrContext) -> *mut bpf_sock {
    // SAFETY: as in `port`.
    unsafe { (&raw const (*ctx.sock_addr).__bindgen_anon_1.sk).read_volatile() }
}

// === impl Family ===

impl Family for V4 {
    #[inline(always)]
    fn addr(ctx: &SockAddrContext) -> Addr {
        // SAFETY: as in `port`.
        Addr::from_v4_word(unsafe { (&raw const (*ctx.sock_addr).user_ip4).read_volatile() })
    }

    #[inline(always)]
    fn set_addr(ctx: &SockAddrContext, addr: Addr) -> bool {
        if !addr.is_v4() {
            return false;
        }
        // SAFETY: as in `port`; the hooks here may write it.
        unsafe { (&raw mut (*ctx.sock_addr).user_ip4).write_volatile(addr.v4_word()) };
        true
    }
}

impl Family for V6 {
    #[inline(always)]
    fn addr(ctx: &SockAddrContext) -> Addr {
        let words: *const u32 = user_ip6(ctx.sock_addr);
        // SAFETY: as in `port`: four loads of one word each.
        Addr::from_words(unsafe {
            [
                words.read_volatile(),
                words.add(1).read_volatile(),
                words.add(2).read_volatile(),
                words.add(3).read_volatile(),
            ]
        })
    }

    #[inline(always)]
    fn set_addr(ctx: &SockAddrContext, addr: Addr) -> bool {
        let words = user_ip6(ctx.sock_addr);
        let [a, b, c, d] = addr.words();
        // SAFETY: as in `port`; the hooks here may write it.
        unsafe {
            words.write_volatile(a);
            words.add(1).write_volatile(b);
            words.add(2).write_volatile(c);
            words.add(3).write_volatile(d);
        }
        true
    }
}

#[inline(always)]
fn user_ip6(ctx: *mut bpf_sock_addr) -> *mut u32 {
    // SAFETY: only an address inside the context is computed.
    unsafe { (&raw mut (*ctx).user_ip6).cast() }
}
