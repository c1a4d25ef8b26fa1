//! Sources: each watches one place where services are defined and reports what changed.

pub mod files;

use std::sync::Arc;

use crate::model::{Service, ServiceName};

/// Where a definition came from, in order of precedence: of two definitions of the same service
/// or the same address, the lesser origin wins.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, Hash)]
pub struct Origin {
    /// Position in the list `sources` of the agent file.
    pub source: usize,
    /// Where inside the source: a file name, for instance.
    pub item: Arc<str>,
}

/// What a source reports. A source sends these in order over one channel to the engine.
#[derive(Clone, Debug)]
pub enum Event {
    /// Definitions that changed. One message is applied as a whole.
    Changed {
        /// Definitions that are new or different now.
        upserts: Vec<(Origin, Arc<Service>)>,
        /// Definitions that are gone.
        removed: Vec<(Origin, ServiceName)>,
    },
    /// The source's own state, for `status`. Sent after each change of it, and in any case once
    /// after the first complete reading.
    State(SourceState),
}

/// The state of a source as `status` shows it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SourceState {
    /// Position in the list `sources` of the agent file.
    pub source: usize,
    /// What people call it, for instance `files /etc/mesh/services.d`.
    pub name: String,
    /// Whether the source has been read completely at least once (errors in single items do not
    /// count against that).
    pub ready: bool,
    /// Whether there is nothing at all in it: no file, for instance, not even one that defines nothing.
    pub is_empty: bool,
    /// What is wrong now, each a complete sentence that names the place and what to do; what these
    /// concern keeps its last good state.
    pub errors: Vec<String>,
}
