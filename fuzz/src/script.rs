//! Data that decides what an adversary does next.

use std::cell::Cell;

use mesh_common::Ejection;
use mesh_common::ejection::Phase;

/// What is known of a backend in a byte, so that data can have many in a row: nothing, or that it is out for
/// all, for ever.
#[must_use]
pub const fn ejection(byte: u8) -> Ejection {
    if byte < 128 { Ejection::NONE } else { Ejection(u64::MAX << 30 | Phase::Ejected as u64) }
}

/// What is left of the data. At its end the last byte comes again and again, so that few make an adversary
/// persistent.
#[derive(Debug)]
pub struct Script<'d> {
    left: Cell<&'d [u8]>,
    last: u8,
}

impl<'d> Script<'d> {
    /// All of it.
    #[must_use]
    pub fn new(data: &'d [u8]) -> Self {
        Self { left: Cell::new(data), last: data.last().copied().unwrap_or_default() }
    }

    fn next<const N: usize>(&self) -> [u8; N] {
        let mut bytes = [self.last; N];
        let data = self.left.get();
        let (taken, left) = data.split_at(data.len().min(N));
        bytes[..taken.len()].copy_from_slice(taken);
        self.left.set(left);
        bytes
    }

    /// The next byte.
    #[must_use]
    pub fn byte(&self) -> u8 {
        let [byte] = self.next();
        byte
    }

    /// The next two.
    #[must_use]
    pub fn half(&self) -> u16 {
        u16::from_le_bytes(self.next())
    }

    /// The next four.
    #[must_use]
    pub fn word(&self) -> u32 {
        u32::from_le_bytes(self.next())
    }

    /// The next eight.
    #[must_use]
    pub fn long(&self) -> u64 {
        u64::from_le_bytes(self.next())
    }
}
