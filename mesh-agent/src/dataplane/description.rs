//! What the records of the maps look like, by names: pinned beside them, so that a build with another layout
//! can read them, be it a later or an earlier one.
//!
//! This is the one layout that never changes: a map `LAYOUT` of entries of 64 bytes, each a field of a record.
//! A field that means something else than before gets another name. Maps that the kernel programs write have
//! no fields here but the number of their format, and are handed on as they are.

use std::mem::offset_of;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;

use aya::maps::{Array, Map, MapData, MapInfo};
use aya_obj::generated::bpf_map_type;
use mesh_common::{
    Addr, Backend, FrontendKey, FrontendValue, Half, Name, Service, Settings, Slot, Word,
};

use super::kernel::OpenError;
use super::pindir::LAYOUT;

/// What belongs together: it is written by the agent only, and names what else is in it. When a field of one
/// of these is elsewhere, all of them are copied.
pub const TABLES: [&str; 6] = ["FRONTENDS", "SERVICES", "SLOTS", "BACKENDS", "NAMES", "SETTINGS"];

/// A part of a record.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Field {
    /// The map.
    pub map: String,
    /// Its name; that of a part of a key begins with `@`.
    pub name: String,
    /// Where it begins, in bytes.
    pub offset: u32,
    /// How many bytes it has.
    pub size: u32,
}

/// Fields in the order of maps and names.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Description(Vec<Field>);

/// Bytes of an entry, of its map's name and of its own.
const ENTRY: usize = 64;
const MAP: usize = 16;
const NAME: usize = 40;

/// Nobody has so many fields.
const MOST: u32 = 4_096;

impl Field {
    fn of(map: &str, name: &str, offset: usize, size: usize) -> Self {
        let (map, name) = (map.to_owned(), name.to_owned());
        Self { map, name, offset: number(offset), size: number(size) }
    }

    fn to_entry(&self) -> [u8; ENTRY] {
        let mut entry = [0; ENTRY];
        let mut put = |at: usize, bytes: &[u8]| {
            for (byte, value) in entry.iter_mut().skip(at).zip(bytes) {
                *byte = *value;
            }
        };
        put(0, self.map.as_bytes());
        put(MAP, self.name.as_bytes());
        put(MAP + NAME, &self.offset.to_le_bytes());
        put(MAP + NAME + 4, &self.size.to_le_bytes());
        entry
    }

    /// Nothing for an entry that makes no sense.
    fn from_entry(entry: &[u8; ENTRY]) -> Option<Self> {
        let text = |at: usize, len: usize| {
            let bytes = entry.get(at..at + len)?;
            let end = bytes.iter().position(|&byte| byte == 0).unwrap_or(len);
            String::from_utf8(bytes.get(..end)?.to_vec()).ok().filter(|text| !text.is_empty())
        };
        let number = |at: usize| Some(u32::from_le_bytes(entry.get(at..at + 4)?.try_into().ok()?));
        let (map, name) = (text(0, MAP)?, text(MAP, NAME)?);
        Some(Self { map, name, offset: number(MAP + NAME)?, size: number(MAP + NAME + 4)? })
    }
}

/// Fields of a record of a map: the name of each, where it is in the type, and its own type.
macro_rules! fields {
    ($fields:ident, $map:literal, $record:ty, $prefix:literal: $($($part:ident).+: $type:ty),+ $(,)?) => {
        $($fields.push(Field::of(
            $map,
            concat!($prefix, stringify!($($part).+)),
            offset_of!($record, $($part).+),
            size_of::<$type>(),
        ));)+
    };
}

impl Description {
    /// That of this build.
    #[must_use]
    pub fn ours() -> Self {
        let mut all = Vec::new();
        fields!(all, "FRONTENDS", FrontendKey, "@": addr: Addr, port: u16, protocol: u8);
        fields!(all, "FRONTENDS", FrontendValue, "": service: u32, generation: u64);
        fields!(all, "SERVICES", Service, "":
            table: Word, generation: Word, policy: Word, key.addr: Addr, key.port: u16,
            key.protocol: u8, rate: Half, position: Word, affinity: Word);
        fields!(all, "SLOTS", Slot, "":
            addr: Addr, port: u16, weight: u16, backend: u32, generation: u32, threshold: u32,
            alias: u32, end: u32);
        // A record that holds entries of a consistent hash instead.
        all.push(Field::of("SLOTS", ENTRIES, 0, 32));
        fields!(all, "BACKENDS", Backend, "":
            addr: Addr, port: u16, weight: u16, protocol: u8, marks: u8, service_port: u16,
            generation: u32, owner: u32);
        fields!(all, "NAMES", Name, "": source: u64);
        all.push(Field::of("NAMES", "text", Name::TEXT, size_of::<Name>() - Name::TEXT));
        fields!(all, "SETTINGS", Settings, "":
            virtual_ips: Word, excludes: Word, places: Word,
            cgroups: [Word; Settings::EXCLUDED], namespaces: [Word; Settings::EXCLUDED],
            generation: Word, backend_generation: Word, gone_opened: Word);
        let shared = super::pindir::MAPS.into_iter().filter(|map| !TABLES.contains(map));
        all.extend(shared.map(|map| Field::of(map, FORMAT, 1, 0)));
        Self::new(all)
    }

    fn new(mut fields: Vec<Field>) -> Self {
        fields.sort();
        Self(fields)
    }

    /// The fields of a map.
    pub fn of<'d>(&'d self, map: &'d str) -> impl Iterator<Item = &'d Field> {
        self.0.iter().filter(move |field| field.map == map)
    }

    /// A field of a map.
    #[must_use]
    pub fn field(&self, map: &str, name: &str) -> Option<&Field> {
        self.0.iter().find(|field| field.map == map && field.name == name)
    }

    /// Whether a map's records are the same in both.
    #[must_use]
    pub fn agrees(&self, other: &Self, map: &str) -> bool {
        self.of(map).eq(other.of(map))
    }

    /// Makes the map that says it.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn write(&self) -> Result<OwnedFd, OpenError> {
        let failed = |source| OpenError::Map { map: LAYOUT, source };
        let count = number(self.0.len());
        let (kind, entry) = (bpf_map_type::BPF_MAP_TYPE_ARRAY as u32, number(ENTRY));
        let map = aya_obj::Map::new_from_params(kind, 4, entry, count, 0);
        let data = MapData::create(map, LAYOUT, None).map_err(failed)?;
        let fd = data.fd().as_fd().try_clone_to_owned();
        let fd = fd.map_err(|source| OpenError::Mapping { map: LAYOUT, source })?;
        let map = Map::Array(data);
        let mut array: Array<MapData, [u8; ENTRY]> = Array::try_from(map).map_err(failed)?;
        for (index, field) in (0..).zip(&self.0) {
            array.set(index, field.to_entry(), 0).map_err(failed)?;
        }
        Ok(fd)
    }

    /// What is pinned there; nothing when there is none.
    ///
    /// # Errors
    ///
    /// When it is something else, or cannot be read.
    pub fn read(directory: &Path) -> Result<Option<Self>, OpenError> {
        let failed = |source| OpenError::Map { map: LAYOUT, source };
        let path = directory.join(LAYOUT);
        if super::pindir::get(directory, LAYOUT)?.is_none() {
            return Ok(None);
        }
        let count = MapInfo::from_pin(&path).map_err(failed)?.max_entries().min(MOST);
        let map = Map::Array(MapData::from_pin(&path).map_err(failed)?);
        let array: Array<MapData, [u8; ENTRY]> = Array::try_from(map).map_err(failed)?;
        let mut fields = Vec::new();
        for index in 0..count {
            fields.extend(Field::from_entry(&array.get(&index, 0).map_err(failed)?));
        }
        Ok(Some(Self::new(fields)))
    }
}

fn number(size: usize) -> u32 {
    u32::try_from(size).unwrap_or(u32::MAX)
}

/// The name of the field that is a map's format.
pub const FORMAT: &str = "format";

/// The name of what lies over the fields of a record of `SLOTS` that holds entries of a consistent hash.
pub const ENTRIES: &str = "entries";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_survive_their_entries() {
        let ours = Description::ours();
        for field in &ours.0 {
            assert!(field.map.len() <= MAP && field.name.len() <= NAME, "{field:?}");
            assert_eq!(Field::from_entry(&field.to_entry()).as_ref(), Some(field));
        }
        assert_eq!(Field::from_entry(&[0; ENTRY]), None);
        assert_eq!(Field::from_entry(&[0xff; ENTRY]), None);
    }

    /// Nothing of a record is left out when it is copied: what is not a field is filling.
    #[test]
    fn records_are_described_whole() {
        let sizes = [
            ("SERVICES", size_of::<Service>(), 1),
            ("SLOTS", size_of::<Slot>(), 0),
            ("BACKENDS", size_of::<Backend>(), 0),
            ("NAMES", size_of::<Name>(), 0),
            // Which programs are attached is for each build to say.
            ("SETTINGS", size_of::<Settings>(), 8),
        ];
        for (map, size, filling) in sizes {
            let mut bytes = vec![0; size];
            let ours = Description::ours();
            for field in ours.of(map).filter(|field| field.name != ENTRIES) {
                let range = field.offset as usize..(field.offset + field.size) as usize;
                bytes[range].iter_mut().for_each(|byte| *byte += 1);
            }
            assert!(bytes.iter().all(|&fields| fields <= 1), "{map}: two fields overlap");
            assert_eq!(bytes.iter().filter(|&&fields| fields == 0).count(), filling, "{map}");
        }
    }
}
