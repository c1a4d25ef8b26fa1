//! The alias method (A. J. Walker 1977; construction by M. D. Vose 1991): a weighted random choice
//! with one slot per backend and one random number per choice.
//!
//! A draw is a 32-bit random number `r`. Its product with the number of slots, 64 bits wide, gives
//! the column in its upper half and an even position inside the column in its lower half. The
//! position is compared with the column's threshold: below it the column's own backend is taken,
//! otherwise the one that the column names as its alias.

/// Weights go up to this.
pub const MAX_WEIGHT: u32 = 65_535;

/// One column of an alias table.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Column {
    /// Positions below this belong to the column's own backend, in units of 2^-32; a column that
    /// is all its own has itself as alias, so that no threshold of 2^32 is needed.
    pub threshold: u32,
    /// The column that takes the other positions.
    pub alias: u32,
}

/// The column of a draw, and the position inside it in units of 2^-32 of a column.
#[inline(always)]
#[must_use]
pub const fn column(random: u32, len: u32) -> (u32, u32) {
    let product = random as u64 * len as u64;
    ((product >> 32) as u32, (product & 0xffff_ffff) as u32)
}

/// Fills `columns` for the given weights.
///
/// The same weights give the same bytes. Weights above [`MAX_WEIGHT`] count as that. Returns
/// whether there is anything to choose: with no weight, or all of them 0, `columns` is left as it
/// is and nothing may be drawn.
///
/// `scratch` must be as long as `weights`, as must `columns`; what is longer is not used, and
/// `false` comes back when one is shorter.
///
/// The arithmetic is exact (integers only) up to the last step, where a threshold is rounded down
/// to a multiple of 2^-32 of a column.
pub fn build(weights: &[u32], columns: &mut [Column], scratch: &mut [Entry]) -> bool {
    let len = weights.len();
    if columns.len() < len || scratch.len() < len || len > u32::MAX as usize {
        return false;
    }
    let total: u64 = weights.iter().map(|&w| u64::from(w.min(MAX_WEIGHT))).sum();
    if total == 0 {
        return false;
    }
    // Scaled by the number of columns, a column holds exactly `total`. The scratch space holds two
    // stacks that grow towards each other: columns with room left, and columns with too much.
    let (mut small, mut large) = (0, len);
    for (index, &weight) in weights.iter().enumerate() {
        // Checked above: no index is larger than a `u32`.
        let column = u32::try_from(index).unwrap_or(u32::MAX);
        let entry = Entry { left: u64::from(weight.min(MAX_WEIGHT)) * len as u64, column };
        if entry.left < total {
            scratch[small] = entry;
            small += 1;
        } else {
            large -= 1;
            scratch[large] = entry;
        }
    }
    while small > 0 && large < len {
        small -= 1;
        let needy = scratch[small];
        let giver = &mut scratch[large];
        columns[needy.column as usize] =
            Column { threshold: share(needy.left, total), alias: giver.column };
        giver.left -= total - needy.left;
        if giver.left < total {
            let giver = *giver;
            large += 1;
            scratch[small] = giver;
            small += 1;
        }
    }
    // What is left is exactly full: integer arithmetic leaves no remainder on either stack.
    for entry in scratch[..small].iter().chain(&scratch[large..len]) {
        columns[entry.column as usize] = Column { threshold: 0, alias: entry.column };
    }
    true
}

/// Working space of [`build`].
#[derive(Clone, Copy, Debug, Default)]
pub struct Entry {
    left: u64,
    column: u32,
}

/// `part / whole` in units of 2^-32, rounded down, for `part < whole`.
fn share(part: u64, whole: u64) -> u32 {
    u32::try_from((u128::from(part) << 32) / u128::from(whole)).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::{vec, vec::Vec};

    fn table(weights: &[u32]) -> Option<Vec<Column>> {
        let mut columns = vec![Column::default(); weights.len()];
        let mut scratch = vec![Entry::default(); weights.len()];
        build(weights, &mut columns, &mut scratch).then_some(columns)
    }

    /// What each backend gets, in units of 2^-32 of a column.
    fn shares(columns: &[Column]) -> Vec<u64> {
        let mut shares = vec![0; columns.len()];
        for (index, column) in columns.iter().enumerate() {
            shares[index] += u64::from(column.threshold);
            shares[column.alias as usize] += (1 << 32) - u64::from(column.threshold);
        }
        shares
    }

    #[test]
    fn nothing_to_choose() {
        assert!(table(&[]).is_none());
        assert!(table(&[0, 0]).is_none());
    }

    #[test]
    fn weight_zero_gets_nothing() {
        let columns = table(&[0, 3, 0, 1]).expect("weights");
        let shares = shares(&columns);
        assert_eq!((shares[0], shares[2]), (0, 0));
        assert_eq!(shares[1], 3 << 32);
    }

    proptest! {
        #[test]
        fn every_backend_gets_its_share(weights in prop::collection::vec(0..=MAX_WEIGHT, 1..200)) {
            let Some(columns) = table(&weights) else {
                prop_assert!(weights.iter().all(|&w| w == 0));
                return Ok(());
            };
            let total: u128 = weights.iter().map(|&w| u128::from(w)).sum();
            for (share, &weight) in shares(&columns).into_iter().zip(&weights) {
                let exact = (u128::from(weight) * (weights.len() as u128)) << 32;
                let off = (u128::from(share) * total).abs_diff(exact);
                // Each column rounds once, by less than one unit.
                prop_assert!(off < total * weights.len() as u128, "{share} for {weight}");
            }
            prop_assert_eq!(table(&weights), Some(columns));
        }

        #[test]
        fn draws_stay_inside(random: u32, len in 1..=crate::Table::MAX_LEN) {
            prop_assert!(column(random, len).0 < len);
        }
    }

    #[test]
    fn draws_are_even() {
        // All draws of one size: each column gets the same number, give or take one.
        let len = 7;
        let mut seen = [0u32; 7];
        for step in 0..700_000u64 {
            let random = u32::try_from((step << 32) / 700_000).unwrap_or(u32::MAX);
            seen[column(random, len).0 as usize] += 1;
        }
        let (min, max) = (seen.iter().min(), seen.iter().max());
        assert!(max.zip(min).is_some_and(|(max, min)| max - min <= 2), "{seen:?}");
    }
}
