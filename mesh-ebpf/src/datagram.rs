//! Datagram sockets: `sendmsg4` and `sendmsg6` lead what is sent to a service to a backend, `recvmsg4`
//! and `recvmsg6` show the service as the sender of what comes back, and `sock_release` ends the
//! records. Connecting is in `connect`.
//!
//! All but the last run with the socket locked (`BPF_CGROUP_RUN_PROG_UDP4_SENDMSG_LOCK` and its like),
//! and that one when nobody else has the socket: a socket's further records are its own, besides for
//! the agent, which removes those of sockets that are gone.

use core::cell::Cell;

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::BPF_NOEXIST;
use aya_ebpf::helpers::bpf_get_socket_cookie;
use aya_ebpf::macros::{cgroup_sock, cgroup_sock_addr};
use aya_ebpf::programs::{SockAddrContext, SockContext};
use mesh_common::datagram::{IDLE_SECONDS, Standing, keeps};
use mesh_common::layout::counter;
use mesh_common::{
    Elsewhere, Flow, FrontendKey, Held, Origin, Protocol, Reason, Role, Tables as _, Token,
    Verdict, translate,
};

use crate::chunks::{BACKEND_STATS, BACKENDS, SERVICES};
use crate::connect::{Connecting, PROCEED, UDP, end_unrecorded, is_excluded, refuse, steer};
use crate::context::{Family, V4, V6, is_connected, is_connected_to, port, protocol, set_port};
use crate::maps::{Maps, OVERFLOW, count, counter, excludes, jiffies, serves};
use crate::{asked, lifecycle, records, words};

/// [`IDLE_SECONDS`] in the unit of [`Origin::age`]. Set by the agent, who knows the kernel's `HZ`; this
/// is for 250.
#[unsafe(no_mangle)]
static DATAGRAM_IDLE: u64 = (IDLE_SECONDS * 250) >> Origin::TIME_SHIFT;

/// A datagram to an `AF_INET` address that the call names.
#[cgroup_sock_addr(sendmsg4)]
pub fn mesh_sendmsg4(ctx: SockAddrContext) -> i32 {
    send::<V4>(&ctx)
}

/// A datagram to an `AF_INET6` address that the call names.
#[cgroup_sock_addr(sendmsg6)]
pub fn mesh_sendmsg6(ctx: SockAddrContext) -> i32 {
    send::<V6>(&ctx)
}

/// The sender of a datagram, for an `AF_INET` socket that asks for it.
#[cgroup_sock_addr(recvmsg4)]
pub fn mesh_recvmsg4(ctx: SockAddrContext) -> i32 {
    receive::<V4>(&ctx)
}

/// The sender of a datagram, for an `AF_INET6` socket that asks for it, also when it is v4-mapped.
#[cgroup_sock_addr(recvmsg6)]
pub fn mesh_recvmsg6(ctx: SockAddrContext) -> i32 {
    receive::<V6>(&ctx)
}

/// A socket is closed by its last owner (`inet_release`).
#[cgroup_sock(sock_release)]
pub fn mesh_release(ctx: SockContext) -> i32 {
    // SAFETY: the kernel passes a valid context; one volatile load of the field's own width.
    let protocol = unsafe { (&raw const (*ctx.sock).protocol).read_volatile() };
    if protocol == UDP {
        // SAFETY: the context is valid.
        end_all(unsafe { bpf_get_socket_cookie(ctx.as_ptr()) });
    }
    PROCEED
}

#[inline(always)]
fn send<F: Family>(ctx: &SockAddrContext) -> i32 {
    if protocol(ctx) != UDP || excludes() && is_excluded(ctx) {
        return PROCEED;
    }
    let key =
        FrontendKey { addr: F::addr(ctx), port: port(ctx), protocol: Protocol::Udp as u8, pad: 0 };
    // Decided when it was connected, or before anything here ran. `send` on a v4-mapped socket comes here
    // like a datagram that names its peer (`udpv6_sendmsg`), and has to go where that of its IPv4 twin
    // goes, of which no hook tells.
    if is_connected_to(ctx, key.addr, key.port) {
        return PROCEED;
    }
    let sending = Connecting { ctx, key: &key, cookie: Cell::new(0) };
    let cookie = sending.cookie();
    let known = Known::of(ctx, cookie, &key, false);
    match known.way() {
        Known::KEEP => return lead::<F>(&sending, known),
        Known::REFUSE => {
            return refuse_datagram(ctx, &key, Reason::NoEndpoint as u32, known.number());
        }
        _ => {}
    }
    match translate(&Maps, &sending, &key) {
        Verdict::Pass => {
            if known.has_record() {
                asked::directly(cookie, &key);
            }
            PROCEED
        }
        Verdict::Refuse(reason, service) => refuse_datagram(ctx, &key, reason as u32, service),
        Verdict::Balance(choice) => {
            let service = choice.service;
            // One that is tried may be better, which only the try can tell.
            let is_try = choice.token.is_some();
            if known.way() == Known::LEAVE && !is_try && !serves(choice.slot.backend) {
                let known = Known::of(ctx, cookie, &key, true);
                if known.way() == Known::KEEP {
                    return lead::<F>(&sending, known);
                }
            }
            let Some(mut flow) = steer::<F>(&sending, choice, false) else {
                return refuse_datagram(ctx, &key, Reason::Corrupt as u32, service);
            };
            if !record(cookie, &mut flow) {
                end_unrecorded(Held(flow.held.load()).backend(), flow.given.token);
            }
            PROCEED
        }
    }
}

/// Leads a datagram to the backend that the socket has there already.
#[inline(always)]
fn lead<F: Family>(sending: &Connecting<'_>, known: Known) -> i32 {
    if let Some(backend) = BACKENDS.get(known.number())
        && F::set_addr(sending.ctx, backend.addr)
    {
        set_port(sending.ctx, backend.port);
        if known.is_news() {
            asked::by(sending.cookie(), known.index());
        }
        return PROCEED;
    }
    // A backend of another family.
    refuse_datagram(sending.ctx, sending.key, Reason::Corrupt as u32, u32::MAX)
}

/// [`refuse`], apart from the way of what is sent. What the socket has elsewhere stays.
#[inline(never)]
fn refuse_datagram(ctx: &SockAddrContext, key: &FrontendKey, reason: u32, service: u32) -> i32 {
    refuse(ctx, key, reason, service)
}

/// What a socket has where it sends to.
///
/// ```text
/// 63     48   47    46      40 39   32 31                0
/// [ 0      ][ news ][ index   ][ way  ][ number           ]
/// ```
#[derive(Clone, Copy)]
struct Known(u64);

impl Known {
    // Ways, and what the number is then.

    /// No record at all.
    const NOTHING: u64 = 0;
    /// A record, which says nothing about this.
    const ELSEWHERE: u64 = 1;
    /// A backend (its id) to go on with; the record's index, and whether it has to be noted that it is used.
    const KEEP: u64 = 2;
    /// A backend to go on with only if there is nothing better.
    const LEAVE: u64 = 3;
    /// It is connected to the service (its index, or [`u32::MAX`]), and its backend is gone: the kernel would drop
    /// what another one answers.
    const REFUSE: u64 = 4;

    const NEWS: u64 = 1 << 47;

    // What is asked: bits of the last argument of `mesh_known`, above the port.

    const CONNECTED: u64 = 1 << words::BITS;
    const STAY: u64 = Self::CONNECTED << 1;

    /// What a socket has at a frontend. What it goes on with is noted to be used. `stay`: there is nothing
    /// better.
    #[inline(always)]
    fn of(ctx: &SockAddrContext, cookie: u64, key: &FrontendKey, stay: bool) -> Self {
        let [high, low, port] = words::pack(key);
        let connected = u64::from(is_connected(ctx)) * Self::CONNECTED;
        let asked = port | connected | (u64::from(stay) * Self::STAY);
        Self(mesh_known(cookie, high, low, asked))
    }

    #[inline(always)]
    const fn way(self) -> u64 {
        self.0 >> 32 & 0xff
    }

    #[inline(always)]
    const fn index(self) -> u32 {
        (self.0 >> 40 & 0x7f) as u32
    }

    #[inline(always)]
    const fn is_news(self) -> bool {
        self.0 & Self::NEWS != 0
    }

    #[inline(always)]
    const fn number(self) -> u32 {
        self.0 as u32
    }

    #[inline(always)]
    const fn has_record(self) -> bool {
        self.way() != Self::NOTHING
    }
}

/// [`Known::of`] with the words of the address, as a global function: the verifier looks at it once, and follows
/// the rest of its callers once for whatever it gives.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn mesh_known(cookie: u64, high: u64, low: u64, asked: u64) -> u64 {
    let Some(own) = records::find(cookie) else { return Known::NOTHING };
    let (is_connected, stay) = (asked & Known::CONNECTED != 0, asked & Known::STAY != 0);
    let key = words::unpack(high, low, asked);
    if records::role(own).is_connected() && !is_connected {
        // AF_UNSPEC, of which no hook tells.
        records::set_role(own, records::role(own).disconnected());
    }
    let Some((index, flow)) = found(own, cookie, &key) else { return Known::ELSEWHERE << 32 };
    let way = way(flow);
    if way == Known::KEEP || stay && way == Known::LEAVE {
        used(flow);
        let news = u64::from(asked::is_news(own, (index, flow))) * Known::NEWS;
        let backend = Held(records::held(flow).load()).backend();
        return news | u64::from(index) << 40 | Known::KEEP << 32 | u64::from(backend);
    }
    if index == 0 && records::role(own).is_connected() {
        let index = records::role(own).service();
        // It may be another frontend's by now.
        let is_ours = SERVICES.get(index).is_some_and(|service| service.key == key);
        let service = if is_ours { index } else { u32::MAX };
        return Known::REFUSE << 32 | u64::from(service);
    }
    way << 32
}

/// Whether the socket goes on with the backend of this record: [`Known::KEEP`], [`Known::LEAVE`], or
/// [`Known::ELSEWHERE`].
#[inline(always)]
fn way(flow: *mut Flow) -> u64 {
    let (role, held) = (records::role(flow), Held(records::held(flow).load()));
    let id = held.backend();
    let Some(stats) = BACKEND_STATS.get(id) else { return Known::ELSEWHERE };
    let Some(backend) = BACKENDS.get(id) else { return Known::ELSEWHERE };
    let Some(service) = SERVICES.get(role.service()) else { return Known::ELSEWHERE };
    // SAFETY: a static of this crate; volatile, so that the compiler does not take the value that
    // it has here.
    let most = unsafe { (&raw const DATAGRAM_IDLE).read_volatile() };
    let ejection = stats.ejection();
    let idle = (records::origin(flow).age(jiffies()), most);
    let standing = Standing {
        is_there: stats.is_life(records::generation(flow))
            && service.generation() != 0
            && service.key == records::frontend(flow),
        is_connected: role.is_connected(),
        idle,
        ejection,
        state: backend.marks.state(),
        is_try: held.has_token() && ejection.token() == records::token(flow),
    };
    match keeps(standing, || Maps.client()) {
        true => Known::KEEP,
        false if standing.is_there && idle.0 <= idle.1 => Known::LEAVE,
        false => Known::ELSEWHERE,
    }
}

/// Notes that a record is used now, unless its socket is connected.
#[inline(always)]
fn used(flow: *mut Flow) {
    let (now, origin) = (jiffies(), records::origin(flow));
    if origin.age(now) != 0 && !records::role(flow).is_connected() {
        records::set_origin(flow, Origin::new(origin.netns(), now));
    }
}

/// Shows the service that the sender was given for. What a backend sends that was removed since is its
/// own.
#[inline(always)]
fn receive<F: Family>(ctx: &SockAddrContext) -> i32 {
    if protocol(ctx) != UDP {
        return PROCEED;
    }
    // SAFETY: the context is valid.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    if let Some(own) = records::find(cookie)
        && let Some(flow) = asked::sender(ctx, own, cookie, (&F::addr(ctx), port(ctx)))
    {
        let frontend = records::frontend(flow);
        if F::set_addr(ctx, frontend.addr) {
            set_port(ctx, frontend.port);
        }
        used(flow);
        if Held(records::held(flow).load()).has_token() {
            lifecycle::answered(cookie, flow);
        }
    }
    PROCEED
}

// === records ===

/// The record of the socket for what it sends to, and its index, where 0 is the socket's own.
#[inline(always)]
fn found(own: *mut Flow, cookie: u64, key: &FrontendKey) -> Option<(u32, *mut Flow)> {
    if records::frontend(own) == *key {
        return Some((0, own));
    }
    let more = records::role(own).more();
    for index in 1..=Role::MOST {
        if index > more {
            break;
        }
        if let Some(flow) = OVERFLOW.get_ptr_mut(Elsewhere { cookie, index: index.into() })
            && records::frontend(flow) == *key
        {
            return Some((index, flow));
        }
    }
    None
}

/// Records what a socket was given for a service: in its own record, if that is free or was for the same
/// service, and otherwise in a further one. `false` when there is no room.
#[inline(always)]
fn record(cookie: u64, mine: &mut Flow) -> bool {
    if let Some(own) = records::find(cookie) {
        if records::frontend(own) != mine.given.frontend {
            return record_further(cookie, mine);
        }
        // What it was before ends, and the further ones stay.
        let role = records::role(own);
        let service = mine.given.role.service();
        mine.given.role = Role::new(service, role.is_connected()).with_more(role.more());
        if role.more() > 0 {
            mine.given.role = mine.given.role.passed_over();
        }
    }
    let kept = record_own(cookie, mine);
    if !kept {
        end_further(cookie, mine.given.role.more());
    }
    kept
}

/// [`records::record`], apart from the way of what is sent.
#[inline(never)]
fn record_own(cookie: u64, mine: &mut Flow) -> bool {
    let kept = records::record(cookie, mine);
    if mine.given.role.is_passed_over() {
        asked::by(cookie, 0);
    }
    kept
}

/// Records it in `OVERFLOW`, in place of what was there for the same service, or at a free index, or in
/// place of the one that was not used for the longest time.
#[inline(never)]
fn record_further(cookie: u64, mine: &mut Flow) -> bool {
    let Some(own) = records::find(cookie) else { return false };
    let role = records::role(own);
    let [high, low, port] = words::pack(&mine.given.frontend);
    let index = match mesh_index(cookie, high, low, port) {
        NONE if role.more() < Role::MOST => u64::from(role.more()) + 1,
        NONE => {
            count(counter::GAVE_WAY);
            mesh_idlest(cookie)
        }
        index => index,
    };
    mesh_end_one(cookie, index);
    mine.given.role = mine.given.role.elsewhere().passed_over();
    if OVERFLOW.insert(Elsewhere { cookie, index }, &*mine, u64::from(BPF_NOEXIST)).is_err() {
        count(counter::NO_FLOW_RECORD);
        return false;
    }
    if let Some(records) = counter(counter::FURTHER) {
        records.increment();
    }
    let more = if index > role.more().into() { index as u32 } else { role.more() };
    records::set_role(own, role.with_more(more));
    asked::by(cookie, index as u32);
    true
}

// Global functions: the verifier looks at each once, and not again for each turn of a loop or each way in which
// one is called.

/// No index of a further record.
const NONE: u64 = 0;

/// The index of the further record of a socket for a frontend, or [`NONE`].
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn mesh_index(cookie: u64, high: u64, low: u64, port: u64) -> u64 {
    let Some(own) = records::find(cookie) else { return NONE };
    match found(own, cookie, &words::unpack(high, low, port)) {
        Some((index, _)) => index.into(),
        None => NONE,
    }
}

/// The index of the further record that was not used for the longest time.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn mesh_idlest(cookie: u64) -> u64 {
    let (now, mut found, mut longest) = (jiffies(), 1, 0);
    for index in 1..=u64::from(Role::MOST) {
        let flow = OVERFLOW.get_ptr_mut(Elsewhere { cookie, index });
        let age = flow.map_or(u64::MAX, |flow| records::origin(flow).age(now));
        if age >= longest {
            (found, longest) = (index, age);
        }
    }
    found
}

/// Ends a further record, if it is there.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn mesh_end_one(cookie: u64, index: u64) -> u64 {
    let key = Elsewhere { cookie, index };
    let Some(flow) = OVERFLOW.get_ptr_mut(key) else { return 0 };
    let held = Held(records::held(flow).load());
    let (generation, token) = (records::generation(flow), records::token(flow));
    // Whoever removes it accounts for it.
    if OVERFLOW.remove(key).is_err() {
        return 0;
    }
    if let Some(records) = counter(counter::FURTHER) {
        records.decrement();
    }
    let token = if held.has_token() { token } else { Token::NONE };
    if let Some(stats) = BACKEND_STATS.get(held.backend()).filter(|stats| stats.is_life(generation))
    {
        records::account(stats, held.backend(), token);
    }
    0
}

/// Ends as many further records.
#[inline(never)]
fn end_further(cookie: u64, more: u32) {
    for index in 1..=u64::from(Role::MOST) {
        if index > more.into() {
            break;
        }
        mesh_end_one(cookie, index);
    }
}

/// Ends all that a datagram socket has. What is called here is called by the program itself, because
/// each call in a call adds to its stack.
#[inline(always)]
pub fn end_all(cookie: u64) {
    if end_rest(cookie)
        && let Some(flow) = records::find(cookie)
    {
        lifecycle::ended_well(cookie, flow);
    }
}

/// Ends all of it, but for a record that was connected and whose success matters: then `true`.
#[inline(never)]
fn end_rest(cookie: u64) -> bool {
    let Some(flow) = records::find(cookie) else { return false };
    let more = records::role(flow).more();
    if more > 0 {
        end_further(cookie, more);
    }
    let held = Held(records::held(flow).load());
    let matters = BACKEND_STATS.get(held.backend()).is_some_and(|s| s.awaits_success(held));
    if matters && records::role(flow).is_connected() && !held.is_told() {
        return true;
    }
    records::end(cookie);
    false
}

/// The same, for the socket of a connect.
#[inline(never)]
pub fn forget(ctx: &SockAddrContext) {
    // SAFETY: the context is valid.
    end_all(unsafe { bpf_get_socket_cookie(ctx.as_ptr()) });
}
