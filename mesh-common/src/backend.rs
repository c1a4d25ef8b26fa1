//! Records of backends, and of the names of services; part of [`crate::layout`].

use crate::Addr;

/// The state of a backend as people see it.
#[repr(u8)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum State {
    /// Nothing is known: no check is configured, or none has ended yet. Usable.
    #[default]
    Unknown = 0,
    /// Its checks pass. Usable.
    Healthy = 1,
    /// Its checks fail.
    Unhealthy = 2,
    /// It finishes what it has and takes nothing new.
    Draining = 3,
    /// Taken out by failures seen in the kernel.
    Ejected = 4,
}

impl State {
    /// From its number in a map; an unknown number is [`State::Unknown`].
    #[must_use]
    pub const fn from_number(number: u8) -> Self {
        match number {
            1 => Self::Healthy,
            2 => Self::Unhealthy,
            3 => Self::Draining,
            4 => Self::Ejected,
            _ => Self::Unknown,
        }
    }

    /// The name used in tables and JSON.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Healthy => "healthy",
            Self::Unhealthy => "unhealthy",
            Self::Draining => "draining",
            Self::Ejected => "ejected",
        }
    }

    /// Whether new connections may go there.
    #[must_use]
    pub const fn is_usable(self) -> bool {
        matches!(self, Self::Unknown | Self::Healthy)
    }
}

/// A record of `BACKENDS`. Writer: the agent. The programs for datagrams read it, of ids that a record of
/// theirs names and whose generation is still the same: then only `marks` and `weight` can change, and
/// what is written over the rest is what is there.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Backend {
    /// Differs between the lives of the same id, so that a late close cannot count for another.
    #[cfg(feature = "other-layout")]
    pub generation: u32,
    /// Address.
    pub addr: Addr,
    /// Port in network byte order.
    pub port: u16,
    /// Weight.
    pub weight: u16,
    /// IANA protocol number; 0 while the record is free.
    pub protocol: u8,
    /// How it is.
    pub marks: Marks,
    /// The port of the service that it serves, in host byte order. For the agent, like `owner`.
    pub service_port: u16,
    /// Differs between the lives of the same id, so that a late close cannot count for another.
    #[cfg(not(feature = "other-layout"))]
    pub generation: u32,
    /// Whose it is: index into `NAMES`.
    pub owner: u32,
}

/// A [`State`] with what else there is to know of a backend, in one byte.
///
/// ```text
/// 7        6                  5    4 3     0
/// [ listed ] [ by a command ] [ 0  ] [ state ]
/// ```
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Marks(pub u8);

impl Marks {
    const STATE: u8 = 0x0f;
    const LISTED: u8 = 0x80;
    const BY_COMMAND: u8 = 0x40;

    /// This state, and nothing else.
    #[must_use]
    pub const fn of(state: State) -> Self {
        Self(state as u8)
    }

    /// The same; a table in force leads there, or not: if one does, clients may keep it
    /// ([`crate::affinity`]).
    #[must_use]
    pub const fn listed(self, listed: bool) -> Self {
        Self(if listed { self.0 | Self::LISTED } else { self.0 & !Self::LISTED })
    }

    /// The same; somebody has it drained by command, or not.
    #[must_use]
    pub const fn by_command(self, drained: bool) -> Self {
        Self(if drained { self.0 | Self::BY_COMMAND } else { self.0 & !Self::BY_COMMAND })
    }

    /// The state.
    #[inline(always)]
    #[must_use]
    pub const fn state(self) -> State {
        State::from_number(self.0 & Self::STATE)
    }

    /// Whether a table in force leads there.
    #[inline(always)]
    #[must_use]
    pub const fn is_listed(self) -> bool {
        self.0 & Self::LISTED != 0
    }

    /// Whether somebody has it drained by command.
    #[must_use]
    pub const fn is_by_command(self) -> bool {
        self.0 & Self::BY_COMMAND != 0
    }
}

/// A record of `NAMES`: what a service is called. Written by the agent before anything says that it is
/// this service's, and read by whoever finds the maps without their agent.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Name {
    /// Which source defines the service, as the agent tells them apart; 0 for none that it knows.
    pub source: u64,
    len: u8,
    text: [u8; Self::MOST],
}

impl Name {
    /// The longest name, in bytes.
    pub const MOST: usize = if cfg!(feature = "other-layout") { 375 } else { 311 };

    /// Where the text begins, with its length.
    pub const TEXT: usize = core::mem::offset_of!(Self, len);

    /// Nobody's.
    pub const NONE: Self = Self { source: 0, len: 0, text: [0; Self::MOST] };

    /// This name, of a service that this source defines; nothing when it is empty or too long.
    #[must_use]
    pub fn new(name: &str, source: u64) -> Option<Self> {
        let mut record = Self { source, ..Self::NONE };
        record.len = u8::try_from(name.len()).ok().filter(|&len| len > 0)?;
        record.text.get_mut(..name.len())?.copy_from_slice(name.as_bytes());
        Some(record)
    }

    /// What lies in a map, of no source: its length, and so many bytes of text and any others.
    #[must_use]
    pub const fn from_bytes(bytes: &[u8; 1 + Self::MOST]) -> Self {
        let [len, text @ ..] = *bytes;
        Self { source: 0, len, text }
    }

    /// The name; nothing when there is none, or what is there is no text.
    #[must_use]
    pub fn get(&self) -> Option<&str> {
        let text = self.text.get(..usize::from(self.len)).filter(|text| !text.is_empty())?;
        core::str::from_utf8(text).ok()
    }
}
