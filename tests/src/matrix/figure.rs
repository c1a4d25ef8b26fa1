//! What a row has measured, beside what it may be at the most.

use std::time::Duration;

use serde::Serialize;

/// A figure of a row.
#[derive(Clone, Debug, Serialize)]
pub struct Figure {
    /// Of what.
    pub of: Of,
    /// What was measured.
    pub value: Value,
    /// What it may be.
    pub bound: Bound,
}

/// What is measured.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Of {
    /// From the failure to the start of the last connect that failed there and was no try.
    Last,
    /// Failed connects of the client that had most.
    Failed,
    /// Connects that failed there though it was out: one at a time, after each ejection.
    Tries,
    /// From when it works again to its first answer; of several, the longest.
    Back,
    /// Endpoints that nothing was wrong with, and that were out for anybody or unhealthy.
    False,
    /// Anything else, which has no column of its own.
    Other(&'static str),
}

/// What is measured, in its unit.
#[derive(Clone, Copy, PartialEq, PartialOrd, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Value {
    /// Seconds.
    Seconds(f64),
    /// A number of something.
    Count(u64),
    /// A part of a whole.
    Share(f64),
    /// A number of something, on average.
    Mean(f64),
    /// MiB of memory.
    Mebibytes(f64),
}

/// What a figure may be.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Bound {
    /// No more than this.
    Most(Value),
    /// No less than this.
    Least(Value),
    /// Anything: it says how much was measured.
    None,
}

// === impl Figure ===

impl Figure {
    /// A time, and the longest that it may be.
    #[must_use]
    pub fn time(of: Of, value: Duration, most: Duration) -> Self {
        Self { of, value: value.into(), bound: Bound::Most(most.into()) }
    }

    /// A number, and the largest that it may be.
    #[must_use]
    pub const fn count(of: Of, value: u64, most: u64) -> Self {
        Self { of, value: Value::Count(value), bound: Bound::Most(Value::Count(most)) }
    }

    /// Anything, and the most that it may be.
    #[must_use]
    pub const fn most(of: Of, value: Value, most: Value) -> Self {
        Self { of, value, bound: Bound::Most(most) }
    }

    /// Something that is only told.
    #[must_use]
    pub const fn told(name: &'static str, value: Value) -> Self {
        Self { of: Of::Other(name), value, bound: Bound::None }
    }

    /// The same, where recovery may take so much longer.
    #[must_use]
    pub fn late(mut self, late: Duration) -> Self {
        if let (Of::Back, Bound::Most(Value::Seconds(most))) = (&self.of, &mut self.bound) {
            *most += late.as_secs_f64();
        }
        self
    }

    /// Whether it is what it may be.
    #[must_use]
    pub fn holds(&self) -> bool {
        match self.bound {
            Bound::Most(most) => self.value <= most,
            Bound::Least(least) => self.value >= least,
            Bound::None => true,
        }
    }

    const fn broken(&self) -> &'static str {
        if matches!(self.bound, Bound::Least(_)) { "<" } else { ">" }
    }

    /// How far it is from its bound, to compare figures of the same kind.
    fn badness(&self) -> f64 {
        match self.bound {
            Bound::Least(_) => -self.value.number(),
            Bound::Most(_) | Bound::None => self.value.number(),
        }
    }

    /// `1.20 ≤ 2.70 s`, or `3.10 > 2.70 s` when it is not what it may be.
    #[must_use]
    pub fn text(&self) -> String {
        let text = |holds, bound: Value| {
            let sign = if self.holds() { holds } else { self.broken() };
            format!("{} {sign} {}", self.value.bare(bound), bound.text())
        };
        match self.bound {
            Bound::Most(most) => text("≤", most),
            Bound::Least(least) => text("≥", least),
            Bound::None => self.value.text(),
        }
    }
}

/// Of the figures of several runs of one row, the worst of each kind.
#[must_use]
pub fn worst(runs: Vec<Vec<Figure>>) -> Vec<Figure> {
    let mut all: Vec<Figure> = Vec::new();
    for figure in runs.into_iter().flatten() {
        match all.iter_mut().find(|known| known.of == figure.of) {
            Some(known) if known.badness() < figure.badness() => *known = figure,
            Some(_) => {}
            None => all.push(figure),
        }
    }
    all
}

// === impl Value ===

impl Value {
    fn number(self) -> f64 {
        match self {
            Self::Seconds(number)
            | Self::Share(number)
            | Self::Mean(number)
            | Self::Mebibytes(number) => number,
            Self::Count(count) => count as f64,
        }
    }

    fn text(self) -> String {
        match self {
            Self::Seconds(seconds) => format!("{seconds:.2} s"),
            Self::Count(count) => count.to_string(),
            Self::Share(share) => format!("{share:.3}"),
            Self::Mean(mean) => format!("{mean:.1}"),
            Self::Mebibytes(mebibytes) => format!("{mebibytes:.1} MiB"),
        }
    }

    /// Without the unit, which follows with the bound.
    fn bare(self, bound: Self) -> String {
        debug_assert_eq!(std::mem::discriminant(&self), std::mem::discriminant(&bound));
        let text = self.text();
        text.split(' ').next().unwrap_or_default().to_owned()
    }
}

impl From<Duration> for Value {
    fn from(time: Duration) -> Self {
        Self::Seconds(time.as_secs_f64())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn says_what_it_may_be() {
        let figure = Figure::time(Of::Back, Duration::from_millis(1_234), Duration::from_secs(2));
        assert_eq!(figure.text(), "1.23 ≤ 2.00 s");
        assert!(figure.holds());
        let figure = Figure::count(Of::Failed, 4, 3);
        assert_eq!(figure.text(), "4 > 3");
        assert!(!figure.holds());
        let bound = Bound::Least(Value::Share(0.5));
        let figure = Figure { of: Of::Other("share"), value: Value::Share(0.25), bound };
        assert!(!figure.holds());
    }

    #[test]
    fn the_worst_counts() {
        let least = |share| Figure {
            of: Of::Other("share"),
            value: Value::Share(share),
            bound: Bound::Least(Value::Share(0.5)),
        };
        let run = |count, share| vec![Figure::count(Of::Failed, count, 9), least(share)];
        let all = worst(vec![run(3, 0.7), run(5, 0.8), run(4, 0.6)]);
        let values: Vec<_> = all.iter().map(|figure| figure.value).collect();
        assert_eq!(values, [Value::Count(5), Value::Share(0.6)]);
    }
}
