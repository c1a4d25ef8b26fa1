//! `connect4` and `connect6`: the balancing. They run in the context of the task that connects,
//! with the socket locked (`__inet_stream_connect` → `tcp_v4_pre_connect`, `tcp_v6_pre_connect`),
//! also for TCP fast open and io_uring; of datagram sockets `udp_pre_connect` and its like.

use core::cell::Cell;

use aya_ebpf::EbpfContext as _;
use aya_ebpf::helpers::{
    bpf_get_current_pid_tgid, bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_set_retval,
};
use aya_ebpf::macros::cgroup_sock_addr;
use aya_ebpf::programs::SockAddrContext;
use aya_log_ebpf::debug;
use mesh_common::affinity::{By, pack};
use mesh_common::flow::peer_hash;
use mesh_common::socket::CHECK_PRIORITY;
use mesh_common::translate::is_probe;
use mesh_common::{
    Algorithm, Caller, Choice, Flow, FrontendKey, Given, Held, Origin, Policy, Protocol, Reason,
    Role, Token, Verdict, Word, translate,
};

use crate::chunks::{BACKEND_STATS, BACKENDS, SERVICES};
use crate::context::{Family, V4, V6, port, priority, protocol, set_port};
use crate::maps::{
    Maps, OUT, cgroup, chance, count, count_refused, excludes, jiffies, mesh_enter, mesh_excluded,
    octets, unit,
};
use crate::records::mesh_give_back;
use crate::{affinity, datagram, events, records, sock, words};

/// The kernel goes on with the connect.
pub const PROCEED: i32 = 1;
/// The kernel fails the connect, with the error that `bpf_set_retval` was given.
const REJECT: i32 = 0;

/// `ECONNREFUSED`, the same on every architecture that Linux runs BPF on but MIPS and Alpha.
const ECONNREFUSED: i32 = 111;

const TCP: u32 = Protocol::Tcp as u32;
pub const UDP: u32 = Protocol::Udp as u32;

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
    let protocol = match protocol(ctx) {
        TCP | IPPROTO_MPTCP => Protocol::Tcp,
        UDP => Protocol::Udp,
        _ => return PROCEED,
    };
    let key = FrontendKey { addr: F::addr(ctx), port: port(ctx), protocol: protocol as u8, pad: 0 };
    if is_of_agent(ctx) || excludes() && is_excluded(ctx) {
        return PROCEED;
    }
    let connecting = Connecting { ctx, key: &key, cookie: Cell::new(0) };
    match translate(&Maps, &connecting, &key) {
        Verdict::Balance(choice) => balance::<F>(&connecting, choice),
        Verdict::Refuse(reason, service) if !is_probe(&key, reason) => {
            refuse_connect(ctx, &key, reason as u32, service)
        }
        _ => {
            forget(ctx);
            PROCEED
        }
    }
}

/// Whether it is a check of the agent's, which is to reach the endpoint itself, though the agent may run in the
/// cgroup that is balanced. Whoever else says so, which takes CAP_NET_ADMIN or CAP_NET_RAW, is left alone too, and
/// could have sent what it likes without that.
#[inline(always)]
fn is_of_agent(ctx: &SockAddrContext) -> bool {
    priority(ctx) == CHECK_PRIORITY
}

/// Whether who connects is not to be touched.
#[inline(always)]
pub fn is_excluded(ctx: &SockAddrContext) -> bool {
    // SAFETY: the context is valid.
    mesh_excluded(unsafe { bpf_get_netns_cookie(ctx.as_ptr()) }) != 0
}

/// A connect, or a datagram that is sent.
pub struct Connecting<'c> {
    pub ctx: &'c SockAddrContext,
    /// What is dialled.
    pub key: &'c FrontendKey,
    /// The socket's cookie, once it was asked for; no socket has 0.
    pub cookie: Cell<u64>,
}

impl Connecting<'_> {
    /// Gives the socket a cookie if it has none.
    #[inline(always)]
    pub fn cookie(&self) -> u64 {
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
    fn key(&self, by: Algorithm) -> u64 {
        match by {
            // SAFETY: the context is valid.
            Algorithm::HashNamespace => unsafe { bpf_get_netns_cookie(self.ctx.as_ptr()) },
            Algorithm::HashProcess => bpf_get_current_pid_tgid() >> 32,
            Algorithm::HashUnit => unit(),
            _ => cgroup(),
        }
    }

    #[inline(always)]
    fn enter(&self, backend: u32, policy: Policy) -> Option<Token> {
        let [high, low, port] = words::pack(self.key);
        match mesh_enter(backend.into(), policy.0, high, low, port) {
            OUT => None,
            token => Some(Token(token)),
        }
    }
}

/// What an earlier connect left on this socket must not speak for this one: a connect that failed
/// before anything was sent leaves its record behind. A socket without a cookie never had one.
#[inline(always)]
fn forget(ctx: &SockAddrContext) {
    match protocol(ctx) {
        UDP => datagram::forget(ctx),
        _ => forget_connection(ctx),
    }
}

/// The same for what is no datagram socket.
#[inline(always)]
fn forget_connection(ctx: &SockAddrContext) {
    let cookie = sock::cookie_of(ctx);
    if cookie != 0 {
        records::end(cookie);
    }
}

#[inline(always)]
fn balance<F: Family>(connecting: &Connecting<'_>, choice: Choice<'_>) -> i32 {
    let (ctx, key, service) = (connecting.ctx, connecting.key, choice.service);
    let Some(mut flow) = steer::<F>(connecting, choice, true) else {
        return refuse_connect(ctx, key, Reason::Corrupt as u32, service);
    };
    let cookie = connecting.cookie();
    if key.protocol != Protocol::Tcp as u8 {
        datagram::end_all(cookie);
    }
    if !records::record(cookie, &mut flow) {
        end_unrecorded(Held(flow.held.load()).backend(), flow.given.token);
    }
    PROCEED
}

/// Leads what is dialled to the backend that was chosen, and counts it. The caller records it, or
/// accounts for its end. Nothing, when the backend is of another family.
#[inline(always)]
pub fn steer<F: Family>(
    connecting: &Connecting<'_>,
    choice: Choice<'_>,
    connected: bool,
) -> Option<Flow> {
    let (ctx, Choice { slot, service, table, affinity, mut token }) = (connecting.ctx, choice);
    let (mut addr, mut port) = (slot.addr, slot.port);
    let (mut backend, mut generation) = (slot.backend, slot.generation);
    if affinity.is_on() {
        let kept = keep(ctx, service, pack(backend, generation));
        if let Some(there) = BACKENDS.get(kept as u32)
            && kept as u32 != backend
        {
            if token.is_some() {
                mesh_give_back(backend.into(), token.0);
            }
            token = Token::NONE;
            (addr, port) = (there.addr, there.port);
            (backend, generation) = (kept as u32, (kept >> 32) as u32);
        }
    }
    if !F::set_addr(ctx, addr) {
        mesh_give_back(backend.into(), token.0);
        return None;
    }
    set_port(ctx, port);
    let cookie = connecting.cookie();
    // SAFETY: the context is valid.
    let netns = unsafe { bpf_get_netns_cookie(ctx.as_ptr()) };
    let given = Given {
        frontend: *connecting.key,
        peer: peer_hash(addr, port),
        origin: Origin::new(netns, jiffies()),
        client: cgroup(),
        role: Role::new(service, connected)
            .measured(matches!(table.algorithm(), Algorithm::Latency)),
        generation,
        token,
    };
    // Opened before it can end.
    if let Some(stats) = BACKEND_STATS.get(backend) {
        stats.opened.increment();
    }
    let held = Held::new(cookie, backend, token.is_some());
    Some(Flow { held: Word::new(held.0), given })
}

/// The backend that the client keeps at this service, or `chosen`, which it keeps from now on
/// ([`pack`]).
#[inline(never)]
fn keep(ctx: &SockAddrContext, service: u32, chosen: u64) -> u64 {
    let Some(service) = SERVICES.get(service) else { return chosen };
    let (affinity, generation) = (service.affinity(), service.generation());
    // Retired just now.
    if generation == 0 {
        return chosen;
    }
    let client = match affinity.by() {
        By::Client => cgroup(),
        // SAFETY: the context is valid.
        By::Namespace => unsafe { bpf_get_netns_cookie(ctx.as_ptr()) },
    };
    let kept = affinity::pinned(client, generation, affinity.timeout(), chosen as u32);
    if kept != affinity::NONE {
        return kept;
    }
    affinity::pin(client, generation, affinity.timeout(), chosen);
    chosen
}

/// A connection that nobody will see end.
#[inline(never)]
pub fn end_unrecorded(backend: u32, token: Token) {
    if let Some(stats) = BACKEND_STATS.get(backend) {
        records::account(stats, backend, token);
    }
}

/// Apart from the way of the connects that are balanced. `reason` is a [`Reason`].
#[inline(never)]
fn refuse_connect(ctx: &SockAddrContext, key: &FrontendKey, reason: u32, service: u32) -> i32 {
    // The kernel goes on with the peer that a datagram socket had.
    if protocol(ctx) != UDP {
        forget_connection(ctx);
    }
    refuse(ctx, key, reason, service)
}

/// Fails the call. `reason` is a [`Reason`].
#[inline(always)]
pub fn refuse(ctx: &SockAddrContext, key: &FrontendKey, reason: u32, service: u32) -> i32 {
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
