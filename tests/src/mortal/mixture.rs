//! A service that nothing is wrong with, on machines of their own and over both families, and clients that
//! abort their connects in all ways there are, and are killed: nothing of that says anything about an endpoint.

use std::net::{Ipv4Addr, SocketAddr};
use std::process::Stdio;

use anyhow::{Result, ensure};

use super::aborts::Tally;
use super::lan::Lan;
use super::scene::{Scene, VIP, app, wait};
use super::server::Manner;
use super::{Backend, Pace};
use crate::process;
use crate::service::Service;

const MACHINES: u8 = 3;

/// More processes than any run kills.
const KILLED: u64 = 2_000_000;

/// The service, its machines, and what no route leads to.
#[derive(Debug)]
pub struct Mixture {
    /// The node and its service.
    pub scene: Scene,
    _lan: Lan,
    _six: Vec<Backend>,
}

/// What the clients did.
#[derive(Clone, Debug)]
pub struct Done {
    /// How often what came to which end.
    pub tally: Tally,
    /// How many processes were killed, each with what it had open.
    pub killed: u64,
}

impl Mixture {
    /// Starts everything. `keys` are more keys of the service.
    ///
    /// # Errors
    ///
    /// Something is missing on this machine, or does not start.
    pub fn start(keys: &[&str]) -> Result<Self> {
        let quick = "{failures: 1, base: 1s}";
        let service = (1..=MACHINES).fold(app(quick).address("fd00:96::10"), |app, n| {
            app.endpoint(&format!("10.9.0.{n}")).endpoint(&format!("fd00:9::{n}"))
        });
        let service = keys.iter().fold(service, |service, key| service.key(key));
        let mut scene = Scene::bare(service.clone())?;
        let nowhere = Service::new("nowhere").address("10.96.0.11").port(80, 8080);
        let nowhere = nowhere.ejection(quick).endpoint("192.0.2.1");
        scene.node.agent.write_services("test.yaml", &Service::file(&[service, nowhere]))?;
        let lan = Lan::new(&scene.node, MACHINES)?;
        let mut six = Vec::new();
        for n in 1..=MACHINES {
            let place = SocketAddr::from((Ipv4Addr::new(10, 9, 0, n), 8080));
            scene.start(&lan.machine(n)?, &format!("four-{n}"), place, Manner::Plain)?;
            let place: SocketAddr = format!("[fd00:9::{n}]:8080").parse()?;
            let command = lan.machine(n)?.outside(process::binary("mesh-mortal")?);
            six.push(Backend::start(command, &format!("six-{n}"), place, Manner::Plain)?);
        }
        // With data in the SYN, and without asking the server for a cookie first.
        scene.node.sysctl("net/ipv4/tcp_fastopen", "5")?;
        scene.node.agent.start()?;
        Ok(Self { scene, _lan: lan, _six: six })
    }

    /// Makes so many connects, and kills other clients all the while. `meanwhile` is called again and again.
    ///
    /// # Errors
    ///
    /// Those of `meanwhile`; a connect fails that must not.
    pub fn run(&self, connects: u64, mut meanwhile: impl FnMut() -> Result<()>) -> Result<Done> {
        let scene = &self.scene;
        let mut command = scene.client()?;
        command.args(["aborts", VIP, "[fd00:96::10]:80", "10.96.0.11:80", "10.9.0.254"]);
        command.args(["--seed", "7", "--connects", &connects.to_string()]);
        let mut mix = command.stdout(Stdio::piped()).spawn()?;
        let mut killed = 0;
        while mix.try_wait()?.is_none() {
            // Processes that are killed with what they have open.
            let pace = Pace { threads: 8, pause: 0, hold: 50, ..Pace::BRISK };
            let storm = scene.storm_in(&scene.node.namespace(), "killed", pace)?;
            wait(30 + killed % 7 * 5);
            storm.kill()?;
            killed += 1;
            ensure!(killed < KILLED, "the clients do not end");
            meanwhile()?;
        }
        let output = mix.wait_with_output()?;
        ensure!(output.status.success(), "the clients failed: {output:?}");
        let tally: Tally = serde_json::from_slice(&output.stdout)?;
        let failed: Vec<_> = tally.keys().filter(|end| end.contains("failed")).collect();
        ensure!(failed.is_empty(), "{failed:?}");
        ensure!(tally.values().sum::<u64>() >= connects && killed > 3, "{tally:?}");
        ensure!(tally.len() == 14, "not every kind occurred: {tally:?}");
        Ok(Done { tally, killed })
    }
}
