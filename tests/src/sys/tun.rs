//! Network devices whose packets a program reads and writes (tun).

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use super::{checked, netns};

/// Makes a device of this name in a network namespace; it goes with the descriptor. Each read is an IP
/// packet that is sent to it, each write one that comes in.
///
/// # Errors
///
/// There is no `/dev/net/tun`, or those of its ioctl.
pub fn create(netns: &OwnedFd, name: &str) -> io::Result<File> {
    netns::inside(netns, || {
        let file = File::options().read(true).write(true).open("/dev/net/tun")?;
        // SAFETY: `ifreq` is plain data, for which zeroes are a value.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        let room = request.ifr_name.len() - 1;
        for (to, from) in request.ifr_name[..room].iter_mut().zip(name.bytes()) {
            *to = from.cast_signed();
        }
        let flags = libc::c_short::try_from(libc::IFF_TUN | libc::IFF_NO_PI);
        request.ifr_ifru.ifru_flags = flags.map_err(io::Error::other)?;
        // SAFETY: TUNSETIFF reads and writes an `ifreq`, which outlives the call.
        checked(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF as _, &raw mut request) })?;
        Ok(file)
    })?
}
