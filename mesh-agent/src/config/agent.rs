//! The agent file: `/etc/mesh/agent.yaml`.

use std::collections::HashSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

use ipnet::IpNet;
use mesh_common::{Limits, Settings};

use super::health;
use super::values::{name, network, path};
use crate::commands::Account;
use crate::model::{Health, HealthCheck, HealthPolicy};
use crate::yaml::{
    self, Fields, Keys, MAX_SIZE, Node, Problem, Problems, boolean, excerpt, fields, integer,
    is_nothing, items, text,
};

/// Where the agent file is looked for when none is named.
pub const DEFAULT_FILE: &str = "/etc/mesh/agent.yaml";

/// Where service files are looked for when no source is configured.
pub const DEFAULT_SERVICES: &str = "/etc/mesh/services.d";

const AGENT: Keys = Keys {
    of: "the agent file",
    known: &[
        "node",
        "cgroup",
        "exclude",
        "socket",
        "pin-dir",
        "virtual-ips",
        "limits",
        "metrics",
        "canary",
        "health",
        "command-checks",
        "sources",
    ],
    later: &["state-dir"],
};

const NODE: Keys = Keys { of: "node", known: &["name", "zone"], later: &[] };

const EXCLUDE: Keys = Keys { of: "exclude", known: &["cgroups", "namespaces"], later: &[] };

const LIMITS: Keys = Keys {
    of: "limits",
    known: &["frontends", "backends", "connections", "affinities"],
    later: &[],
};

const METRICS: Keys = Keys { of: "metrics", known: &["listen"], later: &[] };

/// Where metrics are had when the agent file does not say: on this node only.
const METRICS_LISTEN: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 9464);

const COMMANDS: Keys = Keys { of: "command-checks", known: &["user"], later: &[] };

const SOURCE: Keys = Keys {
    of: "a source",
    known: &["files"],
    later: &["registry", "kubernetes", "consul", "etcd", "dns"],
};

const FILES: Keys = Keys { of: "files", known: &["directory"], later: &[] };

/// What the agent file says, with the default of every key that it leaves out.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Config {
    /// Name of the node; by default its host name.
    pub node: String,
    /// Zone of the node.
    pub zone: Option<String>,
    /// Sockets created below this cgroup are balanced. It has no default: a node is not taken over
    /// by leaving something out.
    pub cgroup: Option<PathBuf>,
    /// Who is not touched, though below that cgroup.
    pub exclude: Exclude,
    /// The API's socket.
    pub socket: PathBuf,
    /// Where programs, links and maps are pinned.
    pub pin_dir: PathBuf,
    /// Addresses that are refused unless they are a service's. None covers everything, and none
    /// covers IPv4-mapped addresses.
    pub virtual_ips: Vec<IpNet>,
    /// How much the maps hold.
    pub limits: Limits,
    /// Whether a connect from inside the cgroup proves, now and then, that connects are balanced.
    pub canary: bool,
    /// How endpoints are checked of services that say nothing about it.
    pub health: Option<HealthPolicy>,
    /// Who health checks that are programs run as; nobody, and they do not run, if there is none.
    pub commands: Option<Account>,
    /// Where `/metrics`, `/healthz` and `/readyz` are; nowhere if there is none.
    pub metrics: Option<SocketAddr>,
    /// In order of precedence; no directory twice.
    pub sources: Vec<Source>,
}

/// Who is not touched.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Exclude {
    /// Processes in these cgroups, and below them, by their directories.
    pub cgroups: Vec<PathBuf>,
    /// Sockets of these network namespaces, by their files.
    pub namespaces: Vec<PathBuf>,
}

/// Where services are defined.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Source {
    /// Service files.
    Files {
        /// An absolute path.
        directory: PathBuf,
    },
}

impl Source {
    /// What people call it.
    #[must_use]
    pub fn name(&self) -> String {
        let Self::Files { directory } = self;
        format!("files {}", directory.display())
    }

    /// What tells it from others, for as long as it is called the same: FNV-1a of its name, never 0.
    #[must_use]
    pub fn key(&self) -> u64 {
        const BASIS: u64 = 0xcbf2_9ce4_8422_2325;
        const PRIME: u64 = 0x0100_0000_01b3;
        let fold = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(PRIME);
        self.name().bytes().fold(BASIS, fold).max(1)
    }
}

/// Why there is no configuration. It is shown as one line.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the agent file {}: {error}; {advice}", file.display())]
    Read {
        /// Which.
        file: PathBuf,
        /// Why.
        #[source]
        error: io::Error,
        /// What to do.
        advice: &'static str,
    },
    /// The file says something that is not understood.
    #[error("{}", first(file, problems))]
    Invalid {
        /// Which.
        file: PathBuf,
        /// What, in the order of the file; at least one.
        problems: Vec<Problem>,
    },
}

/// The first problem, and how many more there are.
fn first(file: &Path, problems: &[Problem]) -> String {
    let file = file.display().to_string();
    let first = problems.first().map_or_else(|| file.clone(), |problem| problem.line(&file));
    match problems.len() {
        0 | 1 => first,
        2 => format!("{first} (and 1 more problem)"),
        n => format!("{first} (and {} more problems)", n - 1),
    }
}

// === impl Config ===

impl Default for Config {
    fn default() -> Self {
        Self {
            node: host_name(),
            zone: None,
            cgroup: None,
            exclude: Exclude::default(),
            socket: "/run/mesh/agent.sock".into(),
            pin_dir: "/sys/fs/bpf/mesh".into(),
            virtual_ips: Vec::new(),
            limits: Limits::default(),
            canary: true,
            health: None,
            commands: None,
            metrics: Some(METRICS_LISTEN),
            sources: vec![Source::Files { directory: DEFAULT_SERVICES.into() }],
        }
    }
}

impl Config {
    /// Reads a named agent file, or [`DEFAULT_FILE`] if it exists.
    ///
    /// # Errors
    ///
    /// The file cannot be read (a named one must exist), or has problems.
    pub fn load(file: Option<&Path>) -> Result<Self, ConfigError> {
        let (path, named) = match file {
            Some(path) => (path, true),
            None => (Path::new(DEFAULT_FILE), false),
        };
        let bytes = match read(path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound && !named => {
                return Ok(Self::default());
            }
            Err(error) => {
                let advice = match error.kind() {
                    io::ErrorKind::NotFound => "name one that exists, or leave out --config",
                    io::ErrorKind::IsADirectory => "name a file",
                    _ => "check its permissions",
                };
                return Err(ConfigError::Read { file: path.to_owned(), error, advice });
            }
        };
        Self::parse(&bytes)
            .map_err(|problems| ConfigError::Invalid { file: path.to_owned(), problems })
    }

    /// Reads the text of an agent file. An empty one has every default.
    ///
    /// # Errors
    ///
    /// Everything that is wrong, in the order of the file; never an empty list.
    pub fn parse(bytes: &[u8]) -> Result<Self, Vec<Problem>> {
        let mut config = Self::default();
        let root = yaml::parse(bytes).map_err(|problem| vec![problem])?;
        let Some(root) = root.filter(|root| !is_nothing(root)) else { return Ok(config) };
        let mut problems = Problems::default();
        config.fill(&root, &mut problems);
        problems.finish(config)
    }

    /// How endpoints are checked of a service that says this; nothing if they are not.
    #[must_use]
    pub fn policy<'c>(&'c self, health: &'c Health) -> Option<&'c HealthPolicy> {
        let policy = health.policy(self.health.as_ref());
        policy.filter(|policy| self.commands.is_some() || !is_command(policy))
    }

    /// Whether checks were meant to be programs, which this agent does not run.
    #[must_use]
    pub fn forbids(&self, health: &Health) -> bool {
        let policy = health.policy(self.health.as_ref());
        policy.is_some_and(is_command) && self.commands.is_none()
    }

    /// Takes over what the file says. A value with a problem leaves its default; the file is
    /// refused in any case.
    fn fill(&mut self, root: &Node, problems: &mut Problems) -> Option<()> {
        let top = fields(root, &AGENT, problems)?;
        if let Some(node) = top.get("node").and_then(|node| fields(node, &NODE, problems)) {
            if let Some(node) = node.get("name")
                && let Some(name) = name(node, "a node name", problems)
            {
                name.clone_into(&mut self.node);
            }
            if let Some(node) = node.get("zone") {
                self.zone = name(node, "a zone name", problems).map(ToOwned::to_owned);
            }
        }
        if let Some(node) = top.get("cgroup") {
            self.cgroup = path(node, "a cgroup directory", problems);
        }
        for (key, what, target) in
            [("socket", "a path", &mut self.socket), ("pin-dir", "a directory", &mut self.pin_dir)]
        {
            if let Some(path) = top.get(key).and_then(|node| path(node, what, problems)) {
                *target = path;
            }
        }
        if let Some(node) = top.get("virtual-ips") {
            self.virtual_ips = virtual_ips(node, problems).unwrap_or_default();
        }
        if let Some(node) = top.get("exclude") {
            self.exclude = exclude(node, problems).unwrap_or_default();
        }
        if let Some(node) = top.get("limits") {
            self.limits = limits(node, problems).unwrap_or_default();
        }
        if let Some(node) = top.get("canary") {
            self.canary = boolean(node, "canary", problems).unwrap_or(true);
        }
        if let Some(node) = top.get("health") {
            self.health = health::policy(node, problems);
        }
        if let Some(node) = top.get("command-checks") {
            self.commands = commands(node, problems);
        }
        if let Some(node) = top.get("metrics") {
            self.metrics = metrics(node, problems);
        }
        if let Some(node) = top.get("sources") {
            self.sources = sources(node, problems).unwrap_or_default();
        }
        Some(())
    }
}

/// Who runs commands. To name the key is to allow them.
fn commands(node: &Node, problems: &mut Problems) -> Option<Account> {
    let none = Fields::none(node.at);
    let fields = if is_nothing(node) { none } else { fields(node, &COMMANDS, problems)? };
    let (named, at) = match fields.get("user") {
        Some(node) => (name(node, "the name or number of a user", problems)?, node.at),
        None => (Account::DEFAULT, node.at),
    };
    match Account::find(named) {
        Ok(account) => Some(account),
        Err(why) => {
            problems.add(at, format!("{why}; expected a user other than root"));
            None
        }
    }
}

fn virtual_ips(node: &Node, problems: &mut Problems) -> Option<Vec<IpNet>> {
    let mut seen = HashSet::new();
    let mut found = Vec::new();
    for node in items(node, "a list of networks, or []", problems)? {
        let Some(network) = network(node, problems) else { continue };
        if !seen.insert(network) {
            problems.add(node.at, format!("{network} is here twice; keep one"));
        }
        found.push(network);
    }
    Some(found)
}

fn exclude(node: &Node, problems: &mut Problems) -> Option<Exclude> {
    let fields = fields(node, &EXCLUDE, problems)?;
    let mut list = |key, what| {
        let Some(node) = fields.get(key) else { return Some(Vec::new()) };
        let all = items(node, &format!("a list of {what}, or []"), problems)?;
        if all.len() > Settings::EXCLUDED {
            let most = Settings::EXCLUDED;
            problems.add(node.at, format!("{} {key}; at most {most} can be excluded", all.len()));
        }
        Some(all.iter().filter_map(|node| path(node, what, problems)).collect())
    };
    let cgroups = list("cgroups", "cgroup directories")?;
    let namespaces = list("namespaces", "files of network namespaces")?;
    Some(Exclude { cgroups, namespaces })
}

fn limits(node: &Node, problems: &mut Problems) -> Option<Limits> {
    let fields = fields(node, &LIMITS, problems)?;
    let (least, most) = (Limits::LEAST, Limits::MOST);
    let mut limits = Limits::default();
    for (key, least, most, limit) in [
        ("frontends", least.frontends, most.frontends, &mut limits.frontends),
        ("backends", least.backends, most.backends, &mut limits.backends),
        ("affinities", least.pins, most.pins, &mut limits.pins),
        ("connections", least.records, most.records, &mut limits.records),
    ] {
        let Some(node) = fields.get(key) else { continue };
        if let Some(number) = integer(node, key, least.into()..=most.into(), problems) {
            *limit = number;
        }
    }
    // A place in the array is some bits of a number.
    limits.records = limits.records.next_power_of_two();
    Some(limits)
}

fn metrics(node: &Node, problems: &mut Problems) -> Option<SocketAddr> {
    const EXPECTED: &str = "an address and port such as 127.0.0.1:9464 or \"[::1]:9464\", or none";
    let fields = fields(node, &METRICS, problems)?;
    let Some(node) = fields.get("listen") else { return Some(METRICS_LISTEN) };
    let written = text(node, EXPECTED, problems)?;
    if written == "none" {
        return None;
    }
    let wrong = match written.parse::<SocketAddr>() {
        Ok(address) if address.port() > 0 => return Some(address),
        Ok(_) => "port 0 is none that can be found".to_owned(),
        Err(_) => format!("found {}", excerpt(written)),
    };
    problems.add(node.at, format!("expected {EXPECTED}; {wrong}"));
    None
}

fn sources(node: &Node, problems: &mut Problems) -> Option<Vec<Source>> {
    let mut seen = HashSet::new();
    let mut found = Vec::new();
    for node in
        items(node, "a list such as [{files: {directory: /etc/mesh/services.d}}]", problems)?
    {
        let Some(source) = source(node, problems) else { continue };
        if !seen.insert(source.clone()) {
            let Source::Files { directory } = &source;
            problems.add(
                node.at,
                format!(
                    "the directory {} is here twice; keep one",
                    excerpt(&directory.to_string_lossy())
                ),
            );
        }
        found.push(source);
    }
    Some(found)
}

fn source(node: &Node, problems: &mut Problems) -> Option<Source> {
    let before = problems.count();
    let source = fields(node, &SOURCE, problems)?;
    let Some(files) = source.get("files") else {
        // A source that is refused by name is not also missing.
        if problems.count() == before {
            problems
                .add(source.at, "the kind of source is missing; expected files: {directory: …}");
        }
        return None;
    };
    if is_nothing(files) {
        return Some(Source::Files { directory: DEFAULT_SERVICES.into() });
    }
    let directory = match fields(files, &FILES, problems)?.get("directory") {
        Some(node) => path(node, "a directory", problems)?,
        None => DEFAULT_SERVICES.into(),
    };
    Some(Source::Files { directory })
}

fn is_command(policy: &HealthPolicy) -> bool {
    matches!(policy.check, HealthCheck::Command(_))
}

/// Reads a file, but no more of it than tells that it is too large.
fn read(path: &Path) -> io::Result<Vec<u8>> {
    use io::Read as _;
    let mut bytes = Vec::new();
    std::fs::File::open(path)?.take(MAX_SIZE as u64 + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// The host name; `localhost` where `/proc` is not mounted.
fn host_name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    match name.trim() {
        "" => "localhost".into(),
        name => name.into(),
    }
}
