//! `getpeername4` and `getpeername6`: the application sees the address that it dialled.

use aya_ebpf::macros::cgroup_sock_addr;
use aya_ebpf::programs::SockAddrContext;

use crate::context::{Family, V4, V6, port, set_port};
use crate::maps::FLOWS;

/// These hooks cannot fail the call.
const PROCEED: i32 = 1;

/// `getpeername` with an `AF_INET` answer.
#[cgroup_sock_addr(getpeername4)]
pub fn mesh_peername4(ctx: SockAddrContext) -> i32 {
    peer::<V4>(&ctx)
}

/// `getpeername` with an `AF_INET6` answer.
#[cgroup_sock_addr(getpeername6)]
pub fn mesh_peername6(ctx: SockAddrContext) -> i32 {
    peer::<V6>(&ctx)
}

/// Shows the frontend when the socket's peer is the backend that its record names. A socket that
/// has been connected elsewhere since has another peer, or a record without a port.
#[inline(always)]
fn peer<F: Family>(ctx: &SockAddrContext) -> i32 {
    // SAFETY: the context holds the socket; without a record the pointer is null.
    if let Some(flow) = unsafe { FLOWS.get_ptr_mut(ctx).as_ref() }
        && flow.port != 0
        && flow.port == port(ctx)
        && flow.addr == F::addr(ctx)
        && F::set_addr(ctx, flow.frontend.addr)
    {
        set_port(ctx, flow.frontend.port);
    }
    PROCEED
}
