//! An agent that may use little memory: it starts with less than it takes where there is plenty, and does not end
//! without a word.

use std::time::Duration;

use anyhow::{Result, ensure};
use mesh_tests::limited::Limited;
use mesh_tests::process::{self, Echo, LIMIT, Process, until};
use mesh_tests::{Node, Service, check};

const VIP: &str = "10.96.0.10:80";
const MIB: u64 = 1 << 20;

fn node() -> Result<Node> {
    let app = Service::new("app").address("10.96.0.10").port(80, 8080).endpoint("10.0.0.1");
    Node::builder().backend("a", "10.0.0.1:8080").service(app).start_without_agent()
}

fn start(node: &Node, limited: &Limited) -> Result<Process> {
    let namespace = node.namespace();
    let command = limited.confine(&node.agent.run_command()?, |shell| namespace.pinning(shell));
    Process::spawn("agent", command, Echo::On)
}

/// What `check` says of memory there.
fn checked(node: &Node, limited: &Limited) -> Result<String> {
    let command = node.agent.cli(&["-o", "json", "check"])?;
    let namespace = node.namespace();
    let output = process::run(limited.confine(&command, |shell| namespace.pinning(shell)))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(text.contains("memory"), "{output:?}");
    Ok(text)
}

/// It starts within so many MiB, and says nothing of them.
fn starts_within(limit: u64) -> Result<()> {
    let (node, limited) = (node()?, Limited::new(&format!("within-{limit}"), limit * MIB)?);
    let allows = format!("allows {limit} MiB");
    ensure!(checked(&node, &limited)?.contains(&allows), "the limit");
    let mut agent = start(&node, &limited)?;
    until("the agent to be ready", LIMIT, || {
        if let Some(status) = agent.ended()? {
            anyhow::bail!("it ended: {status}\n{}", agent.log().tail());
        }
        Ok(node.agent.status().is_ok_and(|status| status.ready).then_some(()))
    })?;
    println!("a first start within {limit} MiB took {} MiB", limited.peak()?.div_ceil(MIB));
    ensure!(check::who(&node, VIP)? == "a", "not balanced");
    ensure!(!agent.log().has(&[&allows]), "it is enough: {}", agent.log().tail());
    // SIGTERM, as it was told to detach.
    agent.terminate(Duration::from_secs(10))?;
    ensure!(check::ask(&node, "blocking", VIP)?.backend.is_none(), "control");
    Ok(())
}

/// Where several programs are verified at a time it took more, and was killed.
#[test]
fn starts_with_little() -> Result<()> {
    starts_within(80)
}

/// Several programs are verified at a time.
#[test]
fn starts_with_enough() -> Result<()> {
    starts_within(256)
}

/// It is killed, or fails: what it has printed by then says what is missing, and where.
#[test]
fn says_what_is_missing() -> Result<()> {
    let (node, limited) = (node()?, Limited::new("none", 24 * MIB)?);
    let told = checked(&node, &Limited::new("check", 48 * MIB)?)?;
    ensure!(told.contains("allows 48 MiB") && told.contains("MemoryMax="), "{told}");
    let mut agent = start(&node, &limited)?;
    let status = agent.wait(LIMIT)?;
    ensure!(!status.success(), "24 MiB are enough: this test needs another number");
    let log = agent.log();
    ensure!(log.has(&["allows 24 MiB", "MemoryMax="]), "{status}: {}", log.tail());
    Ok(())
}
