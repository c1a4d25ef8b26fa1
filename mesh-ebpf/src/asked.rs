//! Whom a datagram socket has asked last at the address of a backend: what comes from there comes from
//! that one. Two services of one socket may have the same backend, and a program may dial one directly.
//!
//! Of the records of a socket that are for one address, all are *passed over* but the one that was used
//! last there ([`Role::passed_over`]); all of them, when the address was dialled directly after that. A
//! socket without a record pays nothing for it. All of it runs with the socket locked.

use aya_ebpf::programs::SockAddrContext;
use mesh_common::{Addr, Elsewhere, Flow, FrontendKey, Held, Role};

use crate::chunks::{BACKEND_STATS, BACKENDS};
use crate::context::is_connected;
use crate::maps::OVERFLOW;
use crate::{records, words};

/// No index of a record.
const NONE: u32 = u32::MAX;

/// Whether it has to be noted that the socket sends by this record, which is that of its index, or its own: 0.
#[inline(always)]
pub fn is_news(own: *mut Flow, (index, flow): (u32, *mut Flow)) -> bool {
    let role = records::role(own);
    records::role(flow).is_passed_over() || role != role.with_last(index)
}

/// Notes that the socket sends by the record of this index.
#[inline(always)]
pub fn by(cookie: u64, index: u32) {
    mesh_asked(cookie, index.into(), 0, 0, 0);
}

/// The socket sends to this address itself, which may be that of a backend of its records.
#[inline(always)]
pub fn directly(cookie: u64, key: &FrontendKey) {
    let [high, low] = words::address(&key.addr);
    mesh_asked(cookie, NONE.into(), high, low, key.port.into());
}

/// [`by`], or [`directly`] with the words of the address. A global function, which the verifier looks at
/// once.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn mesh_asked(cookie: u64, index: u64, high: u64, low: u64, port: u64) -> u64 {
    let Some(own) = records::find(cookie) else { return 0 };
    let (mut addr, mut port, but) = (words::unpack_address(high, low), port as u16, index as u32);
    if but != NONE {
        let flow = match but {
            0 => Some(own),
            _ => OVERFLOW.get_ptr_mut(Elsewhere { cookie, index }),
        };
        let Some(flow) = flow else { return 0 };
        let role = records::role(flow);
        records::set_role(flow, role.asked());
        records::set_role(own, records::role(own).with_last(but));
        if !role.is_passed_over() {
            return 0;
        }
        let id = Held(records::held(flow).load()).backend();
        let Some(backend) = BACKENDS.get(id) else { return 0 };
        (addr, port) = (backend.addr, backend.port);
    }
    pass_over(own, cookie, (&addr, port), but);
    0
}

/// Passes over all records for a backend at this address but one.
#[inline(always)]
fn pass_over(own: *mut Flow, cookie: u64, (addr, port): (&Addr, u16), but: u32) {
    if but != 0 && is_from(own, addr, port) {
        records::set_role(own, records::role(own).passed_over());
    }
    let more = records::role(own).more();
    for index in 1..=Role::MOST {
        if index > more {
            break;
        }
        if index != but
            && let Some(flow) = OVERFLOW.get_ptr_mut(Elsewhere { cookie, index: index.into() })
            && is_from(flow, addr, port)
        {
            records::set_role(flow, records::role(flow).passed_over());
        }
    }
}

/// The record for which a datagram came from this address. Nothing, when it comes from that address itself.
///
/// A socket that is connected receives from its peer only, and sees the address that it is connected to:
/// what it sends there last no hook tells.
#[inline(always)]
pub fn sender(
    ctx: &SockAddrContext,
    own: *mut Flow,
    cookie: u64,
    (addr, port): (&Addr, u16),
) -> Option<*mut Flow> {
    let role = records::role(own);
    if is_connected(ctx) {
        return (role.is_connected() && is_from(own, addr, port)).then_some(own);
    }
    // The likeliest.
    if role.last() != 0
        && let Some(flow) = OVERFLOW.get_ptr_mut(Elsewhere { cookie, index: role.last().into() })
        && is_of(flow, addr, port)
    {
        return Some(flow);
    }
    if is_of(own, addr, port) {
        return Some(own);
    }
    for index in 1..=Role::MOST {
        if index > role.more() {
            break;
        }
        if let Some(flow) = OVERFLOW.get_ptr_mut(Elsewhere { cookie, index: index.into() })
            && is_of(flow, addr, port)
        {
            return Some(flow);
        }
    }
    None
}

/// Whether what comes from this address was asked by this record.
#[inline(always)]
fn is_of(flow: *mut Flow, addr: &Addr, port: u16) -> bool {
    !records::role(flow).is_passed_over() && is_from(flow, addr, port)
}

/// Whether this is where the backend of a record is, which is there still. The hash in the record would
/// not do: anybody can find addresses that share one.
#[inline(always)]
fn is_from(flow: *mut Flow, addr: &Addr, port: u16) -> bool {
    let id = Held(records::held(flow).load()).backend();
    let (Some(stats), Some(backend)) = (BACKEND_STATS.get(id), BACKENDS.get(id)) else {
        return false;
    };
    backend.port == port && backend.addr == *addr && stats.is_life(records::generation(flow))
}
