//! What the scenarios have in common: a service whose backends can die, and clients of it.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::process::Command;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use super::server::Manner;
use super::storm::Trial;
use super::{Backend, Clients, Pace};
use crate::node::Namespace;
use crate::sys::process::signal;
use crate::{Node, Service, process};

/// What clients dial.
pub const VIP: &str = "10.96.0.10:80";

/// A node with the service `app`.
#[derive(Debug)]
pub struct Scene {
    backends: BTreeMap<String, Backend>,
    /// The node.
    pub node: Node,
    records: Cell<u32>,
}

/// What the scenarios read of `backends -o json`.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
pub struct Standing {
    /// `ip:port`.
    pub address: String,
    /// Health state, or `ejected`.
    pub state: String,
    /// Why.
    pub reason: String,
    /// Connections that are open.
    pub active: u64,
    /// Connects that were sent there.
    pub opened: u64,
    /// Those of them that failed.
    pub failed: u64,
    /// The same by reason.
    pub failures: BTreeMap<String, u64>,
}

impl Scene {
    /// Plain backends of these names, all on the node.
    ///
    /// # Errors
    ///
    /// Something is missing on this machine, or does not start.
    pub fn local(names: &[&str], ejection: &str) -> Result<Self> {
        let named: Vec<_> = names.iter().map(|&name| (name, Manner::Plain)).collect();
        Self::with(&named, ejection)
    }

    /// Backends of these names, all on the node. The n-th is at 10.0.0.n, which is also where
    /// connects to it come from.
    ///
    /// # Errors
    ///
    /// As [`Scene::local`].
    pub fn with(named: &[(&str, Manner)], ejection: &str) -> Result<Self> {
        let app =
            (1..=named.len()).fold(app(ejection), |app, n| app.endpoint(&format!("10.0.0.{n}")));
        let mut scene = Self::bare(app)?;
        for (n, (name, manner)) in (1..).zip(named) {
            scene.node.add_address(IpAddr::V4(local(n)))?;
            let place = SocketAddr::from((local(n), 8080));
            scene.start(&scene.node.namespace(), name, place, *manner)?;
        }
        scene.node.agent.start()?;
        Ok(scene)
    }

    /// Without backends, and the agent does not run yet.
    ///
    /// # Errors
    ///
    /// As [`Scene::local`].
    pub fn bare(app: Service) -> Result<Self> {
        let node = Node::builder().service(app).quiet().start_without_agent()?;
        Ok(Self { backends: BTreeMap::new(), node, records: Cell::new(0) })
    }

    /// Starts a backend in a namespace.
    ///
    /// # Errors
    ///
    /// It does not serve.
    pub fn start(
        &mut self,
        namespace: &Namespace,
        name: &str,
        place: SocketAddr,
        manner: Manner,
    ) -> Result<()> {
        let command = namespace.outside(process::binary("mesh-mortal")?);
        let backend = Backend::start(command, name, place, manner)?;
        self.backends.insert(name.to_owned(), backend);
        Ok(())
    }

    /// A backend by its name.
    ///
    /// # Errors
    ///
    /// There is none.
    pub fn backend(&mut self, name: &str) -> Result<&mut Backend> {
        self.backends.get_mut(name).with_context(|| format!("there is no {name}"))
    }

    /// Kills a backend's process.
    ///
    /// # Errors
    ///
    /// There is none, or those of kill(2).
    pub fn kill(&mut self, name: &str) -> Result<()> {
        self.backends.remove(name).with_context(|| format!("there is no {name}"))?.kill()
    }

    /// A client in the node's namespace and cgroup.
    ///
    /// # Errors
    ///
    /// `mesh-mortal` has not been built.
    pub fn client(&self) -> Result<Command> {
        Ok(self.node.command(process::binary("mesh-mortal")?))
    }

    /// Clients in the node's namespace and cgroup.
    ///
    /// # Errors
    ///
    /// As [`Clients::start`].
    pub fn storm(&self, pace: Pace) -> Result<Clients> {
        self.storm_by(self.client()?, pace)
    }

    /// Clients by a command for `mesh-mortal`.
    ///
    /// # Errors
    ///
    /// As [`Clients::start`].
    pub fn storm_by(&self, command: Command, pace: Pace) -> Result<Clients> {
        let number = self.records.replace(self.records.get() + 1);
        let record = self.node.directory().join(format!("record-{number}"));
        Clients::start(command, VIP.parse()?, pace, record)
    }

    /// Clients in a namespace and a cgroup inside that of the node.
    ///
    /// # Errors
    ///
    /// As [`Clients::start`], and those of mkdir(2).
    pub fn storm_in(&self, namespace: &Namespace, cgroup: &str, pace: Pace) -> Result<Clients> {
        let path = self.node.cgroup().path().join(cgroup);
        if !path.exists() {
            self.node.cgroup().child(cgroup)?;
        }
        self.storm_by(namespace.command_in(&path, process::binary("mesh-mortal")?)?, pace)
    }

    /// One connect, alone.
    ///
    /// # Errors
    ///
    /// As [`Clients::wait`].
    pub fn once(&self) -> Result<Trial> {
        let pace = Pace { threads: 1, pause: 0, times: 1, ..Pace::BRISK };
        let trials = self.storm(pace)?.wait()?;
        trials.into_iter().next().context("one connect")
    }

    /// What the agent shows of the service's backends, by address.
    ///
    /// # Errors
    ///
    /// The agent does not say.
    pub fn standings(&self) -> Result<Vec<Standing>> {
        let mut all: Vec<Standing> = self.node.agent.json(&["backends", "app"])?;
        all.sort_by(|a, b| a.address.cmp(&b.address));
        Ok(all)
    }

    /// What it shows of one of them.
    ///
    /// # Errors
    ///
    /// As [`Scene::standings`], or there is none.
    pub fn standing(&self, place: &str) -> Result<Standing> {
        let found = self.standings()?.into_iter().find(|standing| standing.address == place);
        found.with_context(|| format!("{place} is not shown"))
    }

    /// A counter of `status`.
    ///
    /// # Errors
    ///
    /// The agent does not say, or has none of this name.
    pub fn counter(&self, name: &str) -> Result<u64> {
        let status: serde_json::Value = self.node.agent.get("/v1/status")?;
        status["counters"][name].as_u64().with_context(|| format!("{name}: {status}"))
    }

    /// Stops the agent in its tracks, or lets it go on.
    ///
    /// # Errors
    ///
    /// The agent does not run.
    pub fn freeze(&self, frozen: bool) -> Result<()> {
        let number = if frozen { libc::SIGSTOP } else { libc::SIGCONT };
        Ok(signal(self.node.agent.id()?, number)?)
    }

    /// The control of every scenario: without the agent nobody answers, so it was the programs that
    /// led there.
    ///
    /// # Errors
    ///
    /// Somebody answers all the same, or the agent does not end.
    pub fn control(mut self) -> Result<()> {
        self.node.agent.stop()?;
        let trial = self.once()?;
        ensure!(trial.error.as_deref() == Some("connect: ENETUNREACH"), "control: {trial:?}");
        Ok(())
    }
}

impl Standing {
    /// Whether it is out of rotation for anybody.
    #[must_use]
    pub fn is_out(&self) -> bool {
        self.state == "ejected" || self.reason.contains("failed; ")
    }

    /// Failures by this reason.
    #[must_use]
    pub fn failed_by(&self, reason: &str) -> u64 {
        self.failures.get(reason).copied().unwrap_or_default()
    }
}

/// The service, without endpoints.
#[must_use]
pub fn app(ejection: &str) -> Service {
    Service::new("app").address("10.96.0.10").port(80, 8080).ejection(ejection)
}

/// Address of the n-th backend on the node, from 1 on.
#[must_use]
pub fn local(n: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 0, 0, n)
}

/// Lets clients go on for so many milliseconds.
pub fn wait(millis: u64) {
    sleep(Duration::from_millis(millis));
}

/// Whether the connect failed in a way that says something about where it went.
#[must_use]
pub fn tells(trial: &Trial) -> bool {
    trial
        .error
        .as_ref()
        .is_some_and(|error| error.starts_with("connect: ") || error.ends_with(": ECONNRESET"))
}

/// Runs nft(8) in a namespace.
///
/// # Errors
///
/// It fails: then with what it printed.
pub fn nft(namespace: &Namespace, commands: &str) -> Result<()> {
    let mut command = namespace.outside("nft");
    command.arg(commands);
    process::stdout(command).map(drop)
}

/// Runs ip(8) in a namespace.
///
/// # Errors
///
/// It fails: then with what it printed.
pub fn ip(namespace: &Namespace, arguments: &str) -> Result<()> {
    let mut command = namespace.outside("ip");
    command.args(arguments.split(' '));
    process::stdout(command).map(drop)
}
