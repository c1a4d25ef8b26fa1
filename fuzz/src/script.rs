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

/// What is left of the data. At its end there are only zeros, with which an adversary does nothing.
#[derive(Debug)]
pub struct Script<'d>(Cell<&'d [u8]>);

impl<'d> Script<'d> {
    /// All of it.
    #[must_use]
    pub const fn new(data: &'d [u8]) -> Self {
        Self(Cell::new(data))
    }

    fn next<const N: usize>(&self) -> [u8; N] {
        let mut bytes = [0; N];
        let data = self.0.get();
        let (taken, left) = data.split_at(data.len().min(N));
        bytes[..taken.len()].copy_from_slice(taken);
        self.0.set(left);
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
