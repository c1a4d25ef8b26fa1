//! Extents of slots, and the backends that they name: who holds them, and when they are free.
//!
//! An extent is held by the service's table and by every frontend whose record points to it. When
//! the last one lets go, it is retired, waits for a grace period, and is free. A backend is held by
//! its service and by every extent that names it, up to the end of that grace period, so nothing
//! that a slot names is ever given to somebody else.

use std::collections::{HashMap, HashSet};

use mesh_common::maglev::Size;
use mesh_common::{Slot, Table};

use crate::dataplane::alloc::ExtentPool;
use crate::dataplane::maps::{Kind, MapError, Maps};

/// What came of writing an extent.
pub enum Written {
    /// It is there.
    Table(Table),
    /// There is only room for so many slots, which are fewer.
    Room(u32),
    /// There will be room after a grace period.
    Busy,
}

/// Where an extent is: so many slots, of which the first are backends.
#[derive(Clone, Copy, Debug)]
struct Extent {
    base: u32,
    len: u32,
    backends: u32,
    /// Whether all that it holds is what this agent has written, or compared with what it would.
    is_known: bool,
}

/// What an extent holds.
#[derive(Clone, Debug, Default)]
pub struct Content {
    /// Its slots.
    pub slots: Vec<Slot>,
    /// How many of them, from the first on, are backends.
    pub backends: usize,
    /// How many others there are, if there are any ([`mesh_common::maglev`]).
    pub size: Size,
}

/// All extents.
#[derive(Debug)]
pub struct Extents {
    pool: ExtentPool,
    /// How many slots may be used for what is no backend, so that each backend has its own.
    entries: u32,
    /// How many are, of those that are in force.
    entries_used: u32,
    /// Live extents by base, and the number of their holders.
    live: HashMap<u32, (Extent, u32)>,
    retired: Vec<Extent>,
    waiting: Vec<Extent>,
    /// Number of holders of each backend id.
    backends: HashMap<u32, u32>,
}

impl Extents {
    /// An empty array of this many slots, of which so many may be used for what is no backend.
    pub fn new(slots: u32, entries: u32) -> Self {
        Self {
            pool: ExtentPool::new(slots),
            entries,
            entries_used: 0,
            live: HashMap::new(),
            retired: Vec::new(),
            waiting: Vec::new(),
            backends: HashMap::new(),
        }
    }

    /// How many slots are in use.
    pub fn used(&self) -> u32 {
        self.pool.used()
    }

    /// Whether a table holds exactly this.
    pub fn holds<M: Maps>(&mut self, maps: &M, table: Table, content: &Content) -> bool {
        let Content { slots, backends, .. } = content;
        let holds = (table.len() as usize, table.extent() as usize) == (*backends, slots.len())
            && (table.base()..).zip(slots).all(|(index, slot)| maps.slot(index) == Some(*slot));
        if holds && let Some((extent, _)) = self.live.get_mut(&table.base()) {
            extent.is_known = true;
        }
        holds
    }

    /// Whether a table begins with exactly these backends, and what follows was found to be as it should
    /// be for them.
    pub fn begins<M: Maps>(&self, maps: &M, table: Table, slots: &[Slot]) -> bool {
        let extent = self.live.get(&table.base());
        extent.is_some_and(|(extent, _)| extent.is_known)
            && table.len() as usize == slots.len()
            && (table.base()..).zip(slots).all(|(index, slot)| maps.slot(index) == Some(*slot))
    }

    /// Writes slots into a new extent, which the caller holds, perhaps in place of one that is in force
    /// until then.
    pub fn write<M: Maps>(
        &mut self,
        maps: &mut M,
        content: &Content,
        replaced: Option<Table>,
    ) -> Result<Written, MapError> {
        let Content { slots, backends, size } = content;
        let entries = u32::try_from(slots.len() - backends).unwrap_or(u32::MAX);
        // What it replaces is free as soon as it is written, but for a grace period.
        let freed = replaced.map_or(0, |table| table.extent() - table.len());
        if entries > self.entries.saturating_sub(self.entries_used).saturating_add(freed) {
            return Ok(Written::Room(u32::try_from(*backends).unwrap_or(u32::MAX)));
        }
        let taken = match u32::try_from(slots.len()) {
            Ok(len) if (1..=Table::MAX_LEN).contains(&len) => {
                self.take(maps, len).map(|base| (base, len))
            }
            _ => None,
        };
        let Some((base, len)) = taken else {
            // There are at least two slots for each backend, so this is for want of a run of free
            // ones: they wait for running programs, or they are in pieces, or there is no memory for more.
            let waiting = !self.retired.is_empty() || self.is_waiting();
            let bound =
                if maps.shortage().is_some() { maps.reach(Kind::Slots, 0) } else { u32::MAX };
            let longest = self.pool.longest_below(bound).min(Table::MAX_LEN);
            return Ok(if waiting { Written::Busy } else { Written::Room(longest) });
        };
        if let Err(error) = maps.write_slots(base, slots) {
            self.pool.give(base, len);
            return Err(error);
        }
        let backends = u32::try_from(*backends).unwrap_or(len).min(len);
        self.entries_used += entries;
        self.live.insert(base, (Extent { base, len, backends, is_known: true }, 1));
        for slot in &slots[..backends as usize] {
            *self.backends.entry(slot.backend).or_default() += 1;
        }
        Ok(Written::Table(Table::slots(base, backends).sized(*size)))
    }

    /// One holder more of a table that is in force, which may not be known yet. `false` when it makes no
    /// sense: it is not all there, or others lie in it, or it names backends that are not there.
    pub fn adopt<M: Maps>(&mut self, maps: &M, table: Table) -> bool {
        let (base, len, backends) = (table.base(), table.extent(), table.len());
        if let Some((extent, holders)) = self.live.get_mut(&base) {
            let same = (extent.len, extent.backends) == (len, backends);
            *holders += u32::from(same);
            return same;
        }
        let is_there = |slot: Slot| {
            let backend = maps.backend(slot.backend);
            backend.is_some_and(|b| b.protocol != 0 && b.generation == slot.generation)
        };
        let slots = base..base.saturating_add(backends);
        if !slots.clone().all(|index| maps.slot(index).is_some_and(is_there))
            || !self.pool.take_at(base, len)
        {
            return false;
        }
        self.entries_used += len - backends;
        self.live.insert(base, (Extent { base, len, backends, is_known: false }, 1));
        for slot in slots.filter_map(|index| maps.slot(index)) {
            self.hold_backend(slot.backend);
        }
        true
    }

    /// Whether anything holds a backend.
    pub fn names(&self, id: u32) -> bool {
        self.backends.contains_key(&id)
    }

    /// So many slots in a row, which are there.
    fn take<M: Maps>(&mut self, maps: &mut M, len: u32) -> Option<u32> {
        let base = self.pool.take(len)?;
        let there = maps.reach(Kind::Slots, base + len);
        if base + len <= there {
            return Some(base);
        }
        self.pool.give(base, len);
        self.pool.take_below(len, there)
    }

    /// Whether a table has nothing but some of these slots' backends, at least `len` of them: then a
    /// new table of that length would be no better.
    pub fn is_as_good<M: Maps>(&self, maps: &M, table: Table, slots: &[Slot], len: u32) -> bool {
        let known: HashSet<_> = slots.iter().map(|slot| (slot.backend, slot.generation)).collect();
        let range = table.base()..table.base() + table.len();
        table.len() >= len.max(1)
            && range
                .filter_map(|index| maps.slot(index))
                .all(|slot| known.contains(&(slot.backend, slot.generation)))
    }

    /// One more holder.
    pub fn acquire(&mut self, table: Table) {
        if let Some((_, holders)) = self.live.get_mut(&table.base())
            && !table.is_empty()
        {
            *holders += 1;
        }
    }

    /// One holder less.
    pub fn release(&mut self, table: Table) {
        if table.is_empty() {
            return;
        }
        let Some((extent, holders)) = self.live.get_mut(&table.base()) else {
            debug_assert!(false, "an extent is released that is not held");
            return;
        };
        *holders -= 1;
        if *holders == 0 {
            self.entries_used = self.entries_used.saturating_sub(extent.len - extent.backends);
            self.retired.push(*extent);
            self.live.remove(&table.base());
        }
    }

    /// A service holds this backend.
    pub fn hold_backend(&mut self, id: u32) {
        *self.backends.entry(id).or_default() += 1;
    }

    /// A holder lets go of a backend. Returns whether it was the last one.
    pub fn release_backend(&mut self, id: u32) -> bool {
        let Some(holders) = self.backends.get_mut(&id) else {
            debug_assert!(false, "a backend is released that is not held");
            return false;
        };
        *holders -= 1;
        let last = *holders == 0;
        if last {
            self.backends.remove(&id);
        }
        last
    }

    // === grace period ===

    /// Whether a grace period is under way for some extent.
    pub fn is_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Starts one. Returns whether there is anything to wait for.
    pub fn begin_grace(&mut self) -> bool {
        self.waiting = std::mem::take(&mut self.retired);
        self.is_waiting()
    }

    /// The wait failed: all of it waits for the next one.
    pub fn abandon_grace(&mut self) {
        self.retired.append(&mut self.waiting);
    }

    /// The wait is over. Backends that nothing holds any more are added to `unheld`.
    pub fn end_grace<M: Maps>(&mut self, maps: &M, unheld: &mut Vec<u32>) {
        for Extent { base, len, backends, .. } in std::mem::take(&mut self.waiting) {
            for slot in (base..base + backends).filter_map(|index| maps.slot(index)) {
                if self.release_backend(slot.backend) {
                    unheld.push(slot.backend);
                }
            }
            self.pool.give(base, len);
        }
    }
}
