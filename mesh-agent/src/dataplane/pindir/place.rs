//! Where pins can be: on a BPF file system, in a directory that nobody else may write.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use rustix::mount::MountFlags;

use super::{PinError, STANDARD};
use crate::check::mounts::Mounts;

/// That a group, or everybody, may write.
const OTHERS_WRITE: u32 = 0o022;

/// The directory by its real name, on a BPF file system.
pub(super) fn place(root: &Path) -> Result<PathBuf, PinError> {
    let failed = |source| PinError::Io { path: root.to_owned(), source };
    let root = std::path::absolute(root).map_err(failed)?;
    // As far as it is there.
    let there = root.ancestors().find(|ancestor| ancestor.exists()).unwrap_or(Path::new("/"));
    let rest = root.strip_prefix(there).unwrap_or(Path::new("")).to_owned();
    let there = there.canonicalize().map_err(failed)?;
    let real: PathBuf = there.components().chain(rest.components()).collect();
    let kind = |mounts: &Mounts| mounts.holding(&there).map(|mount| mount.kind.clone());
    let mut found = kind(&Mounts::read().map_err(failed)?);
    if found.as_deref() == Some("sysfs") && real.starts_with(STANDARD) {
        let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
        rustix::mount::mount("bpf", STANDARD, "bpf", flags, Some(c"mode=0700"))
            .map_err(|error| PinError::Io { path: STANDARD.into(), source: error.into() })?;
        tracing::info!("a BPF file system is mounted at {STANDARD}");
        found = kind(&Mounts::read().map_err(failed)?);
    }
    match found.as_deref() {
        Some("bpf") => Ok(real),
        kind => {
            let kind = kind.unwrap_or("nothing").to_owned();
            Err(PinError::Elsewhere { path: root, kind })
        }
    }
}

/// Makes a directory that nobody else may write; one that is there must be like that.
pub(super) fn make(path: &Path) -> Result<(), PinError> {
    let failed = |source| PinError::Io { path: path.to_owned(), source };
    match DirBuilder::new().mode(0o700).recursive(true).create(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(failed(error)),
        _ => {}
    }
    let metadata = fs::symlink_metadata(path).map_err(failed)?;
    let (owner, mode) = (metadata.uid(), metadata.mode() & 0o7777);
    if owner != rustix::process::geteuid().as_raw() || mode & OTHERS_WRITE != 0 {
        return Err(PinError::Foreign { path: path.to_owned(), owner, mode });
    }
    Ok(())
}
