//! Whether the tests left something on the machine: cgroups, pins, network namespaces, kernel
//! programs.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// What the tests call everything they make.
const NAME: &str = "mesh-test-";

/// What the names of the kernel programs begin with.
const PROGRAM: &[u8] = b"mesh_";

/// How long to wait for the kernel to free what a process held that has ended.
const PATIENCE: Duration = Duration::from_secs(5);

/// What is there at one moment.
#[derive(PartialEq, Eq, Debug)]
pub(crate) struct Leftovers(BTreeSet<String>);

impl Leftovers {
    /// Looks at the machine.
    ///
    /// # Errors
    ///
    /// When something cannot be read; it needs root.
    pub(crate) fn now() -> Result<Self> {
        let mut found = BTreeSet::new();
        for (kind, mount) in mounts()? {
            find(kind, &mount, &mut found);
        }
        find("network namespace", Path::new("/run/netns"), &mut found);
        for program in aya::programs::loaded_programs() {
            // One that goes away while it is looked at is none that stays.
            let Ok(program) = program else { continue };
            if program.name().starts_with(PROGRAM) {
                let name = String::from_utf8_lossy(program.name()).into_owned();
                found.insert(format!("kernel program {name} (id {})", program.id()));
            }
        }
        Ok(Self(found))
    }

    /// Fails when something is there now that was not there before.
    ///
    /// # Errors
    ///
    /// Names all of it.
    pub(crate) fn assert_none_since(&self) -> Result<()> {
        let start = Instant::now();
        loop {
            let now = Self::now()?;
            let new: Vec<&str> = now.0.difference(&self.0).map(String::as_str).collect();
            if new.is_empty() {
                return Ok(());
            }
            if start.elapsed() > PATIENCE {
                bail!("the tests left something behind:\n  {}", new.join("\n  "));
            }
            thread::sleep(Duration::from_millis(100));
        }
    }
}

/// The mounts of cgroup2 and of the BPF file system.
fn mounts() -> Result<Vec<(&'static str, PathBuf)>> {
    let text = fs::read_to_string("/proc/self/mountinfo")
        .context("cannot read /proc/self/mountinfo: is /proc mounted?")?;
    Ok(text.lines().filter_map(mount).collect())
}

/// A line of mountinfo: see proc_pid_mountinfo(5).
fn mount(line: &str) -> Option<(&'static str, PathBuf)> {
    let (before, after) = line.split_once(" - ")?;
    let kind = match after.split(' ').next()? {
        "cgroup2" => "cgroup",
        "bpf" => "pin",
        _ => return None,
    };
    Some((kind, PathBuf::from(before.split(' ').nth(4)?)))
}

/// Looks for [`NAME`] below a directory. What disappears meanwhile is not there.
fn find(kind: &str, directory: &Path, found: &mut BTreeSet<String>) {
    let Ok(entries) = directory.read_dir() else { return };
    for entry in entries.flatten() {
        let path = entry.path();
        if entry.file_name().to_string_lossy().starts_with(NAME) {
            found.insert(format!("{kind} {}", path.display()));
        } else if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            find(kind, &path, found);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_are_recognised() {
        let cgroup = "41 32 0:37 / /sys/fs/cgroup/unified rw,nosuid shared:9 - cgroup2 cgroup rw";
        assert_eq!(mount(cgroup), Some(("cgroup", "/sys/fs/cgroup/unified".into())));
        assert_eq!(mount("41 32 0:37 / /sys rw - sysfs sysfs rw"), None);
    }

    #[test]
    fn named_entries_are_found_at_any_depth() {
        let top = std::env::temp_dir().join(format!("xtask-leftovers-{}", std::process::id()));
        fs::create_dir_all(top.join("a/mesh-test-1-2/inner")).expect("directories");
        let mut found = BTreeSet::new();
        find("cgroup", &top, &mut found);
        fs::remove_dir_all(&top).expect("removal");
        let expected = format!("cgroup {}", top.join("a/mesh-test-1-2").display());
        assert_eq!(found.into_iter().collect::<Vec<_>>(), [expected]);
    }
}
