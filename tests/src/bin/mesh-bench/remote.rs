//! A process of this benchmark's own that works elsewhere, and is told what to do line by line.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use serde::de::DeserializeOwned;

/// The answer to an order of which nothing else is to be said.
pub const DONE: u8 = b'.';

/// Such a process. Dropped, it is killed and reaped.
pub struct Remote {
    name: String,
    child: Child,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
}

// === impl Remote ===

impl Remote {
    /// Starts it; `name` is what people read.
    ///
    /// # Errors
    ///
    /// The program cannot be started.
    pub fn start(name: &str, mut command: Command) -> Result<Self> {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let (to, from) = child.stdin.take().zip(child.stdout.take()).context("pipes")?;
        Ok(Self { name: name.to_owned(), child, to, from: BufReader::new(from) })
    }

    /// Tells it something that it does not answer.
    ///
    /// # Errors
    ///
    /// It has ended.
    pub fn tell(&mut self, text: &str) -> Result<()> {
        writeln!(self.to, "{text}").with_context(|| self.ended())
    }

    /// Has an order done that is answered by [`DONE`].
    ///
    /// # Errors
    ///
    /// It was not done; the process has said why.
    pub fn order(&mut self, order: &str) -> Result<()> {
        let answer = self.bytes(order, 1)?;
        ensure!(answer == [DONE], "{} answered {answer:?} to {order:?}", self.name);
        Ok(())
    }

    /// Has an order done that is answered by so many bytes.
    ///
    /// # Errors
    ///
    /// It was not done; the process has said why.
    pub fn bytes(&mut self, order: &str, answer: usize) -> Result<Vec<u8>> {
        self.tell(order)?;
        let mut bytes = vec![0; answer];
        self.from.read_exact(&mut bytes).with_context(|| self.ended())?;
        Ok(bytes)
    }

    /// A line of JSON that it says next.
    ///
    /// # Errors
    ///
    /// It has ended, after it has said why, or says something else.
    pub fn answer<T: DeserializeOwned>(&mut self) -> Result<T> {
        let mut line = String::new();
        self.from.read_line(&mut line)?;
        ensure!(!line.is_empty(), self.ended());
        serde_json::from_str(&line).with_context(|| format!("{} said {line:?}", self.name))
    }

    fn ended(&self) -> String {
        format!("{} ended early; its message is above", self.name)
    }
}

impl Drop for Remote {
    fn drop(&mut self) {
        // It is reaped, however it ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
