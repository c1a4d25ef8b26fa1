//! Clients that keep their backends. Apart from the way of all others.

use aya_ebpf::bindings::{BPF_ANY, BPF_F_NO_PREALLOC};
use aya_ebpf::btf_maps::HashMap;
use aya_ebpf::macros::btf_map;
use mesh_common::datagram;
use mesh_common::layout::counter;
use mesh_common::{Limits, Pin, PinKey, Tables as _, Word};

use crate::chunks::{BACKEND_STATS, BACKENDS};
use crate::maps::{Maps, count, jiffies, serves};

#[btf_map]
static AFFINITY: HashMap<
    PinKey,
    Pin,
    { Limits::DEFAULT.pins as usize },
    { BPF_F_NO_PREALLOC as usize },
> = HashMap::new();

/// What [`pinned`] gives for none: no backend has this id.
pub const NONE: u64 = u64::MAX;

/// The backend that a client keeps ([`mesh_common::affinity::pack`]), whose time begins anew; [`NONE`]
/// when it has none, or may not go on with it, and `chosen` is better. `timeout` is in jiffies. The backend's record can be used
/// as long as this program runs: its id is another's only after a grace period.
#[inline(never)]
pub fn pinned(client: u64, service: u64, timeout: u64, chosen: u32) -> u64 {
    let key = PinKey { client, service };
    // SAFETY: the element may be reused while it is read: `Pin::of` finds that out.
    let Some(pin) = (unsafe { AFFINITY.get(key) }) else { return NONE };
    let Some((packed, until)) = pin.of(&key) else { return NONE };
    let now = jiffies();
    let (id, generation) = (packed as u32, (packed >> 32) as u32);
    let (Some(stats), Some(backend)) = (BACKEND_STATS.get(id), BACKENDS.get(id)) else {
        return NONE;
    };
    let state = backend.marks.state();
    if Pin::deadline(until) < now || !stats.is_life(generation) {
        return NONE;
    }
    // What drains is in no table while there is another.
    let good =
        backend.marks.is_listed() && datagram::serves(state, stats.ejection(), || Maps.client());
    // When all are down, or out, nobody is sent from one to the other.
    if !good && (serves(chosen) || !backend.marks.is_listed()) {
        return NONE;
    }
    // Not with every connect of the same moment.
    if until != now + timeout {
        pin.until.store(now + timeout);
    }
    packed
}

/// Notes which backend ([`mesh_common::affinity::pack`]) a client keeps from now on.
#[inline(never)]
pub fn pin(client: u64, service: u64, timeout: u64, backend: u64) {
    let until = jiffies() + timeout;
    let pin = Pin {
        client: Word::new(client),
        service: Word::new(service),
        backend: Word::new(backend),
        until: Word::new(until),
    };
    if AFFINITY.insert(PinKey { client, service }, &pin, u64::from(BPF_ANY)).is_err() {
        count(counter::NO_PIN);
    }
}
