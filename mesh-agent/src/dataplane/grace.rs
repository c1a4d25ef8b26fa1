//! The grace period.

use std::sync::{Mutex, PoisonError};

use aya::maps::{Array, ArrayOfMaps, MapData};

use super::kernel::{OpenError, map_error};
use super::maps::MapError;
use super::opened::Opened;

/// Waits until every kernel program that is running now has ended.
///
/// `membarrier(MEMBARRIER_CMD_GLOBAL)` would do the same on most nodes, but not on one with
/// `nohz_full` CPUs (`EINVAL`) nor on one with a single CPU, where it returns at once although a
/// program may have been preempted. Updating a map of maps always waits.
pub struct Grace {
    maps: Mutex<GraceMaps>,
}

struct GraceMaps {
    outer: ArrayOfMaps<MapData, Inner>,
    inner: Inner,
}

type Inner = Array<MapData, u32>;

impl Grace {
    /// Opens the map of maps.
    ///
    /// # Errors
    ///
    /// When there is none, or the kernel refuses to make the inner one.
    pub fn open(maps: &Opened) -> Result<Self, OpenError> {
        let outer = maps.typed("GRACE", ArrayOfMaps::try_from)?;
        let inner =
            Array::create(1, 0).map_err(|source| OpenError::Map { map: "GRACE", source })?;
        Ok(Self { maps: Mutex::new(GraceMaps { outer, inner }) })
    }

    /// Waits; typically some milliseconds (`synchronize_rcu`). Blocks the thread.
    ///
    /// # Errors
    ///
    /// When the kernel refuses the update: then nothing may be said about running programs.
    pub fn wait(&self) -> Result<(), MapError> {
        let mut maps = self.maps.lock().unwrap_or_else(PoisonError::into_inner);
        let GraceMaps { outer, inner } = &mut *maps;
        outer.set(0, inner, 0).map_err(map_error("updating GRACE"))
    }
}
