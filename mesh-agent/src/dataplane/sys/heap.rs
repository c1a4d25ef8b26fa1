//! The C library's allocator.

/// Gives the kernel back what is free, wherever it lies. The allocator does that by itself only at the end
/// of each arena, and what a large file takes while it is read is in between. Takes milliseconds, in which
/// other threads may have to wait for memory. With another C library nothing happens.
pub fn trim() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it takes a number and may be called by any thread at any time.
    unsafe {
        libc::malloc_trim(0);
    }
}
