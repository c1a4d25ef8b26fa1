//! The number that a socket's backend is chosen by, from what is at hand when it connects. It costs a
//! tenth of what the kernel's generator does (`bpf_get_prandom_u32`).

/// A number that is even over its 32 bits: a hash of the socket's cookie, which no other socket
/// has, and of the time in jiffies, because the same socket may try again. `salt` differs between
/// nodes, so that they do not choose alike.
///
/// The hash is the last step of SplitMix64 (G. Steele, D. Lea, C. Flood 2014), without the shift
/// that only changes the lower half. The same cookie gives the same number until the next jiffy.
///
/// Anybody who can read cookies can foresee it: it spreads load, and keeps no secret.
#[inline(always)]
#[must_use]
pub const fn mix(cookie: u64, time: u64, salt: u64) -> u32 {
    let mut mixed =
        cookie.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ time.wrapping_mul(0xd6e8_feb8_6659_fd93);
    mixed = mixed.wrapping_add(salt);
    mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    (mixed >> 32) as u32
}

#[cfg(test)]
mod tests;
