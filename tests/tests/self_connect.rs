//! A connect to an endpoint of this node, where nobody listens, can be given the endpoint's port as its own, and
//! then meets itself (RFC 9293, 3.5: simultaneous open). Nobody is well for that.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use mesh_tests::process::until;
use mesh_tests::sys::netns;
use mesh_tests::{Node, Service, check};
use serde_json::Value;
use socket2::SockRef;

const VIP: &str = "10.96.0.10:80";
const SIX: &str = "[fd00:96::10]:80";

/// Endpoints on which nobody listens.
const DEAD: [&str; 2] = ["10.0.0.1:40004", "[fd00::1]:40004"];

fn node(key: &str) -> Result<Node> {
    let app = Service::new("app").address("10.96.0.10").address("fd00:96::10").port(80, 40_004);
    let app = app.endpoint("10.0.0.1").endpoint("fd00::1").key(key);
    // On other ports: the one of a listener is no connect's own.
    let app = ["10.0.0.2", "10.0.0.3", "fd00::2", "fd00::3"]
        .iter()
        .fold(app, |app, one| app.endpoint_with(one, "port: 9000"));
    let mut node = Node::builder().service(app);
    for (name, place) in [
        ("a", "10.0.0.2:9000"),
        ("b", "10.0.0.3:9000"),
        ("a6", "[fd00::2]:9000"),
        ("b6", "[fd00::3]:9000"),
    ] {
        node = node.backend(name, place);
    }
    let node = node.start()?;
    for dead in DEAD {
        node.add_address(dead.parse::<SocketAddr>()?.ip())?;
    }
    Ok(node)
}

/// From now on every connect that finds this port free has it; whether a plain socket meets itself is the control.
fn narrow(node: &Node) -> Result<()> {
    node.sysctl("net/ipv4/ip_local_port_range", "40004 40004")?;
    for dead in DEAD {
        let dead: SocketAddr = dead.parse()?;
        // Others may have the port for a moment.
        let itself = until("a socket to meet itself", Duration::from_secs(20), || {
            let met = netns::inside(node.netns(), || -> io::Result<bool> {
                let stream = TcpStream::connect(dead)?;
                // Nothing of it stays, which would have the port.
                SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
                Ok(stream.local_addr()? == stream.peer_addr()?)
            })?;
            Ok(met.ok())
        });
        ensure!(itself?, "control: {dead}");
    }
    Ok(())
}

fn events(node: &Node, kind: &str, address: &str) -> Result<Vec<Value>> {
    let events: Vec<Value> = node.agent.json(&["events", "--service", "app"])?;
    let meant = |one: &Value| one["kind"] == kind && one["backend"] == address;
    Ok(events.into_iter().filter(meant).collect())
}

/// Every check meets itself, and none passes.
#[test]
fn a_check_that_meets_itself_does_not_pass() -> Result<()> {
    let health =
        "health: {tcp: {}, probe: always, interval: 50ms, timeout: 40ms, rise: 1, fall: 1}";
    let mut node = node(health)?;
    narrow(&node)?;
    for dead in DEAD {
        let reason = |words: &str| {
            node.agent.until_backends("app", |all| {
                all.iter().any(|one| {
                    one.address == dead && one.state == "unhealthy" && one.reason.contains(words)
                })
            })
        };
        reason("nothing listens there, and the connect reached its own socket")
            .with_context(|| dead.to_owned())?;
    }
    let passed = |node: &Node| -> Result<u64> {
        let status: Value = node.agent.json(&["status"])?;
        status["checks"]["passed"].as_u64().context("passed")
    };
    // Some rounds of checks of those that are well, beside which those of the others are made.
    let before = passed(&node)?;
    until("more checks", Duration::from_secs(30), || {
        Ok((passed(&node)? > before + 80).then_some(()))
    })?;
    for dead in DEAD {
        let well = events(&node, "healthy", dead)?;
        ensure!(well.is_empty(), "nobody listens at {dead}: {well:?}");
    }
    node.sysctl("net/ipv4/ip_local_port_range", "32768 60999")?;
    check::balanced(&mut node, &["a", "b"], |node| check::who(node, VIP))
}

/// What the kernel has out is tried by the agent, again and again, since no connect does: it is not back for that.
#[test]
fn what_meets_itself_is_not_back() -> Result<()> {
    let mut node = node("ejection: {base: 100ms}")?;
    for (dead, address) in DEAD.into_iter().zip([VIP, SIX]) {
        until("it to be out", Duration::from_secs(30), || {
            check::ask(&node, "blocking", address)?;
            let backends = node.agent.backends("app")?;
            Ok(backends
                .iter()
                .any(|one| one.address == dead && one.state == "ejected")
                .then_some(()))
        })?;
    }
    narrow(&node)?;
    for dead in DEAD {
        // Its ejection is over, and it is out once more: a try has failed. Twice, so that one began after the range was
        // narrowed.
        for words in
            ["the next connect tries it", "out for ", "the next connect tries it", "out for "]
        {
            until(&format!("{dead}: `{words}`"), Duration::from_secs(60), || {
                let backends = node.agent.backends("app")?;
                let one = backends.iter().find(|one| one.address == dead).context("it")?;
                ensure!(one.state == "ejected", "nobody listens there: {one:?}");
                Ok(one.reason.contains(words).then_some(()))
            })?;
        }
        let back = events(&node, "recovered", dead)?;
        ensure!(back.is_empty(), "nobody listens at {dead}: {back:?}");
    }
    node.sysctl("net/ipv4/ip_local_port_range", "32768 60999")?;
    check::balanced(&mut node, &["a", "b"], |node| check::who(node, VIP))
}
