//! The agent, used as a person would: its files, its command line, its API.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fmt::Write as _;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::node::Namespace;
use crate::process::{self, Echo, LIMIT, Log, Process, until};

/// An agent with its own files and cgroup; running or not.
#[derive(Debug)]
pub struct Agent {
    directory: PathBuf,
    cgroup: PathBuf,
    namespace: Namespace,
    echo: Echo,
    process: Option<Process>,
    /// Whether balancing goes on when it ends.
    pub stays: bool,
    /// Whether it is of another map layout, when it is started the next time.
    pub other_layout: bool,
    /// More arguments of `run`.
    pub arguments: Vec<&'static str>,
    /// More variables of its environment, and of nobody else's.
    pub environment: Vec<(&'static str, PathBuf)>,
}

/// A service file that is whole and not in its place yet.
#[derive(Debug)]
pub struct Staged {
    new: PathBuf,
    place: PathBuf,
}

/// What the tests read of `status -o json`.
#[derive(Clone, Debug, Deserialize)]
pub struct Status {
    /// Whether the node balances what its sources define.
    pub ready: bool,
    /// Why not, or what else needs attention.
    pub reasons: Vec<String>,
    /// Kernel programs.
    pub programs: Vec<Program>,
    /// Sources.
    pub sources: Vec<Source>,
    /// Counters.
    pub counters: Counters,
}

/// A kernel program in `status`.
#[derive(Clone, Debug, Deserialize)]
pub struct Program {
    /// Its name.
    pub name: String,
    /// Where it is attached.
    pub hook: String,
    /// Whether it is attached.
    pub attached: bool,
}

/// A source in `status`.
#[derive(Clone, Debug, Deserialize)]
pub struct Source {
    /// How many services it defines.
    pub services: usize,
    /// What is wrong with it.
    pub error: Option<String>,
}

/// Counters in `status`.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
pub struct Counters {
    /// Connects that were given a backend.
    pub balanced: u64,
    /// Connects refused, by reason.
    pub refused: Vec<Refused>,
}

/// Connects refused for one reason.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
pub struct Refused {
    /// The reason's name.
    pub reason: String,
    /// How many.
    pub count: u64,
}

/// What the tests read of `backends -o json`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, Deserialize)]
pub struct Backend {
    /// `ip:port`.
    pub address: String,
    /// Health state.
    pub state: String,
    /// Why.
    pub reason: String,
    /// Weight.
    pub weight: u32,
}

// === impl Agent ===

impl Agent {
    /// Writes the files of an agent that is not running yet.
    ///
    /// # Errors
    ///
    /// A file cannot be written.
    pub fn new(
        directory: &Path,
        cgroup: &Path,
        namespace: Namespace,
        virtual_ips: &[String],
        echo: Echo,
    ) -> Result<Self> {
        let agent = Self {
            directory: directory.to_owned(),
            cgroup: cgroup.to_owned(),
            namespace,
            echo,
            process: None,
            stays: false,
            other_layout: false,
            arguments: Vec::new(),
            environment: Vec::new(),
        };
        fs::create_dir_all(agent.services_directory())?;
        fs::write(agent.file(), agent.yaml(virtual_ips))?;
        Ok(agent)
    }

    /// Starts it and waits until it is ready.
    ///
    /// # Errors
    ///
    /// It ends, or is not ready within a bounded time: then with what it printed last.
    pub fn start(&mut self) -> Result<()> {
        self.launch()?;
        self.until_ready()
    }

    /// Starts it, and does not wait.
    ///
    /// # Errors
    ///
    /// It is running already, or has not been built.
    pub fn launch(&mut self) -> Result<()> {
        ensure!(self.process.is_none(), "the agent is running already");
        let name = self.directory.file_name().and_then(OsStr::to_str).unwrap_or("agent");
        self.process = Some(Process::spawn(name, self.run_command()?, self.echo)?);
        Ok(())
    }

    /// Waits until it is ready.
    ///
    /// # Errors
    ///
    /// As [`Agent::start`].
    pub fn until_ready(&mut self) -> Result<()> {
        let socket = self.socket();
        let process = self.process.as_mut().context("the agent is not running")?;
        let (log, mut last) = (process.log().clone(), String::new());
        until("the agent to be ready", LIMIT, || {
            if let Some(status) = process.ended()? {
                let error = anyhow!("the agent ended ({status}):\n{}", log.tail());
                return Ok(Some(Err(error)));
            }
            match request::<Status>(&socket, "GET", "/v1/status") {
                Ok(status) if status.ready => return Ok(Some(Ok(()))),
                Ok(status) => last = format!("{:?}", status.reasons),
                Err(error) => last = format!("{error:#}"),
            }
            Ok(None)
        })
        .with_context(|| format!("last answer: {last}\n{}", log.tail()))?
    }

    /// `mesh-agent run` with this agent's file, in the namespace but outside the cgroup.
    ///
    /// # Errors
    ///
    /// The agent has not been built.
    pub fn run_command(&self) -> Result<Command> {
        let binary = if self.other_layout { process::binary(OTHER_LAYOUT)? } else { binary()? };
        let mut command = self.namespace.pinning(binary);
        command.arg("run").arg("--config").arg(self.file());
        if !self.stays {
            command.arg("--detach-on-exit");
        }
        command.args(&self.arguments).envs(self.environment.iter().cloned());
        Ok(command)
    }

    /// Stops it with SIGTERM; it must end well.
    ///
    /// # Errors
    ///
    /// It is not running, does not end in time, or its exit status is not 0.
    pub fn stop(&mut self) -> Result<()> {
        let mut process = self.process.take().context("the agent is not running")?;
        let status = process.terminate(Duration::from_secs(10))?;
        ensure!(status.success(), "the agent ended with {status}:\n{}", process.log().tail());
        Ok(())
    }

    /// Kills it with SIGKILL.
    ///
    /// # Errors
    ///
    /// It is not running.
    pub fn kill(&mut self) -> Result<()> {
        self.process.take().context("the agent is not running")?.kill().map(drop)
    }

    /// The process id, while it runs.
    ///
    /// # Errors
    ///
    /// It is not running.
    pub fn id(&self) -> Result<u32> {
        Ok(self.process.as_ref().context("the agent is not running")?.id())
    }

    /// What it has printed.
    ///
    /// # Errors
    ///
    /// It is not running.
    pub fn log(&self) -> Result<&Log> {
        Ok(self.process.as_ref().context("the agent is not running")?.log())
    }

    /// `mesh-agent --socket … ARGUMENTS`, not run yet.
    ///
    /// # Errors
    ///
    /// The agent has not been built.
    pub fn cli(&self, arguments: &[&str]) -> Result<Command> {
        let mut command = self.namespace.pinning(binary()?);
        command.arg("--socket").arg(self.socket()).args(arguments);
        Ok(command)
    }

    /// Runs `mesh-agent --socket … ARGUMENTS` to its end.
    ///
    /// # Errors
    ///
    /// It cannot be started or does not end; its own failure is in the output.
    pub fn mesh(&self, arguments: &[&str]) -> Result<Output> {
        process::run(self.cli(arguments)?)
    }

    /// Runs `mesh-agent --socket … ARGUMENTS -o json`, which must succeed.
    ///
    /// # Errors
    ///
    /// It fails, or prints something else.
    pub fn json<T: DeserializeOwned>(&self, arguments: &[&str]) -> Result<T> {
        let mut command = self.cli(&["-o", "json"])?;
        command.args(arguments);
        let text = process::stdout(command)?;
        serde_json::from_str(&text).with_context(|| format!("{arguments:?} printed {text}"))
    }

    /// Asks the API. `path` begins with `/v1/`.
    ///
    /// # Errors
    ///
    /// Nobody answers, or not with success, or with something else.
    pub fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
        request(&self.socket(), "GET", path)
    }

    /// Has the API change something, as `drain` does. `path` begins with `/v1/`.
    ///
    /// # Errors
    ///
    /// As [`Agent::get`].
    pub fn post<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
        request(&self.socket(), "POST", path)
    }

    /// What the API says about the agent.
    ///
    /// # Errors
    ///
    /// As [`Agent::get`].
    pub fn status(&self) -> Result<Status> {
        self.get("/v1/status")
    }

    /// What the kernel holds of a service, sorted by address.
    ///
    /// # Errors
    ///
    /// As [`Agent::get`].
    pub fn backends(&self, service: &str) -> Result<Vec<Backend>> {
        let mut backends: Vec<Backend> = self.get(&format!("/v1/backends?service={service}"))?;
        backends.sort();
        Ok(backends)
    }

    /// Waits until the backends of a service satisfy `wanted`.
    ///
    /// # Errors
    ///
    /// They do not within a bounded time: then with what they were last.
    pub fn until_backends(&self, service: &str, wanted: impl Fn(&[Backend]) -> bool) -> Result<()> {
        let mut last = String::new();
        until("the backends of a service", LIMIT, || {
            let backends = self.backends(service).inspect_err(|error| last = error.to_string());
            // Before the first definition is applied, the service is unknown.
            let Ok(backends) = backends else { return Ok(None) };
            last = format!("{backends:?}");
            Ok(wanted(&backends).then_some(()))
        })
        .with_context(|| format!("{service}: {last}"))
    }

    /// Waits until the backends of a service are exactly at these places.
    ///
    /// # Errors
    ///
    /// As [`Agent::until_backends`].
    pub fn until_places(&self, service: &str, places: &[&str]) -> Result<()> {
        let mut wanted = places.to_vec();
        wanted.sort_unstable();
        self.until_backends(service, |backends| {
            backends.iter().map(|backend| &*backend.address).eq(wanted.iter().copied())
        })
    }

    /// Waits until a source reports an error of which one line contains all these texts; gives the
    /// whole error.
    ///
    /// # Errors
    ///
    /// It does not within a bounded time: then with what it reported last.
    pub fn until_error(&self, texts: &[&str]) -> Result<String> {
        let mut last = None;
        until(&format!("an error with {texts:?}"), LIMIT, || {
            last = self.errors()?;
            let has = |line: &str| texts.iter().all(|text| line.contains(text));
            Ok(last.clone().filter(|error| error.lines().any(has)))
        })
        .with_context(|| format!("reported: {last:?}"))
    }

    /// Waits until no source reports an error.
    ///
    /// # Errors
    ///
    /// One does for longer than a bounded time.
    pub fn until_no_error(&self) -> Result<()> {
        let mut last = None;
        until("the error to be gone", LIMIT, || {
            last = self.errors()?;
            Ok(last.is_none().then_some(()))
        })
        .with_context(|| format!("reported: {last:?}"))
    }

    /// Waits until there is no such service.
    ///
    /// # Errors
    ///
    /// It is there for longer than a bounded time.
    pub fn until_gone(&self, service: &str) -> Result<()> {
        until("a service to be gone", LIMIT, || {
            let services: Vec<serde_json::Value> = self.get("/v1/services")?;
            let gone = services.iter().all(|found| found["name"] != service);
            Ok(gone.then_some(()))
        })
    }

    /// What the sources report as wrong.
    fn errors(&self) -> Result<Option<String>> {
        let errors: Vec<_> =
            self.status()?.sources.into_iter().filter_map(|source| source.error).collect();
        Ok((!errors.is_empty()).then(|| errors.join("\n")))
    }

    /// How many connects were refused so far, by reason.
    ///
    /// # Errors
    ///
    /// As [`Agent::get`].
    pub fn refused_by_reason(&self) -> Result<BTreeMap<String, u64>> {
        let refused = self.status()?.counters.refused;
        Ok(refused.into_iter().map(|refused| (refused.reason, refused.count)).collect())
    }

    /// Replaces a service file in one step, as one should.
    ///
    /// # Errors
    ///
    /// Those of writing and renaming.
    pub fn write_services(&self, name: &str, yaml: &str) -> Result<()> {
        self.stage_services(name, yaml)?.publish()
    }

    /// Writes what is to replace a service file, which the agent does not read yet.
    ///
    /// # Errors
    ///
    /// Those of writing.
    pub fn stage_services(&self, name: &str, yaml: &str) -> Result<Staged> {
        let directory = self.services_directory();
        let staged =
            Staged { new: directory.join(format!(".{name}.new")), place: directory.join(name) };
        fs::write(&staged.new, yaml)?;
        Ok(staged)
    }

    /// Adds lines to the agent file, which the agent reads when it starts.
    ///
    /// # Errors
    ///
    /// Those of writing.
    pub fn append(&self, yaml: &str) -> Result<()> {
        let mut file = fs::OpenOptions::new().append(true).open(self.file())?;
        Ok(file.write_all(yaml.as_bytes())?)
    }

    /// Where the service files are.
    #[must_use]
    pub fn services_directory(&self) -> PathBuf {
        self.directory.join("services.d")
    }

    /// The API's socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.directory.join("agent.sock")
    }

    /// The agent file.
    #[must_use]
    pub fn file(&self) -> PathBuf {
        self.directory.join("agent.yaml")
    }

    /// Where it pins: a place that is mounted in the namespace only.
    #[must_use]
    pub fn pins(&self) -> PathBuf {
        // Two agents in one namespace have directories of their own.
        let name = self.directory.file_name().and_then(OsStr::to_str).unwrap_or("agent");
        Path::new("/sys/fs/bpf").join(name)
    }

    fn yaml(&self, virtual_ips: &[String]) -> String {
        let directory = self.directory.display();
        let mut yaml = String::from("node: {name: test}\n");
        // Writing to a string cannot fail.
        let _ = writeln!(yaml, "cgroup: {}", self.cgroup.display());
        let _ = writeln!(yaml, "socket: {directory}/agent.sock");
        let _ = writeln!(yaml, "pin-dir: {}", self.pins().display());
        if !virtual_ips.is_empty() {
            let _ = writeln!(yaml, "virtual-ips: {virtual_ips:?}");
        }
        let _ = writeln!(yaml, "sources:\n- files: {{directory: {directory}/services.d}}");
        yaml
    }
}

// === impl Staged ===

impl Staged {
    /// Renames it into its place.
    ///
    /// # Errors
    ///
    /// Those of renaming.
    pub fn publish(self) -> Result<()> {
        Ok(fs::rename(self.new, self.place)?)
    }
}

// === functions ===

/// An agent of another map layout, beside the binaries of this crate.
const OTHER_LAYOUT: &str = "mesh-agent-other";

/// The agent's binary: `$MESH_AGENT_BIN`, or beside those of this crate.
fn binary() -> Result<PathBuf> {
    match std::env::var_os("MESH_AGENT_BIN") {
        Some(path) => Ok(path.into()),
        None => process::binary("mesh-agent"),
    }
}

/// A request over the unix socket, as `curl --unix-socket` would make it.
fn request<T: DeserializeOwned>(socket: &Path, method: &str, path: &str) -> Result<T> {
    let mut stream = UnixStream::connect(socket)
        .with_context(|| format!("nobody answers on {}", socket.display()))?;
    stream.set_read_timeout(Some(LIMIT))?;
    // HTTP/1.0, so that the answer ends with the connection and is not cut into chunks.
    write!(stream, "{method} {path} HTTP/1.0\r\nHost: mesh\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").context("the answer is not HTTP")?;
    let status = head.split(' ').nth(1).unwrap_or_default();
    ensure!(status == "200", "{method} {path}: {status}: {body}");
    serde_json::from_str(body).with_context(|| format!("{method} {path}: {body}"))
}
