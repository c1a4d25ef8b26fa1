//! Backends that die in many ways, and clients that notice when and how: for the tests of ejection.
//!
//! [`server`] and [`storm`], [`aborts`] run in processes of their own (`mesh-mortal`); [`Backend`]
//! and [`Clients`] are what a test holds of them.

pub mod aborts;
pub mod lan;
pub mod mixture;
pub mod scene;
pub mod server;
pub mod storm;

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context, Result, ensure};

use crate::process;
use server::Manner;
use storm::Trial;

/// A backend: a process of its own. Dropped, it is killed.
#[derive(Debug)]
pub struct Backend {
    name: String,
    child: Child,
    orders: ChildStdin,
    answers: BufReader<ChildStdout>,
}

/// A process that connects without pause. Dropped, it is killed.
#[derive(Debug)]
pub struct Clients {
    child: Child,
    record: PathBuf,
}

/// How clients connect.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// Threads, each with one connect at a time.
    pub threads: usize,
    /// Between the end of one and the start of the next, in microseconds.
    pub pause: u64,
    /// For how long a connection stays open after the answer, in milliseconds. The thread goes on
    /// meanwhile.
    pub hold: u64,
    /// Whether connections are closed by a reset (`SO_LINGER` 0).
    pub reset: bool,
    /// How many connects a thread makes; 0: until it is told to stop.
    pub times: u64,
}

// === impl Backend ===

impl Backend {
    /// Starts one with a command that will be `mesh-mortal` where the backend is to live, and waits
    /// until it serves.
    ///
    /// # Errors
    ///
    /// It does not.
    pub fn start(
        mut command: Command,
        name: &str,
        place: SocketAddr,
        manner: Manner,
    ) -> Result<Self> {
        command.args(["serve", "--manner", manner.name(), name, &place.to_string()]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().context("cannot start mesh-mortal")?;
        let orders = child.stdin.take().context("piped")?;
        let answers = BufReader::new(child.stdout.take().context("piped")?);
        let mut backend = Self { name: name.to_owned(), child, orders, answers };
        backend.hear("open")?;
        Ok(backend)
    }

    /// Closes its port.
    ///
    /// # Errors
    ///
    /// It has ended.
    pub fn close(&mut self) -> Result<()> {
        self.order("close", "closed")
    }

    /// Opens its port again.
    ///
    /// # Errors
    ///
    /// It has ended, or the port is somebody else's.
    pub fn open(&mut self) -> Result<()> {
        self.order("open", "open")
    }

    /// Has it treat connections otherwise from now on.
    ///
    /// # Errors
    ///
    /// It has ended.
    pub fn behave(&mut self, manner: Manner) -> Result<()> {
        self.order(manner.name(), manner.name())
    }

    /// Kills it with SIGKILL.
    ///
    /// # Errors
    ///
    /// Those of kill(2) and waitpid(2).
    pub fn kill(mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    fn order(&mut self, order: &str, answer: &str) -> Result<()> {
        writeln!(self.orders, "{order}").with_context(|| format!("{} has ended", self.name))?;
        self.hear(answer)
    }

    fn hear(&mut self, expected: &str) -> Result<()> {
        let mut line = String::new();
        self.answers.read_line(&mut line)?;
        ensure!(line.trim_end() == expected, "{} said {line:?}, not {expected}", self.name);
        Ok(())
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        // It may have been killed before.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

// === impl Clients ===

impl Clients {
    /// Starts them with a command that will be `mesh-mortal` where they are to live. `record` is a
    /// file of theirs.
    ///
    /// # Errors
    ///
    /// The program cannot be started.
    pub fn start(
        mut command: Command,
        target: SocketAddr,
        pace: Pace,
        record: PathBuf,
    ) -> Result<Self> {
        command.args(["storm", &target.to_string(), "--record"]).arg(&record);
        command.arg("--threads").arg(pace.threads.to_string());
        command.arg("--pause").arg(pace.pause.to_string());
        command.arg("--hold").arg(pace.hold.to_string());
        command.arg("--times").arg(pace.times.to_string());
        if pace.reset {
            command.arg("--reset");
        }
        let child = command.stdin(Stdio::piped()).spawn().context("cannot start mesh-mortal")?;
        Ok(Self { child, record })
    }

    /// Tells them to stop, and gives what they have seen, by the start of each connect.
    ///
    /// # Errors
    ///
    /// They failed otherwise than in connecting.
    pub fn finish(mut self) -> Result<Vec<Trial>> {
        drop(self.child.stdin.take());
        self.result()
    }

    /// Waits until they have made all their connects; otherwise as [`Clients::finish`].
    ///
    /// # Errors
    ///
    /// As [`Clients::finish`].
    pub fn wait(mut self) -> Result<Vec<Trial>> {
        // Not closed before they have ended.
        let orders = self.child.stdin.take();
        let result = self.result();
        drop(orders);
        result
    }

    /// Kills them with SIGKILL, whatever they are doing.
    ///
    /// # Errors
    ///
    /// Those of kill(2) and waitpid(2).
    pub fn kill(mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    fn result(&mut self) -> Result<Vec<Trial>> {
        let status =
            process::until("the end of clients", process::LIMIT, || Ok(self.child.try_wait()?))?;
        ensure!(status.success(), "clients failed: {status}");
        let text = fs::read_to_string(&self.record).context("cannot read the record")?;
        let mut trials: Vec<Trial> =
            text.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
        trials.sort_by_key(|trial| trial.start);
        Ok(trials)
    }
}

impl Drop for Clients {
    fn drop(&mut self) {
        // They may have ended before.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

// === impl Pace ===

impl Pace {
    /// Four threads, a connect of each about every two milliseconds.
    pub const BRISK: Self = Self { threads: 4, pause: 1_500, hold: 0, reset: false, times: 0 };

    /// 100 connects a second, also while many of them wait for an answer that does not come: as many threads,
    /// each of which has time.
    pub const STEADY: Self =
        Self { threads: 100, pause: 1_000_000, hold: 0, reset: false, times: 0 };
}
