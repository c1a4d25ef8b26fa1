//! Datagram sockets: `sendmsg4` and `sendmsg6` lead what is sent to a service to a backend, `recvmsg4`
//! and `recvmsg6` show the service as the sender of what comes back, and `sock_release` ends the
//! records. Connecting is in `connect`.
//!
//! All but the last run with the socket locked (`BPF_CGROUP_RUN_PROG_UDP4_SENDMSG_LOCK` and its like),
//! and that one when nobody else has the socket: a socket's further records are its own, besides for
//! the agent, which removes those of sockets that are gone.

use core::cell::Cell;
use core::hint::black_box;

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
use crate::{asked, lifecycle, records};

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
    let mut there = Way::None;
    // 0 for a socket without a record. A number that the verifier does not know, so that it does not follow
    // all of the rest once for each.
    let mut held = cookie ^ black_box(cookie);
    if let Some(own) = records::find(cookie) {
        held = records::held(own).load();
        if records::role(own).is_connected() && !is_connected(ctx) {
            // AF_UNSPEC, of which no hook tells.
            records::set_role(own, records::role(own).disconnected());
        }
        if let Some((index, flow)) = found(own, cookie, &key) {
            there = way(flow);
            if there == Way::Keep && leads::<F>(ctx, flow) {
                asked::by(own, (index, flow), cookie);
                return PROCEED;
            }
            // The kernel would drop what another backend answers.
            if index == 0 && records::role(own).is_connected() {
                let index = records::role(own).service();
                // It may be another frontend's by now.
                let is_ours = SERVICES.get(index).is_some_and(|service| service.key == key);
                let service = if is_ours { index } else { u32::MAX };
                return refuse_datagram(ctx, &key, Reason::NoEndpoint as u32, service);
            }
        }
    }
    match translate(&Maps, &sending, &key) {
        Verdict::Pass => {
            if held != 0 {
                asked::directly(cookie, &key);
            }
            PROCEED
        }
        Verdict::Refuse(reason, service) => refuse_datagram(ctx, &key, reason as u32, service),
        Verdict::Balance(choice) => {
            let service = choice.service;
            // One that is tried may be better, which only the try can tell.
            let is_try = choice.token.is_some();
            if there == Way::Leave && !is_try && !serves(choice.slot.backend) {
                // Found once more: a pointer would be too much for the verifier to keep.
                if let Some(own) = records::find(cookie)
                    && let Some((index, flow)) = found(own, cookie, &key)
                    && leads::<F>(ctx, flow)
                {
                    asked::by(own, (index, flow), cookie);
                    return PROCEED;
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

/// [`refuse`], apart from the way of what is sent. What the socket has elsewhere stays.
#[inline(never)]
fn refuse_datagram(ctx: &SockAddrContext, key: &FrontendKey, reason: u32, service: u32) -> i32 {
    refuse(ctx, key, reason, service)
}

/// What to do with the backend that a socket has there already.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    /// It has none, or that is gone.
    None,
    /// Go on with it.
    Keep,
    /// Go on with it only if there is nothing better.
    Leave,
}

/// Whether the socket goes on with the backend of this record. Not a part of its caller, which the verifier
/// would follow from each of the ways through this.
#[inline(never)]
fn way(flow: *mut Flow) -> Way {
    let given = records::given(flow);
    let held = Held(records::held(flow).load());
    let id = held.backend();
    let Some(stats) = BACKEND_STATS.get(id) else { return Way::None };
    let Some(backend) = BACKENDS.get(id) else { return Way::None };
    let Some(service) = SERVICES.get(given.role.service()) else { return Way::None };
    // SAFETY: a static of this crate; volatile, so that the compiler does not take the value that
    // it has here.
    let most = unsafe { (&raw const DATAGRAM_IDLE).read_volatile() };
    let ejection = stats.ejection();
    let idle = (given.origin.age(jiffies()), most);
    let standing = Standing {
        is_there: stats.is_life(given.generation)
            && service.generation() != 0
            && service.key == given.frontend,
        is_connected: given.role.is_connected(),
        idle,
        ejection,
        state: backend.marks.state(),
        is_try: held.has_token() && ejection.token() == given.token,
    };
    match keeps(standing, || Maps.client()) {
        true => Way::Keep,
        false if standing.is_there && idle.0 <= idle.1 => Way::Leave,
        false => Way::None,
    }
}

/// Leads a datagram to the backend of this record. `false` when that is of another family.
#[inline(always)]
fn leads<F: Family>(ctx: &SockAddrContext, flow: *mut Flow) -> bool {
    let id = Held(records::held(flow).load()).backend();
    let Some(backend) = BACKENDS.get(id) else { return false };
    if !F::set_addr(ctx, backend.addr) {
        return false;
    }
    set_port(ctx, backend.port);
    used(flow);
    true
}

/// Notes that a record is used now, unless its socket is connected.
#[inline(always)]
fn used(flow: *mut Flow) {
    let (now, given) = (jiffies(), records::given(flow));
    if given.origin.age(now) != 0 && !given.role.is_connected() {
        records::set_origin(flow, Origin::new(given.origin.netns(), now));
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
        let frontend = records::given(flow).frontend;
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
    if records::given(own).frontend == *key {
        return Some((0, own));
    }
    match records::role(own).more() {
        0 => None,
        more => further(cookie, more, key).map(|(index, flow)| (index as u32, flow)),
    }
}

/// The further record of the socket for a frontend, and its index.
#[inline(always)]
fn further(cookie: u64, more: u32, key: &FrontendKey) -> Option<(u64, *mut Flow)> {
    for index in 1..=u64::from(Role::MOST) {
        if index > more.into() {
            break;
        }
        if let Some(flow) = OVERFLOW.get_ptr_mut(Elsewhere { cookie, index })
            && records::given(flow).frontend == *key
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
        if records::given(own).frontend != mine.given.frontend {
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
        asked::by_new(cookie, 0);
    }
    kept
}

/// Records it in `OVERFLOW`, in place of what was there for the same service, or at a free index, or in
/// place of the one that was not used for the longest time.
#[inline(never)]
fn record_further(cookie: u64, mine: &mut Flow) -> bool {
    let Some(flow) = records::find(cookie) else { return false };
    let role = records::role(flow);
    let index = match further(cookie, role.more(), &mine.given.frontend) {
        Some((index, _)) => index,
        None if role.more() < Role::MOST => u64::from(role.more()) + 1,
        None => {
            count(counter::GAVE_WAY);
            idlest(cookie)
        }
    };
    end_one(cookie, index);
    mine.given.role = mine.given.role.elsewhere().passed_over();
    if OVERFLOW.insert(Elsewhere { cookie, index }, &*mine, u64::from(BPF_NOEXIST)).is_err() {
        count(counter::NO_FLOW_RECORD);
        return false;
    }
    if let Some(records) = counter(counter::FURTHER) {
        records.increment();
    }
    let more = if index > role.more().into() { index as u32 } else { role.more() };
    records::set_role(flow, role.with_more(more));
    asked::by_new(cookie, index as u32);
    true
}

/// The index of the further record that was not used for the longest time.
#[inline(never)]
fn idlest(cookie: u64) -> u64 {
    let (now, mut found, mut longest) = (jiffies(), 1, 0);
    for index in 1..=u64::from(Role::MOST) {
        let flow = OVERFLOW.get_ptr_mut(Elsewhere { cookie, index });
        let age = flow.map_or(u64::MAX, |flow| records::given(flow).origin.age(now));
        if age >= longest {
            (found, longest) = (index, age);
        }
    }
    found
}

/// Ends a further record, if it is there.
#[inline(always)]
fn end_one(cookie: u64, index: u64) {
    let key = Elsewhere { cookie, index };
    let Some(flow) = OVERFLOW.get_ptr_mut(key) else { return };
    let held = Held(records::held(flow).load());
    let (generation, token) = (records::generation(flow), records::token(flow));
    // Whoever removes it accounts for it.
    if OVERFLOW.remove(key).is_err() {
        return;
    }
    if let Some(records) = counter(counter::FURTHER) {
        records.decrement();
    }
    let token = if held.has_token() { token } else { Token::NONE };
    if let Some(stats) = BACKEND_STATS.get(held.backend()).filter(|stats| stats.is_life(generation))
    {
        stats.end(token, || Maps.now());
    }
}

/// Ends as many further records.
#[inline(never)]
fn end_further(cookie: u64, more: u32) {
    for index in 1..=u64::from(Role::MOST) {
        if index > more.into() {
            break;
        }
        end_one(cookie, index);
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
