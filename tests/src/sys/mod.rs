//! System calls that neither the standard library nor `socket2` offers: all the unsafe code of this
//! crate.
#![expect(
    unsafe_code,
    reason = "raw system calls: namespaces, pre_exec, fork, io_uring, bpf(2); each with its argument"
)]

pub mod bpf;
pub mod fork;
pub mod mounts;
pub mod netns;
pub mod process;
pub mod socket;
pub mod stopped;
pub mod tun;

use std::io;

/// The result of a system call that answers -1 and `errno` on failure.
fn checked(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}
