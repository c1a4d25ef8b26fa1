//! Connections to endpoints that were removed: they go on until the deadline of their service, and what
//! is none of that service's is left alone. Connected datagram sockets look for another one soon.

use std::io::Read;
use std::net::{SocketAddr, TcpListener};
use std::process::{Child, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use mesh_tests::process::{LIMIT, until};
use mesh_tests::sys::netns;
use mesh_tests::{Builder, Datagrams, Node, Service, check};
use serde_json::Value;

/// A client that is connected until its input ends.
struct Holder(Child);

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn hold(node: &Node, address: &str) -> Result<Holder> {
    let mut command = check::mesh_client(node)?;
    command.args(["hold", address, "1"]);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let mut line = [0; 5];
    child.stdout.as_mut().context("its output")?.read_exact(&mut line)?;
    ensure!(&line == b"held\n", "{line:?}");
    Ok(Holder(child))
}

/// Servers that keep what they accept, until the test ends.
fn node(services: &[Service]) -> Result<Node> {
    let node = services.iter().cloned().fold(Node::builder(), Builder::service);
    let node = node.start()?;
    for place in ["10.0.0.1:9000", "10.0.0.2:9000", "[fd00::1]:9000"] {
        let place: SocketAddr = place.parse()?;
        node.add_address(place.ip())?;
        let listener = netns::inside(node.netns(), || TcpListener::bind(place))??;
        thread::spawn(move || listener.incoming().flatten().collect::<Vec<_>>());
    }
    Ok(node)
}

fn app(name: &str, address: &str) -> Service {
    Service::new(name).address(address).port(80, 9000)
}

fn established(node: &Node) -> Result<Vec<(String, String)>> {
    let open: Vec<Value> = node.agent.json(&["connections"])?;
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let open = open.iter().filter(|c| c["state"] == "established");
    Ok(open.map(|c| (text(&c["frontend"]), text(&c["backend"]))).collect())
}

fn until_established(node: &Node, expected: &[&str]) -> Result<()> {
    let mut last = Vec::new();
    until("what is established", LIMIT, || {
        last = established(node)?;
        let mut frontends: Vec<_> = last.iter().map(|(frontend, _)| &**frontend).collect();
        frontends.sort_unstable();
        Ok((frontends == expected).then_some(()))
    })
    .with_context(|| format!("{last:?}, expected {expected:?}"))
}

/// Both families; a service without a deadline, one whose endpoint stays, and a connection that went to
/// the same endpoint without any service are left alone.
#[test]
fn ended_when_the_deadline_is_over() -> Result<()> {
    let ends = |service: Service| service.key("drain-timeout: 1s");
    let (one, two) = ("10.0.0.1", "10.0.0.2");
    let going = ends(app("going", "10.96.0.1").address("fd00:96::1"));
    let stays = ends(app("stays", "10.96.0.2")).endpoint(one);
    let endless = app("endless", "10.96.0.3");
    let before = [
        going.clone().endpoint(one).endpoint("fd00::1"),
        stays.clone(),
        endless.clone().endpoint(one),
    ];
    let node = node(&before)?;
    let held = ["10.96.0.1:80", "[fd00:96::1]:80", "10.96.0.2:80", "10.96.0.3:80", "10.0.0.1:9000"]
        .map(|address| hold(&node, address));
    let _held = held.into_iter().collect::<Result<Vec<_>>>()?;
    let all = ["10.96.0.1:80", "10.96.0.2:80", "10.96.0.3:80", "[fd00:96::1]:80"];
    until_established(&node, &all)?;

    let after = [going.endpoint(two), stays, endless.endpoint(two)];
    node.agent.write_services("test.yaml", &Service::file(&after))?;
    let removed = Instant::now();
    node.agent.until_places("going", &["10.0.0.2:9000"])?;
    if removed.elapsed() < Duration::from_millis(500) {
        until_established(&node, &all)?;
    }
    until_established(&node, &["10.96.0.2:80", "10.96.0.3:80"])?;
    ensure!(removed.elapsed() >= Duration::from_secs(1), "too early: {:?}", removed.elapsed());
    // What has no record is not the agent's to end.
    let direct = netns::inside(node.netns(), || {
        std::process::Command::new("ss").args(["-Htn", "dst", "10.0.0.1:9000"]).output()
    })??;
    let direct = String::from_utf8(direct.stdout)?;
    ensure!(direct.lines().count() == 3, "two that stay, one that went there itself: {direct}");
    until("the events", LIMIT, || {
        let events: Vec<Value> = node.agent.json(&["events", "--service", "going"])?;
        let ended = events.iter().filter(|event| event["kind"] == "ended");
        Ok((ended.count() == 2).then_some(()))
    })?;

    // One that is back in time is left alone.
    let without = Service::file(&[ends(app("stays", "10.96.0.2")).endpoint(two)]);
    node.agent.write_services("test.yaml", &without)?;
    node.agent.until_places("stays", &["10.0.0.2:9000"])?;
    let back = Service::file(&[ends(app("stays", "10.96.0.2")).endpoint(one)]);
    node.agent.write_services("test.yaml", &back)?;
    thread::sleep(Duration::from_millis(1_500));
    until_established(&node, &["10.96.0.2:80", "10.96.0.3:80"])?;
    let _new = hold(&node, "10.96.0.2:80")?;

    // A whole service, with the deadline that it had.
    node.agent.write_services("test.yaml", "services: []\n")?;
    until_established(&node, &["10.96.0.2:80", "10.96.0.3:80"])?;
    let status = node.agent.status()?;
    ensure!(status.reasons.is_empty(), "{:?}", status.reasons);
    Ok(())
}

/// The application is told, and what it asks next goes to another endpoint; sockets of IPv4 and mapped ones
/// alike.
#[test]
fn datagram_sockets_look_for_another() -> Result<()> {
    let dns = || Service::new("dns").address("10.96.0.53").udp(53, 5353);
    let (one, two) = ("10.0.0.1:5353", "10.0.0.2:5353");
    let node = Node::builder().backend("a", one).backend("b", two);
    let node = node.service(dns().endpoint(one)).start()?;
    let open = |family: &str, address: &str| -> Result<Datagrams> {
        let mut client = Datagrams::start(check::mesh_client(&node)?)?;
        client.did(&format!("open {family}"))?;
        client.did(&format!("connect {address}"))?;
        ensure!(client.ask("ask")?.0 == "a", "IPv{family} {address}");
        Ok(client)
    };
    let mut clients = [open("4", "10.96.0.53:53")?, open("6", "10.96.0.53:53")?];
    let mut others = [open("4", one)?, open("6", one)?];
    node.agent.write_services("test.yaml", &Service::file(&[dns().endpoint(two)]))?;
    for client in &mut clients {
        let reply = client.step("receive")?;
        ensure!(reply.error.as_deref() == Some("ECONNABORTED"), "{reply:?}");
        client.did("connect 10.96.0.53:53")?;
        ensure!(client.ask("ask")?.0 == "b", "the other");
    }
    for other in &mut others {
        ensure!(other.ask("ask")?.0 == "a", "one without a service goes on");
    }
    until("the event", LIMIT, || {
        let events: Vec<Value> = node.agent.json(&["events", "--service", "dns"])?;
        Ok(events.iter().any(|event| event["kind"] == "ended").then_some(()))
    })
}
