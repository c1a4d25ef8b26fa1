//! Processes that share the descriptors of this one, which std's `Command` never makes: it always
//! executes a program, and what is opened by std closes then.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Duration;

use super::checked;

/// A child that has a copy of every descriptor, and ends by itself.
#[derive(Debug)]
#[must_use = "it stays a zombie until it is waited for"]
pub struct Copy(libc::pid_t);

/// Makes a child that closes its copy of `first`, if any, sleeps, and ends: with it the last copies
/// of what this process has closed meanwhile.
///
/// # Errors
///
/// Those of fork(2).
pub fn copy_for(lifetime: Duration, first: Option<BorrowedFd<'_>>) -> io::Result<Copy> {
    let sleep = libc::timespec {
        tv_sec: libc::time_t::try_from(lifetime.as_secs()).unwrap_or_default(),
        tv_nsec: lifetime.subsec_nanos().into(),
    };
    let first = first.map(|fd| fd.as_raw_fd());
    // SAFETY: other threads exist, so the child may only call what is async-signal-safe, and does:
    // close, nanosleep, _exit.
    let pid = checked(unsafe { libc::fork() })?;
    if pid == 0 {
        if let Some(fd) = first {
            // SAFETY: the child's own copy, which nothing in it uses again.
            unsafe { libc::close(fd) };
        }
        // SAFETY: a whole timespec that outlives the call; the rest of the time is not asked for.
        unsafe { libc::nanosleep(&raw const sleep, std::ptr::null_mut()) };
        // SAFETY: ends this process without running anything of it.
        unsafe { libc::_exit(0) };
    }
    Ok(Copy(pid))
}

impl Copy {
    /// Waits for its end.
    ///
    /// # Errors
    ///
    /// Those of waitpid(2).
    pub fn wait(self) -> io::Result<()> {
        // SAFETY: a child of this process that nobody else waits for; the status is not asked for.
        checked(unsafe { libc::waitpid(self.0, std::ptr::null_mut(), 0) }).map(drop)
    }
}
