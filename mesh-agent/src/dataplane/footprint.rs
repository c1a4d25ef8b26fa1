//! How much memory the agent and its maps take, as the kernel accounts for it: of the maps that are open
//! here, which the chunks of arrays that grow are not.

use std::collections::BTreeMap;
use std::fs;

use crate::api::types::Memory;

/// Both, now. Reads a file for each file descriptor of the agent.
pub fn measure() -> Memory {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let anonymous = field(&status, "RssAnon:").unwrap_or(0) * 1_024;
    let described = fs::read_dir("/proc/self/fdinfo").into_iter().flatten().flatten();
    // One that was closed meanwhile is none.
    let described = described.filter_map(|entry| fs::read_to_string(entry.path()).ok());
    Memory { anonymous, maps: maps(described) }
}

/// Bytes of the maps among these descriptions of file descriptors (`bpf_map_show_fdinfo`), each once.
fn maps(described: impl Iterator<Item = String>) -> u64 {
    let maps =
        described.filter_map(|text| Some((field(&text, "map_id:")?, field(&text, "memlock:")?)));
    maps.collect::<BTreeMap<_, _>>().values().sum()
}

/// The number behind a name, without its unit.
fn field(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_map_counts_once() {
        let map = |id: u32, bytes: u32| {
            format!("pos:\t0\nmap_type:\t2\nmemlock:\t{bytes}\nmap_id:\t{id}\n")
        };
        let described =
            [map(1, 4_096), map(2, 8_192), map(1, 4_096), "pos:\t0\nflags:\t02\n".to_owned()];
        assert_eq!(maps(described.into_iter()), 12_288);
    }

    #[test]
    fn of_this_process() {
        assert!(measure().anonymous > 0);
    }
}
