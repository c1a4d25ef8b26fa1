//! The maps that are pinned, each as what it is to be used as.

use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};

use aya::maps::{Map, MapData, MapInfo};
use aya_obj::Object;
use aya_obj::generated::bpf_map_type;
use mesh_common::Limits;

use super::kernel::OpenError;
use super::pindir::{self, MAPS, PinError};
use super::sys::{Flat, Mapped};

/// What the kernel says about a map, as far as it has to be what the programs were built for. What it may
/// hold is not part of that: the agent file may say something else than when it was made.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Shape {
    kind: u32,
    key: u32,
    value: u32,
    flags: u32,
}

impl Shape {
    fn describe(self) -> String {
        let Self { kind, key, value, flags } = self;
        format!(
            "a map of type {kind} with keys of {key} and values of {value} bytes, flags {flags:#x}"
        )
    }

    fn of(info: &MapInfo) -> Self {
        Self {
            kind: info.map_type().map_or(u32::MAX, |kind| kind as u32),
            key: info.key_size(),
            value: info.value_size(),
            flags: info.map_flags(),
        }
    }
}

/// The pinned maps of a directory.
#[derive(Clone, Debug)]
pub struct Opened {
    directory: PathBuf,
}

impl Opened {
    /// Those of a directory, none of which is looked at yet.
    #[must_use]
    pub fn at(directory: &Path) -> Self {
        Self { directory: directory.to_owned() }
    }

    /// Compares what is pinned with what the programs of this build were made for. Gives how many of the
    /// maps are there.
    ///
    /// # Errors
    ///
    /// When one is something else.
    pub(super) fn compare(&self, object: &Object) -> Result<usize, OpenError> {
        let mut there = 0;
        for name in MAPS {
            let expected = object.maps.get(name).ok_or(OpenError::Missing(name))?;
            if pindir::get(&self.directory, name)?.is_none() {
                continue;
            }
            there += 1;
            let expected = Shape {
                kind: expected.map_type(),
                key: expected.key_size(),
                value: expected.value_size(),
                flags: expected.map_flags(),
            };
            let found = Shape::of(&self.info(name)?);
            if found != expected {
                let path = self.directory.join(name);
                let (found, expected) = (found.describe(), expected.describe());
                return Err(PinError::Wrong { path, found, expected }.into());
            }
        }
        Ok(there)
    }

    /// How many entries a map may have.
    pub(super) fn entries(&self, name: &'static str) -> Result<u32, OpenError> {
        Ok(self.info(name)?.max_entries())
    }

    fn info(&self, map: &'static str) -> Result<MapInfo, OpenError> {
        MapInfo::from_pin(self.directory.join(map)).map_err(|source| OpenError::Map { map, source })
    }

    /// A map's descriptor, with what the kernel knows about it.
    pub(super) fn data(&self, map: &'static str) -> Result<MapData, OpenError> {
        let failed = |source| OpenError::Map { map, source };
        MapData::from_pin(self.directory.join(map)).map_err(failed)
    }

    /// A map as one of aya's types, which compare the sizes of keys and values.
    pub(super) fn typed<T>(
        &self,
        map: &'static str,
        convert: impl FnOnce(Map) -> Result<T, aya::maps::MapError>,
    ) -> Result<T, OpenError> {
        let failed = |source| OpenError::Map { map, source };
        convert(of_kind(self.data(map)?).ok_or(OpenError::Missing(map))?).map_err(failed)
    }

    /// Maps an array into memory.
    pub(super) fn mapped<T: Flat>(&self, map: &'static str) -> Result<Mapped<T>, OpenError> {
        let data = self.data(map)?;
        let info = data.info().map_err(|source| OpenError::Map { map, source })?;
        let (found, expected) = (info.value_size(), size_of::<T>());
        if found as usize != expected {
            return Err(OpenError::Layout { map, found, expected });
        }
        Mapped::new(data.fd().as_fd(), info.max_entries())
            .map_err(|source| OpenError::Mapping { map, source })
    }

    /// What the maps hold: those of a fixed size what they were made for, whatever the agent file says now.
    ///
    /// # Errors
    ///
    /// When one is missing.
    pub fn limits_in_force(&self, wanted: Limits) -> Result<Limits, OpenError> {
        let (frontends, pins) = (self.entries("FRONTENDS")?, self.entries("AFFINITY")?);
        Ok(Limits { frontends, pins, ..wanted })
    }

    /// The same, and says what is not in force.
    pub(super) fn limits(&self, wanted: Limits) -> Result<Limits, OpenError> {
        let found = self.limits_in_force(wanted)?;
        let differ = [
            ("frontends", wanted.frontends, found.frontends),
            ("affinities", wanted.pins, found.pins),
        ];
        for (key, wanted, found) in differ.into_iter().filter(|(_, wanted, found)| wanted != found)
        {
            tracing::warn!(
                "`limits: {{{key}: {wanted}}}` is not in force: the map that is holds {found}; to change \
                 it, end balancing with `mesh-agent cleanup`, and start the agent anew"
            );
        }
        Ok(found)
    }
}

/// A map as aya knows its kind; nothing for those that this project does not have.
fn of_kind(data: MapData) -> Option<Map> {
    let kind = data.info().ok()?.map_type().ok()? as u32;
    let is = |of: bpf_map_type| kind == of as u32;
    Some(match () {
        () if is(bpf_map_type::BPF_MAP_TYPE_HASH) => Map::HashMap(data),
        () if is(bpf_map_type::BPF_MAP_TYPE_ARRAY) => Map::Array(data),
        () if is(bpf_map_type::BPF_MAP_TYPE_LPM_TRIE) => Map::LpmTrie(data),
        () if is(bpf_map_type::BPF_MAP_TYPE_RINGBUF) => Map::RingBuf(data),
        () if is(bpf_map_type::BPF_MAP_TYPE_ARRAY_OF_MAPS) => Map::ArrayOfMaps(data),
        () => return None,
    })
}
