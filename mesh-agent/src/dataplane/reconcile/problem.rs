//! What keeps a part of a service from being in the kernel.

use crate::dataplane::maps::MapError;

/// Why a part of a service is not in the kernel. All of it is tried again by itself.
#[derive(Debug, thiserror::Error)]
pub enum Problem {
    /// A map has no room. What fitted goes on working.
    #[error("{missing} of {of} {what} do not fit: {map} holds {limit}{note}")]
    Full {
        /// Of these.
        what: &'static str,
        /// How many do not fit.
        missing: usize,
        /// How many there are.
        of: usize,
        /// The map.
        map: &'static str,
        /// Its size.
        limit: u32,
        /// What else there is to know about that limit.
        note: &'static str,
    },
    /// A service that asks for a consistent hash goes without.
    #[error(
        "the entries of its consistent hash do not fit into SLOTS, which holds {limit}: backends are \
         chosen at random; a larger `limits: {{backends}}` makes room"
    )]
    Entries {
        /// Its size.
        limit: u32,
    },
    /// The maps do not say whose a service is.
    #[error(
        "it is served, but its name does not fit into NAMES, which holds {limit} of up to 255 bytes: an \
         agent that is started anew makes it again; a larger `limits: {{frontends}}` makes room"
    )]
    Unnamed {
        /// The size of that map.
        limit: u32,
    },
    /// Room is there, but programs that are still running may be reading it.
    #[error("waits for running programs to leave the room that it needs in {map}")]
    Busy {
        /// The map.
        map: &'static str,
    },
    /// The kernel has no memory for maps that have to grow.
    #[error("not all of it fits: {0}; it is tried again")]
    Memory(String),
    /// The kernel refused a write.
    #[error("{0}; it is tried again")]
    Map(#[from] MapError),
}

impl Problem {
    /// Whether it passes by itself within a grace period, which is nothing to report.
    #[must_use]
    pub fn is_passing(&self) -> bool {
        matches!(self, Self::Busy { .. })
    }
}
