//! What is mounted where (`/proc/self/mountinfo`, see `proc_pid_mountinfo(5)`).

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Component, Path, PathBuf};
use std::{fs, io};

/// The mounts that this process sees.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Mounts(Vec<Mount>);

/// A mount.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Mount {
    /// The directory of the file system that is mounted; for cgroup2 a path in the hierarchy.
    pub root: PathBuf,
    /// Where it is mounted.
    pub point: PathBuf,
    /// Kind of file system.
    pub kind: String,
}

// === impl Mounts ===

impl Mounts {
    /// Reads the table of this process.
    ///
    /// # Errors
    ///
    /// When procfs is not mounted.
    pub fn read() -> io::Result<Self> {
        Ok(Self::parse(&fs::read("/proc/thread-self/mountinfo")?))
    }

    /// Lines that do not have the documented form are left out.
    fn parse(table: &[u8]) -> Self {
        Self(table.split(|&byte| byte == b'\n').filter_map(Mount::parse).collect())
    }

    /// Where file systems of this kind are mounted.
    pub fn points(&self, kind: &str) -> impl Iterator<Item = &Path> {
        self.0.iter().filter(move |mount| mount.kind == kind).map(|mount| mount.point.as_path())
    }

    /// Those of this kind.
    pub(super) fn all(&self, kind: &str) -> impl Iterator<Item = &Mount> {
        self.0.iter().filter(move |mount| mount.kind == kind)
    }

    /// The mount that holds `path`, which must be canonical. Of two at the same place the later
    /// hides the earlier.
    #[must_use]
    pub fn holding(&self, path: &Path) -> Option<&Mount> {
        self.0
            .iter()
            .filter(|mount| path.starts_with(&mount.point))
            // The last of equal maxima wins, which is the later one in the table.
            .max_by_key(|mount| mount.point.components().count())
    }
}

// === impl Mount ===

impl Mount {
    fn parse(line: &[u8]) -> Option<Self> {
        let mut fields = line.split(|&byte| byte == b' ');
        let root = path(fields.nth(3)?);
        let point = path(fields.next()?);
        // Optional fields end with a single hyphen; what follows is the kind.
        fields.find(|field| *field == b"-")?;
        let kind = String::from_utf8_lossy(fields.next()?).into_owned();
        Some(Self { root, point, kind })
    }

    /// The path of `path` in the mounted file system: for a cgroup directory its place in the
    /// hierarchy, as `/proc/PID/cgroup` names it. Nothing when the mount does not hold it.
    #[must_use]
    pub fn inside(&self, path: &Path) -> Option<PathBuf> {
        // Joining an empty remainder would leave a trailing slash, hence the collection.
        let rest = path.strip_prefix(&self.point).ok()?;
        Some(self.root.components().chain(rest.components()).collect())
    }

    /// Where a path of the mounted file system is to be found: the inverse of [`Mount::inside`].
    #[must_use]
    pub fn outside(&self, path: &Path) -> Option<PathBuf> {
        if path.components().any(|part| part == Component::ParentDir) {
            return None;
        }
        let rest = path.strip_prefix(&self.root).ok()?;
        Some(self.point.components().chain(rest.components()).collect())
    }
}

/// Undoes the escapes of space, tab, newline and backslash (`\040` and so on).
fn path(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, tail)) = rest.split_first() {
        let escaped = (byte == b'\\')
            .then(|| tail.get(..3).and_then(|code| std::str::from_utf8(code).ok()))
            .flatten()
            .and_then(|code| u8::from_str_radix(code, 8).ok());
        if let Some(escaped) = escaped {
            bytes.push(escaped);
            rest = &tail[3..];
        } else {
            bytes.push(byte);
            rest = tail;
        }
    }
    OsString::from_vec(bytes).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &[u8] = b"\
23 1 0:20 / / rw - ext4 /dev/vda rw
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
41 31 0:38 /pod\\0401 /sys/fs/cgroup/unified rw shared:9 master:1 - cgroup2 cgroup2 rw
";

    #[test]
    fn the_innermost_mount_holds_a_path() {
        let mounts = Mounts::parse(TABLE);
        assert_eq!(
            mounts.points("cgroup2").collect::<Vec<_>>(),
            [Path::new("/sys/fs/cgroup/unified")]
        );
        let kind = |path| mounts.holding(Path::new(path)).map(|mount| mount.kind.as_str());
        assert_eq!(kind("/sys/fs/cgroup/unified/a/b"), Some("cgroup2"));
        assert_eq!(kind("/sys/fs/cgroup/unifiedly"), Some("tmpfs"));
        assert_eq!(kind("/tmp"), Some("ext4"));
    }

    #[test]
    fn paths_inside_and_outside() {
        let mounts = Mounts::parse(TABLE);
        let directory = Path::new("/sys/fs/cgroup/unified/a/b");
        let mount = mounts.holding(directory).expect("mounted");
        assert_eq!(mount.inside(directory), Some("/pod 1/a/b".into()));
        assert_eq!(mount.inside(&mount.point), Some("/pod 1".into()));
        assert_eq!(mount.outside(Path::new("/pod 1/a/b")), Some(directory.into()));
        assert_eq!(mount.outside(Path::new("/pod 2")), None);
        assert_eq!(mount.outside(Path::new("/../pod 1")), None);
    }

    #[test]
    fn garbage_is_left_out() {
        assert_eq!(Mounts::parse(b"\n1 2 3\n\\9 \\0 a b c d e\n"), Mounts::default());
    }
}
