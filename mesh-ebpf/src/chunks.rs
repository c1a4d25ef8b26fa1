//! Arrays that grow by chunks, which the agent adds; see `mesh_common::chunk`.

use core::marker::PhantomData;

use aya_ebpf::bindings::BPF_F_MMAPABLE;
use aya_ebpf::btf_maps::{Array, ArrayOfMaps};
use aya_ebpf::macros::btf_map;
use mesh_common::{
    Backend, BackendStats, Flow, Limits, Name, Service, ServiceStats, Slot, Word, chunk,
};

/// Flat arrays, and chunks of them, are mapped by the agent and written with plain stores.
pub const FLAT: usize = BPF_F_MMAPABLE as usize;

/// The most that they may hold: there is room for so many chunks.
const MOST: Limits = Limits::MOST;

/// Chunks of `SIZE` records of as many words. Not of structures: before Linux 6.2 the kernel would take what
/// the agent adds, which has no description of its values, for another kind of map.
type Raw<const WORDS: usize, const SIZE: usize, const COUNT: usize> =
    ArrayOfMaps<Array<[u64; WORDS], SIZE, FLAT>, COUNT>;

/// An array of `T`, by the map that holds it.
pub struct Chunks<T, const WORDS: usize, const SIZE: usize, const COUNT: usize> {
    map: &'static Raw<WORDS, SIZE, COUNT>,
    of: PhantomData<fn() -> T>,
}

impl<T, const WORDS: usize, const SIZE: usize, const COUNT: usize> Chunks<T, WORDS, SIZE, COUNT> {
    const fn of(map: &'static Raw<WORDS, SIZE, COUNT>) -> Self {
        assert!(size_of::<T>() == 8 * WORDS && align_of::<T>() <= 8);
        Self { map, of: PhantomData }
    }

    /// A record, if its chunk is there.
    #[inline(always)]
    pub fn get(&self, index: u32) -> Option<&'static T> {
        let record = self.get_ptr_mut(index)?;
        // SAFETY: it lies in a map, which lives as long as this program runs; every bit pattern is a `T`,
        // and what others write meanwhile is words, or nobody reads it (ARCHITECTURE, the maps).
        Some(unsafe { &*record })
    }

    /// A record that is not only read.
    #[inline(always)]
    pub fn get_ptr_mut(&self, index: u32) -> Option<*mut T> {
        let record = self.map.get_value_ptr_mut(index / SIZE as u32, &(index % SIZE as u32))?;
        Some(record.cast())
    }
}

/// Declares arrays: the name of each, what it holds, records of a chunk, and how many there may be.
macro_rules! chunks {
    ($($(#[$doc:meta])* $name:ident: $record:ty, $size:expr, $most:expr;)*) => {
        mod raw {
            use super::*;
            $(#[btf_map]
            pub static $name: Raw<
                { size_of::<$record>() / 8 },
                { $size },
                { chunk::most($most, $size) },
            > = ArrayOfMaps::new();)*
        }
        $($(#[$doc])*
        pub const $name: Chunks<
            $record,
            { size_of::<$record>() / 8 },
            { $size },
            { chunk::most($most, $size) },
        > = Chunks::of(&raw::$name);)*
    };
}

chunks! {
    SERVICES: Service, chunk::SERVICES, MOST.frontends;
    SERVICE_STATS: ServiceStats, chunk::SERVICES, MOST.frontends;
    SLOTS: Slot, chunk::SLOTS, MOST.slots();
    /// For inspection, and for the programs of datagrams and affinity.
    BACKENDS: Backend, chunk::BACKENDS, MOST.backends;
    BACKEND_STATS: BackendStats, chunk::BACKENDS, MOST.backends;
    /// A [`mesh_common::latency::Latency`] for each backend; the agent sets it to 0 when the id is given to
    /// another.
    LATENCIES: Word, chunk::BACKENDS, MOST.backends;
    /// A [`mesh_common::Window`] for each backend; the agent sets it to 0 when the id is given to another.
    WINDOWS: Word, chunk::BACKENDS, MOST.backends;
    #[expect(dead_code, reason = "no program reads it: it is for whoever finds the maps without their agent")]
    NAMES: Name, chunk::NAMES, MOST.frontends;
    FLOWS: Flow, chunk::FLOWS, MOST.records;
}
