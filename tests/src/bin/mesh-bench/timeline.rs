//! What was measured when, and how to compare it.

/// What one figure is about.
pub trait Subject: Copy + PartialEq {
    /// What it is compared with.
    #[must_use]
    fn baseline(self) -> Self;
}

/// All times that were measured, by block.
#[derive(Debug)]
pub struct Timeline<S> {
    entries: Vec<Entry<S>>,
}

/// What was measured of a subject in one block.
#[derive(Debug)]
struct Entry<S> {
    block: usize,
    subject: S,
    /// Nanoseconds, sorted.
    times: Vec<u32>,
}

/// A ratio to the neighbouring direct blocks.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Ratio {
    /// The median over the blocks, so that a disturbance counts in one block only.
    pub median: f64,
    /// Half of the distance between the quartiles.
    pub spread: f64,
}

/// A share of sorted values that is not above a percentile.
#[derive(Clone, Copy, Debug)]
pub enum Percentile {
    /// The median.
    P50,
    /// All but one of a hundred.
    P99,
}

// === impl Timeline ===

impl<S: Subject> Timeline<S> {
    /// Nothing yet.
    pub const fn new() -> Self {
        Self { entries: Vec::new() }
    }

    /// Adds what was measured in a block. Blocks are numbered as they come; `times` are in
    /// nanoseconds.
    pub fn add(&mut self, block: usize, subject: S, mut times: Vec<u32>) {
        times.sort_unstable();
        self.entries.push(Entry { block, subject, times });
    }

    /// All times of a subject, sorted.
    pub fn times(&self, subject: S) -> Vec<u32> {
        let mut times: Vec<_> = self.of(subject).flat_map(|entry| entry.times.clone()).collect();
        times.sort_unstable();
        times
    }

    /// A subject against its baseline: each of its blocks against the mean of the last such block
    /// before and the first after. The baseline itself is compared in the same way: what it differs
    /// from 1 is what the machine does to all ratios.
    pub fn ratio(&self, subject: S, percentile: Percentile) -> Ratio {
        let baseline: Vec<_> = self.of(subject.baseline()).collect();
        let mut ratios: Vec<_> = self
            .of(subject)
            .filter_map(|entry| {
                let before = baseline.iter().rfind(|base| base.block < entry.block);
                let after = baseline.iter().find(|base| base.block > entry.block);
                let near: Vec<_> =
                    before.into_iter().chain(after).map(|base| base.at(percentile)).collect();
                let mean = near.iter().sum::<f64>() / near.len() as f64;
                (mean > 0.0).then(|| entry.at(percentile) / mean)
            })
            .collect();
        ratios.sort_by(f64::total_cmp);
        let quarter = |quarters| ratios.get(ratios.len() * quarters / 4).copied();
        let [low, median, high] = [1, 2, 3].map(|quarters| quarter(quarters).unwrap_or_default());
        Ratio { median, spread: (high - low) / 2.0 }
    }

    fn of(&self, subject: S) -> impl Iterator<Item = &Entry<S>> {
        self.entries.iter().filter(move |entry| entry.subject == subject)
    }
}

// === impl Entry ===

impl<S> Entry<S> {
    fn at(&self, percentile: Percentile) -> f64 {
        percentile.of(&self.times).into()
    }
}

// === impl Percentile ===

impl Percentile {
    /// Of sorted values, by the nearest rank; 0 of none.
    pub fn of(self, sorted: &[u32]) -> u32 {
        let percent = match self {
            Self::P50 => 50,
            Self::P99 => 99,
        };
        let rank = (sorted.len() * percent).div_ceil(100);
        sorted.get(rank.saturating_sub(1)).copied().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone, Copy, PartialEq, Debug)]
    enum Dialled {
        Direct,
        One,
    }

    impl Subject for Dialled {
        fn baseline(self) -> Self {
            Self::Direct
        }
    }

    const ONE: Dialled = Dialled::One;

    #[test]
    fn percentiles_by_nearest_rank() {
        let times: Vec<_> = (1..=200).collect();
        assert_eq!((Percentile::P50.of(&times), Percentile::P99.of(&times)), (100, 198));
        assert_eq!(Percentile::P99.of(&[7]), 7);
        assert_eq!(Percentile::P50.of(&[]), 0);
    }

    #[test]
    fn only_neighbours_are_compared() {
        let mut timeline = Timeline::new();
        // The machine becomes three times as slow on the way.
        for (block, (direct, one)) in [(100, 110), (100, 110), (300, 330)].into_iter().enumerate() {
            timeline.add(block * 3, ONE.baseline(), vec![direct]);
            timeline.add(block * 3 + 1, ONE, vec![one]);
            timeline.add(block * 3 + 2, ONE.baseline(), vec![direct]);
        }
        let ratio = timeline.ratio(ONE, Percentile::P50);
        assert!((ratio.median - 1.1).abs() < 1e-9 && ratio.spread.abs() < 1e-9, "{ratio:?}");
    }

    #[test]
    fn a_disturbed_block_does_not_count() {
        let mut timeline = Timeline::new();
        for (block, time) in [(0, 10), (2, 10), (4, 10), (6, 10)] {
            timeline.add(block, ONE.baseline(), vec![time]);
        }
        for (block, time) in [(1, 11), (3, 5_000), (5, 11)] {
            timeline.add(block, ONE, vec![time]);
        }
        assert!((timeline.ratio(ONE, Percentile::P50).median - 1.1).abs() < 1e-9);
    }
}
