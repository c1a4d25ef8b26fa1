//! Sets that mostly have one element.

use smallvec::SmallVec;

/// An ordered set of few elements. The catalog has one for each endpoint's address and each frontend,
/// and a node of a tree has room for eleven elements.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Few<T>(SmallVec<[T; 1]>);

impl<T> Default for Few<T> {
    fn default() -> Self {
        Self(SmallVec::new())
    }
}

impl<T: Ord> Few<T> {
    /// Adds an element, unless it is there.
    pub fn insert(&mut self, element: T) {
        if let Err(place) = self.0.binary_search(&element) {
            self.0.insert(place, element);
        }
    }

    /// Takes an element away, if it is there.
    pub fn remove(&mut self, element: &T) {
        if let Ok(place) = self.0.binary_search(element) {
            self.0.remove(place);
            // What there were many of for a moment takes no room for ever.
            if self.0.len() == 1 {
                self.0.shrink_to_fit();
            }
        }
    }

    /// The least element.
    pub fn first(&self) -> Option<&T> {
        self.0.first()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl<'f, T> IntoIterator for &'f Few<T> {
    type Item = &'f T;
    type IntoIter = std::slice::Iter<'f, T>;

    /// In order.
    fn into_iter(self) -> Self::IntoIter {
        self.0.iter()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// It is a set.
        #[test]
        fn like_a_tree(steps in prop::collection::vec((any::<bool>(), 0u8..6), 0..60)) {
            let (mut few, mut tree) = (Few::default(), BTreeSet::new());
            for (insert, element) in steps {
                if insert {
                    few.insert(element);
                    tree.insert(element);
                } else {
                    few.remove(&element);
                    tree.remove(&element);
                }
                prop_assert!(few.into_iter().eq(&tree));
                prop_assert_eq!((few.first(), few.is_empty()), (tree.first(), tree.is_empty()));
            }
        }
    }
}
