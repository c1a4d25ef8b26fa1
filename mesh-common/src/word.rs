//! A word that the kernel programs and the agent share while both run.

#[cfg(not(target_arch = "bpf"))]
pub use host::{Half, Word};
#[cfg(target_arch = "bpf")]
pub use kernel::{Half, Word};

#[cfg(not(target_arch = "bpf"))]
mod host {
    use core::sync::atomic::AtomicU32;
    #[cfg(not(loom))]
    use core::sync::atomic::{AtomicU64, Ordering, fence};
    #[cfg(loom)]
    use loom::sync::atomic::{AtomicU64, Ordering, fence};

    /// 32 bits that are read and written whole, and that nothing else depends on.
    #[repr(transparent)]
    #[derive(Debug, Default)]
    pub struct Half(AtomicU32);

    impl Half {
        /// Starts with this value.
        #[must_use]
        pub const fn new(value: u32) -> Self {
            Self(AtomicU32::new(value))
        }

        /// Reads it.
        #[inline(always)]
        #[must_use]
        pub fn load(&self) -> u32 {
            self.0.load(Ordering::Relaxed)
        }

        /// Writes it.
        pub fn store(&self, value: u32) {
            self.0.store(value, Ordering::Relaxed);
        }
    }

    /// 64 bits that are read and written whole. On the host: an atomic.
    #[repr(transparent)]
    #[derive(Debug, Default)]
    pub struct Word(AtomicU64);

    impl Word {
        /// Starts with this value.
        #[cfg(not(loom))]
        #[must_use]
        pub const fn new(value: u64) -> Self {
            Self(AtomicU64::new(value))
        }

        /// Starts with this value.
        #[cfg(loom)]
        #[must_use]
        pub fn new(value: u64) -> Self {
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

        /// Replaces `old` by `new`. `false` when it was not `old`: then nothing is changed.
        ///
        /// Of two that replace a word each and then look at the other's, at least one sees what
        /// the other did, as with the kernel's `cmpxchg`.
        #[inline(always)]
        #[must_use]
        pub fn replace(&self, old: u64, new: u64) -> bool {
            let replaced =
                self.0.compare_exchange(old, new, Ordering::AcqRel, Ordering::Acquire).is_ok();
            if replaced {
                // A load that follows could otherwise be made before the write is seen by others.
                fence(Ordering::SeqCst);
            }
            replaced
        }

        /// Adds one; it wraps.
        #[inline(always)]
        pub fn increment(&self) {
            self.0.fetch_add(1, Ordering::AcqRel);
        }

        /// Adds one; it wraps. Gives what it was before.
        #[inline(always)]
        pub fn next(&self) -> u64 {
            self.0.fetch_add(1, Ordering::AcqRel)
        }

        /// Subtracts one; it wraps.
        #[inline(always)]
        pub fn decrement(&self) {
            self.0.fetch_sub(1, Ordering::AcqRel);
        }
    }
}

#[cfg(target_arch = "bpf")]
#[expect(unsafe_code, reason = "memory that is shared with the agent: volatile and atomic access")]
mod kernel {
    use core::arch::asm;
    use core::cell::UnsafeCell;
    use core::sync::atomic::{Ordering, compiler_fence};

    /// 64 bits that are read and written whole.
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
        /// Starts with this value.
        #[must_use]
        pub const fn new(value: u64) -> Self {
            Self(UnsafeCell::new(value))
        }

        /// Reads it.
        #[inline(always)]
        #[must_use]
        pub fn load(&self) -> u64 {
            // SAFETY: `self` points to eight valid, aligned bytes of a map's value.
            unsafe { self.0.get().read_volatile() }
        }

        /// Writes it. What the program wrote before is seen before it on x86-64; elsewhere by
        /// whoever is ordered after this program by something else, such as the socket's lock.
        #[inline(always)]
        pub fn store(&self, value: u64) {
            // The compiler may move plain writes over a volatile one.
            compiler_fence(Ordering::Release);
            // SAFETY: as in `load`.
            unsafe { self.0.get().write_volatile(value) }
        }

        /// Replaces `old` by `new`, with the full ordering of the kernel's `cmpxchg`. `false` when
        /// it was not `old`: then nothing is changed.
        #[inline(always)]
        #[must_use]
        pub fn replace(&self, old: u64, new: u64) -> bool {
            let seen: u64;
            // SAFETY: as in `load`; one instruction (BPF_STX | BPF_ATOMIC | BPF_DW, BPF_CMPXCHG),
            // which takes and gives the old value in r0.
            unsafe {
                asm!(
                    "r0 = cmpxchg_64({word} + 0, r0, {new})",
                    word = in(reg) self.0.get(),
                    new = in(reg) new,
                    inlateout("r0") old => seen,
                );
            }
            seen == old
        }

        /// Adds one; it wraps.
        #[inline(always)]
        pub fn increment(&self) {
            self.add(1);
        }

        /// Adds one; it wraps. Gives what it was before.
        #[inline(always)]
        pub fn next(&self) -> u64 {
            let mut value = 1u64;
            // SAFETY: as in `load`; one instruction (BPF_STX | BPF_ATOMIC | BPF_DW, BPF_ADD |
            // BPF_FETCH).
            unsafe {
                asm!(
                    "{value} = atomic_fetch_add((u64 *)({word} + 0), {value})",
                    word = in(reg) self.0.get(),
                    value = inout(reg) value,
                );
            }
            value
        }

        /// Subtracts one; it wraps.
        #[inline(always)]
        pub fn decrement(&self) {
            self.add(u64::MAX);
        }

        #[inline(always)]
        fn add(&self, delta: u64) {
            // SAFETY: as in `load`. A program can be preempted on its own CPU, so this is atomic
            // also where only one CPU writes.
            unsafe {
                asm!(
                    "lock *(u64 *)({word} + 0) += {delta}",
                    word = in(reg) self.0.get(),
                    delta = in(reg) delta,
                );
            }
        }
    }

    // SAFETY: it is only accessed by single loads and atomic instructions.
    unsafe impl Sync for Word {}

    /// 32 bits that the agent writes, and programs read, whole.
    #[repr(transparent)]
    pub struct Half(UnsafeCell<u32>);

    impl Half {
        /// Reads it.
        #[inline(always)]
        #[must_use]
        pub fn load(&self) -> u32 {
            // SAFETY: `self` points to four valid, aligned bytes of a map's value.
            unsafe { self.0.get().read_volatile() }
        }
    }

    // SAFETY: it is only accessed by single loads.
    unsafe impl Sync for Half {}
}
