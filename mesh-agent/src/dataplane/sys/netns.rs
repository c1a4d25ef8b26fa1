//! The name by which the kernel programs know a network namespace: its cookie. `socket2` and
//! `rustix` have the option for a socket's own cookie only.

use std::io;
use std::os::fd::{AsFd, AsRawFd as _};

/// The cookie of the network namespace that a socket of any family was made in, as
/// `bpf_get_netns_cookie` gives it: never 0, and never used again (`SO_NETNS_COOKIE`, Linux 5.14).
///
/// # Errors
///
/// Those of getsockopt(2): `ENOPROTOOPT` from an older kernel, `ENOTSOCK`.
pub fn cookie(socket: &impl AsFd) -> io::Result<u64> {
    let mut cookie = 0u64;
    let mut len = libc::socklen_t::try_from(size_of::<u64>()).map_err(io::Error::other)?;
    // SAFETY: `cookie` is writable for the `len` bytes given with it, and `sk_getsockopt` writes no
    // more; both and the descriptor outlive the call.
    let result = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut len,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(cookie) }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::net::UnixDatagram;

    use super::*;

    #[test]
    fn of_sockets_only() {
        let (one, two) = UnixDatagram::pair().expect("sockets");
        let of_one = cookie(&one).expect("a cookie");
        assert_ne!(of_one, 0);
        assert_eq!(of_one, cookie(&two).expect("a cookie"), "both are in one namespace");
        let error = cookie(&File::open("/").expect("the root")).expect_err("no socket");
        assert_eq!(error.raw_os_error(), Some(libc::ENOTSOCK));
    }
}
