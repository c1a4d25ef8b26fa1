//! Files that whoever started this process has left open in it.

use std::io;

/// Has nothing that this process executes inherit any file but the standard ones (close_range(2),
/// Linux 5.11).
///
/// # Errors
///
/// What the kernel says.
pub fn keep() -> io::Result<()> {
    const FIRST: libc::c_uint = 3;
    // SAFETY: it takes numbers, and closes nothing now: every descriptor stays its owner's.
    let result = unsafe {
        libc::syscall(libc::SYS_close_range, FIRST, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC)
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
