//! Arrays that are shared with the kernel programs by mapping (`BPF_F_MMAPABLE`, Linux 5.5).

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::atomic::{Ordering, fence};

use mesh_common::{Backend, BackendStats, Flow, Name, Service, ServiceStats, Settings, Slot, Word};

/// A record of a mapped array.
///
/// # Safety
///
/// Every bit pattern is a value; the size is a multiple of 8, so that records lie in the array as
/// they do in a slice (the kernel pads each to 8); the alignment is at most 8. What the kernel
/// programs write while the agent reads is a [`mesh_common::Word`].
pub unsafe trait Flat {}

// SAFETY: `repr(C)` of integers and words; sizes are asserted below and in `mesh_common::layout`.
unsafe impl Flat for Service {}
// SAFETY: as above; the kernel programs do not write it.
unsafe impl Flat for Slot {}
// SAFETY: as above; the kernel programs do not write it.
unsafe impl Flat for Backend {}
// SAFETY: as above; the kernel programs write only its words.
unsafe impl Flat for BackendStats {}
// SAFETY: as above.
unsafe impl Flat for ServiceStats {}
// SAFETY: bytes only; the kernel programs do not write it.
unsafe impl Flat for Name {}
// SAFETY: words only. It is a `mesh_common::Flow`, which the kernel programs write whole, and of
// which the agent sees nothing but words.
unsafe impl Flat for [Word; size_of::<Flow>() / 8] {}
// SAFETY: as above.
unsafe impl Flat for Settings {}
// SAFETY: one word.
unsafe impl Flat for Word {}

/// A mapped array of `T`, or several that lie one behind the other.
///
/// One owner in the agent writes it (`&mut self`). The kernel programs read at any time, so the
/// caller writes only records that no program can be reading, besides the words in them.
#[derive(Debug)]
pub struct Mapped<T> {
    records: NonNull<T>,
    /// How many are mapped.
    len: u32,
    /// For how many bytes there is address space.
    reserved: usize,
}

// SAFETY: it is plain memory that belongs to this value; shared access only reads, or goes through
// words, which are atomic.
unsafe impl<T: Flat + Send> Send for Mapped<T> {}
// SAFETY: as above.
unsafe impl<T: Flat + Sync> Sync for Mapped<T> {}

impl<T: Flat> Mapped<T> {
    const RECORD: usize = {
        assert!(size_of::<T>().is_multiple_of(8) && align_of::<T>() <= 8);
        size_of::<T>()
    };

    /// Maps an array of `len` records. The caller has compared the map's value size and number of
    /// entries with these; the kernel refuses to map more than there is.
    ///
    /// # Errors
    ///
    /// What `mmap(2)` says: `EINVAL` when the map was made without `BPF_F_MMAPABLE`.
    pub fn new(map: BorrowedFd<'_>, len: u32) -> io::Result<Self> {
        let mut mapped = Self::reserve(len)?;
        mapped.append(map, len)?;
        Ok(mapped)
    }

    /// Address space for arrays of so many records together, of which none is there yet.
    ///
    /// # Errors
    ///
    /// What `mmap(2)` says.
    pub fn reserve(len: u32) -> io::Result<Self> {
        let reserved = Self::RECORD * len as usize;
        // SAFETY: a new mapping that nobody can read or write; nothing else is touched.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                reserved,
                libc::PROT_NONE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let records = NonNull::new(address.cast()).ok_or_else(io::Error::last_os_error)?;
        Ok(Self { records, len: 0, reserved })
    }

    /// Maps an array of `len` records behind those that are there. Its records are whole pages, unless
    /// it is the last; otherwise as for [`Mapped::new`].
    ///
    /// # Errors
    ///
    /// `EINVAL` when it does not fit into what was reserved, and what `mmap(2)` says.
    pub fn append(&mut self, map: BorrowedFd<'_>, len: u32) -> io::Result<()> {
        let (offset, bytes) = (Self::RECORD * self.len as usize, Self::RECORD * len as usize);
        if offset.checked_add(bytes).is_none_or(|end| end > self.reserved) {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        // SAFETY: inside the reserved range (checked above).
        let place = unsafe { self.records.byte_add(offset) };
        // SAFETY: it replaces pages of this value's own reservation, to which no reference exists:
        // they lie beyond `len`. Should the kernel round up to pages, what follows is reserved, too.
        let address = unsafe {
            libc::mmap(
                place.as_ptr().cast(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_FIXED,
                map.as_raw_fd(),
                0,
            )
        };
        if address == libc::MAP_FAILED {
            let error = io::Error::last_os_error();
            // The kernel may have taken the pages away before it failed. What lies there from now on may
            // be another's, so it is never touched again, and left when the rest is unmapped.
            self.reserved = offset;
            return Err(error);
        }
        self.len += len;
        Ok(())
    }

    /// For how many records there is address space.
    pub fn reserved(&self) -> u32 {
        u32::try_from(self.reserved / Self::RECORD).unwrap_or(u32::MAX)
    }

    /// Number of records that are mapped.
    pub fn capacity(&self) -> u32 {
        self.len
    }

    /// A record; nothing when there is none of that index.
    pub fn get(&self, index: u32) -> Option<&T> {
        if index >= self.len {
            return None;
        }
        // SAFETY: inside the mapping.
        let record = unsafe { self.records.add(index as usize) };
        // SAFETY: aligned, and a valid `T` whatever its bytes (`Flat`). Only this value's owner
        // writes what is not a word, and holds `&mut self` meanwhile.
        Some(unsafe { record.as_ref() })
    }

    /// Writes records from `base` on. Whoever sees what is published afterwards sees them.
    ///
    /// # Errors
    ///
    /// `EINVAL` when they do not fit into the array.
    pub fn write(&mut self, base: u32, records: &[T]) -> io::Result<()> {
        let fits =
            (base as usize).checked_add(records.len()).is_some_and(|end| end <= self.len as usize);
        if !fits {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        // SAFETY: the range lies inside the mapping (checked above).
        let target = unsafe { self.records.add(base as usize) };
        // SAFETY: source and target are valid for that many records and do not overlap: the source
        // is not in the mapping, of which no `&T` exists while `&mut self` is held.
        unsafe { std::ptr::copy_nonoverlapping(records.as_ptr(), target.as_ptr(), records.len()) };
        // Orders these stores before the one that publishes them, also when that is a system call.
        fence(Ordering::Release);
        Ok(())
    }
}

impl<T> Drop for Mapped<T> {
    fn drop(&mut self) {
        // SAFETY: made by `reserve` with this address and length; nothing borrows from it any more.
        unsafe { libc::munmap(self.records.as_ptr().cast(), self.reserved) };
    }
}
