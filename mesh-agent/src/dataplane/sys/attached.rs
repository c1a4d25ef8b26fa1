//! Which programs are attached to a cgroup, ours and others' (`BPF_PROG_QUERY`).

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;
use std::path::Path;

use aya_obj::generated::{bpf_attach_type, bpf_cmd};

use super::call::{arguments, bpf};

/// A hook on sockets and their addresses, at which two balancers can meet.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Hook {
    /// `connect()` of an IPv4 socket.
    Connect4,
    /// `connect()` of an IPv6 socket.
    Connect6,
    /// `getpeername()` of an IPv4 socket.
    GetPeerName4,
    /// `getpeername()` of an IPv6 socket.
    GetPeerName6,
    /// `sendto()`, `sendmsg()` of an IPv4 datagram socket.
    SendMsg4,
    /// `sendto()`, `sendmsg()` of an IPv6 datagram socket.
    SendMsg6,
    /// `recvfrom()`, `recvmsg()` of an IPv4 datagram socket.
    RecvMsg4,
    /// `recvfrom()`, `recvmsg()` of an IPv6 datagram socket.
    RecvMsg6,
    /// The last close of a socket.
    SockRelease,
}

impl Hook {
    /// All of them.
    pub const ALL: [Self; 9] = [
        Self::Connect4,
        Self::Connect6,
        Self::GetPeerName4,
        Self::GetPeerName6,
        Self::SendMsg4,
        Self::SendMsg6,
        Self::RecvMsg4,
        Self::RecvMsg6,
        Self::SockRelease,
    ];

    /// The name in tables and messages.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Connect4 => "connect4",
            Self::Connect6 => "connect6",
            Self::GetPeerName4 => "getpeername4",
            Self::GetPeerName6 => "getpeername6",
            Self::SendMsg4 => "sendmsg4",
            Self::SendMsg6 => "sendmsg6",
            Self::RecvMsg4 => "recvmsg4",
            Self::RecvMsg6 => "recvmsg6",
            Self::SockRelease => "sock_release",
        }
    }

    pub(super) const fn attach_type(self) -> bpf_attach_type {
        match self {
            Self::Connect4 => bpf_attach_type::BPF_CGROUP_INET4_CONNECT,
            Self::Connect6 => bpf_attach_type::BPF_CGROUP_INET6_CONNECT,
            Self::GetPeerName4 => bpf_attach_type::BPF_CGROUP_INET4_GETPEERNAME,
            Self::GetPeerName6 => bpf_attach_type::BPF_CGROUP_INET6_GETPEERNAME,
            Self::SendMsg4 => bpf_attach_type::BPF_CGROUP_UDP4_SENDMSG,
            Self::SendMsg6 => bpf_attach_type::BPF_CGROUP_UDP6_SENDMSG,
            Self::RecvMsg4 => bpf_attach_type::BPF_CGROUP_UDP4_RECVMSG,
            Self::RecvMsg6 => bpf_attach_type::BPF_CGROUP_UDP6_RECVMSG,
            Self::SockRelease => bpf_attach_type::BPF_CGROUP_INET_SOCK_RELEASE,
        }
    }
}

/// How many programs one hook of one cgroup can have (`BPF_CGROUP_MAX_PROGS` of
/// `kernel/bpf/cgroup.c`), so one call always sees all.
const MAX_PROGRAMS: u32 = 64;

/// The ids of the programs attached to this very cgroup (not to its ancestors) at `hook`, in the
/// order in which they run.
///
/// # Errors
///
/// What opening the directory or `bpf(2)` says: `EPERM` without `CAP_NET_ADMIN`, `EBADF` when
/// `cgroup` is no cgroup2 directory, `EINVAL` when the kernel does not know the hook.
pub fn program_ids(cgroup: &Path, hook: Hook) -> io::Result<Vec<u32>> {
    let directory = File::open(cgroup)?;
    let mut ids = [0u32; MAX_PROGRAMS as usize];
    let mut attr = arguments();
    attr.query.__bindgen_anon_1.target_fd =
        u32::try_from(directory.as_raw_fd()).map_err(io::Error::other)?;
    attr.query.attach_type = hook.attach_type() as u32;
    attr.query.prog_ids = ids.as_mut_ptr() as u64;
    attr.query.__bindgen_anon_2.prog_cnt = MAX_PROGRAMS;
    // SAFETY: for this command the kernel (`cgroup_bpf_query`) writes at most `prog_cnt` 32-bit words to
    // `prog_ids`, which is the length of `ids`; it and the descriptor outlive the call.
    unsafe { bpf(bpf_cmd::BPF_PROG_QUERY, &mut attr) }?;
    // SAFETY: `query` is the member that was filled in, and holds integers only.
    let query = unsafe { attr.query };
    // SAFETY: both members of this union are the same integer under two names.
    let count = unsafe { query.__bindgen_anon_2.prog_cnt };
    Ok(ids.into_iter().take(count as usize).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_that_is_no_cgroup_is_an_error() {
        let directory = tempfile::tempdir().expect("temporary directory");
        for hook in Hook::ALL {
            assert!(program_ids(directory.path(), hook).is_err(), "{}", hook.name());
        }
    }
}
