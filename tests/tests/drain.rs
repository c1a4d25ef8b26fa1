//! Draining: no new connections, by command and from the file, and what is open goes on.

use std::collections::BTreeSet;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use mesh_tests::process::{LIMIT, until};
use mesh_tests::sys::socket::monotonic_nanos;
use mesh_tests::{Later, Node, Service, check};
use serde_json::Value;

const VIP: &str = "10.96.0.10:80";
const PLACES: [(&str, &str); 3] =
    [("a", "10.0.0.1:8080"), ("b", "10.0.0.2:8080"), ("c", "10.0.0.3:8080")];

/// In turn, so that nobody is left out by chance.
fn app() -> Service {
    PLACES.iter().fold(empty(), |app, (_, place)| app.endpoint(place))
}

fn empty() -> Service {
    Service::new("app").address("10.96.0.10").port(80, 8080).key("balance: round-robin")
}

fn node() -> Result<Node> {
    let node = PLACES.iter().fold(Node::builder(), |node, (name, place)| node.backend(name, place));
    node.service(app()).start()
}

/// Who answers.
fn names(node: &Node) -> Result<BTreeSet<String>> {
    Ok(check::histogram(node, VIP, 30)?.into_keys().collect())
}

fn ensure_names(node: &Node, expected: &[&str]) -> Result<()> {
    let seen = names(node)?;
    ensure!(seen.iter().eq(expected), "{seen:?} answered in place of {expected:?}");
    Ok(())
}

/// What is shown of a backend.
fn shown(node: &Node, place: &str) -> Result<Value> {
    let backends: Vec<Value> = node.agent.json(&["backends", "app"])?;
    backends.into_iter().find(|backend| backend["address"] == place).context("no such backend")
}

/// What a command complains about, which must fail.
fn complaint(node: &Node, arguments: &[&str]) -> Result<String> {
    let output = node.agent.mesh(arguments)?;
    ensure!(!output.status.success(), "{arguments:?} succeeded: {output:?}");
    Ok(String::from_utf8(output.stderr)?)
}

#[test]
fn by_command_under_a_storm() -> Result<()> {
    let mut node = node()?;
    let mut held: Vec<Later> = Vec::new();
    for _ in 0..6 {
        let mut later = Later::start(check::mesh_client(&node)?, VIP)?;
        later.connect(None)?.name()?;
        held.push(later);
    }
    ensure!(shown(&node, "10.0.0.2:8080")?["active"] == 2, "{:?}", shown(&node, "10.0.0.2:8080"));

    let storm = check::Storm::start(&node, VIP)?;
    sleep(Duration::from_millis(100));
    let drained: Vec<Value> = node.agent.json(&["drain", "app", "10.0.0.2"])?;
    let from = monotonic_nanos();
    ensure!(drained.len() == 1 && drained[0]["state"] == "draining", "{drained:?}");
    sleep(Duration::from_millis(300));
    let (report, connects) = storm.finish()?;
    ensure!(report.failed.is_empty(), "connects failed: {report:?}");
    let (before, after): (Vec<_>, Vec<_>) = connects.iter().partition(|c| c.start < from);
    ensure!(before.iter().any(|connect| connect.backend == "b"), "b was never used");
    ensure!(after.len() > 100, "too few connects to tell: {}", after.len());
    ensure!(after.iter().all(|connect| connect.backend != "b"), "b was used after it was drained");

    // What was open goes on, and ends when it ends.
    let shown_now = shown(&node, "10.0.0.2:8080")?;
    ensure!(shown_now["active"] == 2 && shown_now["state"] == "draining", "{shown_now:#}");
    let reason = shown_now["reason"].as_str().unwrap_or_default();
    ensure!(reason.starts_with("drained by command"), "{reason}");
    drop(held);
    until("the last connection to b to end", LIMIT, || {
        Ok((shown(&node, "10.0.0.2:8080")?["active"] == 0).then_some(()))
    })?;

    // Twice is once.
    node.agent.json::<Value>(&["drain", "app", "10.0.0.2"])?;

    // With nothing else usable, what drains is used.
    node.agent.json::<Value>(&["drain", "app", "10.0.0.1:8080"])?;
    ensure_names(&node, &["c"])?;
    node.agent.json::<Value>(&["drain", "app", "10.0.0.3"])?;
    ensure_names(&node, &["a", "b", "c"])?;
    node.agent.json::<Value>(&["undrain", "app", "10.0.0.1"])?;
    ensure_names(&node, &["a"])?;
    node.agent.json::<Value>(&["undrain", "app", "10.0.0.3"])?;
    node.agent.json::<Value>(&["undrain", "app", "10.0.0.2"])?;
    ensure_names(&node, &["a", "b", "c"])?;

    let events: Vec<Value> = node.agent.json(&["events", "--service", "app"])?;
    let kinds: Vec<_> = events.iter().filter_map(|event| event["kind"].as_str()).collect();
    let count = |kind| kinds.iter().filter(|known| **known == kind).count();
    ensure!(count("drained") == 3 && count("undrained") == 3, "{kinds:?}");
    check::balanced(&mut node, &["a", "b", "c"], |node| check::who(node, VIP))
}

#[test]
fn from_the_file() -> Result<()> {
    let mut node = node()?;
    let [a, b, c] = PLACES.map(|(_, place)| place);
    let drained = empty().endpoint(a).drained(b).endpoint(c);
    node.agent.write_services("test.yaml", &Service::file(&[drained]))?;
    until("the file to apply", LIMIT, || {
        Ok((shown(&node, "10.0.0.2:8080")?["state"] == "draining").then_some(()))
    })?;
    ensure_names(&node, &["a", "c"])?;
    let text = complaint(&node, &["undrain", "app", "10.0.0.2"])?;
    ensure!(text.contains("drained by its file") && text.contains("test.yaml"), "{text}");

    node.agent.write_services("test.yaml", &Service::file(&[app()]))?;
    until("the file to apply", LIMIT, || {
        Ok((shown(&node, "10.0.0.2:8080")?["state"] != "draining").then_some(()))
    })?;
    ensure_names(&node, &["a", "b", "c"])?;
    check::balanced(&mut node, &["a", "b", "c"], |node| check::who(node, VIP))
}

/// Wrong orders are refused with what to do; an endpoint that went and came back is a new one.
#[test]
fn what_is_refused_and_what_is_forgotten() -> Result<()> {
    let mut node = node()?;
    for (arguments, words) in [
        (&["drain", "nobody", "10.0.0.1"][..], "there is no service \"nobody\""),
        (&["drain", "app", "10.0.0.9"], "has no endpoint 10.0.0.9"),
        (&["drain", "app", "10.0.0.1:81"], "has no endpoint 10.0.0.1:81"),
        (&["undrain", "app", "10.0.0.1"], "is not drained"),
        (&["drain", "app", "orders"], "expected IP or IP:PORT"),
        (&["drain", "app"], "required"),
    ] {
        let text = complaint(&node, arguments)?;
        ensure!(text.contains(words), "{arguments:?}: {text}");
    }
    node.agent.json::<Value>(&["drain", "app", "10.0.0.1"])?;
    ensure_names(&node, &["b", "c"])?;
    let without = PLACES[1..].iter().fold(empty(), |app, (_, place)| app.endpoint(place));
    node.agent.write_services("test.yaml", &Service::file(&[without]))?;
    node.agent.until_places("app", &["10.0.0.2:8080", "10.0.0.3:8080"])?;
    node.agent.write_services("test.yaml", &Service::file(&[app()]))?;
    node.agent.until_places("app", &["10.0.0.1:8080", "10.0.0.2:8080", "10.0.0.3:8080"])?;
    ensure_names(&node, &["a", "b", "c"])?;
    check::balanced(&mut node, &["a", "b", "c"], |node| check::who(node, VIP))
}
