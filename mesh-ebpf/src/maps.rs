//! The maps, and [`Tables`] over them. Layouts and writers are described in `mesh_common::layout`.
//!
//! The sizes here are defaults; the agent may set others when it loads the object.

use aya_ebpf::bindings::BPF_F_NO_PREALLOC;
use aya_ebpf::btf_maps::lpm_trie::Key;
use aya_ebpf::btf_maps::{Array, ArrayOfMaps, HashMap, LpmTrie, RingBuf};
use aya_ebpf::helpers::{
    bpf_get_current_ancestor_cgroup_id, bpf_get_current_cgroup_id, bpf_get_prandom_u32,
    bpf_jiffies64, bpf_ktime_get_ns,
};
use aya_ebpf::macros::btf_map;
use mesh_common::balance::Loaded;
use mesh_common::ejection::{Admission, ticks};
use mesh_common::latency::Latency;
use mesh_common::layout::counter;
use mesh_common::translate::{self, Detour};
use mesh_common::{
    ABI_VERSION, Addr, BackendStats, Client, Ejection, Elsewhere, Event, Flow, FrontendKey,
    FrontendValue, Limits, Origin, Places, Policy, Reason, Service, Settings, Slot, Table, Tables,
    Word, balance, chance, datagram, latency, maglev,
};

use crate::chunks::{BACKEND_STATS, BACKENDS, FLAT, LATENCIES, SERVICE_STATS, SERVICES, SLOTS};
use crate::{events, words};

/// Memory for an entry is taken when it is made.
const SPARSE: usize = BPF_F_NO_PREALLOC as usize;

/// What the maps hold, unless the agent sets something else.
const LIMITS: Limits = Limits::DEFAULT;

#[btf_map]
static FRONTENDS: HashMap<FrontendKey, FrontendValue, { LIMITS.frontends as usize }, SPARSE> =
    HashMap::new();

#[btf_map]
static SETTINGS: Array<Settings, 1, FLAT> = Array::new();

#[btf_map]
static VIRTUAL_IPS: LpmTrie<[u8; 16], u32, 256> = LpmTrie::new();

#[btf_map]
static COUNTERS: Array<Word, { counter::COUNT as usize }, FLAT> = Array::new();

/// Records whose place in `FLOWS` was taken, and further ones of datagram sockets.
#[btf_map]
pub static OVERFLOW: HashMap<Elsewhere, Flow, { LIMITS.records as usize }, SPARSE> = HashMap::new();

/// What cgroups are part of, by their ids.
#[btf_map]
static UNITS: HashMap<u64, u64, 32_768, SPARSE> = HashMap::new();

#[btf_map]
pub static EVENTS: RingBuf<Event, 262_144> = RingBuf::new();

/// No program reads this one. Updating a map of maps makes the kernel wait for every program that
/// is running (`maybe_wait_bpf_programs`): that is the agent's grace period.
#[btf_map]
static GRACE: ArrayOfMaps<Array<u32, 1>, 1> = ArrayOfMaps::new();

/// What the agent compares with its own version before it attaches anything.
#[unsafe(no_mangle)]
static ABI: u32 = ABI_VERSION;

/// Differs between nodes, so that they do not choose alike. Set by the agent.
#[unsafe(no_mangle)]
static SALT: u64 = 0;

/// The tables as the kernel holds them.
pub struct Maps;

impl Tables for Maps {
    #[inline(always)]
    fn frontend(&self, key: &FrontendKey) -> Option<FrontendValue> {
        // SAFETY: the element may be reused while it is read. Every bit pattern is a value, and
        // `translate` proves the value against the record that it names.
        unsafe { FRONTENDS.get(key) }.copied()
    }

    #[inline(always)]
    fn service(&self, index: u32) -> Option<&Service> {
        SERVICES.get(index)
    }

    #[inline(always)]
    fn slot(&self, index: u32) -> Option<&Slot> {
        SLOTS.get(index)
    }

    #[inline(always)]
    fn is_virtual(&self, addr: &Addr) -> bool {
        VIRTUAL_IPS.get(&Key::new(128, octets(*addr))).is_some()
    }

    #[inline(always)]
    fn random(&self) -> u32 {
        // SAFETY: the helper takes nothing and cannot fail.
        unsafe { bpf_get_prandom_u32() }
    }

    #[inline(always)]
    fn ejection(&self, backend: u32) -> Ejection {
        BACKEND_STATS.get(backend).map_or(Ejection::NONE, BackendStats::ejection)
    }

    #[inline(always)]
    fn active(&self, backend: u32) -> u64 {
        BACKEND_STATS.get(backend).map_or(0, BackendStats::active)
    }

    #[inline(always)]
    fn latency(&self, backend: u32) -> u64 {
        let word = LATENCIES.get(backend).map_or(0, Word::load);
        Latency(word).average(jiffies() >> Origin::TIME_SHIFT, half_life())
    }

    #[inline(always)]
    fn position(&self, service: u32) -> u64 {
        SERVICES.get(service).map_or(0, |service| service.position.next())
    }

    #[inline(always)]
    fn turn(&self, service: u32, table: Table) -> u32 {
        mesh_turn(service.into(), table.0) as u32
    }

    #[inline(always)]
    fn load(&self, backend: u32) -> (Ejection, u64) {
        match BACKEND_STATS.get(backend) {
            Some(stats) => (stats.ejection(), stats.active()),
            None => (Ejection::NONE, 0),
        }
    }

    #[inline(always)]
    fn lighter(&self, table: Table, chance: u32) -> u32 {
        mesh_lighter(table.0, chance.into()) as u32
    }

    #[inline(always)]
    fn nearer(&self, one: Loaded, other: Loaded) -> bool {
        let pack = |of: Loaded| u64::from(of.weight) << 32 | u64::from(of.backend);
        mesh_nearer(pack(one), one.active, pack(other), other.active) != 0
    }

    #[inline(always)]
    fn look_up(&self, table: Table, key: u64) -> u32 {
        mesh_look_up(table.0, key) as u32
    }

    #[inline(always)]
    fn admission(&self, slot: u32, client: Client, now: u64) -> Admission {
        match mesh_admission(slot.into(), client.tag().into(), now) {
            0 => Admission::In,
            1 => Admission::Try,
            2 => Admission::Answered,
            _ => Admission::Out,
        }
    }

    #[inline(always)]
    fn unknown(&self, key: &FrontendKey) -> Option<Reason> {
        // Nothing more for a connect that is none of our business.
        if SETTINGS.get(0).is_none_or(|settings| settings.virtual_ips.load() == 0) {
            return None;
        }
        match unknown(key) {
            0 => None,
            1 => Some(Reason::NoService),
            _ => Some(Reason::NoPort),
        }
    }

    #[inline(always)]
    fn is_out(&self, slot: u32, client: Client) -> u64 {
        mesh_is_out(slot.into(), client.tag().into()) & 1
    }

    #[inline(always)]
    fn around(&self, table: Table, first: u32) -> Detour {
        let packed = mesh_around(table.0, first.into());
        Detour { index: packed as u32, asks: packed >> 32 != 0 }
    }

    #[inline(always)]
    fn client(&self) -> Client {
        Client::of_cgroup(cgroup())
    }

    #[inline(always)]
    fn now(&self) -> u64 {
        ticks(clock())
    }

    #[inline(always)]
    fn retried(&self) {
        count(counter::RETRIES);
    }

    #[inline(always)]
    fn all_ejected(&self) {
        count(counter::ALL_EJECTED);
    }
}

/// What [`mesh_enter`] gives for [`None`].
pub const OUT: u64 = u64::MAX;

/// [`mesh_common::Caller::enter`], as a global function; see [`mesh_around`]. A backend, a [`Policy`], and what is
/// dialled ([`words::pack`]); [`OUT`] or a token.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn mesh_enter(backend: u64, policy: u64, high: u64, low: u64, port: u64) -> u64 {
    let backend = backend as u32;
    let Some(stats) = BACKEND_STATS.get(backend) else { return OUT };
    let (known, now) = (stats.ejection(), Maps.now());
    let next = match known.admits(Maps.client(), now) {
        Admission::In => return 0,
        Admission::Try => known.take(now),
        Admission::Answered => known.recover(Policy(policy), now),
        Admission::Out => return OUT,
    };
    if !stats.ejection.replace(known.0, next.0) {
        return OUT;
    }
    if next.is_in() {
        let frontend = words::unpack(high, low, port);
        events::recovered(backend, stats.generation.load() as u32, &frontend, next);
    }
    next.token().0
}

/// [`translate::unknown`]: 0 is nothing, 1 [`Reason::NoService`], 2 [`Reason::NoPort`].
#[inline(never)]
fn unknown(key: &FrontendKey) -> u32 {
    match translate::unknown(&Maps, key) {
        None => 0,
        Some(Reason::NoService) => 1,
        Some(_) => 2,
    }
}

/// Whether a backend is one to go to, for this client ([`datagram::serves`]).
#[inline(always)]
pub fn serves(id: u32) -> bool {
    let (Some(stats), Some(backend)) = (BACKEND_STATS.get(id), BACKENDS.get(id)) else {
        return false;
    };
    datagram::serves(backend.marks.state(), stats.ejection(), || Maps.client())
}

/// Whether anybody is excluded.
#[inline(always)]
pub fn excludes() -> bool {
    SETTINGS.get(0).is_some_and(|settings| settings.excludes.load() != 0)
}

/// How deep a cgroup that is excluded may lie in the hierarchy.
const DEPTH: u64 = 16;

/// Whether the task that runs is in a cgroup that is excluded, or the network namespace is. A global
/// function, apart from the way of nodes that exclude nobody.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn mesh_excluded(netns: u64) -> u64 {
    let Some(settings) = SETTINGS.get(0) else { return 0 };
    if settings.excludes_namespace(netns) {
        return 1;
    }
    for level in 0..DEPTH {
        // SAFETY: the helper takes a number; beyond the task's own cgroup it gives 0.
        let id = unsafe { bpf_get_current_ancestor_cgroup_id(level as i32) };
        if id == 0 {
            break;
        }
        if settings.excludes_cgroup(id) {
            return 1;
        }
    }
    0
}

/// A number for the choice of a socket's backend, even over its 32 bits ([`chance::mix`]).
#[inline(always)]
pub fn chance(cookie: u64) -> u32 {
    // SAFETY: a static of this crate; volatile, so that the compiler does not take the value that
    // it has here.
    let salt = unsafe { (&raw const SALT).read_volatile() };
    chance::mix(cookie, jiffies(), salt)
}

/// Half of a backend's latency is forgotten in this time, in units of 2^[`Origin::TIME_SHIFT`] jiffies. Set
/// by the agent, who knows the kernel's `HZ`; this is 10 s for 250.
#[unsafe(no_mangle)]
static HALF_LIFE: u64 = 10;

#[inline(always)]
fn half_life() -> u64 {
    // SAFETY: a static of this crate; volatile, so that the compiler does not take the value that
    // it has here.
    unsafe { (&raw const HALF_LIFE).read_volatile() }
}

/// Notes how long a round trip to a backend took, in microseconds.
#[inline(never)]
pub fn measure(backend: u32, time: u64) {
    let Some(word) = LATENCIES.get(backend) else { return };
    let now = jiffies() >> Origin::TIME_SHIFT;
    for _ in 0..latency::ATTEMPTS {
        let before = word.load();
        if word.replace(before, Latency(before).with(time, now, half_life()).0) {
            return;
        }
    }
}

/// `jiffies_64`.
#[inline(always)]
pub fn jiffies() -> u64 {
    // SAFETY: the helper takes nothing and cannot fail.
    unsafe { bpf_jiffies64() }
}

/// [`translate::admission`], as a global function; see [`mesh_around`]. Index of a slot, a
/// [`Client`], ticks; 0 is in, 1 try, 2 answered, anything else out.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn mesh_admission(slot: u64, client: u64, now: u64) -> u64 {
    match translate::admission(&Maps, slot as u32, Client::from_tag(client as u16), now) {
        Admission::In => 0,
        Admission::Try => 1,
        Admission::Answered => 2,
        Admission::Out => 3,
    }
}

/// [`translate::is_out`], likewise.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn mesh_is_out(slot: u64, client: u64) -> u64 {
    translate::is_out(&Maps, slot as u32, Client::from_tag(client as u16))
}

/// [`translate::around`], as a global function: the kernel's verifier looks at it once, whatever its
/// callers know, and not again for each of their attempts. Such a function takes and gives plain
/// numbers: a [`Table`] and the index of a slot; the index of a slot, and bit 32 for
/// [`Detour::asks`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn mesh_around(table: u64, first: u64) -> u64 {
    let Detour { index, asks } = translate::around(&Maps, Table(table), first as u32);
    u64::from(index) | u64::from(asks) << 32
}

/// [`balance::turn`], likewise: index of a record, a [`Table`]; index of a slot.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn mesh_turn(service: u64, table: u64) -> u64 {
    balance::turn(&Maps, service as u32, Table(table)).into()
}

/// [`balance::lighter`], likewise: a [`Table`] and a random number; index of a slot.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn mesh_lighter(table: u64, chance: u64) -> u64 {
    balance::lighter(&Maps, Table(table), chance as u32).into()
}

/// [`balance::nearer`], likewise: of both, id and in the upper half weight, and open connections; 1 or 0.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn mesh_nearer(one: u64, active: u64, other: u64, other_active: u64) -> u64 {
    let unpack = |packed: u64, active| Loaded {
        backend: packed as u32,
        weight: (packed >> 32) as u16,
        active,
    };
    balance::nearer(&Maps, unpack(one, active), unpack(other, other_active)).into()
}

/// [`maglev::look_up`], likewise: a [`Table`] and a client's key; index of a slot.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn mesh_look_up(table: u64, key: u64) -> u64 {
    maglev::look_up(&Maps, Table(table), key).into()
}

/// [`translate::share_allows`], likewise: a [`Table`], a [`Policy`], and a [`Client`] with bit 16 for
/// "it is out already".
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn mesh_share_allows(table: u64, policy: u64, client: u64) -> u64 {
    let is_out = client >> 16 != 0;
    let client = Client::from_tag(client as u16);
    u64::from(translate::share_allows(&Maps, Table(table), Policy(policy), client, is_out))
}

/// [`Addr::octets`] without a loop over slices, which the verifier would have to follow.
#[inline(always)]
pub fn octets(addr: Addr) -> [u8; 16] {
    // SAFETY: both are 16 bytes, every bit pattern is a value, and the words hold their bytes in
    // memory order.
    unsafe { core::mem::transmute(addr.words()) }
}

/// Id of the cgroup of the task that runs.
#[inline(always)]
pub fn cgroup() -> u64 {
    // SAFETY: the helper takes nothing and cannot fail.
    unsafe { bpf_get_current_cgroup_id() }
}

/// Where the records of sockets are.
#[inline(always)]
pub fn places() -> Places {
    Places(SETTINGS.get(0).map_or(0, |settings| settings.places.load()))
}

/// The key of the unit that this cgroup is part of; one that the agent has not seen yet is one by itself.
#[inline(never)]
pub fn unit() -> u64 {
    let cgroup = cgroup();
    // SAFETY: an entry is not reused while its cgroup exists, and the task that runs is in it.
    unsafe { UNITS.get(cgroup) }.copied().unwrap_or(cgroup)
}

/// Nanoseconds of `CLOCK_MONOTONIC`.
#[inline(always)]
pub fn clock() -> u64 {
    // SAFETY: the helper takes nothing and cannot fail.
    unsafe { bpf_ktime_get_ns() }
}

/// A word of `COUNTERS`.
#[inline(always)]
pub fn counter(index: u32) -> Option<&'static Word> {
    COUNTERS.get(index)
}

/// Adds one to a counter of `COUNTERS`.
#[inline(always)]
pub fn count(index: u32) {
    if let Some(counter) = COUNTERS.get(index) {
        counter.increment();
    }
}

/// Counts a connect to a frontend that was refused.
#[inline(always)]
pub fn count_refused(service: u32, reason: u32) {
    if let Some(stats) = SERVICE_STATS.get(service)
        && let Some(refused) = stats.refused.get(reason as usize)
    {
        refused.increment();
    }
}
