//! What is on the disk. Everything here may block.

use std::ffi::OsStr;
use std::fs::{self, Metadata, OpenOptions};
use std::io::{self, Read as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::panic::resume_unwind;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};
use std::{iter, thread};

use crate::config::parse_services;
use crate::model::Service;
use crate::yaml::{MAX_SIZE, printable};

/// Which directory it is: a path can come to mean another one, and so can an inode, whose number
/// ext4 gives to the next directory at once.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Identity {
    device: u64,
    inode: u64,
    /// Nothing on file systems that do not note it.
    born: Option<SystemTime>,
}

/// What a file looks like from outside. Every write changes it: `ctime` cannot be set back.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    mtime: (i64, i64),
    ctime: (i64, i64),
}

/// A service file as a listing shows it.
#[derive(Debug)]
pub(super) struct Listed {
    pub(super) name: Arc<str>,
    /// Nothing when it cannot be looked at, for instance a link to nowhere.
    pub(super) stamp: Option<Stamp>,
    /// Since its last change; nothing when that cannot be said.
    pub(super) age: Option<Duration>,
}

/// A directory at one moment.
#[derive(Debug)]
pub(super) struct Survey {
    pub(super) identity: Identity,
    pub(super) files: Vec<Listed>,
    /// One error for each service file whose name is not UTF-8.
    pub(super) unnamed: Vec<String>,
}

/// What reading a file gave.
#[derive(Debug)]
pub(super) enum Loaded {
    /// What it defines.
    Services(Vec<Service>),
    /// It has errors: each a sentence with the file and the place.
    Bad(Vec<String>),
    /// It cannot be read for a reason outside of it, which may go without a trace.
    Unreadable(String),
    /// It was written to while it was read.
    Changing,
    /// There is no such name.
    Absent,
}

// === impl Identity ===

impl Identity {
    fn of(metadata: &Metadata) -> Self {
        Self { device: metadata.dev(), inode: metadata.ino(), born: metadata.created().ok() }
    }

    /// Whether a directory that was out of sight has certainly come back.
    pub(super) fn is_certainly(&self, other: &Self) -> bool {
        self == other && self.born.is_some()
    }
}

// === impl Stamp ===

impl Stamp {
    fn of(metadata: &Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            mtime: (metadata.mtime(), metadata.mtime_nsec()),
            ctime: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }

    /// Time since the last change by the wall clock; nothing when that is in the future, which
    /// a clock that was set back makes possible.
    fn age(&self, now: SystemTime) -> Option<Duration> {
        let seconds = u64::try_from(self.ctime.0).ok()?;
        let nanoseconds = u32::try_from(self.ctime.1).ok()?;
        now.duration_since(SystemTime::UNIX_EPOCH + Duration::new(seconds, nanoseconds)).ok()
    }
}

/// Whether a name in the directory is that of a service file: not hidden, and not what editors and
/// writers leave beside one (`x.yaml~`, `.x.yaml.swp`, `x.yaml.tmp`).
pub(super) fn is_service_file(name: &OsStr) -> bool {
    let name = name.as_encoded_bytes();
    !name.starts_with(b".") && (name.ends_with(b".yaml") || name.ends_with(b".yml"))
}

/// Which directory a path means now.
pub(super) fn identity(directory: &Path) -> io::Result<Identity> {
    let metadata = fs::metadata(directory)?;
    if !metadata.is_dir() {
        return Err(io::ErrorKind::NotADirectory.into());
    }
    Ok(Identity::of(&metadata))
}

/// Lists a directory. An error also when it was exchanged meanwhile.
pub(super) fn survey(directory: &Path) -> io::Result<Survey> {
    let before = identity(directory)?;
    let mut files = Vec::new();
    let mut unnamed = Vec::new();
    for entry in fs::read_dir(directory)? {
        let name = entry?.file_name();
        if !is_service_file(&name) {
            continue;
        }
        let path = directory.join(&name);
        let Some(name) = name.to_str() else {
            let shown = printable(&path.to_string_lossy());
            unnamed.push(format!("{shown}: the file name is not UTF-8; rename it"));
            continue;
        };
        let stamp = fs::metadata(&path).ok().map(|metadata| Stamp::of(&metadata));
        // The clock after the stamp, or a fresh file would lie in the future.
        let age = stamp.and_then(|stamp| stamp.age(SystemTime::now()));
        files.push(Listed { name: name.into(), stamp, age });
    }
    if identity(directory)? != before {
        return Err(io::Error::other("it was exchanged while it was read"));
    }
    files.sort_by(|a, b| a.name.cmp(&b.name));
    unnamed.sort();
    Ok(Survey { identity: before, files, unnamed })
}

/// Whether a name that has just been created is whole already: a link, symbolic or hard, or what
/// will never be a file. What was created empty will be heard of again when its writer closes it.
pub(super) fn is_born_whole(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|metadata| !metadata.is_file() || metadata.nlink() > 1)
}

/// What a file looked like when it was read, and what it says.
pub(super) type Read = (Option<Stamp>, Loaded);

/// How many threads read files.
const READERS: usize = 4;

/// Reads files, on several processors: at the start of an agent that is most of its work.
pub(super) fn load_all(directory: &Path, names: &[Arc<str>]) -> Vec<(Arc<str>, Read)> {
    let load = |name: &Arc<str>| (Arc::clone(name), load(directory, name));
    let readers = thread::available_parallelism().map_or(1, |n| n.get().min(READERS));
    if names.len() < 2 || readers < 2 {
        return names.iter().map(load).collect();
    }
    // Whoever is done takes the next, since files differ in size.
    let next = AtomicUsize::new(0);
    let read = || {
        let mine = iter::from_fn(|| {
            let place = next.fetch_add(1, Ordering::Relaxed);
            names.get(place).map(|name| (place, load(name)))
        });
        mine.collect::<Vec<_>>()
    };
    let mut all: Vec<_> = thread::scope(|scope| {
        let others = 1..readers.min(names.len());
        // Without threads there is one reader.
        let others: Vec<_> =
            others.filter_map(|_| thread::Builder::new().spawn_scoped(scope, read).ok()).collect();
        let mut all = read();
        for other in others {
            all.extend(other.join().unwrap_or_else(|panic| resume_unwind(panic)));
        }
        all
    });
    all.sort_unstable_by_key(|(place, _)| *place);
    all.into_iter().map(|(_, loaded)| loaded).collect()
}

/// Reads a file, and tells what it looked like then.
pub(super) fn load(directory: &Path, name: &str) -> Read {
    let path = directory.join(name);
    let shown = printable(&path.to_string_lossy());
    let bad = |what: String| Loaded::Bad(vec![format!("{shown}: {what}")]);
    let (before, after, bytes) = match read(&path) {
        Ok(Some(read)) => read,
        Ok(None) => {
            let stamp = fs::metadata(&path).ok().map(|metadata| Stamp::of(&metadata));
            return (
                stamp,
                bad("this is no regular file; expected a file or a link to one".into()),
            );
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return match fs::symlink_metadata(&path) {
                Ok(_) => (
                    None,
                    bad("the link leads to nothing; put its target back or remove it".into()),
                ),
                Err(_) => (None, Loaded::Absent),
            };
        }
        Err(error) => {
            let error =
                format!("{shown}: cannot read it: {error}; what it defined stays as it was");
            return (None, Loaded::Unreadable(error));
        }
    };
    if before != after {
        return (Some(after), Loaded::Changing);
    }
    let loaded = match parse_services(&bytes) {
        Ok(services) => Loaded::Services(services),
        Err(problems) => Loaded::Bad(problems.iter().map(|p| p.line(&shown)).collect()),
    };
    (Some(after), loaded)
}

/// The bytes of a regular file between two looks at it. At most one more than [`MAX_SIZE`], which
/// is enough to refuse it.
fn read(path: &Path) -> io::Result<Option<(Stamp, Stamp, Vec<u8>)>> {
    // O_NONBLOCK: to open a FIFO would wait for its writer. Regular files do not care.
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    let before = file.metadata()?;
    if !before.is_file() {
        return Ok(None);
    }
    let mut bytes = Vec::new();
    (&file).take(MAX_SIZE as u64 + 1).read_to_end(&mut bytes)?;
    Ok(Some((Stamp::of(&before), Stamp::of(&file.metadata()?), bytes)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_editors_leave_is_no_service_file() {
        let is = |name: &str| is_service_file(OsStr::new(name));
        assert!(is("a.yaml") && is("a.yml") && is("a b.yaml"));
        for name in [
            "a.yaml~",
            ".a.yaml.swp",
            ".a.yaml",
            "#a.yaml#",
            ".#a.yaml",
            "a.yaml.tmp",
            "a.json",
            "..data",
            "4913",
        ] {
            assert!(!is(name), "{name}");
        }
    }

    #[test]
    fn what_cannot_be_a_file_is_an_error_and_does_not_hang() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = |name| directory.path().join(name);
        fs::create_dir(path("d.yaml")).expect("created");
        std::os::unix::fs::symlink("nowhere", path("l.yaml")).expect("linked");
        std::os::unix::fs::symlink("/dev/zero", path("z.yaml")).expect("linked");
        fs::write(path("big.yaml"), vec![b'#'; MAX_SIZE + 1]).expect("written");
        let error = |name| match load(directory.path(), name).1 {
            Loaded::Bad(errors) => errors.join("\n"),
            other => panic!("{name}: {other:?}"),
        };
        assert!(error("d.yaml").contains("no regular file"));
        assert!(error("z.yaml").contains("no regular file"));
        assert!(error("l.yaml").contains("leads to nothing"));
        assert!(
            error("big.yaml")
                .ends_with("the file is larger than 4 MiB, the most that is read; split it")
        );
        assert!(matches!(load(directory.path(), "none.yaml").1, Loaded::Absent));
    }
}
