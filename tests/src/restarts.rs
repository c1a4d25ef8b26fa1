//! Agents that end and come back, again and again, while clients connect without pause and connections
//! are used all the time: nobody may notice.
//!
//! Some are killed at any moment, some are told to end, some are of another build than the one before (the
//! programs that log refusals are others than those that do not) or of another map layout, and most find that
//! the endpoints are others than they were.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use serde_json::Value;

use crate::long::{self, Long};
use crate::node::Node;
use crate::process::until;
use crate::replaced::{self, LONG, VIP};
use crate::service::Service;
use crate::{check, storm};

/// How long a connection that has ended may be counted.
const SETTLING: Duration = Duration::from_secs(20);

/// What is to be done.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// How many agents.
    pub times: u32,
    /// Connections that are kept.
    pub tcp: usize,
    /// Datagram sockets that are connected, and as many that are not.
    pub udp: usize,
}

/// What came of it.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Agents that were killed, at a random moment.
    pub killed: u32,
    /// Agents that were told to end, once they were ready.
    pub terminated: u32,
    /// Those of both that were of another build than the one before.
    pub other_build: u32,
    /// Those of both that were of another map layout than the one before.
    pub other_layout: u32,
    /// Milliseconds until those were ready that found their own programs.
    pub ready_same: Vec<u64>,
    /// The same for those that replaced them.
    pub ready_other: Vec<u64>,
    /// What the clients saw that connect.
    pub storm: storm::Report,
    /// What those saw that stay.
    pub long: long::Report,
    /// Connects that the kernel has counted, of `expected`.
    pub counted: u64,
    /// As many as the clients made.
    pub expected: u64,
    /// Records that are left when all connections have ended.
    pub records: u64,
    /// Records that the last agent's audit had to release.
    pub released: u64,
}

impl Report {
    /// Whether anybody noticed.
    ///
    /// # Errors
    ///
    /// Somebody did.
    pub fn ensure_unnoticed(&self) -> Result<()> {
        ensure!(self.storm.failed.is_empty(), "connects failed: {:?}", self.storm.failed);
        ensure!(self.storm.connects > 0, "nobody connected");
        ensure!(self.long.broken.is_empty(), "connections broke: {:?}", self.long.broken);
        ensure!(self.long.exchanges > self.long.made as u64, "they did nothing: {:?}", self.long);
        ensure!(self.counted == self.expected, "{} counted of {}", self.counted, self.expected);
        ensure!(self.records == 0 && self.released == 0, "{} left", self.records + self.released);
        Ok(())
    }
}

/// The endpoints of the service that clients connect to, in one of four ways.
fn services(way: u8) -> String {
    let app = Service::new("app").address("10.96.0.10").port(80, 8080);
    let app = match way % 4 {
        0 => app.endpoint("10.0.0.1").endpoint("10.0.0.2"),
        1 => app.endpoint("10.0.0.2"),
        2 => app.endpoint("10.0.0.2").endpoint("10.0.0.1").key("balance: round-robin"),
        _ => app.weighted("10.0.0.1", 3).weighted("10.0.0.2", 1).key("balance: consistent-hash"),
    };
    Service::file(&[app])
}

/// Does it. `told` hears of each agent, by its number.
///
/// # Errors
///
/// Something fails that is no client; what clients notice is in the report.
pub fn run(plan: Plan, mut told: impl FnMut(u32)) -> Result<Report> {
    let mut node = replaced::builder().quiet().start_without_agent()?;
    node.agent.stays = true;
    node.agent.write_services("app.yaml", &services(0))?;
    node.agent.start()?;
    let lines = (plan.tcp + 2 * plan.udp) as u64;
    let kept = Long::start(&node, LONG, plan.tcp, plan.udp)?;
    until("all connections to be there", SETTLING, || {
        Ok((active(&node, "long")? == lines).then_some(()))
    })?;
    let clients = check::Storm::start(&node, VIP)?;
    node.agent.kill()?;
    let mut random = fastrand::Rng::new();
    let (mut killed, mut terminated, mut other_build, mut other_layout) = (0, 0, 0, 0);
    let (mut ready_same, mut ready_other, mut logs) = (Vec::new(), Vec::new(), false);
    for number in 0..plan.times {
        told(number);
        let (others, layouts) = (random.u8(..6) == 0, random.u8(..6) == 0);
        let is_other = others || layouts;
        logs ^= others;
        node.agent.other_layout ^= layouts;
        other_build += u32::from(others);
        other_layout += u32::from(layouts);
        node.agent.arguments = if logs { vec!["--log-refusals"] } else { Vec::new() };
        node.agent.write_services("app.yaml", &services(random.u8(..)))?;
        let started = Instant::now();
        node.agent.launch()?;
        if random.bool() {
            // Also before it has read what is there, and while it replaces programs.
            let most = if logs || is_other { 3_000 } else { 400 };
            std::thread::sleep(Duration::from_millis(random.u64(..most)));
            node.agent.kill()?;
            killed += 1;
        } else {
            node.agent.until_ready()?;
            let times = if logs || is_other { &mut ready_other } else { &mut ready_same };
            times.push(u64::try_from(started.elapsed().as_millis())?);
            node.agent.stop()?;
            terminated += 1;
        }
    }
    node.agent.arguments.clear();
    node.agent.other_layout = false;
    node.agent.start()?;
    let (storm, answered) = clients.finish()?;
    let long = kept.finish()?;
    for service in ["app", "long"] {
        until("the records to be released", SETTLING, || {
            Ok((active(&node, service)? == 0).then_some(()))
        })?;
    }
    let (status, audit): (Value, Value) =
        (node.agent.get("/v1/status")?, node.agent.get("/v1/audit")?);
    let number = |value: &Value| value.as_u64().context("a number");
    let report = Report {
        killed,
        terminated,
        other_build,
        other_layout,
        ready_same,
        ready_other,
        storm,
        long,
        counted: number(&status["counters"]["balanced"])?,
        expected: answered.len() as u64 + lines,
        records: number(&audit["records"])?,
        released: number(&audit["released_ever"])?,
    };
    node.agent.stop()?;
    let pins = node.agent.pins().to_string_lossy().into_owned();
    let cleaned = node.agent.mesh(&["cleanup", "--pin-dir", &pins])?;
    ensure!(cleaned.status.success(), "{cleaned:?}");
    ensure!(check::ask(&node, "blocking", VIP)?.backend.is_none(), "control: somebody answered");
    Ok(report)
}

fn active(node: &Node, name: &str) -> Result<u64> {
    let services: Vec<Value> = node.agent.get("/v1/services")?;
    let found = services.iter().find(|found| found["name"] == name);
    found.and_then(|found| found["active"].as_u64()).context("the service")
}
