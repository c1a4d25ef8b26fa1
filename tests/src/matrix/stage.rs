//! What most rows have in common: a service with four endpoints that can fail in many ways, and three clients
//! of it.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result};

use super::bounds::{CLIENTS, ENDPOINTS};
use super::ears::journal;
use crate::agent::Backend;
use crate::mortal::lan::Lan;
use crate::mortal::scene::{Scene, Standing, nft};
use crate::mortal::server::Manner;
use crate::mortal::storm::Trial;
use crate::mortal::{Clients, Pace};
use crate::process::{LIMIT, until};
use crate::service::Service;
use crate::sys::netns;
use crate::sys::socket::monotonic_nanos;

/// The names of the endpoints, by their number from 1 on.
const NAMES: [&str; ENDPOINTS as usize] = ["a", "b", "c", "d"];

/// Where they serve.
pub const PORT: u16 = 8080;

/// How an endpoint fails.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    /// Its process is killed.
    Killed,
    /// Its machine is cut off.
    Gone,
    /// Packets to it vanish.
    Dropped,
    /// Its port is closed, its process lives.
    Closed,
    /// It treats connections otherwise.
    Behaves(Manner),
}

/// The node, its service and its clients.
#[derive(Debug)]
pub struct Stage {
    /// The node and its endpoints.
    pub scene: Scene,
    machines: Option<Lan>,
    clients: Vec<Clients>,
}

/// The name of the n-th endpoint, from 1 on.
#[must_use]
pub fn name(n: u8) -> &'static str {
    NAMES[usize::from(n - 1)]
}

/// The service with these keys, without endpoints.
#[must_use]
pub fn app(keys: &[&str]) -> Service {
    let app = Service::new("app").address("10.96.0.10").port(80, PORT);
    keys.iter().fold(app, |app, key| app.key(key))
}

impl Stage {
    /// A service with these keys, whose endpoints are on the node. All are well when this returns.
    ///
    /// # Errors
    ///
    /// Something is missing on this machine, or does not start.
    pub fn local(keys: &[&str], manner: Manner) -> Result<Self> {
        let service =
            (1..=ENDPOINTS).fold(app(keys), |app, n| app.endpoint(&format!("10.0.0.{n}")));
        let scene = Scene::bare(service)?;
        Self { scene, machines: None, clients: Vec::new() }.start(manner)
    }

    /// The same, each endpoint on a machine of its own.
    ///
    /// # Errors
    ///
    /// As [`Stage::local`].
    pub fn machines(keys: &[&str]) -> Result<Self> {
        let service =
            (1..=ENDPOINTS).fold(app(keys), |app, n| app.endpoint(&format!("10.9.0.{n}")));
        let scene = Scene::bare(service)?;
        let machines = Some(Lan::new(&scene.node, ENDPOINTS)?);
        Self { scene, machines, clients: Vec::new() }.start(Manner::Plain)
    }

    fn start(mut self, manner: Manner) -> Result<Self> {
        for n in 1..=ENDPOINTS {
            if self.machines.is_none() {
                self.scene.node.add_address(self.source(n))?;
            }
            self.serve(n, manner)?;
        }
        Ok(self)
    }

    /// Starts the agent, and waits until it has found every endpoint to be in this state.
    ///
    /// # Errors
    ///
    /// It does not start, or does not find them so.
    pub fn run(&mut self, state: &str) -> Result<()> {
        self.scene.node.agent.start()?;
        let all = |shown: &[Backend]| shown.iter().all(|backend| backend.state == state);
        self.scene.node.agent.until_backends("app", all)
    }

    /// Starts the clients, each in a cgroup of its own, and lets them connect for a while.
    ///
    /// # Errors
    ///
    /// They cannot be started.
    pub fn connect(&mut self, pace: Pace) -> Result<()> {
        for client in CLIENTS {
            let clients = self.scene.storm_in(&self.scene.node.namespace(), client, pace)?;
            self.clients.push(clients);
        }
        // Until all threads of theirs have begun, and a little longer.
        std::thread::sleep(Duration::from_micros(pace.pause) + Duration::from_millis(500));
        Ok(())
    }

    /// Ends the clients, and gives what each has seen.
    ///
    /// # Errors
    ///
    /// They failed otherwise than in connecting.
    pub fn seen(&mut self) -> Result<Vec<Vec<Trial>>> {
        self.clients.drain(..).map(Clients::finish).collect()
    }

    /// Where the n-th endpoint serves.
    #[must_use]
    pub fn place(&self, n: u8) -> SocketAddr {
        let net = if self.machines.is_some() { 9 } else { 0 };
        SocketAddr::from((Ipv4Addr::new(10, net, 0, n), PORT))
    }

    /// Where connects to it come from.
    #[must_use]
    pub fn source(&self, n: u8) -> IpAddr {
        IpAddr::V4(if self.machines.is_some() {
            Ipv4Addr::new(10, 9, 1, n)
        } else {
            Ipv4Addr::new(10, 0, 0, n)
        })
    }

    fn serve(&mut self, n: u8, manner: Manner) -> Result<()> {
        let namespace = match &self.machines {
            Some(machines) => machines.machine(n)?,
            None => self.scene.node.namespace(),
        };
        self.scene.start(&namespace, name(n), self.place(n), manner)
    }

    /// Lets an endpoint fail. Gives when it did.
    ///
    /// # Errors
    ///
    /// It cannot be done.
    pub fn fail(&mut self, n: u8, fault: Fault) -> Result<u64> {
        let at = monotonic_nanos();
        match fault {
            Fault::Killed => self.scene.kill(name(n))?,
            Fault::Gone => self.lan()?.unplug(n, true)?,
            Fault::Dropped => nft(&self.scene.node.namespace(), &drop_to(n))?,
            Fault::Closed => self.scene.backend(name(n))?.close()?,
            Fault::Behaves(manner) => self.scene.backend(name(n))?.behave(manner)?,
        }
        Ok(at)
    }

    /// Repairs it. Gives when it could be reached.
    ///
    /// # Errors
    ///
    /// It cannot be done.
    pub fn repair(&mut self, n: u8, fault: Fault) -> Result<u64> {
        match fault {
            Fault::Killed => self.serve(n, Manner::Plain)?,
            Fault::Gone => {
                self.lan()?.unplug(n, false)?;
                // Until the network has found it again, which is not what is measured.
                let (node, place) = (self.scene.node.netns(), self.place(n));
                until("the network to find a machine", LIMIT, || {
                    let patience = Duration::from_millis(100);
                    let found =
                        netns::inside(node, || TcpStream::connect_timeout(&place, patience))?;
                    Ok(found.ok())
                })?;
            }
            Fault::Dropped => {
                nft(&self.scene.node.namespace(), &format!("delete table inet t{n}"))?;
            }
            Fault::Closed => self.scene.backend(name(n))?.open()?,
            Fault::Behaves(_) => self.scene.backend(name(n))?.behave(Manner::Plain)?,
        }
        Ok(monotonic_nanos())
    }

    fn lan(&self) -> Result<&Lan> {
        self.machines.as_ref().context("it has no machine of its own")
    }

    /// How many of the other endpoints than `victims` were out for anybody, or unhealthy, or have failed a
    /// connect.
    ///
    /// # Errors
    ///
    /// The agent does not say.
    pub fn innocents(&self, victims: &[u8]) -> Result<u64> {
        let places = (1..=ENDPOINTS).filter(|n| !victims.contains(n)).map(|n| self.place(n));
        let places: Vec<String> = places.map(|place| place.to_string()).collect();
        if places.is_empty() {
            return Ok(0);
        }
        let (heard, standings) = (journal(&self.scene.node)?, self.scene.standings()?);
        let accused = |place: &&String| {
            let told = heard.iter().filter(|event| event.backend.as_ref() == Some(*place));
            let told = told.filter(|event| event.accuses());
            let shown = standings.iter().filter(|shown| shown.address == **place);
            told.count() > 0 || shown.filter(|shown| shown.failed > 0 || shown.is_out()).count() > 0
        };
        Ok(places.iter().filter(accused).count() as u64)
    }

    /// Waits until no endpoint is out for anybody, and all are in this state. Gives how many are not.
    ///
    /// # Errors
    ///
    /// The agent does not say.
    pub fn left_out(&self, state: &str, within: Duration) -> Result<u64> {
        let out = |shown: &&Standing| shown.is_out() || shown.state != state;
        let end = std::time::Instant::now() + within;
        loop {
            let count = self.scene.standings()?.iter().filter(out).count() as u64;
            if count == 0 || std::time::Instant::now() > end {
                return Ok(count);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// The control: without the agent nobody answers.
    ///
    /// # Errors
    ///
    /// As [`Scene::control`].
    pub fn control(self) -> Result<()> {
        let Self { scene, machines, clients } = self;
        drop(clients);
        let control = scene.control();
        drop(machines);
        control
    }
}

/// Packets to the n-th endpoint vanish on their way in.
fn drop_to(n: u8) -> String {
    format!(
        "add table inet t{n}; add chain inet t{n} in {{ type filter hook input priority 0; }}; \
         add rule inet t{n} in ip daddr 10.0.0.{n} tcp dport {PORT} drop"
    )
}
