//! Several elements of an array of maps at once (`BPF_MAP_UPDATE_BATCH`, for maps of maps Linux 5.19): the
//! kernel waits for all running programs after each call, and only before Linux 6.8 after each element.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use aya_obj::generated::bpf_cmd;

use super::call::{arguments, bpf};

/// Makes `inner` the elements of `outer` from `first` on. After an error some of them may be.
///
/// # Errors
///
/// What `bpf(2)` says: `E2BIG` beyond the array's end, `EINVAL` when a map is not like the others in it.
pub fn set_maps(outer: BorrowedFd<'_>, first: u32, inner: &[BorrowedFd<'_>]) -> io::Result<()> {
    let count = u32::try_from(inner.len()).map_err(io::Error::other)?;
    let end = first.checked_add(count).ok_or(io::ErrorKind::InvalidInput)?;
    let keys: Vec<u32> = (first..end).collect();
    let values: Vec<i32> = inner.iter().map(AsRawFd::as_raw_fd).collect();
    let mut attr = arguments();
    attr.batch.map_fd = u32::try_from(outer.as_raw_fd()).map_err(io::Error::other)?;
    attr.batch.keys = keys.as_ptr() as u64;
    attr.batch.values = values.as_ptr() as u64;
    attr.batch.count = count;
    // SAFETY: for this command the kernel (`generic_map_update_batch`) reads `count` keys and values of 4
    // bytes each, which is what both vectors hold; they and the descriptors outlive the call.
    unsafe { bpf(bpf_cmd::BPF_MAP_UPDATE_BATCH, &mut attr) }.map(drop)
}
