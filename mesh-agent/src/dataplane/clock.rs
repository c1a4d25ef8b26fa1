//! The clock of the kernel programs.

use std::sync::OnceLock;
use std::time::Duration;

use mesh_common::Origin;
use rustix::time::{ClockId, clock_getres, clock_gettime};

/// Nanoseconds of a second.
pub const NANOS: u64 = 1_000_000_000;

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

/// `HZ`, of a tick in nanoseconds, which is rounded where `HZ` is no divisor of 10^9.
#[must_use]
pub const fn hz(tick: u64) -> u64 {
    let tick = if tick == 0 { 1 } else { tick };
    (NANOS + tick / 2) / tick
}

/// So many seconds in units of 2^[`Origin::TIME_SHIFT`] ticks, rounded up.
pub fn units(seconds: u64) -> u64 {
    (seconds * hz(tick())).div_ceil(1 << Origin::TIME_SHIFT)
}

/// In what time half of a backend's latency is forgotten, in those units: 10.24 seconds at any usual `HZ`.
pub fn half_life() -> u64 {
    units(10)
}

/// What `bpf_jiffies64` gives now, to a second or so. It does not begin at 0, but 5 minutes before it
/// fills 32 bits (`INITIAL_JIFFIES`), and counts the ticks of `CLOCK_MONOTONIC`: each is as many whole nanoseconds
/// (`TICK_NSEC`, `tick_do_update_jiffies64`), so with `HZ` = 300 a second has a little more than 300.
pub fn jiffies() -> u64 {
    jiffies_at(monotonic(), tick())
}

pub(crate) const fn jiffies_at(monotonic: u64, tick: u64) -> u64 {
    (1 << 32) - 300 * hz(tick) + monotonic / tick
}

/// Nanoseconds of `CLOCK_MONOTONIC`, which `bpf_ktime_get_ns` gives too. Nobody can step it.
pub fn monotonic() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    // It starts at 0 and lasts for 584 years.
    u64::try_from(now.tv_sec).unwrap_or_default() * NANOS
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

    /// Where `HZ` is no divisor of 10^9, the kernel's clock counts rounded ticks, and so does this one: after ten years
    /// they are the same.
    #[test]
    fn ticks_are_those_of_the_kernel() {
        for (known, tick) in
            [(100, 10_000_000), (250, 4_000_000), (300, 3_333_333), (1_000, 1_000_000)]
        {
            assert_eq!(hz(tick), known);
            let decade = 3_650 * 86_400;
            let begin = (1 << 32) - 300 * known;
            assert_eq!(jiffies_at(0, tick), begin);
            assert_eq!(jiffies_at(decade * NANOS, tick), begin + decade * NANOS / tick);
        }
    }

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
