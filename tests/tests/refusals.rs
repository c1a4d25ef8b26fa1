//! What is refused, with `ECONNREFUSED` and its reason counted, and what is not touched at all.

use anyhow::{Result, ensure};
use mesh_tests::agent::Backend;
use mesh_tests::server::Kind;
use mesh_tests::{Builder, Node, Service, check};

const VIP: &str = "10.96.0.10:80";

fn service(name: &str) -> Service {
    Service::new(name).address("10.96.0.10").port(80, 8080)
}

/// A service whose two endpoints exist in the file only: nobody listens there.
fn dead() -> Service {
    service("dead").checked_every(200).endpoint("10.0.0.1").endpoint("10.0.0.2")
}

fn node(service: Service) -> Builder {
    Node::builder().virtual_ips("10.96.0.0/16").virtual_ips("fd00:96::/64").service(service)
}

/// With the programs detached nothing is refused: there is no route then. This tells a refusal
/// of the programs from one of a closed port.
fn control(mut node: Node, address: &str) -> Result<()> {
    node.agent.stop()?;
    let error = check::ask(&node, "blocking", address)?.error;
    ensure!(error.as_deref() == Some("connect: ENETUNREACH"), "control: {error:?}");
    Ok(())
}

#[test]
fn a_virtual_ip_of_no_service() -> Result<()> {
    let node = node(service("app").endpoint("10.0.0.1")).start()?;
    check::refused(&node, "10.96.0.99:80", "no-service")?;
    check::refused(&node, "[fd00:96::99]:80", "no-service")?;
    control(node, "10.96.0.99:80")
}

#[test]
fn a_port_that_is_not_listed() -> Result<()> {
    let node = node(service("app").endpoint("10.0.0.1")).start()?;
    check::refused(&node, "10.96.0.10:81", "no-port")?;
    control(node, "10.96.0.10:81")
}

#[test]
fn no_endpoint() -> Result<()> {
    let node = node(service("app")).start()?;
    check::refused(&node, VIP, "no-endpoint")?;
    control(node, VIP)
}

#[test]
fn weight_zero_only() -> Result<()> {
    let app = service("app").weighted("10.0.0.1", 0).weighted("10.0.0.2", 0);
    let node = node(app).backend("a", "10.0.0.1:8080").start()?;
    check::refused(&node, VIP, "no-weight")?;
    control(node, VIP)
}

#[test]
fn all_unhealthy_and_told_to_refuse() -> Result<()> {
    let node = node(dead().key("when-all-unhealthy: refuse")).start()?;
    node.agent
        .until_backends("dead", |all| all.iter().all(|backend| backend.state == "unhealthy"))?;
    check::refused(&node, VIP, "all-unhealthy")?;
    control(node, VIP)
}

/// By default all are used when all are unhealthy. The backends are started after they were found
/// unhealthy, and need so many passes to rise that they stay unhealthy while they serve.
#[test]
fn all_unhealthy_uses_all() -> Result<()> {
    let health = "health: {tcp: {}, probe: always, interval: 200ms, rise: 1000, fall: 2}";
    let app = service("app").key(health).endpoint("10.0.0.1").endpoint("10.0.0.2");
    let mut node = node(app).start()?;
    let unhealthy = |all: &[Backend]| all.iter().all(|backend| backend.state == "unhealthy");
    node.agent.until_backends("app", unhealthy)?;
    node.start_server(Kind::Plain, "a", "10.0.0.1:8080")?;
    node.start_server(Kind::Plain, "b", "10.0.0.2:8080")?;
    check::balanced(&mut node, &["a", "b"], |node| {
        let name = check::who(node, VIP)?;
        if let Ok(backends) = node.agent.backends("app") {
            ensure!(unhealthy(&backends), "this tests nothing: {backends:?}");
        }
        Ok(name)
    })
}

#[test]
fn what_is_not_ours_is_not_touched() -> Result<()> {
    let mut node = Node::builder()
        .backend("a", "10.0.0.1:8080")
        .backend("other", "10.0.0.9:81")
        .service(Service::new("app").address("10.0.0.9").port(80, 8080).endpoint("10.0.0.1"))
        .start()?;
    let before = node.agent.status()?.counters;
    // An address of no service; another port of a service's address, outside `virtual-ips`; a
    // closed port; no route.
    let answered = check::untouched(&node, "10.0.0.1:8080")?;
    ensure!(answered.backend.as_deref() == Some("a"), "{answered:?}");
    let answered = check::untouched(&node, "10.0.0.9:81")?;
    ensure!(answered.backend.as_deref() == Some("other"), "{answered:?}");
    check::untouched(&node, "10.0.0.9:82")?;
    check::untouched(&node, "198.51.100.1:80")?;
    check::untouched(&node, "[2001:db8::1]:80")?;
    let after = node.agent.status()?.counters;
    ensure!(after == before, "counted: {before:?}, then {after:?}");
    // And the programs are there: the service's own port is balanced.
    check::balanced(&mut node, &["a"], |node| check::who(node, "10.0.0.9:80"))
}
