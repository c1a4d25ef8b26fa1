//! Network namespaces without a name: they live as long as a descriptor or a process holds them.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::thread;

use super::checked;

/// Makes a network namespace: nothing in it but a loopback interface that is down.
///
/// # Errors
///
/// Those of unshare(2): `EPERM` without `CAP_SYS_ADMIN`.
pub fn create() -> io::Result<OwnedFd> {
    // A thread of its own, so that no other code of this process ever runs in the namespace.
    let maker = thread::spawn(|| {
        // SAFETY: changes only the calling thread, and takes no pointers.
        checked(unsafe { libc::unshare(libc::CLONE_NEWNET) })?;
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
