//! The agent as a process: how it starts, refuses to start, ends, and what it leaves; and the
//! commands that do not need traffic.

use std::process::Output;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use mesh_tests::process::{Echo, run, stdout, until};
use mesh_tests::{Agent, Node, Service, check};

const VIP: &str = "10.96.0.10:80";

fn node() -> Result<Node> {
    let app = Service::new("app").address("10.96.0.10").port(80, 8080).endpoint("10.0.0.1");
    Node::builder().backend("a", "10.0.0.1:8080").service(app).start()
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Ended with status 1 and with these texts on standard error.
fn ensure_refused(output: &Output, texts: &[&str]) -> Result<()> {
    ensure!(output.status.code() == Some(1), "{output:?}");
    for text in texts {
        ensure!(said(output).contains(text), "{text:?} is not in: {}", said(output));
    }
    Ok(())
}

fn until_detached(node: &Node) -> Result<()> {
    until("the programs to be detached", Duration::from_secs(5), || {
        Ok(node.attached()?.is_empty().then_some(()))
    })
}

#[test]
fn sigterm_detaches_everything() -> Result<()> {
    let mut node = node()?;
    let attached: Vec<_> = node.attached()?.into_iter().map(|program| program.name).collect();
    for program in ["mesh_connect4", "mesh_connect6", "mesh_peername4", "mesh_peername6"] {
        ensure!(attached.iter().any(|name| name.starts_with(program)), "{attached:?}");
    }
    let status = node.agent.status()?;
    let hooked = status.programs.iter().filter(|program| program.hook.starts_with("cgroup/"));
    ensure!(hooked.count() == attached.len(), "{:?}", status.programs);
    ensure!(status.programs.iter().all(|program| program.attached), "{:?}", status.programs);
    check::balanced(&mut node, &["a"], |node| check::who(node, VIP))?;
    ensure!(node.attached()?.is_empty());
    ensure!(!node.agent.socket().exists(), "the socket is left");
    Ok(())
}

#[test]
fn a_second_agent_on_the_same_socket_refuses() -> Result<()> {
    let mut node = node()?;
    let second = run(node.agent.run_command()?)?;
    ensure_refused(&second, &[&node.agent.id()?.to_string()])?;
    check::balanced(&mut node, &["a"], |node| check::who(node, VIP))
}

#[test]
fn a_second_agent_on_the_same_cgroup_refuses() -> Result<()> {
    let mut node = node()?;
    let directory = node.directory().join("second");
    let second = Agent::new(&directory, node.cgroup().path(), node.namespace(), &[], Echo::On)?;
    let output = run(second.run_command()?)?;
    let pid = format!("(process {})", node.agent.id()?);
    ensure_refused(&output, &[&*node.cgroup().path().to_string_lossy(), &pid])?;
    check::balanced(&mut node, &["a"], |node| check::who(node, VIP))
}

/// A service manager removes the cgroup of what has stopped, and makes it again. Programs attached
/// to the removed one balance nothing, and nobody tells the agent.
#[test]
fn a_cgroup_that_is_removed_and_made_again() -> Result<()> {
    let node = Node::builder().backend("a", "10.0.0.1:8080").start_without_agent()?;
    let slice = node.cgroup().child("slice")?;
    let directory = node.directory().join("own");
    let mut agent = Agent::new(&directory, &slice, node.namespace(), &[], Echo::On)?;
    let app = Service::new("app").address("10.96.0.10").port(80, 8080).endpoint("10.0.0.1");
    agent.write_services("app.yaml", &Service::file(&[app]))?;
    agent.start()?;
    let ask = || check::ask_in(&node, &slice, "blocking", VIP);
    ensure!(ask()?.backend.as_deref() == Some("a"));

    std::fs::remove_dir(&slice)?;
    let status = agent.status()?;
    let mut hooked = status.programs.iter().filter(|program| program.hook.starts_with("cgroup/"));
    ensure!(!status.ready && hooked.all(|program| !program.attached), "{:?}", status.programs);
    ensure!(status.reasons.iter().any(|reason| reason.contains("nothing is balanced")));
    std::fs::create_dir(&slice)?;
    until("the agent to be ready again", Duration::from_secs(20), || {
        Ok(agent.status()?.ready.then_some(()))
    })?;
    ensure!(ask()?.backend.as_deref() == Some("a"));

    agent.stop()?;
    ensure!(ask()?.backend.is_none(), "control: answered with the agent stopped");
    std::fs::remove_dir(&slice)?;
    Ok(())
}

#[test]
fn without_a_cgroup_it_refuses() -> Result<()> {
    let node = Node::builder().start_without_agent()?;
    let file = node.agent.file();
    let text = std::fs::read_to_string(&file)?;
    let without = text.lines().filter(|line| !line.starts_with("cgroup:"));
    std::fs::write(&file, without.collect::<Vec<_>>().join("\n"))?;
    ensure_refused(&run(node.agent.run_command()?)?, &["cgroup", "--cgroup"])
}

#[test]
fn cleanup() -> Result<()> {
    let mut node = node()?;
    ensure_refused(&node.agent.mesh(&["cleanup"])?, &[&node.agent.id()?.to_string()])?;
    ensure!(check::who(&node, VIP)? == "a");
    node.agent.kill()?;
    ensure!(node.agent.socket().exists(), "this tests nothing: there is no stale socket");
    ensure!(check::who(&node, VIP)? == "a", "what is pinned goes on");
    // Where nothing of anybody's is pinned.
    let pins = node.directory().join("pins");
    let output = node.agent.mesh(&["cleanup", "--pin-dir", &pins.to_string_lossy()])?;
    ensure!(output.status.success(), "{output:?}");
    ensure!(!node.agent.socket().exists());
    let output =
        node.agent.mesh(&["cleanup", "--pin-dir", &node.agent.pins().to_string_lossy()])?;
    ensure!(output.status.success(), "{output:?}");
    until_detached(&node)
}

#[test]
fn nobody_answers() -> Result<()> {
    let node = Node::builder().start_without_agent()?;
    let output = node.agent.mesh(&["status"])?;
    ensure!(output.status.code() == Some(3), "{output:?}");
    ensure!(said(&output).contains(&*node.agent.socket().to_string_lossy()), "{output:?}");
    Ok(())
}

#[test]
fn commands_that_need_no_agent() -> Result<()> {
    let node = Node::builder().start_without_agent()?;
    let version = stdout(node.agent.cli(&["version"])?)?;
    ensure!(version.contains(env!("CARGO_PKG_VERSION")), "{version}");
    for shell in ["bash", "zsh", "fish"] {
        let script = stdout(node.agent.cli(&["completions", shell])?)?;
        ensure!(script.contains("mesh-agent") && script.contains("explain"), "{shell}: {script}");
    }
    let cgroup = node.cgroup().path().to_string_lossy().into_owned();
    let checks: Vec<serde_json::Value> = node.agent.json(&["check", "--cgroup", &cgroup])?;
    for check in &checks {
        ensure!(check["ok"] == true || check["required"] == false, "{check}");
    }
    ensure!(!checks.is_empty());
    let wrong = node.agent.mesh(&["no-such-command"])?;
    ensure!(wrong.status.code() == Some(2), "{wrong:?}");
    Ok(())
}

#[test]
fn the_same_by_tables_json_and_curl() -> Result<()> {
    let node = node()?;
    let table = stdout(node.agent.cli(&["services"])?)?;
    ensure!(table.contains("NAME") && table.contains("app"), "{table}");
    let table = stdout(node.agent.cli(&["backends", "app"])?)?;
    ensure!(table.contains("10.0.0.1:8080"), "{table}");
    ensure!(table.lines().all(|line| line.len() <= 100), "{table}");

    let printed: serde_json::Value = node.agent.json(&["services"])?;
    let mut curl = node.outside("curl");
    curl.args(["--silent", "--show-error", "--fail", "--unix-socket"]);
    curl.arg(node.agent.socket()).arg("http://mesh/v1/services");
    let answered: serde_json::Value = serde_json::from_str(&stdout(curl)?)?;
    ensure!(printed == answered, "{printed} {answered}");
    let service = printed.get(0).context("one service")?;
    ensure!(service["name"] == "app" && service["backends"]["total"] == 1, "{service}");
    ensure!(service["frontends"][0]["address"] == "10.96.0.10", "{service}");

    let unknown = node.agent.mesh(&["backends", "nothing"])?;
    ensure_refused(&unknown, &["nothing"])
}
