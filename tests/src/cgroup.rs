//! Cgroups of tests, and the certainty that they go away.
//!
//! A cgroup and a directory outlive the process that made them. Each node therefore has a janitor:
//! a shell that waits for the end of a pipe whose other end only the node's process holds. However
//! that process ends (return, panic, Ctrl-C, SIGKILL), the pipe ends, and the janitor kills what is
//! left *in that cgroup* and removes cgroup and directory.

use std::fs::{self, File, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, anyhow, bail};

/// What the names of all cgroups of this crate begin with; the id of the process that made them
/// follows.
pub const PREFIX: &str = "mesh-test-";

/// The janitor: `$1` is the cgroup, `$2` the directory.
const JANITOR: &str = r#"
trap '' INT TERM HUP
read -r _
for _ in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25; do
    [ -d "$1" ] || break
    echo 1 > "$1/cgroup.kill"
    find "$1" -depth -type d -exec rmdir {} + && break
    sleep 0.2
done 2>/dev/null
rm -rf -- "$2"
[ ! -d "$1" ]
"#;

/// A cgroup that a test has to itself, another one beside it, and a directory for files. Both are in one below the
/// cgroup2 mount.
#[derive(Debug)]
pub struct Cgroup {
    above: PathBuf,
    path: PathBuf,
    janitor: Child,
}

impl Cgroup {
    /// Makes a cgroup, and has it removed together with `directory` when this value is dropped or
    /// its process ends.
    ///
    /// # Errors
    ///
    /// No cgroup2 is mounted, or a cgroup cannot be made in it.
    pub fn create(directory: &Path) -> Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let mount = mount_point()?;
        sweep(&mount);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let above = mount.join(format!("{PREFIX}{}-{number}", std::process::id()));
        // The janitor first: from here on nothing can be left behind.
        let janitor = Command::new("/bin/sh")
            .args(["-c", JANITOR, "mesh-test-janitor"])
            .args([&above, directory])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            // Out of the reach of a Ctrl-C at the terminal.
            .process_group(0)
            .spawn()
            .context("cannot start /bin/sh, which cleans up after a node")?;
        let cgroup = Self { path: above.join("inside"), above, janitor };
        for path in [&cgroup.above, &cgroup.path, &cgroup.outside()] {
            fs::create_dir(path).with_context(|| {
                format!("cannot make the cgroup {}: are you root?", path.display())
            })?;
        }
        Ok(cgroup)
    }

    /// Its directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// As `/proc/PID/cgroup` has it.
    ///
    /// # Errors
    ///
    /// No cgroup2 is mounted.
    pub fn place(&self) -> Result<String> {
        let below = self.path.strip_prefix(mount_point()?).context("it is below the mount")?;
        Ok(format!("/{}", below.display()))
    }

    /// The one beside it, for what is not to be in it: the cgroup of the tests' own process may be balanced by an
    /// agent of this host.
    #[must_use]
    pub fn outside(&self) -> PathBuf {
        self.above.join("outside")
    }

    /// Makes a cgroup inside it.
    ///
    /// # Errors
    ///
    /// Those of mkdir(2).
    pub fn child(&self, name: &str) -> Result<PathBuf> {
        let path = self.path.join(name);
        fs::create_dir(&path).with_context(|| format!("cannot make {}", path.display()))?;
        Ok(path)
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        drop(self.janitor.stdin.take());
        match self.janitor.wait() {
            Ok(status) if status.success() => {}
            outcome => {
                eprintln!("{} could not be removed (janitor: {outcome:?})", self.above.display());
            }
        }
    }
}

/// Opens what a process writes to in order to enter a cgroup.
///
/// # Errors
///
/// It is not a cgroup, or not ours to write.
pub fn procs(cgroup: &Path) -> Result<Arc<File>> {
    let path = cgroup.join("cgroup.procs");
    let file = OpenOptions::new().write(true).open(&path);
    Ok(Arc::new(file.with_context(|| format!("cannot open {}", path.display()))?))
}

/// Where cgroup2 is mounted: on a hybrid layout that is not `/sys/fs/cgroup`.
///
/// # Errors
///
/// It is not mounted.
pub fn mount_point() -> Result<PathBuf> {
    let table = fs::read_to_string("/proc/self/mountinfo").context("/proc is not mounted")?;
    table.lines().find_map(cgroup2_mount).ok_or_else(|| {
        anyhow!("cgroup2 is not mounted: mount -t cgroup2 none /sys/fs/cgroup/unified")
    })
}

/// The mount point, when a line of mountinfo (proc_pid_mountinfo(5)) is a cgroup2 mount.
fn cgroup2_mount(line: &str) -> Option<PathBuf> {
    let (mount, filesystem) = line.split_once(" - ")?;
    if filesystem.split(' ').next() != Some("cgroup2") {
        return None;
    }
    mount.split(' ').nth(4).map(PathBuf::from)
}

/// Removes cgroups whose process is gone; only empty ones can be removed.
fn sweep(mount: &Path) {
    let Ok(entries) = fs::read_dir(mount) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let pid = name.to_str().and_then(|name| name.strip_prefix(PREFIX)?.split('-').next());
        let Some(pid) = pid.and_then(|pid| pid.parse::<u32>().ok()) else { continue };
        if !Path::new("/proc").join(pid.to_string()).exists()
            && let Err(error) = remove(&entry.path())
        {
            eprintln!("stale {}: {error:#}", entry.path().display());
        }
    }
}

fn remove(cgroup: &Path) -> Result<()> {
    for child in fs::read_dir(cgroup)?.flatten() {
        if child.file_type()?.is_dir() {
            remove(&child.path())?;
        }
    }
    match fs::remove_dir(cgroup) {
        Err(error) if error.kind() != ErrorKind::NotFound => bail!(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_cgroup2_in_a_hybrid_layout() {
        let v1 = "36 31 0:33 / /sys/fs/cgroup/devices rw,relatime - cgroup cgroup rw,devices";
        let v2 = "41 31 0:38 / /sys/fs/cgroup/unified rw shared:9 - cgroup2 cgroup2 rw";
        assert_eq!(cgroup2_mount(v1), None);
        assert_eq!(cgroup2_mount(v2), Some("/sys/fs/cgroup/unified".into()));
    }

    #[test]
    fn nothing_is_left_behind() -> Result<()> {
        let directory = tempfile::tempdir()?.keep();
        let cgroup = Cgroup::create(&directory)?;
        let path = cgroup.above.clone();
        let inner = cgroup.child("inner")?;
        let mut sleeper = Command::new("sleep").arg("60").spawn()?;
        fs::write(inner.join("cgroup.procs"), sleeper.id().to_string())?;
        drop(cgroup);
        assert!(!sleeper.wait()?.success(), "the janitor ends what is left in the cgroup");
        assert!(!path.exists() && !directory.exists());
        Ok(())
    }
}
