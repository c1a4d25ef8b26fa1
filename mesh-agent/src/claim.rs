//! The right to balance a cgroup, which only one agent has.

use std::fs::{self, File, TryLockError};
use std::os::linux::fs::MetadataExt as _;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, bail};
use tokio::time::Instant;

use crate::check::hooks;
use crate::dataplane::pindir::{PinDir, PinError};

/// How long a former agent of the cgroup may take to be gone.
const TAKING: Duration = Duration::from_secs(1);

/// The directory of pins, once a former agent that has it is gone.
///
/// # Errors
///
/// As [`PinDir::take`].
pub async fn take_pins(directory: &Path) -> Result<PinDir, PinError> {
    let until = Instant::now() + TAKING;
    loop {
        match PinDir::take(directory) {
            Err(PinError::Taken { .. }) if Instant::now() < until => {
                tokio::time::sleep(TAKING / 20).await;
            }
            result => return result,
        }
    }
}

/// The right to balance a cgroup: a lock on its directory, which ends with the process. It works
/// without the privilege to see the names of attached programs, which [`refuse_second`] needs.
///
/// An agent that was killed keeps both for some milliseconds, so both are tried for a while. The programs
/// of these numbers are this agent's own.
///
/// # Errors
///
/// As [`try_cgroup`].
pub async fn take_cgroup(cgroup: &Path, ours: &[u32]) -> anyhow::Result<File> {
    let until = Instant::now() + TAKING;
    loop {
        match try_cgroup(cgroup, ours) {
            Err(_) if Instant::now() < until => tokio::time::sleep(TAKING / 20).await,
            result => return result,
        }
    }
}

/// The same, tried once.
///
/// # Errors
///
/// Another agent has it, which is named; or it is no cgroup, or the kernel tells nothing of it.
pub fn try_cgroup(cgroup: &Path, ours: &[u32]) -> anyhow::Result<File> {
    let lock = lock(cgroup)?;
    refuse_second(cgroup, ours)?;
    Ok(lock)
}

fn lock(cgroup: &Path) -> anyhow::Result<File> {
    let name = cgroup.display();
    let directory = File::open(cgroup)
        .with_context(|| format!("opening cgroup {name}; does it exist, and are you root?"))?;
    match directory.try_lock() {
        Ok(()) => Ok(directory),
        Err(TryLockError::WouldBlock) => {
            let who = match holder(&directory) {
                Some(pid) => format!("another agent (process {pid})"),
                None => "another agent".to_owned(),
            };
            bail!("{who} balances {name}: stop it first, or name another cgroup")
        }
        Err(TryLockError::Error(error)) => {
            Err(error).with_context(|| format!("locking cgroup {name}"))
        }
    }
}

/// The process that has locked this file, if it can be seen from here.
pub fn holder(file: &File) -> Option<u32> {
    let file = file.metadata().ok()?;
    let locks = fs::read_to_string("/proc/locks").ok()?;
    let (major, minor) = (rustix::fs::major(file.st_dev()), rustix::fs::minor(file.st_dev()));
    holder_of(&locks, &format!("{major:02x}:{minor:02x}:{}", file.st_ino()))
}

/// The process that has an exclusive lock on the whole of a file, named by device and inode, in the form
/// of `/proc/locks` (`lock_get_status`). One that waits for it is marked by an arrow.
fn holder_of(locks: &str, file: &str) -> Option<u32> {
    locks.lines().find_map(|line| match *line.split_whitespace().collect::<Vec<_>>() {
        [_, "FLOCK", _, "WRITE", pid, of, ..] if of == file => {
            pid.parse().ok().filter(|&pid| pid > 0)
        }
        _ => None,
    })
}

/// Two agents on one cgroup would count and translate twice. What is attached by these numbers is this
/// agent's own, pinned by a former one.
///
/// # Errors
///
/// Programs of another agent are attached there, or above it, or the kernel does not say.
pub fn refuse_second(cgroup: &Path, ours: &[u32]) -> anyhow::Result<()> {
    let attached = hooks::ours(cgroup).with_context(|| {
        format!(
            "asking for the programs attached to {}; run as root, and see `mesh-agent check`",
            cgroup.display()
        )
    })?;
    if let Some((directory, id)) = attached.iter().find(|(_, id)| !ours.contains(id)) {
        bail!(
            "kernel programs of another agent are attached to {} (program id {id}): stop that agent, or \
             name a cgroup outside it; if it runs no more, `mesh-agent cleanup --pin-dir DIRECTORY` with \
             its pin-dir removes what it left",
            directory.display()
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_holder_is_who_has_it_and_not_who_waits() {
        let locks = "1: POSIX  ADVISORY  WRITE 10 00:1b:77 0 EOF\n\
                     2: FLOCK  ADVISORY  READ  11 00:1b:77 0 EOF\n\
                     3: FLOCK  ADVISORY  WRITE 12 00:1b:78 0 EOF\n\
                     4: -> FLOCK  ADVISORY  WRITE 13 00:1b:77 0 EOF\n\
                     5: FLOCK  ADVISORY  WRITE 0 00:1b:76 0 EOF\n";
        assert_eq!(holder_of(locks, "00:1b:77"), None);
        assert_eq!(holder_of(locks, "00:1b:78"), Some(12));
        // In another PID namespace.
        assert_eq!(holder_of(locks, "00:1b:76"), None);
    }

    #[test]
    fn this_process_is_found() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let open = || File::open(directory.path()).expect("a directory");
        let locked = open();
        assert_eq!(holder(&open()), None);
        locked.try_lock().expect("free");
        assert_eq!(holder(&open()), Some(std::process::id()));
    }
}
