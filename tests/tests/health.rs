//! Health checks: a backend that stops gets no traffic, and gets it again when it is back.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use mesh_tests::process::until;
use mesh_tests::server::Kind;
use mesh_tests::{Node, Service, check};
use serde_json::Value;

const VIP: &str = "10.96.0.10:80";
const B: &str = "10.0.0.2:8080";
const C: &str = "10.0.0.3:8080";

fn node() -> Result<Node> {
    let app = Service::new("app").address("10.96.0.10").port(80, 8080).checked_every(200);
    Node::builder()
        .backend("a", "10.0.0.1:8080")
        .backend("b", B)
        .backend("c", "10.0.0.3:8080")
        .service(app.endpoint("10.0.0.1").endpoint("10.0.0.2").endpoint("10.0.0.3"))
        .start()
}

fn until_state(node: &Node, address: &str, state: &str) -> Result<()> {
    let found = node.agent.until_backends("app", |backends| {
        backends.iter().any(|backend| backend.address == address && backend.state == state)
    });
    found.with_context(|| format!("{address} should be {state}"))
}

#[test]
fn traffic_moves_and_returns() -> Result<()> {
    let mut node = node()?;
    until_state(&node, B, "healthy")?;
    node.kill_server("b")?;
    until_state(&node, B, "unhealthy")?;
    // With a third of the traffic, 200 connects miss it with a probability of 1e-35.
    let seen = check::histogram(&node, VIP, 200)?;
    ensure!(seen.keys().eq(["a", "c"]), "with b stopped: {seen:?}");

    node.start_server(Kind::Plain, "b", B)?;
    until_state(&node, B, "healthy")?;
    let seen = check::histogram(&node, VIP, 200)?;
    ensure!(seen.keys().eq(["a", "b", "c"]), "with b back: {seen:?}");
    check::balanced(&mut node, &["a", "b", "c"], |node| check::who(node, VIP))
}

/// What is added later is checked too, and used before its first check has ended.
#[test]
fn a_new_endpoint_is_checked() -> Result<()> {
    let mut node = node()?;
    let app = Service::new("app").address("10.96.0.10").port(80, 8080).checked_every(200);
    let app = app.endpoint("10.0.0.1").endpoint("10.0.0.9");
    node.agent.write_services("test.yaml", &Service::file(&[app]))?;
    until_state(&node, "10.0.0.9:8080", "unhealthy")?;
    until_state(&node, "10.0.0.1:8080", "healthy")?;
    check::balanced(&mut node, &["a"], |node| check::who(node, VIP))
}

/// Connects until one fails, which is told of b, and the agent agrees.
fn until_ejected(node: &Node) -> Result<()> {
    for _ in 0..200 {
        if check::ask(node, "blocking", VIP)?.error.is_some() {
            return until_state(node, B, "ejected");
        }
    }
    anyhow::bail!("no connect met b, which is dead")
}

fn ejected_node(keys: &[&str]) -> Result<Node> {
    let app = Service::new("app").address("10.96.0.10").port(80, 8080);
    let app = keys.iter().fold(app, |app, key| app.key(key));
    let app = app.endpoint("10.0.0.1").endpoint("10.0.0.2").endpoint("10.0.0.3");
    let node = Node::builder().backend("a", "10.0.0.1:8080").backend("b", B);
    let mut node = node.backend("c", "10.0.0.3:8080").service(app).start()?;
    node.kill_server("b")?;
    until_ejected(&node)?;
    Ok(node)
}

/// Nobody connects any more, so nobody would find out that it is back: the agent tries it, and goes on trying
/// while it is not.
#[test]
fn back_without_any_connect() -> Result<()> {
    let mut node = ejected_node(&["ejection: {base: 100ms}"])?;
    // Its ejection is over, and it is out once more: a try has failed.
    for words in ["the next connect tries it", "out for "] {
        until(&format!("`{words}`"), Duration::from_secs(40), || {
            let backends = node.agent.backends("app")?;
            let b = backends.iter().find(|one| one.address == B).context("b")?;
            ensure!(b.state == "ejected", "{b:?}");
            Ok(b.reason.contains(words).then_some(()))
        })?;
    }
    node.start_server(Kind::Plain, "b", B)?;
    until_state(&node, B, "unknown")?;
    let events: Vec<Value> = node.agent.json(&["events", "--service", "app"])?;
    let recovered = |one: &Value| {
        one["kind"] == "recovered"
            && one["detail"].as_str().is_some_and(|text| text.contains("agent's own"))
    };
    ensure!(events.iter().any(recovered), "{events:?}");
    check::balanced(&mut node, &["a", "b", "c"], |node| check::who(node, VIP))
}

/// When its checks pass again after they failed, it is not out any longer for connects that failed before.
#[test]
fn back_when_its_checks_pass() -> Result<()> {
    let health = "health: {tcp: {}, probe: always, interval: 200ms, fall: 5}";
    let mut node = ejected_node(&["ejection: {base: 10m, max: 1h}", health])?;
    until_state(&node, B, "unhealthy")?;
    node.start_server(Kind::Plain, "b", B)?;
    until_state(&node, B, "healthy")?;
    check::balanced(&mut node, &["a", "b", "c"], |node| check::who(node, VIP))
}

/// The agent runs inside the cgroup that it balances: its checks go to the endpoints themselves all the same,
/// whose addresses are another service's frontend, or one that would be refused.
#[test]
fn checks_are_not_balanced() -> Result<()> {
    let service = |name: &str, address: &str, port: u16, endpoint: &str| {
        let service = Service::new(name).address(address).port(80, port).endpoint(endpoint);
        service.key("health: {tcp: {}, probe: always, interval: 200ms, fall: 2}")
    };
    let mut node = Node::builder()
        .virtual_ips("10.96.0.0/16")
        .backend("a", "10.0.0.1:8080")
        .backend("inside", "10.96.9.9:8080")
        .service(service("app", "10.96.0.10", 8080, "10.0.0.1"))
        .start()?;
    let agent = node.agent.id()?.to_string();
    std::fs::write(node.cgroup().path().join("cgroup.procs"), agent)?;
    // Their addresses lead a client that connects there to a, or are refused.
    let behind = service("behind", "10.96.0.11", 80, "10.96.0.10");
    let inside = service("inside", "10.96.0.12", 8080, "10.96.9.9");
    node.agent.write_services("more.yaml", &Service::file(&[behind, inside]))?;
    for (name, state) in [("behind", "unhealthy"), ("inside", "healthy")] {
        node.agent.until_backends(name, |all| all.iter().all(|one| one.state == state))?;
    }
    ensure!(check::ask(&node, "blocking", "10.96.9.9:8080")?.backend.is_none(), "not refused");
    check::balanced(&mut node, &["a"], |node| check::who(node, VIP))
}

/// While too few endpoints are usable, those whose checks fail are used too.
#[test]
fn few_are_not_left_alone() -> Result<()> {
    let app = Service::new("app").address("10.96.0.10").port(80, 8080).checked_every(200);
    let app = app.key("ejection: off").key("panic-threshold: 50%");
    let mut node = Node::builder()
        .backend("a", "10.0.0.1:8080")
        .backend("b", B)
        .backend("c", C)
        .service(app.endpoint("10.0.0.1").endpoint("10.0.0.2").endpoint("10.0.0.3"))
        .start()?;
    node.agent.until_backends("app", |all| all.iter().all(|one| one.state == "healthy"))?;
    node.kill_server("b")?;
    until_state(&node, B, "unhealthy")?;
    let seen = check::histogram(&node, VIP, 100)?;
    ensure!(seen.keys().eq(["a", "c"]), "two of three are enough: {seen:?}");
    node.kill_server("c")?;
    until_state(&node, C, "unhealthy")?;
    // Two of three connects go where nobody is.
    let failed = (0..60).map(|_| check::ask(&node, "blocking", VIP));
    let failed =
        failed.collect::<Result<Vec<_>>>()?.iter().filter(|one| one.error.is_some()).count();
    ensure!((10..60).contains(&failed), "{failed} of 60 failed");
    node.start_server(Kind::Plain, "c", C)?;
    until_state(&node, C, "healthy")?;
    let seen = check::histogram(&node, VIP, 100)?;
    ensure!(seen.keys().eq(["a", "c"]), "two of three are enough again: {seen:?}");
    let events: Vec<Value> = node.agent.json(&["events", "--service", "app"])?;
    let kinds: Vec<_> = events.iter().filter_map(|one| one["kind"].as_str()).collect();
    let told: Vec<_> = kinds.iter().filter(|kind| matches!(**kind, "panic" | "calm")).collect();
    ensure!(told == [&"panic", &"calm"], "{kinds:?}");
    check::balanced(&mut node, &["a", "c"], |node| check::who(node, VIP))
}
