//! How many backends each service may have, so that no limit freezes what is in force.
//!
//! As many ids as the largest service has stay free. So any one service can be replaced as a whole:
//! its new backends get ids before the old ones, which wait for a grace period, give theirs back.

use std::collections::{BTreeMap, HashMap};

use crate::model::ServiceName;

/// What each service has been granted.
#[derive(Debug)]
pub struct Shares {
    limit: usize,
    total: usize,
    of: HashMap<ServiceName, usize>,
    /// How many services have each share.
    sizes: BTreeMap<usize, usize>,
}

impl Shares {
    /// Nobody has anything of `limit` ids.
    pub fn new(limit: u32) -> Self {
        Self { limit: limit as usize, total: 0, of: HashMap::new(), sizes: BTreeMap::new() }
    }

    /// A service wants no more than this: what it has beyond goes back.
    pub fn shrink(&mut self, name: &ServiceName, wanted: usize) {
        let now = self.of.get(name).copied().unwrap_or_default();
        self.set(name, now.min(wanted));
    }

    /// A service wants so many. Returns how many it is granted, at most those.
    pub fn grow(&mut self, name: &ServiceName, wanted: usize) -> usize {
        self.set(name, 0);
        let largest = self.sizes.last_key_value().map_or(0, |(&size, _)| size);
        let left = self.limit.saturating_sub(self.total);
        // One that is larger than all others needs its own size twice.
        let room = if left / 2 >= largest { left / 2 } else { left.saturating_sub(largest) };
        let granted = wanted.min(room);
        self.set(name, granted);
        granted
    }

    /// A service has so many already.
    pub fn adopt(&mut self, name: &ServiceName, size: usize) {
        self.set(name, size);
    }

    /// A service is called something else, and has what it had.
    pub fn rename(&mut self, former: &ServiceName, name: &ServiceName) {
        let size = self.of.get(former).copied().unwrap_or_default();
        self.set(former, 0);
        self.set(name, size);
    }

    fn set(&mut self, name: &ServiceName, size: usize) {
        if let Some(old) = self.of.remove(name) {
            self.total -= old;
            if let Some(count) = self.sizes.get_mut(&old) {
                *count -= 1;
                if *count == 0 {
                    self.sizes.remove(&old);
                }
            }
        }
        if size > 0 {
            self.total += size;
            *self.sizes.entry(size).or_default() += 1;
            self.of.insert(name.clone(), size);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Whoever asks in whatever order: the largest can always be replaced, and one that asks
        /// for what it has gets it.
        #[test]
        fn the_largest_can_be_replaced(asks in prop::collection::vec((0u8..6, 0usize..70), 1..60)) {
            let mut shares = Shares::new(100);
            for (name, wanted) in asks {
                let name = ServiceName::new(&name.to_string());
                let granted = shares.grow(&name, wanted);
                prop_assert!(granted <= wanted);
                let largest = shares.of.values().max().copied().unwrap_or_default();
                prop_assert!(shares.total + largest <= 100);
                prop_assert_eq!(shares.total, shares.of.values().sum::<usize>());
                prop_assert_eq!(shares.grow(&name, granted), granted);
            }
        }
    }

    #[test]
    fn one_service_may_have_half() {
        let (mut shares, name) = (Shares::new(100), ServiceName::new("a"));
        assert_eq!(shares.grow(&name, 80), 50);
        shares.shrink(&name, 10);
        assert_eq!(shares.grow(&ServiceName::new("b"), 80), 45);
    }
}
