//! Pins that somebody takes away while the agent runs: single ones, the directory, or the BPF file system. They are
//! made again wherever that can be; otherwise people are told what it means, and what to do.

use std::fs;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::PoisonError;

use rustix::fs::StatVfsMountFlags;

use super::place::{make, place};
use super::{PinDir, PinError, STANDARD, is_at, lock};
use crate::check::mounts::Mounts;

/// What is pinned.
#[derive(Debug)]
pub(super) struct Kept {
    object: OwnedFd,
    /// Device and inode of its pin.
    at: Option<(u64, u64)>,
}

/// What was found, and done.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Repaired {
    /// The names of pins that were not there, or were something else, and are made again.
    pub names: Vec<String>,
    /// What is in the way of changing any, although all are there.
    pub hindrance: Option<String>,
}

impl Kept {
    pub(super) fn new(object: OwnedFd, path: &Path) -> Self {
        Self { object, at: number(path) }
    }
}

impl PinDir {
    /// Pins again what somebody has removed, or has put something else in place of.
    ///
    /// # Errors
    ///
    /// Why that cannot be done, for people: where, what it means, and what to do.
    pub fn repair(&self) -> Result<Repaired, String> {
        if self.kept().is_empty() {
            return Ok(Repaired::default());
        }
        let names = self.pin_again().map_err(|error| self.lost(&error))?;
        let hindrance = is_read_only(&self.root).then(|| {
            format!(
                "the BPF file system of pin-dir {} is read-only: balancing goes on, also without this agent, but \
                 no other build can take over, and `mesh-agent cleanup` cannot end it; `mount -o remount,rw {}`",
                self.root.display(),
                self.point.display()
            )
        });
        Ok(Repaired { names, hindrance })
    }

    fn pin_again(&self) -> Result<Vec<String>, PinError> {
        {
            let mut locked = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
            if !is_at(&locked, &self.root) {
                // Nothing is made where it would be no pin.
                place(&self.root)?;
                // The one that is there now has to be this agent's as well.
                *locked = lock(&self.root)?;
            }
        }
        let is_gone = |(name, kept): &(&String, &Kept)| {
            let now = number(&self.path(name));
            now.is_none() || now != kept.at
        };
        let gone: Vec<String> =
            self.kept().iter().filter(is_gone).map(|(name, _)| name.clone()).collect();
        if gone.is_empty() {
            return Ok(gone);
        }
        make(&self.directory())?;
        for name in &gone {
            let object = self.kept().get(name).map(|kept| kept.object.try_clone());
            if let Some(object) = object {
                let failed = |source| PinError::Io { path: self.path(name), source };
                self.put(name, object.map_err(failed)?.as_fd())?;
            }
        }
        Ok(gone)
    }

    /// Where the file system is mounted.
    pub(super) fn point_of(root: &Path) -> PathBuf {
        let mounts = Mounts::read().unwrap_or_default();
        mounts.holding(root).map_or_else(|| STANDARD.into(), |mount| mount.point.clone())
    }

    /// What it means that pins cannot be made again, and what to do.
    fn lost(&self, error: &PinError) -> String {
        let (root, point) = (self.root.display(), self.point.display());
        let mount = format!("mount it again: `mount -t bpf bpf {point}`");
        let (what, advice) = match error {
            PinError::Elsewhere { kind, .. } => {
                (format!("is on {kind}, and the BPF file system at {point} is gone"), mount)
            }
            PinError::Io { path, .. } if path == Path::new(STANDARD) && self.point == *path => {
                (format!("is gone with the BPF file system at {point}"), mount)
            }
            PinError::Io { source, .. } if source.kind() == io::ErrorKind::ReadOnlyFilesystem => (
                "is not what this agent had there, on a file system that is read-only".to_owned(),
                format!(
                    "make that writable, `mount -o remount,rw {point}`, or unmount what hides it"
                ),
            ),
            PinError::Taken { pid, .. } => {
                let who = pid.map_or_else(String::new, |pid| format!(" (process {pid})"));
                (
                    format!("was put in place by somebody else, and another agent{who} has it"),
                    "stop one of both, or give one another pin-dir".to_owned(),
                )
            }
            PinError::Foreign { .. } => (
                format!("was put in place by somebody else: {error}"),
                format!("`chown root {root} && chmod go-w {root}`"),
            ),
            PinError::Io { path, source } => (
                format!("has lost pins, which cannot be made again ({}: {source})", path.display()),
                "see whether a security policy or a full system forbids it".to_owned(),
            ),
            _ => (
                format!("has lost pins, which cannot be made again: {error}"),
                "see whether a security policy or a full system forbids it".to_owned(),
            ),
        };
        format!(
            "pin-dir {root} {what}: balancing goes on while this agent runs, and ends with it; {advice}; the agent \
             tries to pin again every second"
        )
    }
}

/// Device and inode of what is at a path.
fn number(path: &Path) -> Option<(u64, u64)> {
    let found = fs::symlink_metadata(path).ok()?;
    Some((found.dev(), found.ino()))
}

fn is_read_only(path: &Path) -> bool {
    rustix::fs::statvfs(path).is_ok_and(|found| found.f_flag.contains(StatVfsMountFlags::RDONLY))
}
