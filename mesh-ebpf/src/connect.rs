//! `connect4` and `connect6`: the balancing. They run in the context of the task that connects,
//! with the socket locked (`__inet_stream_connect` → `tcp_v4_pre_connect`, `tcp_v6_pre_connect`),
//! also for TCP fast open and io_uring.

use core::cell::Cell;

use aya_ebpf::EbpfContext as _;
use aya_ebpf::helpers::{bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_set_retval};
use aya_ebpf::macros::cgroup_sock_addr;
use aya_ebpf::programs::SockAddrContext;
use aya_log_ebpf::debug;
use mesh_common::flow::peer_hash;
use mesh_common::stats::change;
use mesh_common::{
    Caller, Choice, FrontendKey, Given, Held, Policy, Protocol, Reason, Tables as _, Token,
    Verdict, translate,
};

use crate::context::{Family, V4, V6, port, protocol, set_port};
use crate::maps::{BACKEND_STATS, Maps, OUT, cgroup, chance, count, count_refused, enter, octets};
use crate::{events, records, sock};

/// The kernel goes on with the connect.
const PROCEED: i32 = 1;
/// The kernel fails the connect, with the error that `bpf_set_retval` was given.
const REJECT: i32 = 0;

/// `ECONNREFUSED`, the same on every architecture that Linux runs BPF on but MIPS and Alpha.
const ECONNREFUSED: i32 = 111;

/// `IPPROTO_MPTCP`: not an IANA number; its subflows are TCP.
const IPPROTO_MPTCP: u32 = 262;

/// A connect of an `AF_INET` address.
#[cgroup_sock_addr(connect4)]
pub fn mesh_connect4(ctx: SockAddrContext) -> i32 {
    connect::<V4>(&ctx)
}

/// A connect of an `AF_INET6` address.
#[cgroup_sock_addr(connect6)]
pub fn mesh_connect6(ctx: SockAddrContext) -> i32 {
    connect::<V6>(&ctx)
}

#[inline(always)]
fn connect<F: Family>(ctx: &SockAddrContext) -> i32 {
    let protocol = protocol(ctx);
    if protocol != Protocol::Tcp as u32 && protocol != IPPROTO_MPTCP {
        return PROCEED;
    }
    let key =
        FrontendKey { addr: F::addr(ctx), port: port(ctx), protocol: Protocol::Tcp as u8, pad: 0 };
    let connecting = Connecting { ctx, key: &key, cookie: Cell::new(0) };
    match translate(&Maps, &connecting, &key) {
        Verdict::Pass => {
            forget(ctx);
            PROCEED
        }
        Verdict::Balance(choice) => balance::<F>(&connecting, &key, choice),
        Verdict::Refuse(reason, service) => refuse(ctx, &key, reason as u32, service),
    }
}

/// A connect.
struct Connecting<'c> {
    ctx: &'c SockAddrContext,
    /// What is dialled.
    key: &'c FrontendKey,
    /// The socket's cookie, once it was asked for; no socket has 0.
    cookie: Cell<u64>,
}

impl Connecting<'_> {
    /// Gives the socket a cookie if it has none.
    #[inline(always)]
    fn cookie(&self) -> u64 {
        if self.cookie.get() == 0 {
            // SAFETY: the context is valid.
            self.cookie.set(unsafe { bpf_get_socket_cookie(self.ctx.as_ptr()) });
        }
        self.cookie.get()
    }
}

impl Caller for Connecting<'_> {
    #[inline(always)]
    fn chance(&self) -> u32 {
        chance(self.cookie())
    }

    #[inline(always)]
    fn enter(&self, backend: u32, policy: Policy) -> Option<Token> {
        match enter(backend, policy.0, self.key) {
            OUT => None,
            token => Some(Token(token)),
        }
    }
}

/// What an earlier connect left on this socket must not speak for this one: a connect that failed
/// before anything was sent leaves its record behind. A socket without a cookie never had one.
#[inline(always)]
fn forget(ctx: &SockAddrContext) {
    let cookie = sock::cookie_of(ctx);
    if cookie != 0 {
        records::end(cookie);
    }
}

#[inline(always)]
fn balance<F: Family>(
    connecting: &Connecting<'_>,
    frontend: &FrontendKey,
    choice: Choice<'_>,
) -> i32 {
    let (ctx, Choice { slot, service, token }) = (connecting.ctx, choice);
    if !F::set_addr(ctx, slot.addr) {
        give_back(slot.backend, token);
        return refuse(ctx, frontend, Reason::Corrupt as u32, service);
    }
    set_port(ctx, slot.port);
    let cookie = connecting.cookie();
    // SAFETY: the context is valid.
    let netns = unsafe { bpf_get_netns_cookie(ctx.as_ptr()) };
    let given = Given {
        frontend: *frontend,
        peer: peer_hash(slot.addr, slot.port),
        netns,
        client: cgroup(),
        service,
        generation: slot.generation,
        token,
    };
    let mine = Held::new(cookie, slot.backend, token.is_some());
    // Opened before it can end.
    if let Some(stats) = BACKEND_STATS.get(slot.backend) {
        stats.opened.increment();
    }
    if !records::record(cookie, mine, &given) {
        end_unrecorded(slot.backend, token);
    }
    PROCEED
}

/// A connection that nobody will see end.
#[inline(never)]
fn end_unrecorded(backend: u32, token: Token) {
    if let Some(stats) = BACKEND_STATS.get(backend) {
        stats.end(token, || Maps.now());
    }
}

/// A token that is not used.
#[inline(never)]
fn give_back(backend: u32, token: Token) {
    if let Some(stats) = BACKEND_STATS.get(backend) {
        let now = Maps.now();
        change(&stats.ejection, |ejection| ejection.give_back(token, now));
    }
}

/// Apart from the way of the connects that are balanced. `reason` is a [`Reason`].
#[inline(never)]
fn refuse(ctx: &SockAddrContext, key: &FrontendKey, reason: u32, service: u32) -> i32 {
    forget(ctx);
    let reason = Reason::from_number(reason as u8);
    count(reason as u32);
    count_refused(service, reason as u32);
    events::refused(key, reason);
    log(ctx, key, reason);
    // SAFETY: the helper takes an error number and stores it for the caller of the program.
    unsafe { bpf_set_retval(-ECONNREFUSED) };
    REJECT
}

/// Logs a refusal. The verifier removes all of it unless the agent raised the log level when it
/// loaded the programs. Each reason has its own statement because a table of texts would need
/// relocations that the loader does not do.
#[inline(always)]
fn log(ctx: &SockAddrContext, key: &FrontendKey, reason: Reason) {
    let (addr, port) = (octets(key.addr), key.host_port());
    match reason {
        Reason::NoEndpoint => debug!(ctx, "refused: {:i} port {}: no-endpoint", addr, port),
        Reason::NoWeight => debug!(ctx, "refused: {:i} port {}: no-weight", addr, port),
        Reason::AllUnhealthy => debug!(ctx, "refused: {:i} port {}: all-unhealthy", addr, port),
        Reason::NoService => debug!(ctx, "refused: {:i} port {}: no-service", addr, port),
        Reason::NoPort => debug!(ctx, "refused: {:i} port {}: no-port", addr, port),
        Reason::Contended => debug!(ctx, "refused: {:i} port {}: contended", addr, port),
        Reason::Corrupt => debug!(ctx, "refused: {:i} port {}: corrupt", addr, port),
        Reason::NoRoom => debug!(ctx, "refused: {:i} port {}: no-room", addr, port),
    }
}
