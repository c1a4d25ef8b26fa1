//! What cgroups are part of ([`crate::observe::units`]), for hashes by unit.

use std::collections::HashMap;

use aya::Ebpf;
use aya::maps::{HashMap as HashMapOf, MapData, MapError};

use super::kernel::{OpenError, typed};

/// The keys in the kernel, by cgroup.
pub struct Units {
    map: HashMapOf<MapData, u64, u64>,
    /// What the map holds.
    held: HashMap<u64, u64>,
}

impl Units {
    /// Takes the map out of a loaded object.
    ///
    /// # Errors
    ///
    /// When it is missing or has another layout.
    pub fn open(ebpf: &mut Ebpf) -> Result<Self, OpenError> {
        Ok(Self { map: typed(ebpf, "UNITS", HashMapOf::try_from)?, held: HashMap::new() })
    }

    /// Makes the map hold these keys, by the ids of cgroups. Touches only what differs. The entry of a
    /// cgroup that exists is never taken away or exchanged, so no program reads one that is reused.
    ///
    /// # Errors
    ///
    /// What the kernel says, `E2BIG` when there are more than fit: the others are there.
    pub fn hold(&mut self, keys: &HashMap<u64, u64>) -> Result<(), MapError> {
        let gone: Vec<u64> =
            self.held.keys().filter(|id| !keys.contains_key(id)).copied().collect();
        for id in gone {
            match self.map.remove(&id) {
                Ok(()) | Err(MapError::KeyNotFound) => {}
                Err(error) => return Err(error),
            }
            self.held.remove(&id);
        }
        for (&id, &key) in keys {
            if self.held.get(&id) != Some(&key) {
                self.map.insert(id, key, 0)?;
                self.held.insert(id, key);
            }
        }
        Ok(())
    }
}
