//! The maps, and [`Tables`] over them. Layouts and writers are described in `mesh_common::layout`.
//!
//! The sizes here are defaults; the agent may set others when it loads the object.

use aya_ebpf::bindings::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC};
use aya_ebpf::btf_maps::lpm_trie::Key;
use aya_ebpf::btf_maps::{Array, ArrayOfMaps, HashMap, LpmTrie, PerCpuArray, SkStorage};
use aya_ebpf::helpers::bpf_get_prandom_u32;
use aya_ebpf::macros::btf_map;
use mesh_common::layout::counter;
use mesh_common::{
    ABI_VERSION, Addr, Backend, BackendStats, Flow, FrontendKey, FrontendValue, Service, Settings,
    Slot, Tables,
};

/// Flat arrays are mapped by the agent and written with plain stores.
const FLAT: usize = BPF_F_MMAPABLE as usize;

#[btf_map]
static FRONTENDS: HashMap<FrontendKey, FrontendValue, 65_536, { BPF_F_NO_PREALLOC as usize }> =
    HashMap::new();

#[btf_map]
static SERVICES: Array<Service, 65_536, FLAT> = Array::new();

#[btf_map]
static SLOTS: Array<Slot, 262_144, FLAT> = Array::new();

#[btf_map]
static BACKENDS: Array<Backend, 131_072, FLAT> = Array::new();

#[btf_map]
static BACKEND_STATS: Array<BackendStats, 131_072, FLAT> = Array::new();

#[btf_map]
static SETTINGS: Array<Settings, 1, FLAT> = Array::new();

#[btf_map]
static VIRTUAL_IPS: LpmTrie<[u8; 16], u32, 256> = LpmTrie::new();

#[btf_map]
static COUNTERS: PerCpuArray<u64, { counter::COUNT as usize }> = PerCpuArray::new();

#[btf_map]
pub static FLOWS: SkStorage<Flow> = SkStorage::new();

/// No program reads this one. Updating a map of maps makes the kernel wait for every program that
/// is running (`maybe_wait_bpf_programs`): that is the agent's grace period.
#[btf_map]
static GRACE: ArrayOfMaps<Array<u32, 1>, 1> = ArrayOfMaps::new();

/// What the agent compares with its own version before it attaches anything.
#[unsafe(no_mangle)]
static ABI: u32 = ABI_VERSION;

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
        let any = SETTINGS.get(0).is_some_and(|s| s.virtual_ips.load() != 0);
        any && VIRTUAL_IPS.get(&Key::new(128, octets(*addr))).is_some()
    }

    #[inline(always)]
    fn random(&self) -> u32 {
        // SAFETY: the helper takes nothing and cannot fail.
        unsafe { bpf_get_prandom_u32() }
    }

    #[inline(always)]
    fn retried(&self) {
        count(counter::RETRIES);
    }
}

/// [`Addr::octets`] without a loop over slices, which the verifier would have to follow.
#[inline(always)]
pub fn octets(addr: Addr) -> [u8; 16] {
    // SAFETY: both are 16 bytes, every bit pattern is a value, and the words hold their bytes in
    // memory order.
    unsafe { core::mem::transmute(addr.words()) }
}

/// Adds one to a counter of `COUNTERS`.
#[inline(always)]
pub fn count(index: u32) {
    if let Some(counter) = COUNTERS.get_ptr_mut(index) {
        add_one(counter);
    }
}

/// Counts a connect that was given this backend.
#[inline(always)]
pub fn count_opened(backend: u32) {
    if let Some(stats) = BACKEND_STATS.get_ptr_mut(backend) {
        // SAFETY: only the field's address is computed.
        add_one(unsafe { (&raw mut (*stats).opened).cast() });
    }
}

/// Adds one atomically: a program can be preempted on its own CPU, so even a per-CPU counter
/// would lose counts without it.
#[inline(always)]
fn add_one(counter: *mut u64) {
    // SAFETY: `counter` points into a map's value, aligned to 8. The form without a fetch is the
    // one that every kernel with these hooks accepts (BPF_STX | BPF_ATOMIC | BPF_DW, BPF_ADD).
    unsafe {
        core::arch::asm!(
            "lock *(u64 *)({counter} + 0) += {one}",
            counter = in(reg) counter,
            one = in(reg) 1u64,
        );
    }
}
