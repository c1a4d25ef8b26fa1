//! The clock of the kernel programs.

use std::sync::OnceLock;
use std::time::Duration;

use mesh_common::Origin;
use rustix::time::{ClockId, clock_getres, clock_gettime};

/// Nanoseconds from one tick of the kernel to the next: 10^9 / `HZ`. The resolution of the coarse clocks
/// is just that (`KTIME_LOW_RES`). The kernel is asked once: it is a system call, and everything that is
/// told of a backend needs it.
pub fn tick() -> u64 {
    static TICK: OnceLock<u64> = OnceLock::new();
    *TICK.get_or_init(|| {
        let tick = clock_getres(ClockId::MonotonicCoarse);
        u64::try_from(tick.tv_nsec).unwrap_or_default().max(1)
    })
}

/// So many seconds in units of 2^[`Origin::TIME_SHIFT`] ticks, at least one.
pub fn units(seconds: u64) -> u64 {
    ((seconds * (1_000_000_000 / tick())) >> Origin::TIME_SHIFT).max(1)
}

/// In what time half of a backend's latency is forgotten, in those units: 10 seconds.
pub fn half_life() -> u64 {
    units(10)
}

/// What `bpf_jiffies64` gives now, to a second or so. It does not begin at 0, but 5 minutes before it
/// fills 32 bits (`INITIAL_JIFFIES`), and counts the ticks of `CLOCK_MONOTONIC`.
pub fn jiffies() -> u64 {
    let tick = tick();
    let begin = (1 << 32) - 300 * (1_000_000_000 / tick);
    begin + monotonic() / tick
}

/// Nanoseconds of `CLOCK_MONOTONIC`, which `bpf_ktime_get_ns` gives too. Nobody can step it.
pub fn monotonic() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    // It starts at 0 and lasts for 584 years.
    u64::try_from(now.tv_sec).unwrap_or_default() * 1_000_000_000
        + u64::try_from(now.tv_nsec).unwrap_or_default()
}

/// For how long a record has been there, to a second or two.
pub fn age(origin: Origin) -> Duration {
    let ticks = origin.age(jiffies()) << Origin::TIME_SHIFT;
    // A record of this moment can be of the next unit already, as it is known here.
    const WHOLE: u64 = 1 << 28 << Origin::TIME_SHIFT;
    let ticks = if ticks > WHOLE - (4 << Origin::TIME_SHIFT) { 0 } else { ticks };
    Duration::from_nanos(ticks.saturating_mul(tick()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_are_those_of_the_kernels_ticks() {
        let now = jiffies();
        let second = 1_000_000_000 / tick();
        assert!(age(Origin::new(1, now)) < Duration::from_secs(6));
        assert!(age(Origin::new(1, now + second)) < Duration::from_secs(6), "in the future");
        let hour = age(Origin::new(1, now - 3_600 * second)).as_secs();
        assert!((3_590..3_610).contains(&hour), "{hour}");
    }
}
