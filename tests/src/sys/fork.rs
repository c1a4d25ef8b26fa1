//! Processes that execute no program, which std's `Command` never makes: they share the descriptors of
//! this one, and are made in a moment.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use super::checked;

/// Runs `work` in a process of its own, in this cgroup from its first moment on if one is given, and
/// waits for its end: what `work` said.
///
/// Only a process without other threads may do that: then nobody can hold a lock that the child, in
/// which there is only a copy of the calling thread, would wait for.
///
/// # Errors
///
/// Those of clone3(2) and waitpid(2); `EBUSY` when there are other threads, and `ECHILD` when something
/// has ended the child before it was done.
pub fn run(cgroup: Option<BorrowedFd<'_>>, work: impl FnOnce() -> u8) -> io::Result<u8> {
    const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000; // linux/sched.h
    if std::fs::read_dir("/proc/self/task")?.count() != 1 {
        return Err(io::Error::from_raw_os_error(libc::EBUSY));
    }
    // SAFETY: plain integers, for all of which zero is a value.
    let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
    arguments.exit_signal = u64::from(libc::SIGCHLD.cast_unsigned());
    if let Some(cgroup) = cgroup {
        arguments.flags = CLONE_INTO_CGROUP;
        arguments.cgroup = u64::from(cgroup.as_raw_fd().cast_unsigned());
    }
    let size = size_of::<libc::clone_args>();
    // SAFETY: the arguments are whole, of the size given, and live through the call. Without CLONE_VM the
    // child has a copy of this process' memory, and of its threads there are none but this one.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw const arguments, size) };
    if pid == 0 {
        // Without unwinding into what the parent goes on with.
        let Ok(said) = catch_unwind(AssertUnwindSafe(work)) else { std::process::abort() };
        // SAFETY: ends the child without running anything of the parent's.
        unsafe { libc::_exit(said.into()) };
    }
    let pid = checked(libc::c_int::try_from(pid).unwrap_or(-1))?;
    let mut status = 0;
    // SAFETY: a child of this process that nobody else waits for; the status is written to an integer.
    checked(unsafe { libc::waitpid(pid, &raw mut status, 0) })?;
    let said = libc::WIFEXITED(status).then(|| libc::WEXITSTATUS(status));
    said.and_then(|said| u8::try_from(said).ok())
        .ok_or_else(|| io::Error::from_raw_os_error(libc::ECHILD))
}

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
