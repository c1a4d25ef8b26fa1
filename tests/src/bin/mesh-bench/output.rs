//! Where results go, and what says on a terminal how far it has come.

use std::env;
use std::fs;
use std::io::{self, IsTerminal as _, Write as _};
use std::path::PathBuf;

use anyhow::{Context as _, Result};
use serde::Serialize;

/// Where xtask says that results are kept.
const DIRECTORY_VARIABLE: &str = "MESH_BENCH_DIR";

/// How results are shown.
#[derive(Clone, Copy, clap::Args)]
pub struct Output {
    /// One JSON object instead of tables.
    #[arg(long)]
    json: bool,
}

/// What says how far it has come.
pub struct Progress {
    shown: bool,
    steps: usize,
}

// === impl Output ===

impl Output {
    /// Shows a result, and keeps it as JSON in place of the one before.
    ///
    /// # Errors
    ///
    /// It cannot be written.
    pub fn publish<T: Serialize>(self, name: &str, result: &T, print: fn(&T)) -> Result<()> {
        let json = serde_json::to_string_pretty(result)?;
        if self.json {
            println!("{json}");
        } else {
            print(result);
        }
        let Some(directory) = env::var_os(DIRECTORY_VARIABLE).map(PathBuf::from) else {
            return Ok(());
        };
        let file = directory.join(format!("{name}.json"));
        fs::create_dir_all(&directory)
            .and_then(|()| fs::write(&file, json + "\n"))
            .with_context(|| format!("cannot keep the result in {}", file.display()))?;
        eprintln!("Kept in {}.", file.display());
        Ok(())
    }
}

// === impl Progress ===

impl Progress {
    /// Of so many steps.
    pub fn of(steps: usize, output: Output) -> Self {
        Self { shown: !output.json && io::stderr().is_terminal(), steps }
    }

    /// A step begins; they are counted from 0.
    ///
    /// # Errors
    ///
    /// The terminal has gone.
    pub fn say(&self, step: usize, what: &str) -> Result<()> {
        if self.shown {
            // To the end of the line: what was said before may be longer.
            eprint!("\r\x1b[K{} of {}: {what}", step + 1, self.steps);
            io::stderr().flush()?;
        }
        Ok(())
    }

    /// All is done.
    pub fn end(&self) {
        if self.shown {
            eprint!("\r\x1b[K");
        }
    }
}
