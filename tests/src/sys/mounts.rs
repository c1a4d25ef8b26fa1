//! Mount namespaces without a name, as [`super::netns`]: what is mounted in one is seen by nobody else,
//! and goes with it.
//!
//! Each has a BPF file system of its own at the usual place. A host that systemd booted has one mounted
//! there, which a new mount namespace inherits: without one of their own all tests would pin into the
//! same directory, on the host.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::thread;

use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};

use super::checked;

/// Where BPF file systems are mounted on every machine.
const BPF: &str = "/sys/fs/bpf";

/// Makes a mount namespace: what is mounted here is mounted there, until either changes, but for an empty
/// BPF file system at the usual place.
///
/// # Errors
///
/// Those of unshare(2) and mount(2): `EPERM` without `CAP_SYS_ADMIN`.
pub fn create() -> io::Result<OwnedFd> {
    // A thread of its own, so that no other code of this process ever runs in the namespace.
    let maker = thread::spawn(|| {
        // SAFETY: changes only the calling thread, and takes no pointers.
        checked(unsafe { libc::unshare(libc::CLONE_NEWNS) })?;
        let flags = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
        mount_change("/", flags)?;
        mount("bpf", BPF, "bpf", MountFlags::empty(), None)?;
        Ok(File::open("/proc/thread-self/ns/mnt")?.into())
    });
    maker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// Hides the BPF file system of the namespace: at the usual place is then what a host has there that has none
/// mounted.
///
/// # Errors
///
/// Those of [`inside`] and mount(2).
pub fn without_bpf(mounts: &OwnedFd) -> io::Result<()> {
    inside(mounts, || Ok(mount("sysfs", BPF, "sysfs", MountFlags::empty(), None)?))?
}

/// Runs `work` on a thread inside the namespace.
///
/// # Errors
///
/// Those of unshare(2) and setns(2).
pub fn inside<T: Send>(mounts: &OwnedFd, work: impl FnOnce() -> T + Send) -> io::Result<T> {
    thread::scope(|scope| {
        let worker = scope.spawn(|| {
            // Whoever shares its directory with others cannot enter.
            // SAFETY: changes only the calling thread, and takes no pointers.
            checked(unsafe { libc::unshare(libc::CLONE_FS) })?;
            enter(mounts)?;
            Ok(work())
        });
        worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Moves the calling thread into the namespace, and to its root directory. Async-signal-safe.
pub(super) fn enter(mounts: &impl AsFd) -> io::Result<()> {
    // SAFETY: the descriptor is open for the length of the call; only the calling thread changes.
    checked(unsafe { libc::setns(mounts.as_fd().as_raw_fd(), libc::CLONE_NEWNS) }).map(drop)
}
