//! cgroup2 directories: the one whose sockets are balanced, and the place of a process.

use std::fmt;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::{fs, io};

use super::Check;
use super::mounts::Mounts;

/// A cgroup2 directory that exists.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Cgroup {
    /// The directory, without symbolic links.
    pub directory: PathBuf,
    /// Its place in the hierarchy as `/proc/PID/cgroup` names it; `/` is the root of what this
    /// process can see.
    pub path: PathBuf,
}

/// Why a directory cannot be used as a cgroup.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// It cannot be looked at.
    #[error("cgroup {}: {source}; {hint}", directory.display())]
    Missing {
        /// What was named.
        directory: PathBuf,
        /// What the kernel says.
        source: io::Error,
        /// Where to look instead.
        hint: Hint,
    },
    /// It is something else.
    #[error("{} is not a cgroup2 directory (it is on {kind}); {hint}", directory.display())]
    NotCgroup2 {
        /// What was named.
        directory: PathBuf,
        /// Kind of the file system.
        kind: String,
        /// Where to look instead.
        hint: Hint,
    },
    /// The table of mounts cannot be read.
    #[error("/proc/self/mountinfo: {0}; mount procfs at /proc")]
    Mounts(io::Error),
}

/// Where cgroup2 is mounted, as a sentence.
#[derive(Debug)]
pub struct Hint(Vec<PathBuf>);

/// The directory of the cgroup with this id, which is its number in the file system.
#[must_use]
pub fn directory_of(id: u64) -> Option<PathBuf> {
    let mounts = Mounts::read().ok()?;
    let mut left: Vec<PathBuf> = mounts.points("cgroup2").map(Path::to_owned).collect();
    while let Some(directory) = left.pop() {
        if fs::metadata(&directory).is_ok_and(|metadata| metadata.ino() == id) {
            return Some(directory);
        }
        // Cgroups come and go meanwhile.
        let entries = fs::read_dir(&directory).into_iter().flatten().flatten();
        let inside = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
        left.extend(inside.map(|entry| entry.path()));
    }
    None
}

// === impl Cgroup ===

impl Cgroup {
    /// The cgroup2 directory that `directory` names.
    ///
    /// # Errors
    ///
    /// When it does not exist, cannot be read or is no cgroup2 directory; each names the mount
    /// point of cgroup2.
    pub fn open(directory: &Path) -> Result<Self, CgroupError> {
        Self::find(directory, &Mounts::read().map_err(CgroupError::Mounts)?)
    }

    pub(super) fn find(named: &Path, mounts: &Mounts) -> Result<Self, CgroupError> {
        let hint = || Hint(mounts.points("cgroup2").map(Path::to_path_buf).collect());
        let missing =
            |source| CgroupError::Missing { directory: named.to_path_buf(), source, hint: hint() };
        let directory = fs::canonicalize(named).map_err(missing)?;
        if !fs::metadata(&directory).map_err(missing)?.is_dir() {
            return Err(missing(io::ErrorKind::NotADirectory.into()));
        }
        let mount = mounts.holding(&directory);
        mount
            .filter(|mount| mount.kind == "cgroup2")
            .and_then(|mount| mount.inside(&directory))
            .map(|path| Self { directory, path })
            .ok_or_else(|| CgroupError::NotCgroup2 {
                directory: named.to_path_buf(),
                kind: mount.map_or_else(|| "nothing".into(), |mount| mount.kind.clone()),
                hint: hint(),
            })
    }

    /// Whether sockets made in `other`, a place in the hierarchy, are below this cgroup.
    #[must_use]
    pub fn contains(&self, other: &Path) -> bool {
        other.starts_with(&self.path)
    }
}

// === impl Hint ===

impl fmt::Display for Hint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.as_slice() {
            [] => f.write_str(
                "cgroup2 is not mounted: mount -t cgroup2 cgroup2 /sys/fs/cgroup (or give the \
                 container the host's)",
            ),
            [first, rest @ ..] => {
                write!(f, "cgroup2 is mounted at {}", first.display())?;
                rest.iter().try_for_each(|point| write!(f, ", {}", point.display()))?;
                f.write_str(": name a directory there")
            }
        }
    }
}

// === checks ===

/// cgroup2, and the cgroup that is to be balanced.
pub(super) fn checks(mounts: &Mounts, named: Option<&Path>) -> [Check; 2] {
    let points: Vec<_> =
        mounts.points("cgroup2").map(|point| point.display().to_string()).collect();
    let mounted = if points.is_empty() {
        Check::bad(
            "cgroup2",
            "not mounted",
            "mount -t cgroup2 cgroup2 /sys/fs/cgroup; in a container mount the host's",
        )
    } else {
        Check::good("cgroup2", format!("mounted at {}", points.join(", ")))
    };
    let usable = match named.map(|named| Cgroup::find(named, mounts)) {
        None => Check::bad(
            "cgroup",
            "none is named: `run` will refuse",
            "name it with --cgroup DIR or with `cgroup:` in the agent file",
        )
        .optional(),
        Some(Ok(cgroup)) => {
            let what = if cgroup.path == Path::new("/") {
                "the root: every socket of the node is balanced"
            } else {
                "sockets created below it are balanced"
            };
            Check::good("cgroup", format!("{}: {what}", cgroup.directory.display()))
        }
        Some(Err(error)) => {
            Check::bad("cgroup", error.to_string(), "name another with --cgroup DIR")
        }
    };
    [mounted, usable]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plain_directory_is_refused_and_the_mount_point_named() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let error = Cgroup::open(directory.path()).expect_err("not a cgroup").to_string();
        assert!(error.contains("is not a cgroup2 directory"), "{error}");
        assert!(error.contains("mount"), "{error}");
        let missing = directory.path().join("missing");
        let error = Cgroup::open(&missing).expect_err("missing").to_string();
        assert!(error.contains("No such file"), "{error}");
    }

    #[test]
    fn containment_is_by_component() {
        let cgroup = Cgroup { directory: "/c/web".into(), path: "/web".into() };
        assert!(cgroup.contains(Path::new("/web")));
        assert!(cgroup.contains(Path::new("/web/a")));
        assert!(!cgroup.contains(Path::new("/website")));
        assert!(!cgroup.contains(Path::new("/")));
    }
}
