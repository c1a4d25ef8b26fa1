//! A word that the kernel programs and the agent share while both run.

#[cfg(not(target_arch = "bpf"))]
pub use host::Word;
#[cfg(target_arch = "bpf")]
pub use kernel::Word;

#[cfg(not(target_arch = "bpf"))]
mod host {
    use core::sync::atomic::{AtomicU64, Ordering};

    /// 64 bits that are read and written whole. On the host: an atomic.
    #[repr(transparent)]
    #[derive(Debug, Default)]
    pub struct Word(AtomicU64);

    impl Word {
        /// Starts with this value.
        #[must_use]
        pub const fn new(value: u64) -> Self {
            Self(AtomicU64::new(value))
        }

        /// Reads it; what was stored before the value that is seen is seen too.
        #[inline(always)]
        #[must_use]
        pub fn load(&self) -> u64 {
            self.0.load(Ordering::Acquire)
        }

        /// Writes it; whoever sees the value sees what was stored before it.
        pub fn store(&self, value: u64) {
            self.0.store(value, Ordering::Release);
        }
    }
}

#[cfg(target_arch = "bpf")]
#[expect(unsafe_code, reason = "a volatile load of memory that the agent writes")]
mod kernel {
    use core::cell::UnsafeCell;

    /// 64 bits that are read whole. The kernel programs never write one by a store.
    ///
    /// LLVM selects atomic loads for BPF from version 4 of the instruction set on only. A volatile
    /// load is one `BPF_LDX | BPF_DW`, which the JIT turns into one load, and is never merged with
    /// another or left out. It orders nothing by itself: what a program reads *through* a word
    /// (a slot, by the index in a table word) is ordered by the address dependency, on every
    /// architecture; reads after one another are ordered on x86-64, and where they are not, the
    /// grace period still keeps what was read from being reused.
    #[repr(transparent)]
    pub struct Word(UnsafeCell<u64>);

    impl Word {
        /// Reads it.
        #[inline(always)]
        #[must_use]
        pub fn load(&self) -> u64 {
            // SAFETY: `self` points to eight valid, aligned bytes of a map's value.
            unsafe { self.0.get().read_volatile() }
        }
    }

    // SAFETY: it is only read, by single loads.
    unsafe impl Sync for Word {}
}
