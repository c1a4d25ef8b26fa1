//! Steps that are run one after another, and how long each took.

use std::time::{Duration, Instant};

use anyhow::Result;

use crate::process;

/// How long the steps took.
pub(crate) struct Times(Vec<(&'static str, Duration)>);

impl Times {
    /// Runs steps, and says how long they took, also when one fails.
    ///
    /// # Errors
    ///
    /// That of the first step that fails.
    pub(crate) fn of(steps: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        let mut times = Self(Vec::new());
        let result = steps(&mut times);
        times.print();
        result
    }

    /// Runs a step.
    ///
    /// # Errors
    ///
    /// That of the step.
    pub(crate) fn step<T>(
        &mut self,
        name: &'static str,
        f: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        let start = Instant::now();
        let result = process::step(name, f);
        self.0.push((name, start.elapsed()));
        result
    }

    fn print(&self) {
        eprintln!("\nTime per step:");
        for (name, duration) in &self.0 {
            eprintln!("  {name:30} {:>8}", process::seconds(*duration));
        }
        let total = self.0.iter().map(|(_, duration)| *duration).sum();
        eprintln!("  {:30} {:>8}", "all", process::seconds(total));
    }
}
