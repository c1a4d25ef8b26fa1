//! How much memory this process may use, and how much its first start takes: the kernel's verifier works for it, so
//! what that takes counts for its cgroup. (What is at rest afterwards is much less.)

use std::path::{Path, PathBuf};
use std::{fmt, fs};

use super::Check;
use super::mounts::Mounts;

/// What a first start takes when programs are verified one at a time: 51 MiB were measured on Linux 6.18
/// (`cargo xtask test --test memory -- --no-capture`). Of that, what is needed is the verifier's and the kernel's
/// types, and the rest are pages of files. Other kernels' verifiers may remember more.
pub const NEEDED: u64 = 80 << 20;

/// From here on several are verified at a time: with two, 63 MiB were measured there.
pub const AMPLE: u64 = 192 << 20;

/// Where a limit is raised.
pub(super) const ADVICE: &str =
    "raise it (`MemoryMax=` and `MemoryHigh=` of the unit, or the container's memory limit)";

/// The narrowest limit, of this process's cgroup or of one above.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Limit {
    /// In bytes.
    pub bytes: u64,
    /// The file that says so.
    pub file: PathBuf,
}

/// The hierarchies that can limit memory: the controller in /proc/self/cgroup (cgroups(7)), the kind of file
/// system, and the files.
const HIERARCHIES: [(&str, &str, &[&str]); 2] = [
    ("", "cgroup2", &["memory.max", "memory.high"]),
    ("memory", "cgroup", &["memory.limit_in_bytes"]),
];

/// The narrowest limit of this process, if there is any.
#[must_use]
pub fn limit() -> Option<Limit> {
    let (mounts, own) = (Mounts::read().ok()?, fs::read_to_string("/proc/self/cgroup").ok()?);
    let all = HIERARCHIES.iter().filter_map(|(controller, kind, files)| {
        let place = place(&own, controller)?;
        mounts
            .all(kind)
            .filter_map(|mount| narrowest(&mount.outside(place)?, &mount.point, files))
            .min_by_key(|limit| limit.bytes)
    });
    all.min_by_key(|limit| limit.bytes)
}

/// Where a process is in the hierarchy of a controller, by its /proc/PID/cgroup.
fn place<'t>(table: &'t str, controller: &str) -> Option<&'t Path> {
    table.lines().find_map(|line| {
        let (controllers, place) = line.split_once(':')?.1.split_once(':')?;
        controllers.split(',').any(|one| one == controller).then(|| Path::new(place))
    })
}

/// Of a cgroup and those above it, as far as they are mounted.
fn narrowest(cgroup: &Path, top: &Path, files: &[&str]) -> Option<Limit> {
    let above = cgroup.ancestors().take_while(|directory| directory.starts_with(top));
    let limits = above.flat_map(|directory| files.iter().map(|file| directory.join(file)));
    let limits = limits.filter_map(|file| {
        let bytes = bytes(&fs::read_to_string(&file).ok()?)?;
        Some(Limit { bytes, file })
    });
    limits.min_by_key(|limit| limit.bytes)
}

/// What such a file says: nothing when there is no limit, which the older ones write as the largest number of pages.
fn bytes(text: &str) -> Option<u64> {
    text.trim().parse().ok().filter(|&bytes: &u64| bytes < 1 << 62)
}

pub(super) fn check() -> Check {
    const NAME: &str = "memory";
    let needed = NEEDED >> 20;
    match limit() {
        None => {
            Check::good(NAME, format!("no limit; a first start takes up to {} MiB", AMPLE >> 20))
        }
        Some(limit) if limit.is_enough() => Check::good(NAME, limit.to_string()),
        Some(limit) => {
            let detail = format!(
                "{limit}; a first start takes about {needed} MiB, and is killed when there is less"
            );
            // Its programs may be there already.
            Check::bad(NAME, detail, ADVICE).optional()
        }
    }
}

// === impl Limit ===

impl Limit {
    /// Whether a first start fits.
    #[must_use]
    pub const fn is_enough(&self) -> bool {
        self.bytes >= NEEDED
    }

    /// What is said before a start that may not fit.
    #[must_use]
    pub fn warning(&self) -> String {
        format!(
            "{self}, and loading the kernel programs takes about {} MiB; if this process is killed now, {ADVICE}",
            NEEDED >> 20
        )
    }

    /// What to do when it did not.
    #[must_use]
    pub fn advice(&self) -> String {
        format!("{self}, and a first start takes about {} MiB: {ADVICE}", NEEDED >> 20)
    }
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} allows {} MiB", self.file.display(), self.bytes >> 20)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_in_each_hierarchy() {
        let hybrid = "9:name=systemd:/x\n4:memory:/a/b:c\n1:cpu,cpuacct:/y\n0::/\n";
        assert_eq!(place(hybrid, "memory"), Some(Path::new("/a/b:c")));
        assert_eq!(place(hybrid, ""), Some(Path::new("/")));
        assert_eq!(place(hybrid, "cpuacct"), Some(Path::new("/y")));
        let unified = "0::/system.slice/mesh-agent.service\n";
        assert_eq!(place(unified, ""), Some(Path::new("/system.slice/mesh-agent.service")));
        assert_eq!(place(unified, "memory"), None);
        assert_eq!(place("garbage\n\n", ""), None);
    }

    #[test]
    fn limits_as_the_kernel_writes_them() {
        assert_eq!(bytes("67108864\n"), Some(64 << 20));
        assert_eq!(bytes("max\n"), None);
        assert_eq!(bytes("9223372036854771712\n"), None, "none, in the older hierarchy");
        assert_eq!(bytes(""), None);
    }

    /// The one that is reached first may be above, or the softer one.
    #[test]
    fn the_narrowest_counts() {
        let top = tempfile::tempdir().expect("a directory");
        let own = top.path().join("slice/unit");
        fs::create_dir_all(&own).expect("made");
        let files = HIERARCHIES[0].2;
        let narrowest = || narrowest(&own, top.path(), files);
        assert_eq!(narrowest(), None);
        let write =
            |place: &str, text: &str| fs::write(top.path().join(place), text).expect("written");
        write("slice/unit/memory.max", "max\n");
        write("slice/memory.max", "1000\n");
        assert_eq!(narrowest().map(|limit| limit.bytes), Some(1_000));
        write("slice/unit/memory.high", "900\n");
        let limit = narrowest().expect("a limit");
        assert_eq!((limit.bytes, limit.file.as_path()), (900, own.join("memory.high").as_path()));
        assert!(!limit.is_enough() && limit.warning().contains("memory.high"), "{limit}");
    }
}
