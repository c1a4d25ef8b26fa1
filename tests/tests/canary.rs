//! That a node is ready is proven: by a connect from inside the cgroup, which the kernel programs lead to the
//! agent.

use std::fs;
use std::time::Duration;

use anyhow::{Result, ensure};
use mesh_tests::process::until;
use mesh_tests::{Node, Service, check};
use serde_json::Value;

const VIP: &str = "10.96.0.10:80";

fn node() -> Result<Node> {
    let app = Service::new("app").address("10.96.0.10").port(80, 8080).endpoint("10.0.0.1");
    Node::builder().backend("a", "10.0.0.1:8080").service(app).start_without_agent()
}

/// All is attached, and nobody in the cgroup can connect: a frozen one stands for whatever keeps it.
#[test]
fn not_ready_before_a_connect_came_back() -> Result<()> {
    let mut node = node()?;
    let freeze = |node: &Node, frozen: bool| {
        fs::write(node.cgroup().path().join("cgroup.freeze"), if frozen { "1" } else { "0" })
    };
    freeze(&node, true)?;
    node.agent.launch()?;
    until("the agent to say why it is not ready", Duration::from_secs(30), || {
        let Ok(status) = node.agent.status() else { return Ok(None) };
        let attached = status.programs.iter().all(|program| program.attached);
        let said = status.reasons.iter().any(|reason| {
            reason.contains("not seen to be balanced") && reason.contains("no answer within")
        });
        ensure!(!status.ready, "{:?}", status.reasons);
        Ok((attached && said).then_some(()))
    })?;
    freeze(&node, false)?;
    node.agent.until_ready()?;
    ensure!(node.agent.status()?.reasons.is_empty(), "{:?}", node.agent.status()?.reasons);
    check::balanced(&mut node, &["a"], |node| check::who(node, VIP))
}

/// It is no service of anybody's, and nobody sees it but in `explain`.
#[test]
fn it_leaves_no_trace() -> Result<()> {
    let mut node = node()?;
    node.agent.start()?;
    ensure!(check::who(&node, VIP)? == "a");
    let services: Vec<Value> = node.agent.json(&["services"])?;
    ensure!(services.len() == 1 && services[0]["name"] == "app", "{services:?}");
    let backends: Vec<Value> = node.agent.json(&["backends"])?;
    ensure!(backends.len() == 1, "{backends:?}");
    ensure!(node.agent.status()?.counters.balanced == 1);
    let connections: Vec<Value> = node.agent.json(&["connections"])?;
    ensure!(connections.iter().all(|one| one["service"] == "app"), "{connections:?}");
    let inside = fs::read_dir(node.cgroup().path())?.filter_map(Result::ok);
    let inside: Vec<_> = inside.filter(|entry| entry.path().is_dir()).collect();
    ensure!(inside.is_empty(), "{inside:?}");
    let procs = fs::read_to_string(node.cgroup().path().join("cgroup.procs"))?;
    ensure!(procs.is_empty(), "{procs}");
    let explained: Value = node.agent.json(&["explain", "192.0.0.8:1"])?;
    ensure!(explained["service"] == "the agent's canary", "{explained}");
    check::balanced(&mut node, &["a"], |node| check::who(node, VIP))
}

/// Whoever may not enter the cgroup can do without, and says so in the agent file; what a former agent left
/// goes.
#[test]
fn it_can_be_left_out() -> Result<()> {
    let mut node = node()?;
    node.agent.stays = true;
    node.agent.start()?;
    node.agent.stop()?;
    node.agent.append("canary: false\n")?;
    node.agent.stays = false;
    node.agent.start()?;
    check::untouched(&node, "192.0.0.8:1")?;
    let explained = node.agent.mesh(&["explain", "192.0.0.8:1"])?;
    ensure!(explained.status.code() == Some(1), "{explained:?}");
    check::balanced(&mut node, &["a"], |node| check::who(node, VIP))
}
