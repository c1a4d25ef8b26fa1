//! Who is excluded is not touched: a cgroup with all below it, a network namespace.

use std::fs;

use anyhow::{Result, ensure};
use mesh_tests::client::Outcome;
use mesh_tests::process::{LIMIT, until};
use mesh_tests::{Node, Service, check, process};
use serde_json::Value;

const VIP: &str = "10.96.0.10:80";

fn node() -> Result<Node> {
    let app = Service::new("app").address("10.96.0.10").port(80, 8080).udp(80, 8080);
    let node = Node::builder().backend("a", "10.0.0.1:8080").virtual_ips("10.96.0.0/16");
    node.service(app.endpoint("10.0.0.1")).start()
}

/// Starts the agent again with another line in its file.
fn restart(node: &mut Node, line: &str) -> Result<()> {
    node.agent.stop()?;
    let file = fs::read_to_string(node.agent.file())?;
    fs::write(node.agent.file(), format!("{line}\n{file}"))?;
    node.agent.start()
}

fn ask(node: &Node, cgroup: &std::path::Path) -> Result<Outcome> {
    let mut command = node.command_in(cgroup, process::binary("mesh-client")?)?;
    command.args(["ask", VIP]);
    check::printed(command)
}

#[test]
fn a_cgroup_and_all_below_it() -> Result<()> {
    let mut node = node()?;
    let [out, inside] = ["out", "in"].map(|name| node.cgroup().child(name));
    let (out, inside) = (out?, inside?);
    let below = out.join("below");
    let later = node.cgroup().path().join("later");
    fs::create_dir(&below)?;
    let (first, second) = (out.display(), later.display());
    restart(&mut node, &format!("exclude: {{cgroups: [{first}, {second}]}}"))?;
    ensure!(ask(&node, &inside)?.backend.as_deref() == Some("a"), "others are balanced");
    for excluded in [&out, &below] {
        let outcome = ask(&node, excluded)?;
        ensure!(outcome.error.as_deref() == Some("connect: ENETUNREACH"), "{outcome:?}");
        // Not even what is refused to others.
        let mut command = node.command_in(excluded, process::binary("mesh-client")?)?;
        command.args(["ask", "10.96.9.9:80"]);
        let outcome: Outcome = check::printed(command)?;
        ensure!(outcome.error.as_deref() == Some("connect: ENETUNREACH"), "{outcome:?}");
        let command = node.command_in(excluded, process::binary("mesh-client")?)?;
        let mut datagrams = mesh_tests::Datagrams::start(command)?;
        let reply = datagrams.step(&format!("ask {VIP}"))?;
        ensure!(reply.error.as_deref() == Some("ENETUNREACH"), "{reply:?}");
        let from = excluded.display().to_string();
        let explained = node.agent.mesh(&["explain", VIP, "--from", &from, "-o", "json"])?;
        let explained: Value = serde_json::from_slice(&explained.stdout)?;
        ensure!(explained["answer"].is_null(), "{explained}");
        ensure!(explained["steps"].to_string().contains("excludes"), "{explained}");
    }
    // One that is made later, which was told to be missing.
    ensure!(node.agent.log()?.has(&["is not there", "later"]), "{}", node.agent.log()?.tail());
    fs::create_dir(&later)?;
    until("a new cgroup to be excluded", LIMIT, || {
        Ok((ask(&node, &later)?.error.as_deref() == Some("connect: ENETUNREACH")).then_some(()))
    })?;
    check::balanced(&mut node, &["a"], |node| check::who(node, VIP))
}

#[test]
fn a_network_namespace() -> Result<()> {
    let mut node = node()?;
    let holder = process::Process::spawn(
        "holder",
        {
            let mut command = node.command("sleep");
            command.arg("600");
            command
        },
        process::Echo::Off,
    )?;
    ensure!(check::who(&node, VIP)? == "a", "before");
    restart(&mut node, &format!("exclude: {{namespaces: [/proc/{}/ns/net]}}", holder.id()))?;
    let outcome = check::ask(&node, "blocking", VIP)?;
    ensure!(outcome.error.as_deref() == Some("connect: ENETUNREACH"), "{outcome:?}");
    let counters: Value = node.agent.json(&["status"])?;
    ensure!(counters["counters"]["balanced"] == 0, "{counters}");
    Ok(())
}
