//! The agent with the privileges that `check` names, and no other: whoever starts it, it keeps only those.

use std::fs;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use mesh_agent::privileges::{NEEDED, names};
use mesh_tests::long::Long;
use mesh_tests::process::{Echo, Process, run, until};
use mesh_tests::server::Kind;
use mesh_tests::{Node, Service, check};
use serde_json::Value;

const VIP: &str = "10.96.0.10:80";
const LONG: &str = "10.96.0.12:90";

fn node() -> Result<Node> {
    let app = Service::new("app").address("10.96.0.10").port(80, 8080).endpoint("10.0.0.1");
    let long = Service::new("long").address("10.96.0.12").port(90, 9090).endpoint("10.0.0.3");
    let mut node = Node::builder()
        .backend("a", "10.0.0.1:8080")
        .server(Kind::Long, "c", "10.0.0.3:9090")
        .service(app.checked_every(200))
        .service(long)
        .start_without_agent()?;
    node.agent.stays = true;
    Ok(node)
}

/// The same, with nothing but these.
fn confined(node: &Node, command: &Command) -> Command {
    let mut setpriv = node.namespace().pinning("setpriv");
    let kept = NEEDED.map(|needed| needed.name.replace("CAP_", "+").to_lowercase()).join(",");
    setpriv.arg(format!("--bounding-set=-all,{kept}")).arg("--no-new-privs");
    setpriv.arg(command.get_program()).args(command.get_args());
    setpriv
}

fn field(pid: u32, name: &str) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let found = status.lines().find_map(|line| line.strip_prefix(name)).context("the field")?;
    Ok(u64::from_str_radix(found.trim_start_matches(':').trim(), 16)?)
}

fn until_ready(node: &Node) -> Result<()> {
    until("the agent to be ready", Duration::from_secs(20), || {
        Ok(node.agent.status().is_ok_and(|status| status.ready).then_some(()))
    })
}

#[test]
fn the_least_is_enough() -> Result<()> {
    let node = node()?;
    let allowed = NEEDED.iter().fold(0, |set, needed| set | needed.set.bits());
    let mut agent = Process::spawn("agent", confined(&node, &node.agent.run_command()?), Echo::On)?;
    until_ready(&node)?;
    ensure!(field(agent.id(), "CapEff")? == allowed, "{:x}", field(agent.id(), "CapEff")?);
    ensure!(check::who(&node, VIP)? == "a");
    let long = Long::start(&node, LONG, 3, 0)?;
    until("the connections to be listed with who holds them", Duration::from_secs(20), || {
        let listed: Vec<Value> = node.agent.get("/v1/connections?service=long")?;
        Ok((listed.len() == 3 && listed.iter().all(|one| one["pid"].is_u64())).then_some(()))
    })?;
    // What the next one is to find unchanged has to be as it stays.
    node.agent.until_backends("app", |backends| backends.iter().all(|b| b.state == "healthy"))?;
    agent.kill()?;

    // It takes over what it has left, with no more than that.
    let mut agent = Process::spawn("agent", confined(&node, &node.agent.run_command()?), Echo::On)?;
    until_ready(&node)?;
    let audit: Value = node.agent.get("/v1/audit")?;
    ensure!(audit["records"] == 3 && audit["seen"] == 3, "{audit}");
    ensure!(audit["in_unknown_namespaces"] == 0 && audit["problem"].is_null(), "{audit}");
    let status: Value = node.agent.get("/v1/status")?;
    ensure!(status["counters"]["map_writes"] == 0, "{}", status["counters"]);
    node.agent.until_backends("app", |backends| backends.iter().all(|b| b.state == "healthy"))?;
    long.finish_whole()?;
    let ended = agent.terminate(Duration::from_secs(10))?;
    ensure!(ended.success(), "{ended}: {}", agent.log().tail());

    let pins = node.agent.pins().to_string_lossy().into_owned();
    let cleanup = node.agent.cli(&["cleanup", "--pin-dir", &pins])?;
    let output = run(confined(&node, &cleanup))?;
    ensure!(output.status.success(), "{output:?}");
    ensure!(check::ask(&node, "blocking", VIP)?.backend.is_none(), "control");
    Ok(())
}

#[test]
fn the_rest_is_given_up() -> Result<()> {
    let mut node = node()?;
    node.agent.stays = false;
    node.agent.start()?;
    let allowed = NEEDED.iter().fold(0, |set, needed| set | needed.set.bits());
    for set in ["CapEff", "CapPrm", "CapBnd"] {
        let found = field(node.agent.id()?, set)?;
        ensure!(found == allowed, "{set} {found:x}, not {allowed:x}");
    }
    check::balanced(&mut node, &["a"], |node| check::who(node, VIP))
}

/// The unit gives what is needed, `check` says it, and lacks nothing with it.
#[test]
fn the_unit_and_check_say_the_same() -> Result<()> {
    let unit =
        fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/mesh-agent.service"))?;
    let has = |line: &str| unit.lines().any(|found| found == line);
    ensure!(has(&format!("CapabilityBoundingSet={}", names())), "{unit}");
    ensure!(has("Type=notify") && has("Restart=always") && has("NoNewPrivileges=yes"), "{unit}");
    let node = node()?;
    let cgroup = node.cgroup().path().to_string_lossy().into_owned();
    let command = node.agent.cli(&["-o", "json", "check", "--cgroup", &cgroup])?;
    let output = run(confined(&node, &command))?;
    let checks: Vec<Value> = serde_json::from_slice(&output.stdout)?;
    for check in &checks {
        ensure!(check["ok"] == true || check["required"] == false, "{check}");
    }
    let least =
        checks.iter().find(|check| check["name"] == "least privileges").context("a line")?;
    ensure!(least["detail"].as_str().is_some_and(|text| text.contains(&names())), "{least}");
    Ok(())
}
