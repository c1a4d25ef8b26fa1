//! Telling the agent what is rare. What could come in a flood has a budget by the second, and does
//! not wake the agent, which looks by itself from time to time.

use aya_ebpf::bindings::{BPF_RB_FORCE_WAKEUP, BPF_RB_NO_WAKEUP};
pub use mesh_common::event::Kind;
use mesh_common::layout::counter;
use mesh_common::{Ejection, Event, FrontendKey, Given, Held, Reason};

use crate::maps::{EVENTS, cgroup, clock, count, counter};

/// How many events without a wake-up are sent in a second; the others are only counted.
const BUDGET: u64 = 200;

const NO_WAKEUP: u64 = BPF_RB_NO_WAKEUP as u64;
/// Also when the agent has not read what was sent before without one.
const WAKEUP: u64 = BPF_RB_FORCE_WAKEUP as u64;

/// A connect was refused.
#[inline(always)]
pub fn refused(key: &FrontendKey, reason: Reason) {
    let time = clock();
    if !within_budget(time) {
        return count(counter::EVENTS_LOST);
    }
    send(
        &Event {
            time,
            client: cgroup(),
            ejection: 0,
            frontend: *key,
            backend: u32::MAX,
            generation: 0,
            kind: Kind::Refused as u8,
            detail: reason as u8,
            pad: 0,
        },
        NO_WAKEUP,
    );
}

/// A connection failed.
#[inline(always)]
pub fn failed(held: Held, given: &Given, detail: u8, ejection: Ejection) {
    limited(Kind::Failed, held, given, detail, ejection);
}

/// A backend was spared.
#[inline(always)]
pub fn failed_but_spared(held: Held, given: &Given, detail: u8, ejection: Ejection) {
    limited(Kind::Spared, held, given, detail, ejection);
}

/// A backend went out, or came back.
#[inline(always)]
pub fn changed(kind: Kind, held: Held, given: &Given, detail: u8, ejection: Ejection) {
    send(&event(clock(), kind, held, given, detail, ejection), WAKEUP);
}

/// Nothing bad was heard of a backend's try, as a connect finds.
#[inline(always)]
pub fn recovered(backend: u32, generation: u32, frontend: &FrontendKey, ejection: Ejection) {
    let event = Event {
        time: clock(),
        client: cgroup(),
        ejection: ejection.0,
        frontend: *frontend,
        backend,
        generation,
        kind: Kind::Recovered as u8,
        detail: 0,
        pad: 0,
    };
    send(&event, WAKEUP);
}

#[inline(always)]
fn limited(kind: Kind, held: Held, given: &Given, detail: u8, ejection: Ejection) {
    let time = clock();
    if !within_budget(time) {
        return count(counter::EVENTS_LOST);
    }
    send(&event(time, kind, held, given, detail, ejection), NO_WAKEUP);
}

#[inline(always)]
fn event(
    time: u64,
    kind: Kind,
    held: Held,
    given: &Given,
    detail: u8,
    ejection: Ejection,
) -> Event {
    Event {
        time,
        client: given.client,
        ejection: ejection.0,
        frontend: given.frontend,
        backend: held.backend(),
        generation: given.generation,
        kind: kind as u8,
        detail,
        pad: 0,
    }
}

#[inline(always)]
fn send(event: &Event, flags: u64) {
    if EVENTS.output(event, flags).is_err() {
        count(counter::EVENTS_LOST);
    }
}

/// Whether one more event may be sent in this second.
#[inline(always)]
fn within_budget(time: u64) -> bool {
    let Some(word) = counter(counter::EVENT_BUDGET) else { return false };
    // 2^30 ns: about a second.
    let (second, seen) = (time >> 30, word.load());
    let next = match seen >> 24 == second {
        true if seen & 0xff_ffff >= BUDGET => return false,
        true => seen + 1,
        false => second << 24 | 1,
    };
    // Whoever loses against another CPU has been counted by it, or is one too few.
    word.replace(seen, next)
}
