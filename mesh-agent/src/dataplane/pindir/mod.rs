//! The directory in which programs, links and maps are pinned, so that they outlive the agent: `v<N>` below
//! `pin-dir`, where N is the version of the maps' layout.
//!
//! Whatever is in it belongs to this project. A pin is replaced by a rename, so there is always one.
//! [`versions`] says how one version's pins come to be in force instead of another's.

mod error;
mod place;
mod upkeep;
mod versions;

use std::collections::BTreeMap;
use std::fs::{self, File, TryLockError};
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use mesh_common::ABI_VERSION;

use super::sys::links;
use crate::claim;
pub use error::PinError;
use place::{make, place};
use upkeep::Kept;
pub use upkeep::Repaired;
use versions::InForce;
pub use versions::{any_version, in_force, version};

/// The maps that are pinned.
pub const MAPS: [&str; 18] = [
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
    "WINDOWS",
    "AFFINITY",
    "UNITS",
    "EVENTS",
    "SETTINGS",
    "VIRTUAL_IPS",
    "COUNTERS",
    "GRACE",
];

/// What says how their records look, also to other versions.
pub const LAYOUT: &str = "LAYOUT";

/// How the names of programs and links begin.
pub const PREFIX: &str = "mesh_";

/// How the names of links end. The BPF file system allows no dots.
pub const LINK: &str = "_link";

/// How the name of a pin ends that is to replace another.
const NEXT: &str = "_next";

/// How often a directory is made that is removed at once.
const ATTEMPTS: u32 = 16;

/// Where a BPF file system is mounted everywhere; if there is none, it is mounted.
const STANDARD: &str = "/sys/fs/bpf";

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
        if MAPS.contains(&name) || name == LAYOUT {
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
    place: Mutex<Place>,
    lock: Mutex<File>,
    /// Whether there was nothing when it was taken.
    is_new: bool,
    /// Where the file system was mounted.
    point: PathBuf,
    /// What is pinned, to pin it again should somebody remove it.
    kept: Mutex<BTreeMap<String, Kept>>,
}

/// Where this agent pins.
#[derive(Clone, Debug)]
struct Place {
    directory: PathBuf,
    /// What is in force meanwhile, of another version.
    former: Option<(u32, PathBuf)>,
}

impl PinDir {
    /// Takes the directory, which is made if there is none. A BPF file system is mounted at the usual
    /// place if that is below it and there is none. What other agents have begun and not ended is undone.
    ///
    /// # Errors
    ///
    /// When it is no place for pins, or another agent's.
    pub fn take(root: &Path) -> Result<Self, PinError> {
        let root = place(root)?;
        let lock = lock(&root)?;
        let in_force = versions::settle(&root)?;
        let (former, directory) = match in_force {
            InForce::Other(version) => {
                (Some((version, versions::of(&root, version))), versions::next(&root))
            }
            InForce::Nothing | InForce::Ours => (None, versions::of(&root, ABI_VERSION)),
        };
        make(&directory)?;
        let failed = |source| PinError::Io { path: directory.clone(), source };
        for directory in [Some(&directory), former.as_ref().map(|(_, path)| path)] {
            drop_unfinished(directory).map_err(failed)?;
        }
        let is_new = in_force == InForce::Nothing;
        let place = Mutex::new(Place { directory, former });
        let (point, kept) = (Self::point_of(&root), Mutex::default());
        Ok(Self { root, place, lock: Mutex::new(lock), is_new, point, kept })
    }

    /// Whether there was nothing when it was taken.
    #[must_use]
    pub fn is_new(&self) -> bool {
        self.is_new
    }

    /// Where it is, with the version.
    #[must_use]
    pub fn directory(&self) -> PathBuf {
        self.place().directory.clone()
    }

    /// What another version has pinned, while that is in force.
    #[must_use]
    pub fn former(&self) -> Option<(u32, PathBuf)> {
        self.place().former.clone()
    }

    /// Where a pin of this name is.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.place().directory.join(name)
    }

    /// What is pinned by this name, and is what it should be; nothing when there is no such pin.
    ///
    /// # Errors
    ///
    /// When it is something else, or the kernel does not give it.
    pub fn get(&self, name: &str) -> Result<Option<OwnedFd>, PinError> {
        get(&self.directory(), name)
    }

    /// The same of what is in force: of another version, as long as this one's is not.
    ///
    /// # Errors
    ///
    /// As [`PinDir::get`].
    pub fn get_in_force(&self, name: &str) -> Result<Option<OwnedFd>, PinError> {
        let Place { directory, former } = self.place().clone();
        get(&former.map_or(directory, |(_, path)| path), name)
    }

    /// Pins it by this name, perhaps in place of another.
    ///
    /// # Errors
    ///
    /// What the kernel says; then what was pinned by that name is so still.
    pub fn put(&self, name: &str, object: BorrowedFd<'_>) -> Result<(), PinError> {
        let (path, next) = (self.path(name), self.path(&format!("{name}{NEXT}")));
        let put = || {
            let kept = object.try_clone_to_owned()?;
            remove(&next)?;
            links::pin(object, &next)?;
            fs::rename(&next, &path)?;
            Ok(kept)
        };
        let kept = put().map_err(|source| PinError::Io { path: path.clone(), source })?;
        self.kept().insert(name.to_owned(), Kept::new(kept, &path));
        Ok(())
    }

    /// Notes what is pinned by this name, to pin it again should somebody remove it; pins it if it is not.
    ///
    /// # Errors
    ///
    /// As [`PinDir::put`], and when there are no descriptors left.
    pub fn keep(&self, name: &str, object: BorrowedFd<'_>) -> Result<(), PinError> {
        let path = self.path(name);
        if fs::symlink_metadata(&path).is_err() {
            return self.put(name, object);
        }
        let kept = object
            .try_clone_to_owned()
            .map_err(|source| PinError::Io { path: path.clone(), source })?;
        self.kept().insert(name.to_owned(), Kept::new(kept, &path));
        Ok(())
    }

    /// Removes a pin. What it stands for lives on with its other holders.
    pub fn remove(&self, name: &str) {
        self.kept().remove(name);
        // It may have been removed by hand.
        let _ = fs::remove_file(self.path(name));
    }

    /// What this version has pinned is in force: another one's pins are removed, if there are any.
    ///
    /// # Errors
    ///
    /// When the system refuses; then the other one's are in force still.
    pub fn begin(&self) -> Result<(), PinError> {
        let mut place = self.place();
        if let Some((_, former)) = &place.former {
            place.directory = versions::swap(&self.root, former)?;
            place.former = None;
        }
        Ok(())
    }

    /// Removes all pins, also another version's that are in force, and the directories if nothing else is in
    /// them.
    pub fn clear(&self) {
        self.kept().clear();
        let Place { directory, former } = self.place().clone();
        for directory in former.map(|(_, path)| path).iter().chain([&directory]) {
            versions::sweep(directory);
        }
        let _ = fs::remove_dir(&self.root);
    }

    fn place(&self) -> MutexGuard<'_, Place> {
        self.place.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn kept(&self) -> MutexGuard<'_, BTreeMap<String, Kept>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for PinDir {
    /// What was to be in force instead of another version's, and is not, goes.
    fn drop(&mut self) {
        if self.former().is_some() {
            versions::sweep(&self.directory());
        }
    }
}

/// Locks the directory, which is made if there is none.
fn lock(root: &Path) -> Result<File, PinError> {
    let failed = |source| PinError::Io { path: root.to_owned(), source };
    for _ in 0..ATTEMPTS {
        make(root)?;
        let lock = match File::open(root) {
            // Whoever had it last has just removed it.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            opened => opened.map_err(failed)?,
        };
        match lock.try_lock() {
            Ok(()) if is_at(&lock, root) => return Ok(lock),
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(PinError::Taken { pid: claim::holder(&lock), path: root.to_owned() });
            }
            Err(TryLockError::Error(source)) => return Err(failed(source)),
        }
    }
    Err(failed(io::Error::other("it is removed again and again")))
}

/// Whether a file is what is at a path now.
fn is_at(file: &File, path: &Path) -> bool {
    let number = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
    let [one, other] = [file.metadata(), fs::metadata(path)].map(|found| found.map(number).ok());
    one.is_some() && one == other
}

/// Removes what was pinned to replace another, and did not come to it.
fn drop_unfinished(directory: Option<&PathBuf>) -> io::Result<()> {
    let Some(directory) = directory else { return Ok(()) };
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        // A directory is somebody else's.
        let is_pin = entry.file_type()?.is_file() && Kind::of_name(&name).is_some();
        if name.ends_with(NEXT) && is_pin {
            remove(&entry.path())?;
        }
    }
    Ok(())
}

/// Removes what need not be there.
fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
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
