//! The cgroups that clients are in, by the kernel's numbers for them.
//!
//! The id of a cgroup2 directory is the number of its inode, so a walk over the balanced cgroup
//! finds the names. It is made only when an id is unknown, is bounded, and takes a small share of
//! the time at most: clients can be made faster than anybody can look for them.

use std::collections::{HashMap, HashSet, VecDeque};
use std::os::unix::fs::{DirEntryExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use std::{fs, io};

use tokio::time::Instant;

use crate::check::cgroup::Cgroup;

/// The most directories that one walk looks at.
pub(super) const WALK: usize = 20_000;

/// How many ids are remembered; when there are more, all are forgotten.
const REMEMBERED: usize = 16_384;

/// How long a walk may hold up what it is made for.
const PATIENCE: Duration = Duration::from_millis(500);

/// After a walk there is none for so many times what it took.
const REST: u32 = 20;

/// The names of clients.
#[derive(Debug)]
pub struct Clients {
    /// The directory of the balanced cgroup.
    balanced: PathBuf,
    /// By id; nothing for those that were looked for in vain, which are gone or elsewhere.
    names: HashMap<u64, Option<Arc<str>>>,
    /// No walk before this.
    rest: Option<Instant>,
}

impl Clients {
    /// Clients inside a cgroup, given by its directory.
    #[must_use]
    pub fn of(balanced: &Path) -> Self {
        Self { balanced: balanced.to_owned(), names: HashMap::new(), rest: None }
    }

    /// Looks for the names of those ids that have none yet, unless it was done too lately.
    pub async fn learn(&mut self, ids: impl IntoIterator<Item = u64>) {
        let unknown: HashSet<u64> =
            ids.into_iter().filter(|id| !self.names.contains_key(id)).collect();
        let now = Instant::now();
        if unknown.is_empty() || self.rest.is_some_and(|rest| now < rest) {
            return;
        }
        let balanced = self.balanced.clone();
        let wanted = unknown.clone();
        let walk = tokio::task::spawn_blocking(move || walk(&balanced, wanted, WALK));
        let walked = tokio::time::timeout(PATIENCE, walk).await;
        self.rest = Some(Instant::now() + now.elapsed() * REST);
        // A walk that takes too long, or finds no cgroup, says nothing about any id.
        let Ok(Ok(Some(Walked { found, .. }))) = walked else { return };
        if self.names.len() + unknown.len() + found.len() > REMEMBERED {
            self.names.clear();
        }
        self.names.extend(unknown.into_iter().map(|id| (id, None)));
        self.names.extend(found.into_iter().map(|(id, name)| (id, Some(name))));
    }

    /// The cgroup's place in the hierarchy, as `/proc/PID/cgroup` has it, or `cgroup 1234`.
    #[must_use]
    pub fn name(&self, id: u64) -> Arc<str> {
        match self.names.get(&id) {
            Some(Some(name)) => Arc::clone(name),
            _ => format!("cgroup {id}").into(),
        }
    }
}

/// What a walk came across.
#[derive(PartialEq, Eq, Debug)]
pub(super) struct Walked {
    /// Names by id.
    pub(super) found: HashMap<u64, Arc<str>>,
    /// Whether all was looked at that it was to look at.
    pub(super) whole: bool,
}

/// Looks for ids at and below a cgroup, from the top down, at `most` directories. Gives all that it
/// came across, or nothing when there is no such cgroup.
pub(super) fn walk(balanced: &Path, mut wanted: HashSet<u64>, most: usize) -> Option<Walked> {
    let Cgroup { directory, path } = Cgroup::open(balanced).ok()?;
    let name = |path: &Path| Arc::<str>::from(path.to_string_lossy());
    let id = fs::metadata(&directory).ok()?.ino();
    let mut found = HashMap::from([(id, name(&path))]);
    wanted.remove(&id);
    let mut whole = true;
    let mut queue = VecDeque::from([(directory, path)]);
    while let Some((directory, path)) = queue.pop_front() {
        if wanted.is_empty() {
            break;
        }
        let entries = match fs::read_dir(&directory) {
            Ok(entries) => entries,
            Err(error) => {
                // One that was removed meanwhile has nothing below it.
                whole &= is_gone(&error);
                continue;
            }
        };
        for entry in entries {
            let entry = match entry {
                Ok(entry) => entry,
                Err(error) => {
                    whole &= is_gone(&error);
                    continue;
                }
            };
            if found.len() >= most {
                return Some(Walked { found, whole: false });
            }
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                let path = path.join(entry.file_name());
                found.insert(entry.ino(), name(&path));
                wanted.remove(&entry.ino());
                queue.push_back((entry.path(), path));
            }
        }
    }
    Some(Walked { found, whole })
}

/// Whether a directory was removed while it was looked at.
fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ENODEV)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::mounts::Mounts;

    fn top() -> PathBuf {
        let mounts = Mounts::read().expect("procfs");
        mounts.points("cgroup2").next().expect("cgroup2 is mounted").to_owned()
    }

    /// Anybody may look at the hierarchy; making cgroups is left to the end-to-end tests.
    #[test]
    fn a_walk_finds_the_hierarchy_and_is_bounded() {
        let id = fs::metadata(top()).expect("cgroup").ino();
        let Walked { found, whole } = walk(&top(), HashSet::from([id]), WALK).expect("a cgroup");
        assert!(whole);
        assert_eq!(found, HashMap::from([(id, "/".into())]), "it stops when all is found");
        let walked = walk(&top(), HashSet::from([u64::MAX]), 3).expect("a cgroup");
        let found = walked.found;
        assert!((1..=3).contains(&found.len()), "{found:?}");
        assert_eq!(walk(Path::new("/proc"), HashSet::new(), WALK), None);
    }

    #[tokio::test]
    async fn what_is_not_found_has_its_number() {
        let id = fs::metadata(top()).expect("cgroup").ino();
        let mut clients = Clients::of(&top());
        assert_eq!(&*clients.name(id), format!("cgroup {id}"));
        clients.learn([id, u64::MAX]).await;
        assert_eq!(&*clients.name(id), "/");
        assert_eq!(&*clients.name(u64::MAX), format!("cgroup {}", u64::MAX));
        assert!(clients.rest.is_some_and(|rest| rest > Instant::now()), "no walk right away");
        // Of a directory that is no cgroup nothing is learned, nor remembered.
        let mut clients = Clients::of(Path::new("/proc"));
        clients.learn([1]).await;
        assert!(clients.names.is_empty());
    }
}
