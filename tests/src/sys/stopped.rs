//! A thread of another process, stopped for a moment without a signal that it could see.

use std::io;

use super::checked;

/// A stopped thread; dropped, it goes on. What it was doing in the kernel is ended before, and done again
/// after, as by a signal without a handler (`ERESTARTSYS`).
#[derive(Debug)]
pub struct Stopped(libc::pid_t);

impl Stopped {
    /// Stops a thread of a child of this one.
    ///
    /// # Errors
    ///
    /// Those of ptrace(2) and waitpid(2).
    pub fn new(thread: u32) -> io::Result<Self> {
        let id = thread.cast_signed();
        let none = std::ptr::null_mut::<libc::c_void>();
        // SAFETY: takes no pointers that it follows.
        if unsafe { libc::ptrace(libc::PTRACE_SEIZE, id, none, none) } < 0 {
            return Err(io::Error::last_os_error());
        }
        let stopped = Self(id);
        // SAFETY: the same.
        if unsafe { libc::ptrace(libc::PTRACE_INTERRUPT, id, none, none) } < 0 {
            return Err(io::Error::last_os_error());
        }
        let mut status = 0;
        // SAFETY: the status outlives the call.
        checked(unsafe { libc::waitpid(id, &raw mut status, libc::__WALL) })?;
        if libc::WIFSTOPPED(status) { Ok(stopped) } else { Err(io::ErrorKind::NotFound.into()) }
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        let none = std::ptr::null_mut::<libc::c_void>();
        // SAFETY: takes no pointers that it follows. Fails for a thread that is gone.
        unsafe { libc::ptrace(libc::PTRACE_DETACH, self.0, none, none) };
    }
}
