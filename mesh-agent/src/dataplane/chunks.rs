//! Flat arrays that grow: chunks of one size in an array of maps ([`mesh_common::chunk`]), mapped one behind
//! the other, so that the agent sees one array.
//!
//! A chunk is there before anything names a record in it, and stays while the programs are loaded.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};

use aya::maps::{ArrayOfMaps, Map, MapData, MapError};
use aya_obj::generated::{BPF_F_MMAPABLE, bpf_map_type};

use super::kernel::OpenError;
use super::opened::Opened;
use super::sys::{Flat, Mapped, set_maps};

/// An array of `T` that grows.
pub struct Chunks<T> {
    name: &'static str,
    outer: ArrayOfMaps<MapData>,
    /// The same, for what aya has no call for.
    fd: OwnedFd,
    records: Mapped<T>,
    /// Records of a chunk.
    chunk: u32,
    limit: u32,
}

impl<T: Flat> Chunks<T> {
    /// The array of that name, for its one writer, with the chunks that it has. Up to `limit` records will
    /// be there, or as many as are.
    ///
    /// # Errors
    ///
    /// When it is missing, or a chunk cannot be mapped.
    pub fn found(
        maps: &Opened,
        name: &'static str,
        chunk: usize,
        limit: u32,
    ) -> Result<Self, OpenError> {
        let mut chunks = Self::look(maps, name, chunk, limit)?;
        let there = chunks.count().map_err(|source| OpenError::Map { map: name, source })?;
        // It may be more than is wanted now.
        if there > chunks.records.reserved() {
            chunks = Self::look(maps, name, chunk, there)?;
        }
        if there > 0 && !chunks.follow(there - 1) {
            let source = io::Error::other("a chunk of it cannot be mapped");
            return Err(OpenError::Mapping { map: name, source });
        }
        chunks.limit = chunks.limit.max(there);
        Ok(chunks)
    }

    /// How many records the chunks have that are there. What cannot be looked at is not taken for missing: it
    /// would be made anew, and what is in it lost.
    fn count(&self) -> Result<u32, MapError> {
        let mut records = 0;
        for index in 0..self.outer.len() {
            match self.outer.get(&index, 0) {
                Ok(_) => records += self.chunk,
                Err(MapError::KeyNotFound) => break,
                Err(error) => return Err(error),
            }
        }
        Ok(records)
    }

    /// The same array for somebody else, who sees what the writer has made after [`Chunks::follow`].
    ///
    /// # Errors
    ///
    /// When it is missing.
    pub fn look(
        maps: &Opened,
        name: &'static str,
        chunk: usize,
        limit: u32,
    ) -> Result<Self, OpenError> {
        let data = maps.data(name)?;
        let mapping = |source| OpenError::Mapping { map: name, source };
        let failed = |source| OpenError::Map { map: name, source };
        let fd = data.fd().as_fd().try_clone_to_owned().map_err(mapping)?;
        let again = fd.try_clone().map_err(mapping)?;
        let outer = Map::ArrayOfMaps(MapData::from_fd(again).map_err(failed)?);
        let outer = ArrayOfMaps::try_from(outer).map_err(failed)?;
        let chunk = u32::try_from(chunk).unwrap_or(u32::MAX);
        let records = Mapped::reserve(limit.next_multiple_of(chunk)).map_err(mapping)?;
        Ok(Self { name, outer, fd, records, chunk, limit })
    }

    /// How many records there may be.
    pub fn limit(&self) -> u32 {
        self.limit
    }

    /// How many there are.
    pub fn size(&self) -> u32 {
        self.records.capacity().min(self.limit)
    }

    /// A record; nothing when its chunk is not there yet.
    pub fn get(&self, index: u32) -> Option<&T> {
        self.records.get(index)
    }

    /// How many bytes there are.
    pub fn bytes(&self) -> u64 {
        u64::from(self.records.capacity()) * size_of::<T>() as u64
    }

    /// Writes records from `base` on; see [`Mapped::write`].
    ///
    /// # Errors
    ///
    /// `EINVAL` when not all of them are there.
    pub fn write(&mut self, base: u32, records: &[T]) -> io::Result<()> {
        self.records.write(base, records)
    }

    /// Sees to it that there are as many records. Grows to twice the size where it can, so that the
    /// kernel has to be waited for few times.
    ///
    /// # Errors
    ///
    /// `EINVAL` beyond the limit, and what the kernel says to a new chunk (`ENOMEM`).
    pub fn reach(&mut self, len: u32) -> io::Result<()> {
        let there = self.records.capacity();
        if len <= there {
            return Ok(());
        }
        if len > self.limit {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        let ample = there.saturating_mul(2).clamp(len, self.limit);
        self.grow(ample).or_else(|error| if ample > len { self.grow(len) } else { Err(error) })
    }

    /// Adds chunks. What an attempt that failed has left in the array of maps is replaced by the next:
    /// nothing names records there.
    fn grow(&mut self, len: u32) -> io::Result<()> {
        let first = self.records.capacity() / self.chunk;
        let last = len.div_ceil(self.chunk);
        if last * self.chunk > self.records.reserved() {
            return Err(io::Error::other("its address space is lost; start the agent anew"));
        }
        let made = (first..last).map(|_| self.make()).collect::<io::Result<Vec<_>>>()?;
        let fds: Vec<_> = made.iter().map(|map| map.fd().as_fd()).collect();
        set_maps(self.fd.as_fd(), first, &fds)?;
        fds.into_iter().try_for_each(|map| self.records.append(map, self.chunk))
    }

    fn make(&self) -> io::Result<MapData> {
        let size = u32::try_from(size_of::<T>()).map_err(io::Error::other)?;
        let kind = bpf_map_type::BPF_MAP_TYPE_ARRAY as u32;
        let key = u32::try_from(size_of::<u32>()).map_err(io::Error::other)?;
        let map = aya_obj::Map::new_from_params(kind, key, size, self.chunk, BPF_F_MMAPABLE);
        MapData::create(map, self.name, None).map_err(into_io)
    }

    /// Maps what the writer has made since, up to this record. `false` when it cannot be had.
    pub fn follow(&mut self, index: u32) -> bool {
        while self.records.capacity() <= index {
            let next = self.outer.get(&(self.records.capacity() / self.chunk), 0);
            let Ok(map) = next else { return false };
            if self.records.append(map.fd().as_fd(), self.chunk).is_err() {
                return false;
            }
        }
        true
    }
}

fn into_io(error: MapError) -> io::Error {
    match error {
        MapError::CreateError { io_error, .. } => io_error,
        other => io::Error::other(other),
    }
}
