//! Processes of a node: their output, and their end.

use std::io::{BufRead, BufReader, Read};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::sys::process::signal;

/// Nothing that is waited for takes longer than this, unless a limit is given.
pub const LIMIT: Duration = Duration::from_secs(30);

/// A process that runs in the background. Dropped, it is killed and reaped.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    log: Log,
    readers: Vec<JoinHandle<()>>,
}

/// Who gets the output of a process, besides its log.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Echo {
    /// Standard error too: of a test, only when it fails.
    On,
    /// Nobody.
    Off,
}

/// What a process has printed so far, on both streams.
#[derive(Clone, Debug, Default)]
pub struct Log(Arc<Mutex<Vec<String>>>);

// === impl Process ===

impl Process {
    /// Starts the command; `name` is what people read.
    ///
    /// # Errors
    ///
    /// The program cannot be started.
    pub fn spawn(name: &str, mut command: Command, echo: Echo) -> Result<Self> {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().with_context(|| cannot_start(&command))?;
        let log = Log::default();
        let mut readers = Vec::new();
        if let Some(stream) = child.stdout.take() {
            readers.push(log.follow(name, stream, echo));
        }
        if let Some(stream) = child.stderr.take() {
            readers.push(log.follow(name, stream, echo));
        }
        Ok(Self { name: name.to_owned(), child, log, readers })
    }

    /// Its process id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// What it has printed.
    #[must_use]
    pub fn log(&self) -> &Log {
        &self.log
    }

    /// How it ended, if it has.
    ///
    /// # Errors
    ///
    /// Those of waitpid(2).
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }

    /// Asks it to end, and waits until it has.
    ///
    /// # Errors
    ///
    /// It is still there after `limit`.
    pub fn terminate(&mut self, limit: Duration) -> Result<ExitStatus> {
        self.signal(libc::SIGTERM)?;
        self.wait(limit)
    }

    /// Kills it, and reaps it.
    ///
    /// # Errors
    ///
    /// Those of kill(2) and waitpid(2).
    pub fn kill(&mut self) -> Result<ExitStatus> {
        self.signal(libc::SIGKILL)?;
        self.wait(LIMIT)
    }

    /// Stops it in its tracks (its sockets stay, nobody serves them) or lets it go on.
    ///
    /// # Errors
    ///
    /// Those of kill(2).
    pub fn freeze(&mut self, frozen: bool) -> Result<()> {
        self.signal(if frozen { libc::SIGSTOP } else { libc::SIGCONT })
    }

    /// Waits until it has ended and all that it printed is in its log.
    ///
    /// # Errors
    ///
    /// It is still there after `limit`.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        let what = format!("the end of {}", self.name);
        let status = until(&what, limit, || Ok(self.child.try_wait()?))?;
        for reader in self.readers.drain(..) {
            // A reader ends with its stream and cannot panic; its result says nothing more.
            let _ = reader.join();
        }
        Ok(status)
    }

    /// Sends it a signal.
    ///
    /// # Errors
    ///
    /// Those of kill(2); it has ended already.
    pub fn signal(&mut self, number: libc::c_int) -> Result<()> {
        // Not reaped yet, so the id cannot have become somebody else's.
        ensure!(self.child.try_wait()?.is_none(), "{} has ended already", self.name);
        signal(self.child.id(), number).with_context(|| format!("cannot signal {}", self.name))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

// === impl Log ===

impl Log {
    fn follow(&self, name: &str, stream: impl Read + Send + 'static, echo: Echo) -> JoinHandle<()> {
        let log = self.clone();
        let name = name.to_owned();
        thread::spawn(move || {
            for line in BufReader::new(stream).split(b'\n').map_while(Result::ok) {
                let line = String::from_utf8_lossy(&line).into_owned();
                if echo == Echo::On {
                    eprintln!("[{name}] {line}");
                }
                log.lines().push(line);
            }
        })
    }

    /// Whether a line contains all of these texts.
    #[must_use]
    pub fn has(&self, texts: &[&str]) -> bool {
        self.lines().iter().any(|line| texts.iter().all(|text| line.contains(text)))
    }

    /// All lines so far.
    #[must_use]
    pub fn all(&self) -> Vec<String> {
        self.lines().clone()
    }

    /// The last lines.
    #[must_use]
    pub fn tail(&self) -> String {
        let lines = self.lines();
        lines[lines.len().saturating_sub(20)..].join("\n")
    }

    fn lines(&self) -> std::sync::MutexGuard<'_, Vec<String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === functions ===

/// Runs a command to its end, within [`LIMIT`].
///
/// # Errors
///
/// The program cannot be started, or takes too long (it is killed then).
pub fn run(command: Command) -> Result<Output> {
    run_within(command, LIMIT)
}

/// Runs a command to its end.
///
/// # Errors
///
/// The program cannot be started, or takes longer than `limit` (it is killed then).
pub fn run_within(mut command: Command, limit: Duration) -> Result<Output> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().with_context(|| cannot_start(&command))?;
    let stdout = child.stdout.take().map(drain);
    let stderr = child.stderr.take().map(drain);
    let ended = until("its end", limit, || Ok(child.try_wait()?));
    if ended.is_err() {
        child.kill()?;
        child.wait()?;
    }
    let collect = |reader: Option<JoinHandle<Vec<u8>>>| {
        reader.and_then(|reader| reader.join().ok()).unwrap_or_default()
    };
    let (stdout, stderr) = (collect(stdout), collect(stderr));
    let status = ended
        .with_context(|| format!("{command:?}: {}", String::from_utf8_lossy(&stderr).trim()))?;
    Ok(Output { status, stdout, stderr })
}

/// Reads a stream to its end, on a thread, so that the writer never waits for us.
fn drain(mut stream: impl Read + Send + 'static) -> JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        // What was read before an error is still worth showing.
        let _ = stream.read_to_end(&mut bytes);
        bytes
    })
}

/// Runs a command that must succeed; gives what it printed, without the last line break.
///
/// # Errors
///
/// As [`run`], or it fails: then with what it printed on standard error.
pub fn stdout(command: Command) -> Result<String> {
    let description = format!("{command:?}");
    let output = run(command)?;
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        bail!("{description}: {}: {}", output.status, stderr.trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim_end().to_owned())
}

/// Waits until `attempt` gives a value.
///
/// # Errors
///
/// Those of `attempt`, or it gives none within `limit`: then naming `what`.
pub fn until<T>(
    what: &str,
    limit: Duration,
    mut attempt: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let started = Instant::now();
    loop {
        if let Some(value) = attempt()? {
            return Ok(value);
        }
        ensure!(started.elapsed() < limit, "waited {limit:?} in vain for {what}");
        thread::sleep(Duration::from_millis(2));
    }
}

/// A binary of this project: in `$MESH_TEST_BIN_DIR`, or beside or above the running one.
///
/// # Errors
///
/// It has not been built.
pub fn binary(name: &str) -> Result<PathBuf> {
    let exe = std::env::current_exe()?;
    let given = std::env::var_os("MESH_TEST_BIN_DIR").map(PathBuf::from);
    let places = given.into_iter().chain(exe.ancestors().skip(1).take(2).map(PathBuf::from));
    for place in places {
        let path = place.join(name);
        if path.is_file() {
            return Ok(path);
        }
    }
    bail!("{name} has not been built: run `cargo xtask test`, or cargo build -p mesh-tests --bins")
}

fn cannot_start(command: &Command) -> String {
    let program = command.get_program().to_string_lossy();
    let package = match &*program {
        "nginx" => "nginx-light",
        "redis-cli" => "redis-tools",
        "ip" => "iproute2",
        "nft" => "nftables",
        other => other,
    };
    format!("cannot start {program}: if it is missing, `apt-get install {package}`")
}
