//! Who connects: whether the sockets of a process, or of a cgroup, are balanced.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::{fs, io};

use crate::check::cgroup::{Cgroup, CgroupError};

/// A client as an explanation sees it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ClientView {
    /// For people: `pid 123 (curl)` or the cgroup's directory.
    pub name: String,
    /// Its place in the cgroup hierarchy.
    pub cgroup: PathBuf,
    /// The place of the balanced cgroup.
    pub balanced: PathBuf,
    /// Whether the one is inside the other.
    pub inside: bool,
    /// Whether it is excluded, as far as its cgroup says.
    pub excluded: bool,
    /// The number by which the kernel programs know the cgroup: that of its directory's inode.
    pub id: Option<u64>,
}

/// Why `--from` names nobody. Each is for people, and says what to do.
#[derive(Debug, thiserror::Error)]
pub enum UnknownClient {
    /// The number is no process.
    #[error("no process {0}: it has ended, or is in another PID namespace; see `ps -e`")]
    NoProcess(u32),
    /// The process cannot be looked at.
    #[error("process {pid}: {source}")]
    Process {
        /// Which process.
        pid: u32,
        /// What the kernel says.
        source: io::Error,
    },
    /// The process is in no cgroup2.
    #[error("process {0} is in no cgroup2 hierarchy: mount cgroup2 first")]
    NoCgroup2(u32),
    /// Neither a number nor a directory.
    #[error("{0:?} is neither a process id nor an absolute cgroup directory")]
    Neither(String),
    /// The directory is no cgroup.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
}

// === impl ClientView ===

impl ClientView {
    /// Finds the client that `from` names: a process id, or an absolute cgroup directory.
    /// `balanced` is the directory of the balanced cgroup, `excluded` are those that are left alone.
    ///
    /// # Errors
    ///
    /// When it does not exist or cannot be looked at.
    pub fn resolve(
        from: &str,
        balanced: &Path,
        excluded: &[PathBuf],
    ) -> Result<Self, UnknownClient> {
        let balanced = Cgroup::open(balanced)?;
        let (name, cgroup) = if let Ok(pid) = from.parse() {
            process(pid)?
        } else if from.starts_with('/') {
            let cgroup = Cgroup::open(Path::new(from))?;
            (format!("cgroup {}", cgroup.directory.display()), cgroup.path)
        } else {
            return Err(UnknownClient::Neither(from.into()));
        };
        let inside = balanced.contains(&cgroup);
        let id = id(&balanced, &cgroup);
        let outside = excluded.iter().filter_map(|excluded| Cgroup::open(excluded).ok());
        let excluded = outside.into_iter().any(|outside| outside.contains(&cgroup));
        Ok(Self { name, cgroup, balanced: balanced.path, inside, excluded, id })
    }

    /// Where the client is, in a sentence.
    pub(super) fn describe(&self) -> String {
        let Self { name, cgroup, balanced, inside, .. } = self;
        let relation = if *inside { "inside" } else { "not inside" };
        format!(
            "{name}: {} is {relation} the balanced cgroup {} (what counts is where a socket was \
             created, not where its process is now)",
            cgroup.display(),
            balanced.display()
        )
    }
}

/// The id of a cgroup inside the balanced one; nothing when it is not, or has been removed.
fn id(balanced: &Cgroup, cgroup: &Path) -> Option<u64> {
    let inside = cgroup.strip_prefix(&balanced.path).ok()?;
    Some(fs::metadata(balanced.directory.join(inside)).ok()?.ino())
}

/// A process, and its place in the hierarchy.
fn process(pid: u32) -> Result<(String, PathBuf), UnknownClient> {
    let read = |file: &str| {
        fs::read(format!("/proc/{pid}/{file}")).map_err(|source| {
            // A process that ends while it is read gives ESRCH.
            let gone = source.kind() == io::ErrorKind::NotFound
                || source.raw_os_error() == Some(libc::ESRCH);
            if gone {
                UnknownClient::NoProcess(pid)
            } else {
                UnknownClient::Process { pid, source }
            }
        })
    };
    let cgroup = unified(&read("cgroup")?).ok_or(UnknownClient::NoCgroup2(pid))?;
    let name = format!("pid {pid} ({})", String::from_utf8_lossy(&read("comm")?).trim_end());
    Ok((name, cgroup))
}

/// The cgroup2 line of `/proc/PID/cgroup` (`cgroups(7)`); the others belong to version 1
/// hierarchies.
fn unified(table: &[u8]) -> Option<PathBuf> {
    let path = table.split(|&byte| byte == b'\n').find_map(|line| line.strip_prefix(b"0::"))?;
    // The kernel marks a cgroup that was removed while the process had not yet left it.
    let path = path.strip_suffix(b" (deleted)").unwrap_or(path);
    Some(OsStr::from_bytes(path).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_unified_line_is_found_in_a_hybrid_layout() {
        let hybrid = b"9:name=systemd:/x\n4:memory:/y\n0::/web/a\n";
        assert_eq!(unified(hybrid), Some("/web/a".into()));
        assert_eq!(unified(b"0::/web (deleted)\n"), Some("/web".into()));
        assert_eq!(unified(b"1:cpu:/\n"), None);
    }

    #[test]
    fn a_process_that_does_not_exist_is_said_to() {
        // The largest process id is 2^22.
        assert!(matches!(process(1 << 23), Err(UnknownClient::NoProcess(_))));
        let (name, _) = process(std::process::id()).expect("this process");
        assert!(name.starts_with(&format!("pid {} (", std::process::id())), "{name}");
    }

    #[test]
    fn this_process_is_below_the_mount_point() {
        let mounts = crate::check::mounts::Mounts::read().expect("procfs");
        let top = mounts.points("cgroup2").next().expect("cgroup2 is mounted");
        let client = ClientView::resolve(&std::process::id().to_string(), top, &[]).expect("found");
        assert!(client.inside, "{client:?}");
        let client =
            ClientView::resolve(&top.display().to_string(), top, &[top.to_owned()]).expect("found");
        assert!(client.inside && client.excluded, "{client:?}");
        for (from, words) in [("web", "neither"), ("/proc", "not a cgroup2"), ("/none", "No such")]
        {
            let error = ClientView::resolve(from, top, &[]).expect_err(from).to_string();
            assert!(error.contains(words), "{error}");
        }
    }
}
