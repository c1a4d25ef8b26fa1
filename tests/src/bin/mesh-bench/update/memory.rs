//! What an agent has in memory.

use std::fs;

use anyhow::{Context as _, Result};
use mesh_tests::Agent;
use serde::Serialize;
use serde_json::Value;

/// A process's memory, in bytes.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Memory {
    /// Its own: `Anonymous` of smaps_rollup.
    pub anonymous: u64,
    /// All that is resident, mapped maps and the program included: `Rss` of smaps_rollup.
    pub resident: u64,
    /// Of its maps, in the kernel, as its `status` says.
    pub maps: u64,
}

// === impl Memory ===

impl Memory {
    /// Of an agent.
    ///
    /// # Errors
    ///
    /// It has ended, or the kernel says something else.
    pub fn of(agent: &Agent) -> Result<Self> {
        let status: Value = agent.json(&["status"])?;
        let maps = status["memory"]["maps"].as_u64().context("no memory of maps in its status")?;
        let rollup = fs::read_to_string(format!("/proc/{}/smaps_rollup", agent.id()?))?;
        let field = |name: &str| {
            let kib =
                value(&rollup, name).with_context(|| format!("smaps_rollup has no {name}"))?;
            Ok::<_, anyhow::Error>(kib * 1024)
        };
        Ok(Self { anonymous: field("Anonymous")?, resident: field("Rss")?, maps })
    }
}

// === functions ===

/// The number in the line `NAME: NUMBER …`.
fn value(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    line.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_found_by_their_whole_name() {
        let text = "AnonHugePages:  7 kB\nAnonymous:   12 kB\n";
        assert_eq!(value(text, "Anonymous"), Some(12));
        assert_eq!(value(text, "Anon"), None);
    }
}
