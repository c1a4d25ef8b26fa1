//! Taking over from a version with another map layout, be it a later or an earlier one.
//!
//! What the kernel programs write is handed on as it is: both versions' programs use the same maps while
//! hook after hook gets another program, so nothing is counted twice, and a record that one of them makes
//! the other one finds. What only the agent writes ([`TABLES`]) is copied, field by field, by what the other
//! version says about its records. Its own tables are not touched any more from then on: its programs use
//! them as long as they are attached, and they are still right should this version not come into force.

use std::io;
use std::os::fd::AsFd as _;
use std::path::PathBuf;

use aya::maps::{ArrayOfMaps, MapData, MapError};
use mesh_common::{Backend, Limits, Name, Service, Slot, Table, Word, chunk};

use super::chunks::Chunks;
use super::description::{Description, ENTRIES, FORMAT, Field, TABLES};
use super::kernel::OpenError;
use super::opened::Opened;
use super::pindir::{LAYOUT, MAPS, PinDir, PinError};
use super::sys::{Elements, Flat, Mapped};

/// What is taken over.
pub(super) struct Handover {
    former: PathBuf,
    theirs: Description,
    ours: Description,
    /// Whether the tables have to be copied.
    copies: bool,
}

/// Takes over the maps that stay as they are. Nothing when no other version is in force.
///
/// # Errors
///
/// When this version does not understand what the programs of the other one write.
pub(super) fn begin(pins: &PinDir) -> Result<Option<Handover>, OpenError> {
    let Some((version, former)) = pins.former() else { return Ok(None) };
    let refused =
        |why: String| OpenError::Pin(PinError::OtherVersion { path: former.clone(), version, why });
    let ours = Description::ours();
    let theirs = Description::read(&former)?
        .ok_or_else(|| refused(format!("it does not say how (there is no {LAYOUT})")))?;
    let copies = !TABLES.iter().all(|map| ours.agrees(&theirs, map));
    for map in MAPS {
        let is_table = TABLES.contains(&map);
        // Before layout 12 there was none: ours is new, and its programs write nothing that would be in there.
        if map == "WINDOWS" && theirs.field(map, FORMAT).is_none() {
            continue;
        }
        if !is_table && !ours.agrees(&theirs, map) {
            let format = |of: &Description| of.field(map, FORMAT).map_or(0, |field| field.offset);
            return Err(refused(format!(
                "{map} has format {} there and {} here",
                format(&theirs),
                format(&ours)
            )));
        }
        if is_table && copies {
            continue;
        }
        let object = super::pindir::get(&former, map)?
            .ok_or_else(|| refused(format!("{map} is not pinned there any more")))?;
        pins.put(map, object.as_fd())?;
    }
    Ok(Some(Handover { former, theirs, ours, copies }))
}

impl Handover {
    /// The same limits, with room for what is to be copied.
    ///
    /// # Errors
    ///
    /// When the other version's maps cannot be looked at.
    pub(super) fn limits(&self, wanted: Limits) -> Result<Limits, OpenError> {
        let there = Opened::at(&self.former).entries("FRONTENDS")?;
        Ok(Limits { frontends: wanted.frontends.max(there), ..wanted })
    }

    /// Copies the tables into this version's maps, which are empty.
    ///
    /// # Errors
    ///
    /// When they cannot be read or written. The other version's are as they were.
    pub(super) fn copy(&self, maps: &Opened) -> Result<(), OpenError> {
        if !self.copies {
            return Ok(());
        }
        self.records::<Service>(maps, "SERVICES", chunk::SERVICES)?;
        self.records::<Slot>(maps, "SLOTS", chunk::SLOTS)?;
        self.records::<Backend>(maps, "BACKENDS", chunk::BACKENDS)?;
        self.records::<Name>(maps, "NAMES", chunk::NAMES)?;
        self.entries(maps)?;
        self.settings(maps)?;
        self.frontends(maps)
    }

    /// All records of an array that grows.
    fn records<T: Flat>(
        &self,
        maps: &Opened,
        map: &'static str,
        chunk: usize,
    ) -> Result<(), OpenError> {
        let from = Raw::open(&Opened::at(&self.former), map)?;
        let count = from.count();
        let mapping = |source| OpenError::Mapping { map, source };
        let mut grown = Chunks::<T>::found(maps, map, chunk, count)?;
        grown.reach(count).map_err(mapping)?;
        drop(grown);
        let mut to = Raw::open(maps, map)?;
        let fields = self.fields(map, |name| name != ENTRIES);
        for index in 0..count {
            to.change(index, |new| transcode(&fields, &from.record(index), new))
                .map_err(mapping)?;
        }
        Ok(())
    }

    /// Those records of `SLOTS` that hold entries of a consistent hash.
    fn entries(&self, maps: &Opened) -> Result<(), OpenError> {
        const SLOTS: &str = "SLOTS";
        let services = Raw::open(maps, "SERVICES")?;
        let from = Raw::open(&Opened::at(&self.former), SLOTS)?;
        let mut to = Raw::open(maps, SLOTS)?;
        let fields = self.fields(SLOTS, |name| name == ENTRIES);
        let mapping = |source| OpenError::Mapping { map: SLOTS, source };
        let word = |record: &[u8], name: &str| {
            let at = self.ours.field("SERVICES", name)?.offset as usize;
            Some(u64::from_ne_bytes(record.get(at..at + 8)?.try_into().ok()?))
        };
        for index in 0..services.count() {
            let record = services.record(index);
            // What is left of one that is over names slots that are others' by now.
            if word(&record, "generation").is_none_or(|generation| generation == 0) {
                continue;
            }
            let table = Table(word(&record, "table").unwrap_or_default());
            let first = table.base().saturating_add(table.len());
            let end = table.base().saturating_add(table.extent()).min(to.count());
            for slot in first..end {
                to.change(slot, |new| {
                    new.fill(0);
                    transcode(&fields, &from.record(slot), new)
                })
                .map_err(mapping)?;
            }
        }
        Ok(())
    }

    /// The one record of `SETTINGS`. Which programs are attached is not taken over: none of these is.
    fn settings(&self, maps: &Opened) -> Result<(), OpenError> {
        const SETTINGS: &str = "SETTINGS";
        let mapping = |source| OpenError::Mapping { map: SETTINGS, source };
        let from = Words::of(&Opened::at(&self.former).data(SETTINGS)?, SETTINGS)?;
        let mut to = Words::of(&maps.data(SETTINGS)?, SETTINGS)?;
        let fields = self.fields(SETTINGS, |_| true);
        to.change(0, |new| transcode(&fields, &from.record(0), new)).map_err(mapping)
    }

    /// All entries of `FRONTENDS`.
    fn frontends(&self, maps: &Opened) -> Result<(), OpenError> {
        const FRONTENDS: &str = "FRONTENDS";
        let [from, to] = [Opened::at(&self.former).data(FRONTENDS)?, maps.data(FRONTENDS)?];
        let mapping = |source| OpenError::Mapping { map: FRONTENDS, source };
        let copy = || {
            let (from, to) = (Elements::of(from.fd().as_fd())?, Elements::of(to.fd().as_fd())?);
            let (key_fields, fields) = (
                self.fields(FRONTENDS, |name| name.starts_with('@')),
                self.fields(FRONTENDS, |name| !name.starts_with('@')),
            );
            let (key_size, value_size) = to.sizes();
            let mut last = from.next(None)?;
            while let Some(key) = last {
                if let Some(value) = from.get(&key)? {
                    let (mut new_key, mut new) = (vec![0; key_size], vec![0; value_size]);
                    transcode(&key_fields, &key, &mut new_key)?;
                    transcode(&fields, &value, &mut new)?;
                    to.set(&new_key, &new)?;
                }
                last = from.next(Some(&key))?;
            }
            Ok(())
        };
        copy().map_err(mapping)
    }

    /// Fields that both have: there, and here.
    fn fields<'h>(
        &'h self,
        map: &'h str,
        is_meant: impl Fn(&str) -> bool,
    ) -> Vec<(&'h Field, &'h Field)> {
        let meant = self.ours.of(map).filter(|field| is_meant(&field.name));
        meant.filter_map(|ours| Some((self.theirs.field(map, &ours.name)?, ours))).collect()
    }
}

/// Sets fields of a record to what they are in another. One that has more room there is cut, one that has
/// less is filled with zeros: numbers have their lowest byte first.
fn transcode(fields: &[(&Field, &Field)], from: &[u8], to: &mut [u8]) -> io::Result<()> {
    let range = |field: &Field, len: u32| {
        let begin = field.offset as usize;
        begin..begin.saturating_add(len as usize)
    };
    for (theirs, ours) in fields {
        let len = theirs.size.min(ours.size);
        let (source, target) = (from.get(range(theirs, len)), to.get_mut(range(ours, len)));
        let (Some(source), Some(target)) = (source, target) else {
            return Err(io::Error::other(format!("{} is not inside its record", theirs.name)));
        };
        target.copy_from_slice(source);
    }
    Ok(())
}

/// An array whose records are of a size that is known only when it is read.
struct Words {
    words: Mapped<Word>,
    /// Words of a record.
    size: u32,
    /// How many records there are.
    count: u32,
}

impl Words {
    fn of(data: &MapData, map: &'static str) -> Result<Self, OpenError> {
        let info = data.info().map_err(|source| OpenError::Map { map, source })?;
        let (size, count) = (info.value_size().div_ceil(8), info.max_entries());
        let words = Mapped::new(data.fd().as_fd(), size.saturating_mul(count));
        let words = words.map_err(|source| OpenError::Mapping { map, source })?;
        Ok(Self { words, size, count })
    }

    fn record(&self, index: u32) -> Vec<u8> {
        let words = (0..self.size).map(|word| self.words.get(index * self.size + word));
        words.flat_map(|word| word.map_or(0, Word::load).to_ne_bytes()).collect()
    }

    fn change(
        &mut self,
        index: u32,
        change: impl FnOnce(&mut [u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut record = self.record(index);
        change(&mut record)?;
        for (word, bytes) in (0..).zip(record.chunks_exact(8)) {
            if let (Some(word), Ok(bytes)) =
                (self.words.get(index * self.size + word), bytes.try_into())
            {
                word.store(u64::from_ne_bytes(bytes));
            }
        }
        Ok(())
    }
}

/// The same for one that grows.
struct Raw {
    chunks: Vec<Words>,
    /// Records of a chunk.
    chunk: u32,
}

impl Raw {
    fn open(maps: &Opened, map: &'static str) -> Result<Self, OpenError> {
        let failed = |source| OpenError::Map { map, source };
        let outer: ArrayOfMaps<MapData> = maps.typed(map, ArrayOfMaps::try_from)?;
        let mut chunks = Vec::new();
        for index in 0..outer.len() {
            match outer.get(&index, 0) {
                Ok(inner) => chunks.push(Words::of(&inner, map)?),
                Err(MapError::KeyNotFound) => break,
                Err(error) => return Err(failed(error)),
            }
        }
        let chunk = chunks.first().map_or(1, |words| words.count.max(1));
        Ok(Self { chunks, chunk })
    }

    fn count(&self) -> u32 {
        u32::try_from(self.chunks.len()).unwrap_or(u32::MAX).saturating_mul(self.chunk)
    }

    /// All zero where there is none.
    fn record(&self, index: u32) -> Vec<u8> {
        let words = self.chunks.get((index / self.chunk) as usize);
        words.map(|words| words.record(index % self.chunk)).unwrap_or_default()
    }

    fn change(
        &mut self,
        index: u32,
        change: impl FnOnce(&mut [u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        let words = self.chunks.get_mut((index / self.chunk) as usize);
        let words = words.ok_or_else(|| io::Error::from_raw_os_error(libc::EINVAL))?;
        words.change(index % self.chunk, change)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn field(name: &str, offset: u32, size: u32) -> Field {
        Field { map: "M".to_owned(), name: name.to_owned(), offset, size }
    }

    #[test]
    fn fields_move_grow_and_shrink() {
        let theirs = [field("a", 0, 2), field("b", 2, 4)];
        let ours = [field("a", 6, 2), field("b", 0, 2)];
        let fields: Vec<_> = theirs.iter().zip(&ours).collect();
        let mut to = [0xff; 8];
        transcode(&fields, &[1, 2, 3, 4, 5, 6], &mut to).expect("inside");
        assert_eq!(to, [3, 4, 0xff, 0xff, 0xff, 0xff, 1, 2]);
        let back: Vec<_> = ours.iter().zip(&theirs).collect();
        let mut again = [0; 6];
        transcode(&back, &to, &mut again).expect("inside");
        assert_eq!(again, [1, 2, 3, 4, 0, 0]);
    }

    #[test]
    fn what_lies_outside_is_refused() {
        for (offset, size) in [(7, 2), (u32::MAX, 1)] {
            let (theirs, ours) = (field("a", offset, size), field("a", 0, 8));
            let outside = transcode(&[(&theirs, &ours)], &[0; 8], &mut [0; 8]);
            assert!(outside.is_err(), "{theirs:?}");
        }
    }
}
