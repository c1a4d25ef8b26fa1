//! The directory in which programs, links and maps are pinned, so that they outlive the agent: `v<N>` below
//! `pin-dir`, where N is the version of the maps' layout.
//!
//! Whatever is in it belongs to this project. A pin is replaced by a rename, so there is always one.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File, TryLockError};
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use mesh_common::ABI_VERSION;
use rustix::mount::MountFlags;

use super::sys::links;
use crate::check::mounts::Mounts;
use crate::claim;

/// The maps that are pinned.
pub const MAPS: [&str; 17] = [
    "FRONTENDS",
    "SERVICES",
    "SERVICE_STATS",
    "NAMES",
    "SLOTS",
    "BACKENDS",
    "BACKEND_STATS",
    "FLOWS",
    "OVERFLOW",
    "LATENCIES",
    "AFFINITY",
    "UNITS",
    "EVENTS",
    "SETTINGS",
    "VIRTUAL_IPS",
    "COUNTERS",
    "GRACE",
];

/// How the names of programs and links begin.
pub const PREFIX: &str = "mesh_";

/// How the names of links end. The BPF file system allows no dots.
pub const LINK: &str = "_link";

/// How the name of a pin ends that is to replace another.
const NEXT: &str = "_next";

/// Where a BPF file system is mounted everywhere; if there is none, it is mounted.
const STANDARD: &str = "/sys/fs/bpf";

/// Why nothing can be pinned. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum PinError {
    /// It is on no BPF file system.
    #[error(
        "pin-dir {} is on {kind} and not on a BPF file system, so nothing can be pinned there; name one \
         below {STANDARD}, or mount one there: `mount -t bpf bpf DIRECTORY`",
        path.display()
    )]
    Elsewhere {
        /// The directory.
        path: PathBuf,
        /// What it is on.
        kind: String,
    },
    /// Somebody else could replace what is in it.
    #[error(
        "{} belongs to user {owner}, who could replace what is pinned there; name another pin-dir, or \
         give it to root: `chown root {}`",
        path.display(), path.display()
    )]
    Foreign {
        /// The directory.
        path: PathBuf,
        /// Whose it is.
        owner: u32,
    },
    /// Pins of a version that this one does not understand.
    #[error(
        "{} holds what another version of the agent has pinned (map layout {version}, this one has \
         {ABI_VERSION}): run that version, or remove it with `mesh-agent cleanup`, which ends balancing \
         until this one runs",
        path.display()
    )]
    OtherVersion {
        /// The directory.
        path: PathBuf,
        /// Version of the layout.
        version: u32,
    },
    /// Another agent has it.
    #[error("another agent{} has pin-dir {}: stop it first, or name another", who(*pid), path.display())]
    Taken {
        /// The directory.
        path: PathBuf,
        /// Its process, if it can be seen from here.
        pid: Option<u32>,
    },
    /// A pin is not what its name says.
    #[error(
        "{} is {found} where this agent has {expected}: it is not this project's, or damaged; remove it, \
         or name another pin-dir",
        path.display()
    )]
    Wrong {
        /// The pin.
        path: PathBuf,
        /// What it is.
        found: String,
        /// What it should be.
        expected: String,
    },
    /// The system refuses.
    #[error("{}: {source}; run as root, and see `mesh-agent check`", path.display())]
    Io {
        /// What was touched.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

fn who(pid: Option<u32>) -> String {
    pid.map_or_else(String::new, |pid| format!(" (process {pid})"))
}

/// What a pin stands for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// A map.
    Map,
    /// A program.
    Program,
    /// A link.
    Link,
}

impl Kind {
    /// What a pin of this name has to be; nothing when it is none of this project's.
    #[must_use]
    pub fn of_name(name: &str) -> Option<Self> {
        let name = name.strip_suffix(NEXT).unwrap_or(name);
        if MAPS.contains(&name) {
            Some(Self::Map)
        } else if !name.starts_with(PREFIX) {
            None
        } else if name.ends_with(LINK) {
            Some(Self::Link)
        } else {
            Some(Self::Program)
        }
    }

    /// What a descriptor stands for, as the kernel calls it; of a link it has two ways to write that.
    fn of(object: BorrowedFd<'_>) -> io::Result<String> {
        use std::os::fd::AsRawFd as _;
        let target = fs::read_link(format!("/proc/self/fd/{}", object.as_raw_fd()))?;
        Ok(target.to_string_lossy().replace("anon_inode:", "").replace('_', "-"))
    }

    /// The kernel's word for it.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Map => "bpf-map",
            Self::Program => "bpf-prog",
            Self::Link => "bpf-link",
        }
    }
}

/// The directory, which no other agent has meanwhile.
#[derive(Debug)]
pub struct PinDir {
    root: PathBuf,
    directory: PathBuf,
    _lock: File,
    /// Whether there was nothing when it was taken.
    is_new: bool,
    /// What is pinned, to pin it again should somebody remove it.
    kept: Mutex<BTreeMap<String, OwnedFd>>,
}

impl PinDir {
    /// Takes the directory, which is made if there is none. A BPF file system is mounted at the usual
    /// place if that is below it and there is none.
    ///
    /// # Errors
    ///
    /// When it is no place for pins, or another agent's.
    pub fn take(root: &Path) -> Result<Self, PinError> {
        let root = place(root)?;
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| PinError::Io { path, source }
        };
        make(&root)?;
        let lock = File::open(&root).map_err(failed(&root))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(PinError::Taken { pid: claim::holder(&lock), path: root });
            }
            Err(TryLockError::Error(source)) => return Err(PinError::Io { path: root, source }),
        }
        for entry in fs::read_dir(&root).map_err(failed(&root))? {
            let entry = entry.map_err(failed(&root))?;
            let version = version(&entry.file_name().to_string_lossy());
            let other = version.filter(|&version| version != ABI_VERSION);
            if let Some(version) = other
                && fs::read_dir(entry.path()).map_err(failed(&entry.path()))?.next().is_some()
            {
                return Err(PinError::OtherVersion { path: entry.path(), version });
            }
        }
        let directory = root.join(format!("v{ABI_VERSION}"));
        make(&directory)?;
        let is_new = fs::read_dir(&directory).map_err(failed(&directory))?.next().is_none();
        Ok(Self { root, directory, _lock: lock, is_new, kept: Mutex::default() })
    }

    /// Whether there was nothing when it was taken.
    #[must_use]
    pub fn is_new(&self) -> bool {
        self.is_new
    }

    /// Where it is, with the version.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Where a pin of this name is.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// What is pinned by this name, and is what it should be; nothing when there is no such pin.
    ///
    /// # Errors
    ///
    /// When it is something else, or the kernel does not give it.
    pub fn get(&self, name: &str) -> Result<Option<OwnedFd>, PinError> {
        get(&self.directory, name)
    }

    /// Pins it by this name, perhaps in place of another.
    ///
    /// # Errors
    ///
    /// What the kernel says; then what was pinned by that name is so still.
    pub fn put(&self, name: &str, object: BorrowedFd<'_>) -> Result<(), PinError> {
        let (path, next) = (self.path(name), self.path(&format!("{name}{NEXT}")));
        let put = || {
            // Left by an agent that ended between the two.
            match fs::remove_file(&next) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => links::pin(object, &next)?,
            }
            fs::rename(&next, &path)?;
            object.try_clone_to_owned()
        };
        let kept = put().map_err(|source| PinError::Io { path: path.clone(), source })?;
        self.kept().insert(name.to_owned(), kept);
        Ok(())
    }

    /// Notes what is pinned, to pin it again should somebody remove it.
    ///
    /// # Errors
    ///
    /// When there are no descriptors left.
    pub fn keep(&self, name: &str, object: BorrowedFd<'_>) -> Result<(), PinError> {
        let kept = object.try_clone_to_owned();
        let kept = kept.map_err(|source| PinError::Io { path: self.path(name), source })?;
        self.kept().insert(name.to_owned(), kept);
        Ok(())
    }

    /// Removes a pin. What it stands for lives on with its other holders.
    pub fn remove(&self, name: &str) {
        self.kept().remove(name);
        // It may have been removed by hand.
        let _ = fs::remove_file(self.path(name));
    }

    /// Pins again what somebody has removed. Gives the names.
    ///
    /// # Errors
    ///
    /// When that cannot be done.
    pub fn repair(&self) -> Result<Vec<String>, PinError> {
        let kept = self.kept();
        let is_gone = |name: &&String| fs::symlink_metadata(self.path(name)).is_err();
        let gone: Vec<String> = kept.keys().filter(is_gone).cloned().collect();
        if !gone.is_empty() {
            make(&self.root)?;
            make(&self.directory)?;
        }
        for name in &gone {
            let path = self.path(name);
            if let Some(object) = kept.get(name) {
                links::pin(object.as_fd(), &path)
                    .map_err(|source| PinError::Io { path, source })?;
            }
        }
        Ok(gone)
    }

    /// Removes all pins, and the directories if nothing else is in them.
    pub fn clear(&self) {
        self.kept().clear();
        for entry in fs::read_dir(&self.directory).into_iter().flatten().flatten() {
            if Kind::of_name(&entry.file_name().to_string_lossy()).is_some() {
                let _ = fs::remove_file(entry.path());
            }
        }
        let _ = fs::remove_dir(&self.directory);
        let _ = fs::remove_dir(&self.root);
    }

    fn kept(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, OwnedFd>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What is pinned in a directory by this name, and is what it should be; nothing when there is none.
///
/// # Errors
///
/// When it is something else, or the kernel does not give it.
pub fn get(directory: &Path, name: &str) -> Result<Option<OwnedFd>, PinError> {
    let path = directory.join(name);
    let object = match links::pinned(&path) {
        Ok(object) => object,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(PinError::Io { path, source }),
    };
    let found =
        Kind::of(object.as_fd()).map_err(|source| PinError::Io { path: path.clone(), source })?;
    match Kind::of_name(name) {
        Some(kind) if kind.word() == found => Ok(Some(object)),
        kind => {
            let expected = kind.map_or("nothing", Kind::word).to_owned();
            Err(PinError::Wrong { path, found, expected })
        }
    }
}

/// The version that a directory's name stands for.
#[must_use]
pub fn version(name: &str) -> Option<u32> {
    let number = name.strip_prefix('v')?;
    number.bytes().all(|byte| byte.is_ascii_digit()).then(|| number.parse().ok())?
}

/// The directory by its real name, on a BPF file system.
fn place(root: &Path) -> Result<PathBuf, PinError> {
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
fn make(path: &Path) -> Result<(), PinError> {
    let failed = |source| PinError::Io { path: path.to_owned(), source };
    match DirBuilder::new().mode(0o700).recursive(true).create(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(failed(error)),
        _ => {}
    }
    let metadata = fs::symlink_metadata(path).map_err(failed)?;
    let owner = metadata.uid();
    if owner != rustix::process::geteuid().as_raw() {
        return Err(PinError::Foreign { path: path.to_owned(), owner });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_say_what_they_are() {
        let kinds =
            ["FRONTENDS", "mesh_connect4", "mesh_connect4_link", "mesh_x_link_next", "cil_from"];
        let expected = [Kind::Map, Kind::Program, Kind::Link, Kind::Link].map(Some);
        assert_eq!(kinds.map(Kind::of_name)[..4], expected);
        assert_eq!(Kind::of_name("cil_from"), None);
        assert_eq!(
            ["v9", "v12", "v", "vmlinux", "9"].map(version),
            [Some(9), Some(12), None, None, None]
        );
    }

    #[test]
    fn elsewhere_it_refuses() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let path = directory.path().join("mesh");
        let error = PinDir::take(&path).expect_err("no BPF file system");
        assert!(matches!(error, PinError::Elsewhere { .. }), "{error}");
        assert!(!path.exists(), "nothing was made");
    }
}
