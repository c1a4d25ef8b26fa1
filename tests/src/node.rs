//! A node in miniature: network namespace, cgroup, files, backends and the agent.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::env;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::agent::Agent;
use crate::cgroup::{self, Cgroup};
use crate::process::{self, Echo, Process};
use crate::server::{self, Kind};
use crate::service::Service;
use crate::sys;

/// What a node will be.
#[derive(Debug)]
pub struct Builder {
    servers: Vec<(Kind, String, String)>,
    services: Vec<Service>,
    virtual_ips: Vec<String>,
    echo: Echo,
}

/// A node. Dropped, everything of it is gone: processes, cgroup, namespace, files.
///
/// The order of the fields is the order in which they go: processes before what they are in.
#[derive(Debug)]
pub struct Node {
    /// The agent, whose cgroup is the node's.
    pub agent: Agent,
    servers: BTreeMap<String, Process>,
    addresses: RefCell<BTreeSet<IpAddr>>,
    procs: Arc<File>,
    outside: Arc<File>,
    cgroup: Cgroup,
    namespace: Namespace,
    directory: PathBuf,
}

/// Where processes run that are not balanced: a network, and mounts for those that pin.
#[derive(Clone, Debug)]
pub struct Namespace {
    net: Arc<OwnedFd>,
    mounts: Arc<OwnedFd>,
}

/// What the environment of the tests' own process says of this host, and no program of a node is to know:
/// a proxy would answer in place of a backend, and a service manager would be told of the agent.
const HOST_VARIABLES: [&str; 11] = [
    "http_proxy",
    "https_proxy",
    "all_proxy",
    "HTTP_PROXY",
    "ALL_PROXY",
    "NOTIFY_SOCKET",
    "WATCHDOG_PID",
    "WATCHDOG_USEC",
    "LISTEN_PID",
    "LISTEN_FDS",
    "RUST_LOG",
];

// === impl Builder ===

impl Builder {
    /// A backend of this crate's own at `ip:port` or `[ip]:port`.
    #[must_use]
    pub fn backend(self, name: &str, place: &str) -> Self {
        self.server(Kind::Plain, name, place)
    }

    /// A backend of any kind.
    #[must_use]
    pub fn server(mut self, kind: Kind, name: &str, place: &str) -> Self {
        self.servers.push((kind, name.to_owned(), place.to_owned()));
        self
    }

    /// A service, in the file `test.yaml`.
    #[must_use]
    pub fn service(mut self, service: Service) -> Self {
        self.services.push(service);
        self
    }

    /// A prefix of `virtual-ips`.
    #[must_use]
    pub fn virtual_ips(mut self, prefix: &str) -> Self {
        self.virtual_ips.push(prefix.to_owned());
        self
    }

    /// Keeps what the agent prints out of the output.
    #[must_use]
    pub fn quiet(mut self) -> Self {
        self.echo = Echo::Off;
        self
    }

    /// Makes the node and starts everything; the agent is ready when this returns.
    ///
    /// # Errors
    ///
    /// Something is missing on this machine, or does not start.
    pub fn start(self) -> Result<Node> {
        let mut node = self.start_without_agent()?;
        node.agent.start()?;
        Ok(node)
    }

    /// As [`Builder::start`], but the agent's files only.
    ///
    /// # Errors
    ///
    /// As [`Builder::start`].
    pub fn start_without_agent(self) -> Result<Node> {
        ensure!(
            sys::process::is_root(),
            "root is needed for network namespaces, cgroups and BPF: run as root"
        );
        allow_many_files();
        let directory = tempfile::Builder::new().prefix("mesh-test-").tempdir()?;
        let cgroup = Cgroup::create(directory.path())?;
        // From here on removed by the cgroup's janitor, which also works when this process is killed.
        let directory = directory.keep();
        let namespace = Namespace::create()?;
        let (procs, outside) = (cgroup::procs(cgroup.path())?, cgroup::procs(&cgroup.outside())?);
        let agent = Agent::new(
            &directory.join("agent"),
            cgroup.path(),
            namespace.clone(),
            &self.virtual_ips,
            self.echo,
        )?;
        let mut node = Node {
            agent,
            servers: BTreeMap::new(),
            addresses: RefCell::default(),
            procs,
            outside,
            cgroup,
            namespace,
            directory,
        };
        node.ip(&["link", "set", "lo", "up"])?;
        for (kind, name, place) in self.servers {
            node.start_server(kind, &name, &place)?;
        }
        node.agent.write_services("test.yaml", &Service::file(&self.services))?;
        Ok(node)
    }

    const fn new() -> Self {
        Self { servers: Vec::new(), services: Vec::new(), virtual_ips: Vec::new(), echo: Echo::On }
    }
}

// === impl Node ===

impl Node {
    /// A node without anything yet.
    #[must_use]
    pub const fn builder() -> Builder {
        Builder::new()
    }

    /// A command that will run in the node's namespace and cgroup: its sockets are balanced.
    #[must_use]
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        self.namespace.command(program, Some(&self.procs))
    }

    /// A command that will run in the node's namespace and in another cgroup.
    ///
    /// # Errors
    ///
    /// It is not a cgroup.
    pub fn command_in(&self, cgroup: &Path, program: impl AsRef<OsStr>) -> Result<Command> {
        Ok(self.namespace.command(program, Some(&cgroup::procs(cgroup)?)))
    }

    /// A command that will run in the node's namespace, but in a cgroup beside the node's: its sockets are not
    /// balanced.
    #[must_use]
    pub fn outside(&self, program: impl AsRef<OsStr>) -> Command {
        self.namespace.command(program, Some(&self.outside))
    }

    /// Starts a backend; its name must be new or that of a stopped one.
    ///
    /// # Errors
    ///
    /// A program is missing, or does not serve within a bounded time.
    pub fn start_server(&mut self, kind: Kind, name: &str, place: &str) -> Result<()> {
        ensure!(!self.servers.contains_key(name), "a backend {name} exists already");
        let place: SocketAddr = place.parse().with_context(|| format!("{place} is no address"))?;
        let server = server::start(self, kind, name, place)?;
        self.servers.insert(name.to_owned(), server);
        Ok(())
    }

    /// Kills a backend: its port is closed then.
    ///
    /// # Errors
    ///
    /// There is none of this name.
    pub fn kill_server(&mut self, name: &str) -> Result<()> {
        let mut server =
            self.servers.remove(name).with_context(|| format!("there is no backend {name}"))?;
        server.kill().map(drop)
    }

    /// The programs that are attached to the node's cgroup.
    ///
    /// # Errors
    ///
    /// Those of bpf(2).
    pub fn attached(&self) -> Result<Vec<sys::bpf::Attached>> {
        sys::bpf::attached(self.cgroup.path()).context("cannot ask for attached programs")
    }

    /// The node's cgroup.
    #[must_use]
    pub fn cgroup(&self) -> &Cgroup {
        &self.cgroup
    }

    /// Where the node's files are.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The node's network namespace.
    #[must_use]
    pub fn netns(&self) -> &OwnedFd {
        &self.namespace.net
    }

    /// What starts processes in the node's namespace.
    #[must_use]
    pub fn namespace(&self) -> Namespace {
        self.namespace.clone()
    }

    /// Sets a sysctl of the node's own network namespace, for instance `net/ipv4/tcp_fastopen`.
    ///
    /// # Errors
    ///
    /// There is no such setting in a namespace.
    pub fn sysctl(&self, name: &str, value: &str) -> Result<()> {
        ensure!(name.starts_with("net/"), "{name} is not a namespace's own");
        let path = Path::new("/proc/sys").join(name);
        // /proc/sys/net is that of the thread which looks.
        sys::netns::inside(self.netns(), || std::fs::write(&path, value))?
            .with_context(|| format!("cannot set {}", path.display()))
    }

    /// Makes an address the namespace's own.
    ///
    /// # Errors
    ///
    /// Those of `ip address add`.
    pub fn add_address(&self, ip: IpAddr) -> Result<()> {
        if ip.is_loopback() || !self.addresses.borrow_mut().insert(ip) {
            return Ok(());
        }
        match ip {
            IpAddr::V4(ip) => self.ip(&["address", "add", &format!("{ip}/32"), "dev", "lo"]),
            IpAddr::V6(ip) => {
                self.ip(&["address", "add", &format!("{ip}/128"), "dev", "lo", "nodad"])
            }
        }
    }

    fn ip(&self, arguments: &[&str]) -> Result<()> {
        let mut command = self.outside("ip");
        command.args(arguments);
        process::stdout(command).map(drop)
    }
}

// === impl Namespace ===

impl Namespace {
    /// A new one: nothing in it but a loopback interface that is down.
    ///
    /// # Errors
    ///
    /// Those of unshare(2).
    pub fn create() -> Result<Self> {
        let net = sys::netns::create().context("cannot make a network namespace")?;
        let mounts = sys::mounts::create().context("cannot make a mount namespace")?;
        Ok(Self { net: Arc::new(net), mounts: Arc::new(mounts) })
    }

    /// The descriptor of its network.
    #[must_use]
    pub fn netns(&self) -> &OwnedFd {
        &self.net
    }

    /// That of its mounts, where pins are.
    #[must_use]
    pub fn mounts(&self) -> &OwnedFd {
        &self.mounts
    }

    /// A command that will run in this namespace and in a cgroup.
    ///
    /// # Errors
    ///
    /// It is not a cgroup.
    pub fn command_in(&self, cgroup: &Path, program: impl AsRef<OsStr>) -> Result<Command> {
        Ok(self.command(program, Some(&cgroup::procs(cgroup)?)))
    }

    /// A command that will run in this namespace and in the cgroup of this process.
    #[must_use]
    pub fn outside(&self, program: impl AsRef<OsStr>) -> Command {
        self.command(program, None)
    }

    /// The same, with the mounts of this namespace, in its root directory.
    #[must_use]
    pub fn pinning(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = self.command(program, None);
        sys::process::enter_mounts(&mut command, &self.mounts);
        command
    }

    fn command(&self, program: impl AsRef<OsStr>, procs: Option<&Arc<File>>) -> Command {
        let mut command = Command::new(program);
        sys::process::confine(&mut command, &self.net, procs);
        for name in HOST_VARIABLES {
            command.env_remove(name);
        }
        command.env("PATH", search_path());
        command
    }
}

// === functions ===

/// Where programs are searched. Administrators' tools are not everywhere in the `PATH` of root.
fn search_path() -> OsString {
    let path = env::var_os("PATH").unwrap_or_default();
    let mut places: Vec<PathBuf> = env::split_paths(&path).collect();
    places.extend(["/usr/sbin", "/sbin"].map(PathBuf::from));
    // What came out of a `PATH` can be put into one.
    env::join_paths(places).unwrap_or(path)
}

/// As many files as this process and its children may open, if the host's hard limit allows it. Most hosts
/// have a soft limit of 1,024, less than some tests have connections; and where there is no limit, some
/// servers close a billion descriptors before they start.
const FILES: u64 = 65_536;

fn allow_many_files() {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    let current = Some(maximum.map_or(FILES, |maximum| maximum.min(FILES)));
    // Not above the hard limit, so it cannot fail; where it does, the test that needs more says so.
    let _ = setrlimit(Resource::Nofile, Rlimit { current, maximum });
}
