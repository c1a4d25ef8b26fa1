//! Addresses: 16 bytes for both families, so that nothing is written twice.

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// An IPv6 address, or an IPv4 address mapped into IPv6 (RFC 4291, section 2.5.5.2), in network
/// byte order.
///
/// It is kept as four words because that is how the kernel hands it to a program
/// (`bpf_sock_addr.user_ip6`); each word holds its bytes in memory order, so a word must never be
/// compared as a number.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Addr {
    words: [u32; 4],
}

/// The third word of every v4-mapped address: `00 00 ff ff` in memory.
const MAPPED: u32 = u32::from_ne_bytes([0, 0, 0xff, 0xff]);

impl Addr {
    /// The unspecified IPv6 address, `::`.
    pub const UNSPECIFIED: Self = Self { words: [0; 4] };

    /// An IPv4 address given as the kernel does (`bpf_sock_addr.user_ip4`: network byte order).
    #[inline(always)]
    #[must_use]
    pub const fn from_v4_word(word: u32) -> Self {
        Self { words: [0, 0, MAPPED, word] }
    }

    /// An address given as the kernel does (`bpf_sock_addr.user_ip6`: network byte order).
    #[inline(always)]
    #[must_use]
    pub const fn from_words(words: [u32; 4]) -> Self {
        Self { words }
    }

    /// The four words as the kernel takes them.
    #[inline(always)]
    #[must_use]
    pub const fn words(self) -> [u32; 4] {
        self.words
    }

    /// The last word: the IPv4 address in network byte order when [`Addr::is_v4`] holds.
    #[inline(always)]
    #[must_use]
    pub const fn v4_word(self) -> u32 {
        self.words[3]
    }

    /// Whether this is an IPv4 address (v4-mapped).
    #[inline(always)]
    #[must_use]
    pub const fn is_v4(self) -> bool {
        self.words[0] == 0 && self.words[1] == 0 && self.words[2] == MAPPED
    }

    /// The 16 bytes in network order.
    #[must_use]
    pub fn octets(self) -> [u8; 16] {
        let mut out = [0; 16];
        for (chunk, word) in out.chunks_exact_mut(4).zip(self.words) {
            chunk.copy_from_slice(&word.to_ne_bytes());
        }
        out
    }

    /// The address as the standard library writes it; v4-mapped becomes IPv4.
    #[must_use]
    pub fn ip(self) -> IpAddr {
        Ipv6Addr::from(self.octets()).to_canonical()
    }
}

// === impl conversions ===

impl From<Ipv4Addr> for Addr {
    fn from(ip: Ipv4Addr) -> Self {
        Self::from_v4_word(u32::from_ne_bytes(ip.octets()))
    }
}

impl From<Ipv6Addr> for Addr {
    fn from(ip: Ipv6Addr) -> Self {
        let mut words = [0; 4];
        for (word, chunk) in words.iter_mut().zip(ip.octets().as_chunks::<4>().0) {
            *word = u32::from_ne_bytes(*chunk);
        }
        Self { words }
    }
}

impl From<IpAddr> for Addr {
    fn from(ip: IpAddr) -> Self {
        match ip {
            IpAddr::V4(ip) => ip.into(),
            IpAddr::V6(ip) => ip.into(),
        }
    }
}

impl core::fmt::Debug for Addr {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        self.ip().fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn v4_survives_and_is_mapped(bits: u32) {
            let ip = Ipv4Addr::from(bits);
            let addr = Addr::from(ip);
            prop_assert!(addr.is_v4());
            prop_assert_eq!(addr.ip(), IpAddr::V4(ip));
            prop_assert_eq!(addr, Addr::from(ip.to_ipv6_mapped()));
            prop_assert_eq!(addr.v4_word().to_ne_bytes(), ip.octets());
        }

        #[test]
        fn v6_survives(bits: u128) {
            let ip = Ipv6Addr::from(bits);
            let addr = Addr::from(ip);
            prop_assert_eq!(addr.octets(), ip.octets());
            prop_assert_eq!(addr.ip(), ip.to_canonical());
            prop_assert_eq!(addr.is_v4(), ip.to_ipv4_mapped().is_some());
        }
    }
}
