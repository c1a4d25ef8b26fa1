//! The clock of the kernel programs.

use rustix::time::{ClockId, clock_gettime};

/// Nanoseconds of `CLOCK_MONOTONIC`, which `bpf_ktime_get_ns` gives too. Nobody can step it.
pub fn monotonic() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    // It starts at 0 and lasts for 584 years.
    u64::try_from(now.tv_sec).unwrap_or_default() * 1_000_000_000
        + u64::try_from(now.tv_nsec).unwrap_or_default()
}
