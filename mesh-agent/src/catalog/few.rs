//! Sets that mostly have one element.

use std::collections::BTreeSet;

use smallvec::SmallVec;

/// So many elements are looked through in a row.
const ROW: usize = 64;

/// An ordered set of mostly one element. The catalog has one for each endpoint's address and each frontend,
/// and a node of a tree has room for eleven elements.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Few<T: Ord> {
    /// In order.
    Row(SmallVec<[T; 1]>),
    /// Once there were more than fit into a row.
    Tree(BTreeSet<T>),
}

impl<T: Ord> Default for Few<T> {
    fn default() -> Self {
        Self::Row(SmallVec::new())
    }
}

impl<T: Ord> Few<T> {
    /// Adds an element, unless it is there.
    pub fn insert(&mut self, element: T) {
        match self {
            Self::Row(row) => {
                let Err(place) = row.binary_search(&element) else { return };
                row.insert(place, element);
                if row.len() > ROW {
                    *self = Self::Tree(std::mem::take(row).into_iter().collect());
                }
            }
            Self::Tree(tree) => {
                tree.insert(element);
            }
        }
    }

    /// Takes an element away, if it is there.
    pub fn remove(&mut self, element: &T) {
        match self {
            Self::Row(row) => {
                if let Ok(place) = row.binary_search(element) {
                    row.remove(place);
                }
            }
            Self::Tree(tree) => {
                tree.remove(element);
            }
        }
    }

    /// The elements, in order.
    pub fn iter(&self) -> impl Iterator<Item = &T> {
        let (row, tree) = match self {
            Self::Row(row) => (Some(row), None),
            Self::Tree(tree) => (None, Some(tree)),
        };
        row.into_iter().flatten().chain(tree.into_iter().flatten())
    }

    /// The least element.
    pub fn first(&self) -> Option<&T> {
        self.iter().next()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.first().is_none()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// It is a set.
        #[test]
        fn like_a_tree(steps in prop::collection::vec((any::<bool>(), 0u8..200), 0..400)) {
            let (mut few, mut tree) = (Few::default(), BTreeSet::new());
            for (insert, element) in steps {
                if insert {
                    few.insert(element);
                    tree.insert(element);
                } else {
                    few.remove(&element);
                    tree.remove(&element);
                }
                prop_assert!(few.iter().eq(&tree));
                prop_assert_eq!((few.first(), few.is_empty()), (tree.first(), tree.is_empty()));
            }
        }
    }
}
