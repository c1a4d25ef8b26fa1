//! Child processes: where they run, and how they end.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::Arc;

use super::{checked, mounts, netns};

/// Makes the command run inside a network namespace and, with the open `cgroup.procs` of a cgroup,
/// inside that cgroup. Both are entered before exec, because a socket belongs for good to the
/// cgroup in which it was made.
///
/// The child is killed when the *thread* that spawns it ends, so that nothing survives a crash:
/// spawn what lives long from a thread that lives longer.
pub fn confine(command: &mut Command, netns: &Arc<OwnedFd>, procs: Option<&Arc<File>>) {
    let netns = Arc::clone(netns);
    let procs = procs.map(Arc::clone);
    let parent = std::process::id();
    let enter = move || {
        if let Some(procs) = &procs {
            // "0" is the writing process.
            (&**procs).write_all(b"0")?;
        }
        netns::enter(&netns)?;
        die_with_parent(parent)
    };
    // SAFETY: between fork and exec the closure only writes, calls setns, prctl and getppid, which
    // are async-signal-safe; it neither allocates nor locks.
    unsafe { command.pre_exec(enter) };
}

/// Makes the command run inside a mount namespace, in its root directory.
pub fn enter_mounts(command: &mut Command, mounts: &Arc<OwnedFd>) {
    let mounts = Arc::clone(mounts);
    // SAFETY: between fork and exec the closure only calls setns, which is async-signal-safe.
    unsafe { command.pre_exec(move || mounts::enter(&mounts)) };
}

fn die_with_parent(parent: u32) -> io::Result<()> {
    // SAFETY: takes no pointers.
    checked(unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) })?;
    // SAFETY: cannot fail and takes nothing.
    let now = unsafe { libc::getppid() };
    // The parent may have ended before the request was made.
    if now.cast_unsigned() == parent {
        Ok(())
    } else {
        Err(io::Error::from_raw_os_error(libc::ESRCH))
    }
}

/// Sends a signal to a process that the caller has started and not yet reaped.
///
/// # Errors
///
/// Those of kill(2).
pub fn signal(pid: u32, signal: libc::c_int) -> io::Result<()> {
    let pid = pid.cast_signed();
    if pid <= 1 {
        // 0 and negative numbers address groups.
        return Err(io::Error::from_raw_os_error(libc::ESRCH));
    }
    // SAFETY: takes no pointers.
    checked(unsafe { libc::kill(pid, signal) }).map(drop)
}

/// Whether this process is root.
#[must_use]
pub fn is_root() -> bool {
    // SAFETY: cannot fail and takes nothing.
    unsafe { libc::geteuid() == 0 }
}
