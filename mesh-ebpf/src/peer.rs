//! `getpeername4` and `getpeername6`: the application sees the address that it dialled.

use aya_ebpf::EbpfContext as _;
use aya_ebpf::helpers::bpf_get_socket_cookie;
use aya_ebpf::macros::cgroup_sock_addr;
use aya_ebpf::programs::SockAddrContext;
use mesh_common::flow::peer_hash;

use crate::connect::UDP;
use crate::context::{Family, V4, V6, port, protocol, set_port};
use crate::{records, sock};

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
/// has been connected elsewhere since has another peer, or no record.
#[inline(always)]
fn peer<F: Family>(ctx: &SockAddrContext) -> i32 {
    let cookie = match protocol(ctx) {
        // SAFETY: the context is valid.
        UDP => unsafe { bpf_get_socket_cookie(ctx.as_ptr()) },
        _ => sock::cookie_of(ctx),
    };
    if cookie != 0
        && let Some(flow) = records::find(cookie)
    {
        let given = records::given(flow);
        // One of a datagram socket that only sends to the service says nothing of its peer.
        if given.role.is_connected()
            && given.peer == peer_hash(F::addr(ctx), port(ctx))
            && F::set_addr(ctx, given.frontend.addr)
        {
            set_port(ctx, given.frontend.port);
        }
    }
    PROCEED
}
