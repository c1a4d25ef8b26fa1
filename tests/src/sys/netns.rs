//! Network namespaces without a name: they live as long as a descriptor or a process holds them.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::thread;

use super::checked;

/// What a new namespace takes over from the host (`devinet_init_net`, `addrconf_init_net`), and what the
/// tests expect.
const SETTINGS: [(&str, &str); 7] = [
    ("ipv6/conf/all/disable_ipv6", "0"),
    ("ipv6/conf/default/disable_ipv6", "0"),
    ("ipv6/conf/lo/disable_ipv6", "0"),
    ("ipv4/ip_forward", "0"),
    ("ipv4/conf/all/rp_filter", "0"),
    ("ipv4/conf/default/rp_filter", "0"),
    ("ipv4/conf/all/route_localnet", "0"),
];

/// Makes a network namespace: nothing in it but a loopback interface that is down.
///
/// # Errors
///
/// Those of unshare(2): `EPERM` without `CAP_SYS_ADMIN`. Those of changing a setting that the host has
/// otherwise than the tests expect: `ENOENT` where the kernel runs without IPv6.
pub fn create() -> io::Result<OwnedFd> {
    // A thread of its own, so that no other code of this process ever runs in the namespace.
    let maker = thread::spawn(|| {
        // SAFETY: changes only the calling thread, and takes no pointers.
        checked(unsafe { libc::unshare(libc::CLONE_NEWNET) })?;
        for (name, wanted) in SETTINGS {
            // Of the thread that looks.
            let path = Path::new("/proc/sys/net").join(name);
            let failed = |error: io::Error| {
                io::Error::new(error.kind(), format!("{}: {error}", path.display()))
            };
            if fs::read_to_string(&path).map_err(failed)?.trim() != wanted {
                fs::write(&path, wanted).map_err(failed)?;
            }
        }
        Ok(File::open("/proc/thread-self/ns/net")?.into())
    });
    maker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// Runs `work` on a thread inside the namespace. The thread stays in the cgroup of this process.
///
/// # Errors
///
/// Those of setns(2).
pub fn inside<T: Send>(netns: &OwnedFd, work: impl FnOnce() -> T + Send) -> io::Result<T> {
    thread::scope(|scope| {
        let worker = scope.spawn(|| {
            enter(netns)?;
            Ok(work())
        });
        worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Moves the calling thread into the namespace. Async-signal-safe.
pub(super) fn enter(netns: &impl AsFd) -> io::Result<()> {
    // SAFETY: the descriptor is open for the length of the call; only the calling thread changes.
    checked(unsafe { libc::setns(netns.as_fd().as_raw_fd(), libc::CLONE_NEWNET) }).map(drop)
}
