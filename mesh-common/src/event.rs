//! What the programs tell the agent as it happens: what is rare, and only that. Everything else is
//! counted.

use crate::layout::FrontendKey;

/// What happened. The numbers are in the ring buffer.
#[repr(u8)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Kind {
    /// A connect to a service, or inside the virtual range, was refused; `detail` is the
    /// [`crate::Reason`].
    Refused = 1,
    /// A connect to a backend failed; `detail` is the [`crate::Failure`].
    Failed = 2,
    /// A backend was taken out for one client.
    Suspected = 3,
    /// A backend was taken out for all.
    Ejected = 4,
    /// A try succeeded: the backend is in again.
    Recovered = 5,
    /// A backend failed often enough, but may not be taken out, because so many others are.
    Spared = 6,
}

impl Kind {
    /// From its number.
    #[must_use]
    pub const fn from_number(number: u8) -> Option<Self> {
        match number {
            1 => Some(Self::Refused),
            2 => Some(Self::Failed),
            3 => Some(Self::Suspected),
            4 => Some(Self::Ejected),
            5 => Some(Self::Recovered),
            6 => Some(Self::Spared),
            _ => None,
        }
    }
}

/// An entry of `EVENTS`.
#[repr(C, align(8))]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Event {
    /// When, in nanoseconds of `CLOCK_MONOTONIC`.
    pub time: u64,
    /// Id of the cgroup of the task that connected.
    pub client: u64,
    /// The [`crate::Ejection`] after it, where there is one.
    pub ejection: u64,
    /// What was dialled.
    pub frontend: FrontendKey,
    /// Index into `BACKENDS`; `u32::MAX` when no backend is concerned.
    pub backend: u32,
    /// The backend's generation.
    pub generation: u32,
    /// A [`Kind`].
    pub kind: u8,
    /// What the kind says.
    pub detail: u8,
    /// Zero.
    pub pad: u16,
}

const _: () = assert!(size_of::<Event>() == 56);
