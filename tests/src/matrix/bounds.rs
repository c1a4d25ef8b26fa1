//! What the defaults promise: every bound of the matrix is made of these.

use std::time::Duration;

use crate::mortal::Pace;

/// `interval` of `health`.
pub const INTERVAL: Duration = Duration::from_secs(1);

/// `timeout` of `health`.
pub const TIMEOUT: Duration = Duration::from_millis(300);

/// `fall` of `health`.
pub const FALL: u32 = 3;

/// `base` of `ejection`.
pub const BASE: Duration = Duration::from_secs(1);

/// Between two checks of an endpoint passes an interval, give or take a tenth, so that many are checked
/// evenly: the longest time.
const LONGEST_INTERVAL: Duration = Duration::from_millis(1_100);

/// The second retransmission of a SYN: after 2 s, as by default since Linux 6.5
/// (`tcp_syn_linear_timeouts`), or after 3 s.
const RETRANSMITTED: [Duration; 2] = [Duration::from_secs(2), Duration::from_secs(3)];

/// The kernel counts time in ticks of 2^24 ns, and rounds down what time it is.
pub const TICK: Duration = Duration::from_nanos(1 << 24);

/// What a busy machine of two processors may be late, as in the tests of ejection.
pub const LATE: Duration = Duration::from_millis(700);

/// The aim: an endpoint that works again has traffic again within this. Checks find it with their second
/// pass (`rise`), the kernel after an ejection that is no longer than what it has been out for.
pub const RECOVERY: Duration = Duration::from_secs(2);

/// How many endpoints there are.
pub const ENDPOINTS: u8 = 4;

/// How many clients there are, each in a cgroup of its own.
pub const CLIENTS: [&str; 3] = ["one", "two", "three"];

/// Connects of one client in a second, at the most.
const RATE: u64 = Pace::STEADY.threads as u64 * 1_000_000 / Pace::STEADY.pause;

/// When checks that fail have made an endpoint unhealthy: `fall` checks, the first of which begins up to an
/// interval after the failure; the last one may have to wait for its end.
#[must_use]
pub fn unhealthy() -> Duration {
    LONGEST_INTERVAL * FALL + TIMEOUT
}

/// How long a connect that is not answered has to wait until its backend is blamed.
#[must_use]
pub fn silence() -> Duration {
    let linear = std::path::Path::new("/proc/sys/net/ipv4/tcp_syn_linear_timeouts").exists();
    RETRANSMITTED[usize::from(!linear)]
}

/// How many tries there can be within a time after the first ejection: each ejection is twice as long as the
/// one before.
#[must_use]
pub fn tries(within: Duration) -> u64 {
    u64::from((within.as_nanos() / BASE.as_nanos() + 1).ilog2())
}

/// How many connects of one client go to `endpoints` of [`ENDPOINTS`] within a time: its share of what
/// the client makes, and six standard deviations of a Poisson distribution (a probability below 1e-9).
#[must_use]
pub fn share(endpoints: usize, within: Duration) -> u64 {
    let mean = RATE as f64 * within.as_secs_f64() * endpoints as f64 / f64::from(ENDPOINTS);
    let most = mean + 6.0 * mean.sqrt();
    // A count of connects of seconds.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "small and positive"
    )]
    let most = most.ceil() as u64;
    most
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_ejection_is_twice_as_long() {
        let after = |millis| tries(Duration::from_millis(millis));
        assert_eq!([999, 1_000, 2_999, 3_000, 6_999, 7_000].map(after), [0, 1, 1, 2, 2, 3]);
    }

    #[test]
    fn what_one_client_sends_to_one_endpoint() {
        assert_eq!(RATE, 100);
        assert_eq!(share(1, Duration::from_secs(4)), 160);
        assert_eq!(share(4, Duration::from_secs(1)), 160);
    }
}
