//! `connect4` and `connect6`: the balancing. They run in the context of the task that connects,
//! with the socket locked (`__inet_stream_connect` → `tcp_v4_pre_connect`, `tcp_v6_pre_connect`),
//! also for TCP fast open and io_uring.

use aya_ebpf::helpers::bpf_set_retval;
use aya_ebpf::macros::cgroup_sock_addr;
use aya_ebpf::programs::SockAddrContext;
use aya_log_ebpf::debug;
use mesh_common::layout::counter;
use mesh_common::{Flow, FrontendKey, Protocol, Reason, Slot, Verdict, translate};

use crate::context::{Family, V4, V6, port, protocol, set_port};
use crate::maps::{FLOWS, Maps, count, count_opened, octets};

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
    match translate(&Maps, &key) {
        Verdict::Pass => pass(ctx),
        Verdict::Balance(slot) => balance::<F>(ctx, key, slot),
        Verdict::Refuse(reason) => refuse(ctx, &key, reason),
    }
}

/// Not ours. A record that an earlier connect left on this socket must not speak for this one.
#[inline(always)]
fn pass(ctx: &SockAddrContext) -> i32 {
    // SAFETY: the context holds the socket; without a record the pointer is null.
    if let Some(flow) = unsafe { FLOWS.get_ptr_mut(ctx).as_mut() } {
        flow.port = 0;
    }
    PROCEED
}

#[inline(always)]
fn balance<F: Family>(ctx: &SockAddrContext, frontend: FrontendKey, slot: &Slot) -> i32 {
    if !F::set_addr(ctx, slot.addr) {
        return refuse(ctx, &frontend, Reason::Corrupt);
    }
    set_port(ctx, slot.port);
    let mut flow = Flow {
        frontend,
        addr: slot.addr,
        port: slot.port,
        pad: 0,
        backend: slot.backend,
        generation: slot.generation,
    };
    // SAFETY: the context holds the socket; null means that there was no memory for a record.
    let record = unsafe { FLOWS.get_or_insert_ptr_mut(ctx, Some(&mut flow)) };
    if record.is_null() {
        count(counter::NO_FLOW_RECORD);
    } else {
        // SAFETY: a record of this socket, which the socket's lock keeps to this program; it may
        // be older than this connect, in which case `flow` was not copied into it. The stack and
        // a map's value do not overlap.
        unsafe { core::ptr::copy_nonoverlapping(&raw const flow, record, 1) };
    }
    count(counter::BALANCED);
    count_opened(slot.backend);
    PROCEED
}

#[inline(always)]
fn refuse(ctx: &SockAddrContext, key: &FrontendKey, reason: Reason) -> i32 {
    count(reason as u32);
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
