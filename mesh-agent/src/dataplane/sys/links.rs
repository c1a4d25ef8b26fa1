//! Links, which keep programs attached, and pins, which keep links, programs and maps.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use aya_obj::generated::{bpf_attr, bpf_cmd, bpf_link_info, bpf_link_type, bpf_prog_info};

use super::attached::Hook;
use super::call::{arguments, bpf, descriptor};

/// What the kernel says about a link.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Link {
    /// The program that it keeps attached.
    pub program: u32,
    /// The id of the cgroup; nothing when it is not on a cgroup, or that was removed.
    pub cgroup: Option<u64>,
}

/// Pins what a descriptor stands for: a program, a map, a link. It lives as long as the pin.
///
/// # Errors
///
/// `EEXIST`, `EPERM` when the directory is on no BPF file system, and others.
pub fn pin(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut attr = arguments();
    attr.__bindgen_anon_4.bpf_fd = number(object)?;
    attr.__bindgen_anon_4.pathname = path.as_ptr() as u64;
    // SAFETY: the command reads a string, which ends with zero and outlives the call.
    unsafe { bpf(bpf_cmd::BPF_OBJ_PIN, &mut attr) }.map(drop)
}

/// What is pinned there.
///
/// # Errors
///
/// `ENOENT`, `EACCES` when it is no pin, and others.
pub fn pinned(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut attr = arguments();
    attr.__bindgen_anon_4.pathname = path.as_ptr() as u64;
    // SAFETY: the command reads a string, which ends with zero and outlives the call, and gives a
    // descriptor.
    unsafe { descriptor(bpf_cmd::BPF_OBJ_GET, &mut attr) }
}

/// Attaches a program to a cgroup, beside those that are there.
///
/// # Errors
///
/// `EPERM` when a program above forbids more, `EBADF` when it is no cgroup2 directory, and others.
pub fn attach(program: BorrowedFd<'_>, hook: Hook, cgroup: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let mut attr = arguments();
    attr.link_create.__bindgen_anon_1.prog_fd = number(program)?;
    attr.link_create.__bindgen_anon_2.target_fd = number(cgroup)?;
    attr.link_create.attach_type = hook.attach_type() as u32;
    // SAFETY: the command reads integers only, and gives a descriptor.
    unsafe { descriptor(bpf_cmd::BPF_LINK_CREATE, &mut attr) }
}

/// Attaches a program to the tracepoint that it was loaded for.
///
/// # Errors
///
/// What the kernel says.
pub fn trace(program: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let mut attr = arguments();
    attr.raw_tracepoint.prog_fd = number(program)?;
    // SAFETY: a program that knows its tracepoint is given no name, so the command reads integers only; it
    // gives a descriptor.
    unsafe { descriptor(bpf_cmd::BPF_RAW_TRACEPOINT_OPEN, &mut attr) }
}

/// Has a link on a cgroup keep another program attached in place of its own: no moment is between the two.
///
/// # Errors
///
/// `ENOLINK` when the cgroup was removed, `EINVAL` for tracepoints, and others.
pub fn update(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = arguments();
    attr.link_update.link_fd = number(link)?;
    attr.link_update.__bindgen_anon_1.new_prog_fd = number(program)?;
    // SAFETY: the command reads integers only.
    unsafe { bpf(bpf_cmd::BPF_LINK_UPDATE, &mut attr) }.map(drop)
}

/// What the kernel says about a link, which must be one: of other objects it tells other things.
///
/// # Errors
///
/// What the kernel says.
pub fn look(link: BorrowedFd<'_>) -> io::Result<Link> {
    // SAFETY: a structure of plain integers, for which all zero is a value.
    let mut info = unsafe { std::mem::zeroed::<bpf_link_info>() };
    let mut attr: bpf_attr = arguments();
    attr.info.bpf_fd = number(link)?;
    attr.info.info = (&raw mut info) as u64;
    attr.info.info_len = u32::try_from(size_of::<bpf_link_info>()).map_err(io::Error::other)?;
    // SAFETY: the command writes at most as many bytes as `info` has, which outlives the call.
    unsafe { bpf(bpf_cmd::BPF_OBJ_GET_INFO_BY_FD, &mut attr) }?;
    let on_cgroup = info.type_ == bpf_link_type::BPF_LINK_TYPE_CGROUP as u32;
    // SAFETY: a union of integers, for which all that can be there is a value.
    let cgroup = unsafe { info.__bindgen_anon_1.cgroup.cgroup_id };
    Ok(Link { program: info.prog_id, cgroup: Some(cgroup).filter(|&id| on_cgroup && id != 0) })
}

/// The kernel's number for a program, which it must be: of other objects the kernel tells other things.
///
/// # Errors
///
/// What the kernel says.
pub fn program_id(program: BorrowedFd<'_>) -> io::Result<u32> {
    // SAFETY: a structure of plain integers, for which all zero is a value.
    let mut info = unsafe { std::mem::zeroed::<bpf_prog_info>() };
    let mut attr: bpf_attr = arguments();
    attr.info.bpf_fd = number(program)?;
    attr.info.info = (&raw mut info) as u64;
    attr.info.info_len = u32::try_from(size_of::<bpf_prog_info>()).map_err(io::Error::other)?;
    // SAFETY: the command writes at most as many bytes as `info` has, which outlives the call, and nothing
    // else, since all that it says where to write is zero.
    unsafe { bpf(bpf_cmd::BPF_OBJ_GET_INFO_BY_FD, &mut attr) }?;
    Ok(info.id)
}

fn number(fd: BorrowedFd<'_>) -> io::Result<u32> {
    u32::try_from(fd.as_raw_fd()).map_err(io::Error::other)
}
