//! What the services are called in `NAMES`: whoever finds the maps without this agent knows whose they
//! are by that.
//!
//! A name is there before anything is the service's, and taken away when nothing is any more.

use std::collections::HashMap;

use mesh_common::Name;

use super::Problem;
use crate::dataplane::alloc::IdPool;
use crate::dataplane::maps::{Kind, Maps};
use crate::model::ServiceName;

/// What a service has whose name does not fit: it is served all the same.
pub const UNNAMED: u32 = u32::MAX;

/// Who has which record of `NAMES`.
#[derive(Debug)]
pub struct Names {
    limit: u32,
    ids: IdPool,
    of: HashMap<ServiceName, u32>,
    /// Records of nobody that are still to be cleared.
    clearing: Vec<u32>,
}

impl Names {
    /// Nobody has any of so many.
    pub fn new(limit: u32) -> Self {
        Self { limit, ids: IdPool::new(limit), of: HashMap::new(), clearing: Vec::new() }
    }

    /// Those that are there. What is no name, or one that another has already, is to be cleared.
    pub fn adopt(limit: u32, there: impl Iterator<Item = (u32, Name)>) -> Self {
        let mut names = Self::new(limit);
        let mut used = Vec::new();
        for (index, record) in there.filter(|(_, record)| *record != Name::NONE) {
            used.push(index);
            match record.get().map(ServiceName::new) {
                Some(name) if !names.of.contains_key(&name) => {
                    names.of.insert(name, index);
                }
                _ => names.clearing.push(index),
            }
        }
        names.ids = IdPool::adopt(limit, used.into_iter());
        names
    }

    /// All names, by their records.
    pub fn by_index(&self) -> HashMap<u32, ServiceName> {
        self.of.iter().map(|(name, &index)| (index, name.clone())).collect()
    }

    /// The record of a service, which is made if there is none.
    ///
    /// # Errors
    ///
    /// When there is no room, or it cannot be written.
    pub fn take<M: Maps>(&mut self, maps: &mut M, name: &ServiceName) -> Result<u32, Problem> {
        if let Some(&index) = self.of.get(name) {
            return Ok(index);
        }
        let unnamed = Problem::Unnamed { limit: self.limit };
        let Some(record) = Name::new(name.as_str()) else { return Err(unnamed) };
        let reach = |index| maps.reach(Kind::Names, index + 1) > index;
        let Some(index) = self.ids.take(reach) else { return Err(unnamed) };
        if let Err(error) = maps.write_name(index, &record) {
            self.ids.give(index);
            return Err(error.into());
        }
        self.of.insert(name.clone(), index);
        Ok(index)
    }

    /// Nothing is a service's any more.
    pub fn give(&mut self, name: &ServiceName) {
        self.clearing.extend(self.of.remove(name));
    }

    /// Clears the records of those.
    pub fn clear<M: Maps>(&mut self, maps: &mut M) {
        let ids = &mut self.ids;
        self.clearing.retain(|&index| {
            let cleared = maps.write_name(index, &Name::NONE).is_ok();
            if cleared {
                ids.give(index);
            }
            !cleared
        });
    }

    /// Whether some are still to be cleared.
    pub fn is_unfinished(&self) -> bool {
        !self.clearing.is_empty()
    }

    /// How many there are.
    pub fn used(&self) -> u32 {
        self.ids.used()
    }
}
