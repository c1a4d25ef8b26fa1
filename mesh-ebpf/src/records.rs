//! Records of sockets: finding, claiming and releasing them, and the accounts that hang on them.
//! The rules are in `mesh_common::flow`.

use aya_ebpf::bindings::BPF_NOEXIST;
use mesh_common::layout::counter;
use mesh_common::{
    BackendStats, Elsewhere, Flow, FrontendKey, Given, Held, Origin, Role, Tables as _, Token,
    Word, flow,
};

use crate::chunks::{BACKEND_STATS, FLOWS};
use crate::maps::{self, Maps, OVERFLOW, count, counter};

/// The key of a record whose place was taken.
#[inline(always)]
const fn elsewhere(cookie: u64) -> Elsewhere {
    Elsewhere { cookie, index: 0 }
}

/// Whether any such record is in `OVERFLOW`. A socket's own entry is counted before it can be asked
/// for.
#[inline(always)]
fn overflowed() -> bool {
    counter(counter::OVERFLOWED).is_some_and(|records| records.load() != 0)
}

/// The word of a record.
#[inline(always)]
pub fn held<'f>(flow: *mut Flow) -> &'f Word {
    // SAFETY: `flow` points to a value of `FLOWS` or `OVERFLOW`, valid while this program runs.
    unsafe { &(*flow).held }
}

/// What a record says about its socket. The caller has seen that it is the socket's, and uses this
/// only if it still is afterwards, or the socket cannot have lost it meanwhile.
#[inline(always)]
pub fn given(flow: *mut Flow) -> Given {
    // SAFETY: as in `held`; volatile, so that it is read now and not after the record was released.
    unsafe { (&raw const (*flow).given).read_volatile() }
}

/// The service in a record; see [`given`].
#[inline(always)]
pub fn frontend(flow: *mut Flow) -> FrontendKey {
    // SAFETY: as in `given`.
    unsafe { (&raw const (*flow).given.frontend).read_volatile() }
}

/// When a record was used last; see [`given`].
#[inline(always)]
pub fn origin(flow: *mut Flow) -> Origin {
    // SAFETY: as in `given`.
    unsafe { (&raw const (*flow).given.origin).read_volatile() }
}

/// What a record says besides; see [`given`].
#[inline(always)]
pub fn role(flow: *mut Flow) -> Role {
    // SAFETY: as in `given`.
    unsafe { (&raw const (*flow).given.role).read_volatile() }
}

/// Notes that a datagram socket has used its record now. The socket's lock keeps other writers away, and
/// whoever reads it otherwise reads the whole word.
#[inline(always)]
pub fn set_origin(flow: *mut Flow, origin: Origin) {
    // SAFETY: as in `given`.
    unsafe { (&raw mut (*flow).given.origin).write_volatile(origin) }
}

/// Notes how many further records a datagram socket has; likewise.
#[inline(always)]
pub fn set_role(flow: *mut Flow, role: Role) {
    // SAFETY: as in `given`.
    unsafe { (&raw mut (*flow).given.role).write_volatile(role) }
}

/// The generation in a record; see [`given`].
#[inline(always)]
pub fn generation(flow: *mut Flow) -> u32 {
    // SAFETY: as in `given`.
    unsafe { (&raw const (*flow).given.generation).read_volatile() }
}

/// The token in a record; see [`given`].
#[inline(always)]
pub fn token(flow: *mut Flow) -> Token {
    // SAFETY: as in `given`.
    unsafe { (&raw const (*flow).given.token).read_volatile() }
}

/// The record of the socket with this cookie.
#[inline(always)]
pub fn find(cookie: u64) -> Option<*mut Flow> {
    let places = maps::places();
    let flow = FLOWS.get_ptr_mut(places.of(cookie))?;
    if Held(held(flow).load()).is_of(cookie) {
        return Some(flow);
    }
    if !places.has_former() && !overflowed() {
        return None;
    }
    let flow = find_elsewhere(cookie);
    if flow.is_null() { None } else { Some(flow) }
}

/// The same, where it may be from before the table grew, and in `OVERFLOW`. Null is none.
#[inline(never)]
fn find_elsewhere(cookie: u64) -> *mut Flow {
    if let Some(place) = maps::places().former(cookie)
        && let Some(flow) = FLOWS.get_ptr_mut(place)
        && Held(held(flow).load()).is_of(cookie)
    {
        return flow;
    }
    match OVERFLOW.get_ptr_mut(elsewhere(cookie)) {
        Some(flow) if Held(held(flow).load()).is_of(cookie) => flow,
        _ => core::ptr::null_mut(),
    }
}

/// Records what a socket was given, in place of what it held before. `false` when there is no room.
#[inline(always)]
pub fn record(cookie: u64, mine: &mut Flow) -> bool {
    let places = maps::places();
    let Some(flow) = FLOWS.get_ptr_mut(places.of(cookie)) else {
        count(counter::NO_FLOW_RECORD);
        return false;
    };
    // A socket's first connect finds its place free, and no record elsewhere.
    if held(flow).load() != 0 || places.has_former() || overflowed() {
        end(cookie);
    }
    if flow::claim(held(flow)) == flow::Claim::Taken {
        // SAFETY: as in `held`; the record is this socket's since the line above, and the socket's
        // lock keeps others away from the rest of it.
        unsafe { core::ptr::copy_nonoverlapping(&mine.given, &raw mut (*flow).given, 1) };
        flow::publish(held(flow), Held(mine.held.load()));
        return true;
    }
    record_elsewhere(cookie, mine)
}

/// Records it in `OVERFLOW`.
#[inline(never)]
fn record_elsewhere(cookie: u64, mine: &mut Flow) -> bool {
    mine.given.role = mine.given.role.elsewhere();
    // Before the entry is there, so that whoever needs it looks.
    if let Some(records) = counter(counter::OVERFLOWED) {
        records.increment();
    }
    if OVERFLOW.insert(elsewhere(cookie), &*mine, u64::from(BPF_NOEXIST)).is_ok() {
        count(counter::COLLISIONS);
        return true;
    }
    if let Some(records) = counter(counter::OVERFLOWED) {
        records.decrement();
    }
    count(counter::NO_FLOW_RECORD);
    false
}

/// A reservation that was released, for whoever released it to account for.
pub struct Released {
    /// What was reserved.
    pub held: Held,
    /// The accounts of the backend, if it still is that backend.
    pub stats: &'static BackendStats,
    /// The token of its try, if it still held it.
    pub token: Token,
}

/// Releases this record, which is where the socket with this cookie has its own.
#[inline(always)]
pub fn release(flow: *mut Flow, cookie: u64) -> Option<Released> {
    let (generation, token) = (generation(flow), token(flow));
    let held = if !role(flow).is_elsewhere() {
        flow::release(held(flow), cookie)?
    } else {
        // An element of a hash map can be another socket's at any time, so its word decides nothing:
        // whoever removes the entry has released it, and has read the socket's own before.
        let held = Held(held(flow).load());
        if !remove_elsewhere(cookie) {
            return None;
        }
        held
    };
    let stats = BACKEND_STATS.get(held.backend()).filter(|stats| stats.is_life(generation))?;
    Some(Released { held, stats, token: if held.has_token() { token } else { Token::NONE } })
}

/// Removes an entry of `OVERFLOW`; `false` when somebody else has.
#[inline(always)]
fn remove_elsewhere(cookie: u64) -> bool {
    let removed = OVERFLOW.remove(elsewhere(cookie)).is_ok();
    if removed && let Some(records) = counter(counter::OVERFLOWED) {
        records.decrement();
    }
    removed
}

/// Releases what the socket holds, if anything, and accounts for a connection that has ended and of
/// which nothing else is known.
#[inline(always)]
pub fn end(cookie: u64) {
    mesh_end(cookie);
}

/// [`end`], as a global function: the verifier looks at it once, and not again wherever it is called.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn mesh_end(cookie: u64) -> u64 {
    if let Some(flow) = find(cookie)
        && let Some(Released { held, stats, token }) = release(flow, cookie)
    {
        account(stats, held.backend(), token);
    }
    0
}

/// Accounts for a connection of a backend that has ended ([`BackendStats::end`]).
#[inline(always)]
pub fn account(stats: &BackendStats, backend: u32, token: Token) {
    if stats.close(token) {
        mesh_give_back(backend.into(), token.0);
    }
}

/// [`BackendStats::give_back`], likewise: a backend, which the caller has seen to be there, and its token.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn mesh_give_back(backend: u64, token: u64) -> u64 {
    if let Some(stats) = BACKEND_STATS.get(backend as u32) {
        stats.give_back(Token(token), Maps.now());
    }
    0
}
