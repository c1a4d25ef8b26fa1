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
    /// With the source that it is noted to be of.
    of: HashMap<ServiceName, (u32, u64)>,
    /// The same the other way round.
    by: HashMap<u32, ServiceName>,
    /// Records of nobody that are still to be cleared.
    clearing: Vec<u32>,
}

impl Names {
    /// Nobody has any of so many.
    pub fn new(limit: u32) -> Self {
        let (of, by) = (HashMap::new(), HashMap::new());
        Self { limit, ids: IdPool::new(limit), of, by, clearing: Vec::new() }
    }

    /// Those that are there. What is no name, or one that another has already, is to be cleared.
    pub fn adopt(limit: u32, there: impl Iterator<Item = (u32, Name)>) -> Self {
        let mut names = Self::new(limit);
        let mut used = Vec::new();
        for (index, record) in there.filter(|(_, record)| *record != Name::NONE) {
            used.push(index);
            match record.get().map(ServiceName::new) {
                Some(name) if !names.of.contains_key(&name) => {
                    names.note(name, index, record.source);
                }
                _ => names.clearing.push(index),
            }
        }
        names.ids = IdPool::adopt(limit, used.into_iter());
        names
    }

    /// All names, by their records.
    pub fn by_index(&self) -> HashMap<u32, ServiceName> {
        self.by.clone()
    }

    /// Whose record this is.
    pub fn get(&self, index: u32) -> Option<&ServiceName> {
        self.by.get(&index)
    }

    fn note(&mut self, name: ServiceName, index: u32, source: u64) {
        self.by.insert(index, name.clone());
        self.of.insert(name, (index, source));
    }

    /// The record of a service, if it has one.
    pub fn id(&self, name: &ServiceName) -> Option<u32> {
        self.of.get(name).map(|&(index, _)| index)
    }

    /// Which source a service is noted to be of.
    pub fn source(&self, name: &ServiceName) -> u64 {
        self.of.get(name).map_or(0, |&(_, source)| source)
    }

    /// The record of a service of this source, which is made if there is none.
    ///
    /// With what was in the way: no room, or it cannot be written. Then it is [`UNNAMED`], or noted to be of
    /// another source still.
    pub fn take<M: Maps>(
        &mut self,
        maps: &mut M,
        name: &ServiceName,
        source: u64,
    ) -> (u32, Option<Problem>) {
        let known = self.of.get(name).copied();
        if let Some((index, _)) = known.filter(|&(_, known)| known == source) {
            return (index, None);
        }
        let unnamed = (UNNAMED, Some(Problem::Unnamed { limit: self.limit }));
        let Some(record) = Name::new(name.as_str(), source) else { return unnamed };
        let reach = |index| maps.reach(Kind::Names, index + 1) > index;
        let index = known.map(|(index, _)| index).or_else(|| self.ids.take(reach));
        let Some(index) = index else { return unnamed };
        match maps.write_name(index, &record) {
            Ok(()) => {
                self.note(name.clone(), index, source);
                (index, None)
            }
            Err(error) if known.is_some() => (index, Some(error.into())),
            Err(error) => {
                self.ids.give(index);
                (UNNAMED, Some(error.into()))
            }
        }
    }

    /// Nothing is a service's any more.
    pub fn give(&mut self, name: &ServiceName) {
        if let Some((index, _)) = self.of.remove(name) {
            self.by.remove(&index);
            self.clearing.push(index);
        }
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
