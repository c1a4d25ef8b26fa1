//! Health checks: a backend that stops gets no traffic, and gets it again when it is back.

use anyhow::{Context, Result, ensure};
use mesh_tests::server::Kind;
use mesh_tests::{Node, Service, check};

const VIP: &str = "10.96.0.10:80";
const B: &str = "10.0.0.2:8080";

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
