//! What cgroups are part of ([`crate::observe::units`]), for hashes by unit.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};

use aya::maps::{HashMap as HashMapOf, MapData, MapError};

use super::kernel::OpenError;
use super::opened::Opened;

/// The keys in the kernel, by cgroup.
pub struct Units {
    map: HashMapOf<MapData, u64, u64>,
    held: Keys,
}

/// What the map holds, for whoever explains it.
#[derive(Clone, Debug, Default)]
pub struct Keys(Arc<RwLock<HashMap<u64, u64>>>);

impl Keys {
    /// The key of this cgroup's unit, if the programs know it: otherwise the cgroup counts for itself.
    #[must_use]
    pub fn of(&self, cgroup: u64) -> Option<u64> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).get(&cgroup).copied()
    }
}

impl Units {
    /// Opens the map.
    ///
    /// # Errors
    ///
    /// When it is missing or has another layout.
    pub fn open(maps: &Opened) -> Result<Self, OpenError> {
        let map: HashMapOf<_, u64, u64> = maps.typed("UNITS", HashMapOf::try_from)?;
        // What a former agent has found: what of it is gone is removed once all are known.
        let found = map.iter().collect::<Result<HashMap<_, _>, _>>();
        let found = found.map_err(|source| OpenError::Map { map: "UNITS", source })?;
        Ok(Self { map, held: Keys(Arc::new(RwLock::new(found))) })
    }

    /// What the map holds.
    #[must_use]
    pub fn keys(&self) -> Keys {
        self.held.clone()
    }

    /// Makes the map hold these keys, by the ids of cgroups; if they are the whole, no others. Touches only
    /// what differs. The entry of a cgroup that exists is not taken away, so no program reads one that is
    /// reused.
    ///
    /// # Errors
    ///
    /// What the kernel says, `E2BIG` when there are more than fit: the others are there.
    pub fn hold(&mut self, keys: &HashMap<u64, u64>, whole: bool) -> Result<(), MapError> {
        let mut held = self.held.0.write().unwrap_or_else(PoisonError::into_inner);
        let gone: Vec<u64> =
            held.keys().filter(|id| whole && !keys.contains_key(id)).copied().collect();
        for id in gone {
            match self.map.remove(&id) {
                Ok(()) | Err(MapError::KeyNotFound) => {}
                Err(error) => return Err(error),
            }
            held.remove(&id);
        }
        for (&id, &key) in keys {
            if held.get(&id) != Some(&key) {
                self.map.insert(id, key, 0)?;
                held.insert(id, key);
            }
        }
        Ok(())
    }
}
