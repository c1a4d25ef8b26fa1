//! Whether the tests left something on the machine: processes, cgroups, pins, kernel programs.
//!
//! Network namespaces are not looked for: those of the tests have no name, so they live only as
//! long as the processes in them, and these are found.

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

/// The programs below the target directory that no test starts: another terminal may run them.
const OURS: [&str; 2] = ["xtask", "cargo"];

/// What /proc appends to the path of a program whose file was replaced or removed since it started.
const DELETED: &str = " (deleted)";

/// What is there at one moment.
#[derive(Debug)]
pub(crate) struct Leftovers {
    target: PathBuf,
    found: BTreeSet<String>,
}

impl Leftovers {
    /// Looks at the machine. Programs below `target` are what the tests run.
    ///
    /// # Errors
    ///
    /// When something cannot be read; it needs root.
    pub(crate) fn now(target: &Path) -> Result<Self> {
        // As /proc names programs.
        let target = target
            .canonicalize()
            .with_context(|| format!("cannot find the target directory {}", target.display()))?;
        let mut found = BTreeSet::new();
        for (kind, mount) in mounts()? {
            find(kind, &mount, &mut found);
        }
        processes(&target, &mut found)?;
        for program in aya::programs::loaded_programs() {
            // One that goes away while it is looked at is none that stays.
            let Ok(program) = program else { continue };
            if program.name().starts_with(PROGRAM) {
                let name = String::from_utf8_lossy(program.name()).into_owned();
                found.insert(format!("kernel program {name} (id {})", program.id()));
            }
        }
        Ok(Self { target, found })
    }

    /// Fails when something is there now that was not there before.
    ///
    /// # Errors
    ///
    /// Names all of it.
    pub(crate) fn assert_none_since(&self) -> Result<()> {
        let start = Instant::now();
        loop {
            let now = Self::now(&self.target)?;
            let new: Vec<&str> = now.found.difference(&self.found).map(String::as_str).collect();
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

/// Looks for processes of the tests. What ends meanwhile is not there, nor is what has ended and
/// was not reaped: it has no program any more.
fn processes(target: &Path, found: &mut BTreeSet<String>) -> Result<()> {
    let entries = fs::read_dir("/proc").context("cannot read /proc: is it mounted?")?;
    for entry in entries.flatten() {
        let name = entry.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        let Ok(exe) = fs::read_link(entry.path().join("exe")) else { continue };
        let cgroups = fs::read_to_string(entry.path().join("cgroup")).unwrap_or_default();
        let program = program(&exe);
        if is_of_the_tests(&program, &cgroups, target) {
            found.insert(format!("process {pid} ({})", program.display()));
        }
    }
    Ok(())
}

/// The program of a process, by the same name before and after its file was built anew.
fn program(exe: &Path) -> PathBuf {
    let text = exe.to_string_lossy();
    PathBuf::from(text.strip_suffix(DELETED).unwrap_or(&text))
}

/// Whether the tests started a process, by its program and its cgroups (the text of
/// `/proc/PID/cgroup`).
fn is_of_the_tests(program: &Path, cgroups: &str, target: &Path) -> bool {
    let ours = program.file_name().is_some_and(|name| OURS.iter().any(|ours| name == *ours));
    let paths = cgroups.lines().filter_map(|line| line.splitn(3, ':').nth(2));
    let confined = paths.flat_map(|path| path.split('/')).any(|name| name.starts_with(NAME));
    confined || (program.starts_with(target) && !ours)
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

    #[test]
    fn processes_are_recognised_by_program_or_cgroup() {
        let is = |exe: &str, cgroups| {
            is_of_the_tests(&program(Path::new(exe)), cgroups, Path::new("/t"))
        };
        let elsewhere = "4:memory:/\n0::/user.slice\n";
        assert!(is("/t/debug/mesh-agent", elsewhere));
        assert!(is("/t/debug/mesh-agent (deleted)", elsewhere));
        assert!(is("/usr/bin/sleep", "4:memory:/\n0::/mesh-test-1-2/inner\n"));
        assert!(!is("/usr/bin/sleep", elsewhere));
        assert!(!is("/tools/mesh-agent", elsewhere), "another directory");
        assert!(!is("/t/debug/xtask (deleted)", elsewhere), "xtask itself");
    }

    #[test]
    fn a_running_process_is_found() {
        let exe = std::env::current_exe().and_then(fs::canonicalize).expect("this program");
        let mut found = BTreeSet::new();
        processes(exe.parent().expect("its directory"), &mut found).expect("/proc");
        let this = format!("process {} ({})", std::process::id(), exe.display());
        assert!(found.contains(&this), "{this} is not in {found:?}");
    }
}
