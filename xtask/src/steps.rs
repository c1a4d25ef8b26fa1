//! Steps that are run one after another, and how long each took.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::process;

/// How long the steps took, and which of them failed.
#[derive(Default)]
pub(crate) struct Times {
    steps: Vec<(&'static str, Duration)>,
    failed: Vec<&'static str>,
}

impl Times {
    /// Runs steps, and says how long they took, also when one fails.
    ///
    /// # Errors
    ///
    /// That of the first step that fails; which steps have failed, of those that others do not wait for.
    pub(crate) fn of(steps: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        let mut times = Self::default();
        let result = steps(&mut times);
        times.print();
        result?;
        if !times.failed.is_empty() {
            bail!("failed: {}; what each said is above", times.failed.join(", "));
        }
        Ok(())
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
        self.steps.push((name, start.elapsed()));
        result
    }

    /// Runs a step that no later one needs: when it fails, that is told, and the others run all the same.
    pub(crate) fn apart(&mut self, name: &'static str, f: impl FnOnce() -> Result<()>) {
        if let Err(error) = self.step(name, f) {
            eprintln!("error: {name}: {error:#}");
            self.failed.push(name);
        }
    }

    fn print(&self) {
        eprintln!("\nTime per step:");
        for (name, duration) in &self.steps {
            let failed = if self.failed.contains(name) { "  FAILED" } else { "" };
            eprintln!("  {name:30} {:>8}{failed}", process::seconds(*duration));
        }
        let total = self.steps.iter().map(|(_, duration)| *duration).sum();
        eprintln!("  {:30} {:>8}", "all", process::seconds(total));
    }
}
