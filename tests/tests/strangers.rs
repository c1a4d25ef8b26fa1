//! Programs of others: in place of this project's, or before them.

use std::fs;
use std::os::fd::AsFd as _;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use mesh_agent::dataplane::sys::links;
use mesh_common::ABI_VERSION;
use mesh_tests::process::until;
use mesh_tests::sys::bpf::Stranger;
use mesh_tests::sys::mounts;
use mesh_tests::{Node, Service, check};

const VIP: &str = "10.96.0.10:80";

fn node() -> Result<Node> {
    let app = Service::new("app").address("10.96.0.10").port(80, 8080).endpoint("10.0.0.1");
    Node::builder()
        .backend("a", "10.0.0.1:8080")
        .backend("b", "10.0.0.2:8080")
        .service(app)
        .start_without_agent()
}

fn until_said(node: &Node, texts: &[&str]) -> Result<()> {
    let mut last = Vec::new();
    until("the agent to say it", Duration::from_secs(40), || {
        let Ok(status) = node.agent.status() else { return Ok(None) };
        last = status.reasons;
        let has = |reason: &String| texts.iter().all(|text| reason.contains(text));
        Ok(last.iter().any(has).then_some(()))
    })
    .with_context(|| format!("said: {last:?}"))
}

/// It is put back within about a second, and named.
#[test]
fn a_program_in_place_of_ours_is_put_out_again() -> Result<()> {
    let mut node = node()?;
    node.agent.start()?;
    let link = node.agent.pins().join(format!("v{ABI_VERSION}")).join("mesh_connect4_link");
    let link = mounts::inside(node.namespace().mounts(), || links::pinned(&link))??;
    Stranger::load(None)?.replace(link.as_fd())?;
    // What keeps it attached is the agent's again.
    drop(link);
    let answered = until("the agent to put its own back", Duration::from_secs(20), || {
        Ok(check::ask(&node, "blocking", VIP)?.backend)
    })?;
    ensure!(answered == "a", "{answered}");
    ensure!(node.agent.log()?.has(&["somebody has put program", "in place of mesh_connect4"]));
    node.agent.until_ready()?;
    check::balanced(&mut node, &["a"], |node| check::who(node, VIP))
}

/// What is attached to a cgroup below runs before; it is named whether or not it rewrites.
#[test]
fn a_program_that_runs_first_is_named() -> Result<()> {
    let mut node = node()?;
    let below = node.cgroup().path().join("below");
    fs::create_dir(&below)?;
    let harmless = Stranger::load(None)?.attach(&below)?;
    node.agent.start()?;
    until_said(&node, &["before this agent's", "stranger (id ", "connect4 of ", "/below"])?;
    ensure!(node.agent.status()?.ready, "it is not known to rewrite anything");
    ensure!(check::who(&node, VIP)? == "a");
    drop(harmless);
    fs::remove_dir(&below)?;
    node.agent.stop()?;

    // One that was there before this agent's programs runs before them as well, and this one rewrites.
    let rewriting = Stranger::load(Some("10.0.0.2:8080".parse()?))?.attach(node.cgroup().path())?;
    node.agent.launch()?;
    until_said(&node, &["before this agent's", "stranger (id "])?;
    until_said(&node, &["not seen to be balanced"])?;
    ensure!(!node.agent.status()?.ready);
    ensure!(check::ask(&node, "blocking", VIP)?.backend.as_deref() == Some("b"), "control");
    drop(rewriting);
    node.agent.until_ready()?;
    check::balanced(&mut node, &["a"], |node| check::who(node, VIP))
}
