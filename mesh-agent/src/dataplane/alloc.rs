//! Who owns which index of the flat arrays: single ids, and extents of consecutive slots.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// Ids from 0 up to a limit. An id that was given back rests until [`RESTING`] others were, or no fresh
/// one is left: what is late for its former life is then rare, and the ids in use stay few, since the
/// arrays that they name grow with the highest.
#[derive(Debug)]
pub struct IdPool {
    limit: u32,
    fresh: u32,
    free: VecDeque<u32>,
}

/// How many ids that were given back are kept while there are fresh ones.
const RESTING: u32 = 1_024;

impl IdPool {
    /// A pool of `limit` ids.
    pub fn new(limit: u32) -> Self {
        Self { limit, fresh: 0, free: VecDeque::new() }
    }

    /// A pool of which these ids are in use. What is free below them may rest no longer.
    pub fn adopt(limit: u32, used: impl Iterator<Item = u32>) -> Self {
        let used: BTreeSet<u32> = used.filter(|&id| id < limit).collect();
        let fresh = used.last().map_or(0, |last| last + 1);
        let free = (0..fresh).filter(|id| !used.contains(id)).collect();
        Self { limit, fresh, free }
    }

    /// Takes an id; nothing when all are in use. `reach` is asked whether a fresh one can be had: if it
    /// cannot, none has to rest.
    pub fn take(&mut self, reach: impl FnOnce(u32) -> bool) -> Option<u32> {
        if self.fresh < self.limit && self.free.len() < RESTING as usize && reach(self.fresh) {
            self.fresh += 1;
            return Some(self.fresh - 1);
        }
        self.free.pop_front()
    }

    /// Gives an id back.
    pub fn give(&mut self, id: u32) {
        debug_assert!(id < self.fresh, "id {id} was never taken");
        self.free.push_back(id);
    }

    /// How many ids are in use.
    pub fn used(&self) -> u32 {
        // The free ids are a subset of those taken before, so their number fits.
        self.fresh - u32::try_from(self.free.len()).unwrap_or(self.fresh)
    }
}

/// Extents of a flat array: best fit, neighbours joined when they are given back.
#[derive(Debug)]
pub struct ExtentPool {
    limit: u32,
    used: u32,
    /// Free extents by base.
    by_base: BTreeMap<u32, u32>,
    /// The same by length and base.
    by_len: BTreeSet<(u32, u32)>,
}

impl ExtentPool {
    /// A pool of `limit` slots.
    pub fn new(limit: u32) -> Self {
        let mut pool = Self { limit, used: 0, by_base: BTreeMap::new(), by_len: BTreeSet::new() };
        if limit > 0 {
            pool.insert(0, limit);
        }
        pool
    }

    /// Takes these very slots. `false` when one of them is in use, or there is none of that number.
    pub fn take_at(&mut self, base: u32, len: u32) -> bool {
        let Some((&from, &size)) = self.by_base.range(..=base).next_back() else { return false };
        let (Some(end), until) = (base.checked_add(len), from + size) else { return false };
        if len == 0 || end > until {
            return false;
        }
        self.remove(from, size);
        if from < base {
            self.insert(from, base - from);
        }
        if end < until {
            self.insert(end, until - end);
        }
        self.used += len;
        true
    }

    /// Takes `len` consecutive slots and returns the first; nothing when there is no such room.
    pub fn take(&mut self, len: u32) -> Option<u32> {
        debug_assert!(len > 0, "an extent has at least one slot");
        self.take_below(len, self.limit)
    }

    /// Takes `len` consecutive slots, all of them below `bound`.
    pub fn take_below(&mut self, len: u32, bound: u32) -> Option<u32> {
        let mut fitting = self.by_len.range((len, 0)..);
        let &(found, base) = fitting.find(|(_, base)| base.saturating_add(len) <= bound)?;
        self.remove(base, found);
        if found > len {
            self.insert(base + len, found - len);
        }
        self.used += len;
        Some(base)
    }

    /// The longest extent that can be taken below `bound`.
    pub fn longest_below(&self, bound: u32) -> u32 {
        let below = self.by_base.range(..bound);
        below.map(|(&base, &len)| len.min(bound - base)).max().unwrap_or(0)
    }

    /// Gives slots back.
    pub fn give(&mut self, base: u32, len: u32) {
        debug_assert!(base + len <= self.limit && len <= self.used, "foreign extent");
        self.used -= len;
        let (mut base, mut len) = (base, len);
        if let Some((&before, &size)) = self.by_base.range(..base).next_back()
            && before + size == base
        {
            self.remove(before, size);
            (base, len) = (before, len + size);
        }
        if let Some(&size) = self.by_base.get(&(base + len)) {
            self.remove(base + len, size);
            len += size;
        }
        self.insert(base, len);
    }

    /// How many slots are in use.
    pub fn used(&self) -> u32 {
        self.used
    }

    fn insert(&mut self, base: u32, len: u32) {
        self.by_base.insert(base, len);
        self.by_len.insert((len, base));
    }

    fn remove(&mut self, base: u32, len: u32) {
        self.by_base.remove(&base);
        self.by_len.remove(&(len, base));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn fresh_ids_come_first() {
        let mut pool = IdPool::new(3);
        let take = |pool: &mut IdPool| pool.take(|_| true);
        assert_eq!((take(&mut pool), take(&mut pool)), (Some(0), Some(1)));
        pool.give(0);
        pool.give(1);
        let three = [(); 3].map(|()| take(&mut pool));
        assert_eq!(three, [Some(2), Some(0), Some(1)]);
        assert_eq!((take(&mut pool), pool.used()), (None, 3));
    }

    #[test]
    fn none_rests_where_there_is_no_memory_for_fresh_ones() {
        let mut pool = IdPool::new(100);
        let take = |pool: &mut IdPool| pool.take(|id| id < 2);
        assert_eq!([(); 3].map(|()| take(&mut pool)), [Some(0), Some(1), None]);
        pool.give(1);
        assert_eq!((take(&mut pool), take(&mut pool), pool.used()), (Some(1), None, 2));
    }

    #[test]
    fn not_more_rest_than_have_to() {
        let mut pool = IdPool::new(100_000);
        for _ in 0..RESTING {
            pool.take(|_| true);
        }
        for id in 0..RESTING {
            pool.give(id);
        }
        // One after the other, as a service changes its endpoints: no fresh id is needed any more.
        for _ in 0..50_000 {
            let id = pool.take(|_| true).expect("an id");
            assert!(id <= RESTING, "{id}");
            pool.give(id);
        }
    }

    proptest! {
        /// Extents never overlap, and when all are given back the pool is one piece again.
        #[test]
        fn extents(
            steps in prop::collection::vec((1u32..40, any::<prop::sample::Index>()), 1..200),
            bound in 40u32..=256,
        ) {
            let limit = 256;
            let mut pool = ExtentPool::new(limit);
            let mut held: Vec<(u32, u32)> = Vec::new();
            for (len, index) in steps {
                if len % 3 == 0 && !held.is_empty() {
                    let (base, len) = held.swap_remove(index.index(held.len()));
                    pool.give(base, len);
                } else if let Some(base) = pool.take_below(len, bound) {
                    prop_assert!(base + len <= bound);
                    prop_assert!(base + len <= limit);
                    for &(other, size) in &held {
                        prop_assert!(base + len <= other || other + size <= base);
                    }
                    held.push((base, len));
                }
                let longest = pool.longest_below(bound);
                if longest > 0 {
                    let base = pool.take_below(longest, bound).expect("it was said to be there");
                    prop_assert!(pool.take_below(longest + 1, bound).is_none());
                    pool.give(base, longest);
                }
                prop_assert_eq!(pool.used(), held.iter().map(|&(_, len)| len).sum::<u32>());
            }
            for (base, len) in held {
                pool.give(base, len);
            }
            prop_assert_eq!(pool.take(limit), Some(0));
        }
    }
}
