//! What is wrong with what the agent has made outside of itself.

use std::collections::BTreeMap;

use super::Engine;
use super::view::Handle;

/// What it has made that others may take away.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Outside {
    /// The pins, by which balancing outlives it.
    Pins,
    /// The socket by which it is asked.
    Socket,
}

impl Outside {
    const ALL: [Self; 2] = [Self::Pins, Self::Socket];

    /// Its name in metrics.
    const fn name(self) -> &'static str {
        match self {
            Self::Pins => "pins",
            Self::Socket => "socket",
        }
    }
}

/// What is wrong with what, for people.
pub(super) type Wrong = BTreeMap<Outside, String>;

impl Handle {
    /// Tells the engine what is wrong with it, or that nothing is.
    pub async fn set_outside(&self, what: Outside, wrong: Option<String>) {
        // An engine that is gone does not need to know.
        let set = move |engine: &mut Engine| match wrong {
            Some(wrong) => drop(engine.outside.insert(what, wrong)),
            None => drop(engine.outside.remove(&what)),
        };
        let _ = self.ask(set).await;
    }
}

impl Engine {
    /// Which of it is in place, by its name.
    pub(super) fn in_place(&self) -> Vec<(&'static str, bool)> {
        let is_right = |what: &Outside| !self.outside.contains_key(what);
        Outside::ALL.map(|what| (what.name(), is_right(&what))).into()
    }
}
