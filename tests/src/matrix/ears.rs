//! What the agent says: events.

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use crate::node::Node;
use crate::process::{Echo, LIMIT, Process, until};

/// What rows read of `events -o json`.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
pub struct Event {
    /// Its number, from 1 on.
    pub seq: u64,
    /// When, RFC 3339.
    pub time: String,
    /// What has happened.
    pub kind: String,
    /// To which backend.
    pub backend: Option<String>,
    /// For which client.
    pub client: Option<String>,
}

/// Who follows, where more may happen than the agent keeps.
#[derive(Debug)]
pub struct Ears(Process);

// === impl Event ===

impl Event {
    /// Whether it says that something is wrong with a backend.
    #[must_use]
    pub fn accuses(&self) -> bool {
        ["failed", "suspected", "ejected", "spared", "unhealthy"].contains(&&*self.kind)
    }
}

// === impl Ears ===

impl Ears {
    /// Listens to the agent of a node, which has said something already.
    ///
    /// # Errors
    ///
    /// It does not say anything.
    pub fn start(node: &Node) -> Result<Self> {
        let command = node.agent.cli(&["-o", "json", "events", "--follow"])?;
        let process = Process::spawn("events", command, Echo::Off)?;
        let log = process.log();
        // What has happened before is told at once.
        until("events", LIMIT, || Ok((!log.all().is_empty()).then_some(())))?;
        Ok(Self(process))
    }

    /// All that was said.
    ///
    /// # Errors
    ///
    /// Something was missed, or cannot be read.
    pub fn heard(&self) -> Result<Vec<Event>> {
        let lines = self.0.log().all();
        let event =
            |line: &String| serde_json::from_str(line).with_context(|| format!("an event: {line}"));
        complete(lines.iter().map(event).collect::<Result<_>>()?)
    }
}

/// All that the agent of a node has said, if it still knows all.
///
/// # Errors
///
/// Something was missed, or cannot be read.
pub fn journal(node: &Node) -> Result<Vec<Event>> {
    complete(node.agent.json(&["events"])?)
}

fn complete(events: Vec<Event>) -> Result<Vec<Event>> {
    let first = events.first().map_or(1, |event| event.seq);
    let missed = events.iter().filter(|event| event.kind == "missed").count();
    ensure!(
        first == 1 && missed == 0,
        "the first event is {first}, {missed} times some were missed"
    );
    Ok(events)
}
