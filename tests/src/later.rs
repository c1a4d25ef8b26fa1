//! A client whose socket is older than its connection, which stays open for as long as a test wants.

use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};

use crate::client::Outcome;

/// A `mesh-client later` that has made its socket. Dropped, it is killed and reaped.
#[derive(Debug)]
pub struct Later(Child);

// === impl Later ===

impl Later {
    /// Starts it with what runs `mesh-client`.
    ///
    /// # Errors
    ///
    /// It cannot be run, or does not make a socket.
    pub fn start(mut command: Command, address: &str) -> Result<Self> {
        command.args(["later", address]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut later = Self(command.spawn()?);
        let mut line = [0; 5];
        later.0.stdout.as_mut().context("its output")?.read_exact(&mut line)?;
        ensure!(&line == b"made\n", "{line:?}");
        Ok(later)
    }

    /// Its process.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.0.id()
    }

    /// Lets it connect, after it has gone to this cgroup, if any. It is connected until this is
    /// dropped.
    ///
    /// # Errors
    ///
    /// It ends without saying what came of it. A connect that fails is an [`Outcome`].
    pub fn connect(&mut self, cgroup: Option<&Path>) -> Result<Outcome> {
        let input = self.0.stdin.as_mut().context("its input")?;
        let procs = cgroup.map(|cgroup| cgroup.join("cgroup.procs").display().to_string());
        writeln!(input, "{}", procs.unwrap_or_default())?;
        let output = BufReader::new(self.0.stdout.take().context("its output")?);
        let line = output.lines().next().context("it has ended")??;
        Ok(serde_json::from_str(&line)?)
    }
}

impl Drop for Later {
    fn drop(&mut self) {
        if let Ok(None) = self.0.try_wait() {
            let _ = self.0.kill();
        }
        let _ = self.0.wait();
    }
}
