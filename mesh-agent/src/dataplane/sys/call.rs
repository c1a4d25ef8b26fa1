//! `bpf(2)` itself.

use std::io;
use std::os::fd::{FromRawFd as _, OwnedFd, RawFd};

use aya_obj::generated::{bpf_attr, bpf_cmd};

/// Arguments of which all are zero.
pub fn arguments() -> bpf_attr {
    // SAFETY: a union of structures of plain integers, for which all zero is a value.
    unsafe { std::mem::zeroed() }
}

/// A command of `bpf(2)`. Gives what it returns.
///
/// # Safety
///
/// What this command reads and writes besides `attr` is valid for as much as `attr` says, through the call.
///
/// # Errors
///
/// What the kernel says.
pub unsafe fn bpf(command: bpf_cmd, attr: &mut bpf_attr) -> io::Result<RawFd> {
    let size = size_of::<bpf_attr>();
    // SAFETY: `attr` is valid and writable for the length given with it; the rest is the caller's word.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command as libc::c_long, attr, size) };
    // Descriptors are of the size of an int.
    RawFd::try_from(result).ok().filter(|fd| *fd >= 0).ok_or_else(io::Error::last_os_error)
}

/// The same for a command that gives a new descriptor.
///
/// # Safety
///
/// As [`bpf`], and it is such a command.
pub unsafe fn descriptor(command: bpf_cmd, attr: &mut bpf_attr) -> io::Result<OwnedFd> {
    // SAFETY: the caller's word.
    let fd = unsafe { bpf(command, attr) }?;
    // SAFETY: the kernel has just made it, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
