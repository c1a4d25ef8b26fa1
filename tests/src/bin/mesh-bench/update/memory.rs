//! What an agent has in memory.

use std::collections::BTreeMap;
use std::fs;

use anyhow::{Context as _, Result};
use serde::Serialize;

/// A process's memory, in bytes.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Memory {
    /// Its own: `Anonymous` of smaps_rollup.
    pub anonymous: u64,
    /// All that is resident, mapped maps and the program included: `Rss` of smaps_rollup.
    pub resident: u64,
    /// Of the maps that it holds, in the kernel: `memlock` of each, once.
    pub maps: u64,
}

// === impl Memory ===

impl Memory {
    /// Of a process.
    ///
    /// # Errors
    ///
    /// It has ended, or the kernel says something else.
    pub fn of(pid: u32) -> Result<Self> {
        let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
        let field = |name: &str| {
            let kib =
                value(&rollup, name).with_context(|| format!("smaps_rollup has no {name}"))?;
            Ok::<_, anyhow::Error>(kib * 1024)
        };
        let mut maps = BTreeMap::new();
        for entry in fs::read_dir(format!("/proc/{pid}/fdinfo"))? {
            // A descriptor may be closed meanwhile.
            let Ok(text) = fs::read_to_string(entry?.path()) else { continue };
            if let Some((id, size)) = value(&text, "map_id").zip(value(&text, "memlock")) {
                maps.insert(id, size);
            }
        }
        Ok(Self {
            anonymous: field("Anonymous")?,
            resident: field("Rss")?,
            maps: maps.values().sum(),
        })
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
        let text = "AnonHugePages:  7 kB\nAnonymous:   12 kB\nmap_id:\t3\nmemlock:\t4096\n";
        assert_eq!(value(text, "Anonymous"), Some(12));
        assert_eq!(value(text, "memlock"), Some(4096));
        assert_eq!(value(text, "Anon"), None);
    }
}
