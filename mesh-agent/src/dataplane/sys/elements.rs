//! Elements of hash maps whose layout is known only when they are read.

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd};

use aya_obj::generated::{bpf_attr, bpf_cmd};

use super::call::{arguments, bpf};

/// A hash map, with keys and values of so many bytes as the kernel says that it has.
#[derive(Clone, Copy, Debug)]
pub struct Elements<'m> {
    map: BorrowedFd<'m>,
    key: usize,
    value: usize,
}

impl<'m> Elements<'m> {
    /// The elements of a map that is of a kind without values of each processor.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn of(map: BorrowedFd<'m>) -> io::Result<Self> {
        let info = aya::maps::MapData::from_fd(map.try_clone_to_owned()?)
            .and_then(|data| data.info())
            .map_err(io::Error::other)?;
        if info.map_type().map_err(io::Error::other)? != aya::maps::MapType::Hash {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let bytes = |size: u32| usize::try_from(size).map_err(io::Error::other);
        Ok(Self { map, key: bytes(info.key_size())?, value: bytes(info.value_size())? })
    }

    /// Bytes of a key and of a value.
    #[must_use]
    pub fn sizes(&self) -> (usize, usize) {
        (self.key, self.value)
    }

    /// The key behind this one, or the first; nothing behind the last.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn next(&self, key: Option<&[u8]>) -> io::Result<Option<Vec<u8>>> {
        let mut next = vec![0; self.key];
        let mut attr = self.attr(key)?;
        attr.__bindgen_anon_2.__bindgen_anon_1.next_key = next.as_mut_ptr() as u64;
        // SAFETY: the command reads a key and writes another, of `self.key` bytes each.
        match unsafe { bpf(bpf_cmd::BPF_MAP_GET_NEXT_KEY, &mut attr) } {
            Ok(_) => Ok(Some(next)),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The value at a key; nothing when it is gone.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn get(&self, key: &[u8]) -> io::Result<Option<Vec<u8>>> {
        let mut value = vec![0; self.value];
        let mut attr = self.attr(Some(key))?;
        attr.__bindgen_anon_2.__bindgen_anon_1.value = value.as_mut_ptr() as u64;
        // SAFETY: the command reads a key of `self.key` bytes and writes a value of `self.value`.
        match unsafe { bpf(bpf_cmd::BPF_MAP_LOOKUP_ELEM, &mut attr) } {
            Ok(_) => Ok(Some(value)),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Sets the value at a key.
    ///
    /// # Errors
    ///
    /// What the kernel says: `E2BIG` when the map is full.
    pub fn set(&self, key: &[u8], value: &[u8]) -> io::Result<()> {
        if value.len() != self.value {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut attr = self.attr(Some(key))?;
        attr.__bindgen_anon_2.__bindgen_anon_1.value = value.as_ptr() as u64;
        // SAFETY: the command reads a key of `self.key` bytes and a value of `self.value`.
        unsafe { bpf(bpf_cmd::BPF_MAP_UPDATE_ELEM, &mut attr) }.map(drop)
    }

    fn attr(&self, key: Option<&[u8]>) -> io::Result<bpf_attr> {
        let mut attr = arguments();
        if key.is_some_and(|key| key.len() != self.key) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        attr.__bindgen_anon_2.map_fd =
            u32::try_from(self.map.as_raw_fd()).map_err(io::Error::other)?;
        attr.__bindgen_anon_2.key = key.map_or(0, |key| key.as_ptr() as u64);
        Ok(attr)
    }
}
