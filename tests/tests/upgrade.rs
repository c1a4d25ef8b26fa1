//! Programs of another build replace those that are attached, hook by hook, while everybody uses them.
//!
//! Programs that log refusals are others than those that do not: the kernel's verifier removes that code
//! from the latter.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use mesh_agent::dataplane::load::{self, Loaded, Options};
use mesh_agent::dataplane::pindir::PinDir;
use mesh_tests::client::Outcome;
use mesh_tests::long::Long;
use mesh_tests::node::Namespace;
use mesh_tests::process::{binary, run, until};
use mesh_tests::restarts::{self, Plan};
use mesh_tests::server::Kind;
use mesh_tests::sys::mounts;
use mesh_tests::{Agent, Node, Service, check};
use serde_json::Value;

const VIP: &str = "10.96.0.10:80";
const CLOSED: &str = "10.96.0.11:80";
const LONG: &str = "10.96.0.12:90";

/// `app` of a and b, `closed` where nobody listens, and `long` of c and d.
fn node() -> Result<Node> {
    let app = Service::new("app").address("10.96.0.10").port(80, 8080);
    let app = app.endpoint("10.0.0.1").endpoint("10.0.0.2");
    let closed = Service::new("closed").address("10.96.0.11").port(80, 9).endpoint("10.0.0.1");
    let long = Service::new("long").address("10.96.0.12").port(90, 9090).udp(90, 9090);
    let mut node = Node::builder()
        .backend("a", "10.0.0.1:8080")
        .backend("b", "10.0.0.2:8080")
        .server(Kind::Long, "c", "10.0.0.3:9090")
        .server(Kind::Long, "d", "10.0.0.4:9090")
        .service(app)
        .service(closed)
        .service(long.endpoint("10.0.0.3").endpoint("10.0.0.4"))
        .start_without_agent()?;
    node.agent.stays = true;
    node.agent.start()?;
    Ok(node)
}

fn service(agent: &Agent, name: &str, field: &str) -> Result<u64> {
    let services: Vec<Value> = agent.get("/v1/services")?;
    let found = services.iter().find(|found| found["name"] == name);
    found.and_then(|found| found[field].as_u64()).context("the service")
}

fn until_open(node: &Node, name: &str, wanted: u64) -> Result<()> {
    until("the open connections", Duration::from_secs(20), || {
        Ok((service(&node.agent, name, "active")? == wanted).then_some(()))
    })
}

/// What clients in the cgroup meet between the replacement of two programs.
fn meet(namespace: &Namespace, cgroup: &Path) -> Result<u64> {
    let client = |arguments: &[&str]| -> Result<_> {
        let mut command = namespace.command_in(cgroup, binary("mesh-client")?)?;
        command.args(arguments);
        Ok(command)
    };
    let seen: BTreeMap<String, u64> = check::printed(client(&["histogram", VIP, "6"])?)?;
    ensure!(seen.keys().all(|name| name == "a" || name == "b"), "{seen:?}");
    let outcome: Outcome = check::printed(client(&["ask", VIP])?)?;
    ensure!(outcome.peer == Some(VIP.parse()?), "{outcome:?}");
    let outcome: Outcome = check::printed(client(&["ask", CLOSED])?)?;
    ensure!(outcome.error.as_deref() == Some("connect: ECONNREFUSED"), "{outcome:?}");
    Ok(7)
}

/// After each single replacement everything is as it should be, and nothing is counted twice or not at all.
#[test]
fn any_mix_of_programs() -> Result<()> {
    let mut node = node()?;
    let long = Long::start(&node, LONG, 20, 10)?;
    until_open(&node, "long", 40)?;
    node.agent.kill()?;
    let (namespace, cgroup, pins) =
        (node.namespace(), node.cgroup().path().to_owned(), node.agent.pins());
    let replace = || -> Result<Vec<u64>> {
        let pins = Arc::new(PinDir::take(&pins)?);
        let loaded = load::load(Options { log: true, ..Options::default() }, &pins)?;
        let Loaded { mut programs, are_kept, .. } = loaded;
        ensure!(!are_kept, "this tests nothing: they are the same programs");
        let mut met = Vec::new();
        programs.attach_watched(&cgroup, |_| met.push(meet(&namespace, &cgroup)))?;
        met.into_iter().collect()
    };
    let met = mounts::inside(namespace.mounts(), replace)??;
    ensure!(met.len() == 16, "{met:?}");

    // This one has the former programs, so it replaces them once more.
    node.agent.start()?;
    ensure!(node.agent.log()?.has(&["its programs will be replaced"]));
    let opened = service(&node.agent, "app", "opened")?;
    ensure!(opened == met.iter().sum::<u64>(), "{opened}");
    ensure!(service(&node.agent, "closed", "opened")? == 16);
    ensure!(service(&node.agent, "closed", "failed")? == 16, "each failure counts once");
    until_open(&node, "app", 0)?;
    until_open(&node, "closed", 0)?;
    until_open(&node, "long", 40)?;
    long.finish_whole()?;
    until_open(&node, "long", 0)?;
    let audit: Value = node.agent.get("/v1/audit")?;
    ensure!(audit["records"] == 0 && audit["released_ever"] == 0, "{audit}");
    node.agent.stays = false;
    node.agent.stop()?;
    node.agent.start()?;
    check::balanced(&mut node, &["a", "b"], |node| check::who(node, VIP))
}

/// Agents of two builds, killed at any moment or told to end, under load (`cargo xtask soak restarts`).
#[test]
fn nobody_notices_restarts() -> Result<()> {
    let report = restarts::run(Plan { times: 16, tcp: 100, udp: 20 }, |_| {})?;
    println!("{report:?}");
    report.ensure_unnoticed()
}

/// What cannot be brought to its end is undone, also at its last step.
#[test]
fn an_upgrade_that_fails_changes_nothing() -> Result<()> {
    let mut node = node()?;
    let ids = |node: &Node| -> Result<Vec<u32>> {
        Ok(node.attached()?.into_iter().map(|program| program.id).collect())
    };
    let before = ids(&node)?;
    node.agent.stop()?;
    let (namespace, pins) = (node.namespace(), node.agent.pins());
    let obstacle = pins.join(format!("v{}", mesh_common::ABI_VERSION)).join("mesh_retransmit_next");
    mounts::inside(namespace.mounts(), || fs::create_dir(&obstacle))??;
    node.agent.arguments = vec!["--log-refusals"];
    let output = run(node.agent.run_command()?)?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.code() == Some(1) && said.contains("mesh_retransmit"), "{said}");
    ensure!(ids(&node)? == before, "{:?}, and before {before:?}", ids(&node)?);
    let seen = check::histogram(&node, VIP, 20)?;
    ensure!(seen.len() == 2, "{seen:?}");

    mounts::inside(namespace.mounts(), || fs::remove_dir(&obstacle))??;
    node.agent.stays = false;
    node.agent.start()?;
    let after = ids(&node)?;
    ensure!(after.iter().all(|id| !before.contains(id)), "{before:?} and {after:?}");
    check::balanced(&mut node, &["a", "b"], |node| check::who(node, VIP))
}
