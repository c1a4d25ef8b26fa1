//! A frontend as arguments of a global function, which takes plain numbers.

use mesh_common::{Addr, FrontendKey};

/// Where the bits of [`pack`]'s last number end: above them is room for other things.
pub const BITS: u32 = 24;

/// The address in two numbers, and the port with the protocol.
#[inline(always)]
pub fn pack(key: &FrontendKey) -> [u64; 3] {
    let [high, low] = address(&key.addr);
    [high, low, u64::from(key.port) | u64::from(key.protocol) << 16]
}

/// What [`pack`] was given.
#[inline(always)]
pub fn unpack(high: u64, low: u64, port: u64) -> FrontendKey {
    FrontendKey {
        addr: unpack_address(high, low),
        port: port as u16,
        protocol: (port >> 16) as u8,
        pad: 0,
    }
}

/// An address in two numbers.
#[inline(always)]
pub fn address(addr: &Addr) -> [u64; 2] {
    let [a, b, c, d] = addr.words().map(u64::from);
    [a << 32 | b, c << 32 | d]
}

/// What [`address`] was given.
#[inline(always)]
pub fn unpack_address(high: u64, low: u64) -> Addr {
    Addr::from_words([(high >> 32) as u32, high as u32, (low >> 32) as u32, low as u32])
}
