//! A service that is only called something else: connections and datagrams go on as if nothing had happened. And what
//! the program of a connected datagram socket sees when its endpoint is really removed.

use std::collections::BTreeMap;
use std::fs;

use anyhow::{Context, Result, ensure};
use mesh_tests::process::{LIMIT, until};
use mesh_tests::{Builder, Datagrams, Later, Node, Service, check};
use serde_json::Value;

const ONE: &str = "10.0.0.1:5353";
const SIX: &str = "[fd00::1]:5353";

/// Of both families, with TCP and UDP on one port.
fn dns(name: &str) -> Service {
    Service::new(name).address("10.96.0.53").address("fd00:96::53").port(53, 5353).udp(53, 5353)
}

fn whole(name: &str) -> Service {
    dns(name).endpoint("10.0.0.1").endpoint("fd00::1").key("drain-timeout: 1s")
}

fn builder() -> Builder {
    Node::builder().backend("a", ONE).backend("a6", SIX).backend("b", "10.0.0.2:5353")
}

/// Sockets of every kind, connected and not, and TCP connections.
struct Clients {
    /// With the family that each was opened with, and what it connected to.
    connected: Vec<(Datagrams, &'static str)>,
    free: Vec<(Datagrams, &'static str)>,
    _held: Vec<Later>,
}

impl Clients {
    const KINDS: [(&str, &str, &str); 3] = [
        ("4", "10.96.0.53:53", "a"),
        ("6", "[fd00:96::53]:53", "a6"),
        // A mapped one.
        ("6", "10.96.0.53:53", "a"),
    ];

    fn start(node: &Node) -> Result<Self> {
        let (mut connected, mut free, mut held) = (Vec::new(), Vec::new(), Vec::new());
        for (family, address, name) in Self::KINDS {
            let mut client = Datagrams::start(check::mesh_client(node)?)?;
            client.did(&format!("open {family}"))?;
            client.did(&format!("connect {address}"))?;
            connected.push((client, name));
            let mut client = Datagrams::start(check::mesh_client(node)?)?;
            client.did(&format!("open {family}"))?;
            client.ask(&format!("ask {address}"))?;
            free.push((client, address));
            let mut client = Later::start(check::mesh_client(node)?, address)?;
            ensure!(client.connect(None)?.name()? == name);
            held.push(client);
        }
        Ok(Self { connected, free, _held: held })
    }

    /// All of them still go where they went.
    fn ask(&mut self) -> Result<()> {
        for (client, name) in &mut self.connected {
            ensure!(client.ask("ask")?.0 == *name, "{name}");
        }
        for ((client, address), (_, _, name)) in self.free.iter_mut().zip(Self::KINDS) {
            ensure!(client.ask(&format!("ask {address}"))?.0 == name, "{name}");
        }
        Ok(())
    }
}

/// How many connections each backend was given, and how many of them are open.
fn counts(node: &Node, service: &str) -> Result<BTreeMap<String, (u64, u64)>> {
    let backends: Vec<Value> = node.agent.get(&format!("/v1/backends?service={service}"))?;
    let one = |backend: &Value| {
        let place = format!("{}/{}", backend["address"], backend["protocol"]);
        let number = |key: &str| backend[key].as_u64().unwrap_or(u64::MAX);
        (place, (number("opened"), number("active")))
    };
    Ok(backends.iter().map(one).collect())
}

fn is_ended(node: &Node) -> Result<bool> {
    let events: Vec<Value> = node.agent.json(&["events"])?;
    Ok(events.iter().any(|event| event["kind"] == "ended"))
}

/// After longer than removed endpoints and their `drain-timeout` take, all goes on, is counted as before, and named anew.
fn ensure_whole(node: &Node, clients: &mut Clients, name: &str, before: &Counts) -> Result<()> {
    std::thread::sleep(std::time::Duration::from_millis(1_500));
    clients.ask()?;
    ensure!(!is_ended(node)?, "something was ended");
    let now = counts(node, name)?;
    ensure!(now == *before, "{now:?}, and before {before:?}");
    let open: Vec<Value> = node.agent.json(&["connections", name])?;
    ensure!(open.len() == 9, "{open:?}");
    Ok(())
}

type Counts = BTreeMap<String, (u64, u64)>;

#[test]
fn in_its_file() -> Result<()> {
    let node = builder().service(whole("one")).start()?;
    let mut clients = Clients::start(&node)?;
    let before = counts(&node, "one")?;
    ensure!(before.values().all(|&(opened, active)| opened > 0 && active > 0), "{before:?}");
    node.agent.write_services("test.yaml", &Service::file(&[whole("two")]))?;
    node.agent.until_gone("one")?;
    ensure_whole(&node, &mut clients, "two", &before)?;

    // The control: with another endpoint it is another service, and theirs is gone.
    let other = dns("three").endpoint("10.0.0.2");
    node.agent.write_services("test.yaml", &Service::file(&[other]))?;
    until("them to be ended", LIMIT, || Ok(is_ended(&node)?.then_some(())))
}

/// The one with the new name waits for the addresses, and has them when the other goes.
#[test]
fn in_another_file() -> Result<()> {
    let node = builder().service(whole("one")).start()?;
    let mut clients = Clients::start(&node)?;
    let before = counts(&node, "one")?;
    node.agent.write_services("zzz.yaml", &Service::file(&[whole("two")]))?;
    until("it to wait", LIMIT, || {
        let reasons = node.agent.status()?.reasons;
        Ok(reasons.iter().any(|reason| reason.contains("two")).then_some(()))
    })?;
    fs::remove_file(node.agent.services_directory().join("test.yaml"))?;
    node.agent.until_gone("one")?;
    ensure_whole(&node, &mut clients, "two", &before)
}

/// One of its endpoints is not there any more: only who is connected to that has to look for another.
#[test]
fn with_fewer_endpoints() -> Result<()> {
    let with = |name: &str| whole(name).key("balance: round-robin");
    let node = builder().service(with("one").endpoint("10.0.0.2")).start()?;
    let mut clients = BTreeMap::new();
    for _ in 0..2 {
        let mut client = Datagrams::start(check::mesh_client(&node)?)?;
        client.did("connect 10.96.0.53:53")?;
        clients.insert(client.ask("ask")?.0, client);
    }
    ensure!(clients.len() == 2, "{clients:?}");
    let mut held = Later::start(check::mesh_client(&node)?, "[fd00:96::53]:53")?;
    ensure!(held.connect(None)?.name()? == "a6");
    node.agent.write_services("test.yaml", &Service::file(&[with("two")]))?;
    let mut client = |name: &str| clients.remove(name).with_context(|| name.to_owned());
    let reply = client("b")?.step("receive")?;
    ensure!(reply.error.as_deref() == Some("ECONNABORTED"), "{reply:?}");
    std::thread::sleep(std::time::Duration::from_millis(1_500));
    ensure!(client("a")?.ask("ask")?.0 == "a");
    // It is none of the other service's, and goes on although the `drain-timeout` is over.
    let open: Vec<Value> = node.agent.json(&["connections"])?;
    let of_six = open.iter().find(|c| c["frontend"] == "[fd00:96::53]:53");
    let of_six = of_six.with_context(|| format!("{open:?}"))?;
    ensure!(of_six["service"] == "" && of_six["backend"] == SIX, "{of_six}");
    Ok(())
}

/// While no agent runs, its definition is called something else.
#[test]
fn without_an_agent() -> Result<()> {
    let mut node = builder().service(whole("one")).start_without_agent()?;
    node.agent.stays = true;
    node.agent.start()?;
    let mut clients = Clients::start(&node)?;
    let before = counts(&node, "one")?;
    node.agent.kill()?;
    node.agent.write_services("test.yaml", &Service::file(&[whole("two")]))?;
    node.agent.start()?;
    node.agent.until_gone("one")?;
    ensure_whole(&node, &mut clients, "two", &before)
}

/// Endpoints are as they were: unhealthy ones, and those that were drained by command.
#[test]
fn what_is_known_of_endpoints_stays() -> Result<()> {
    let app = |name: &str| {
        let app = Service::new(name).address("10.96.0.10").port(80, 5353);
        let app = app.key("health: {tcp: {}, probe: always, interval: 60s, fall: 1}");
        app.endpoint("10.0.0.1").endpoint("10.0.0.2").endpoint("10.0.0.3")
    };
    let node = builder().service(app("one")).start()?;
    let states = |name: &str| -> Result<Vec<String>> {
        Ok(node.agent.backends(name)?.into_iter().map(|backend| backend.state).collect())
    };
    let checked = ["healthy", "healthy", "unhealthy"];
    until("the first checks", LIMIT, || Ok((states("one")? == checked).then_some(())))?;
    let drained = node.agent.mesh(&["drain", "one", "10.0.0.2"])?;
    ensure!(drained.status.success(), "{drained:?}");
    node.agent.write_services("test.yaml", &Service::file(&[app("two")]))?;
    node.agent.until_gone("one")?;
    let now = states("two")?;
    ensure!(now == ["healthy", "draining", "unhealthy"], "{now:?}");
    Ok(())
}

/// As the README says it: who waits or reads is told once, who sends is told that there is no peer.
#[test]
fn what_programs_see_of_an_endpoint_that_is_removed() -> Result<()> {
    let node = builder().service(whole("one")).start()?;
    let steps: [(&str, &[&str]); 4] = [
        ("who reads", &["receive", "send"]),
        ("who polls and asks why", &["readable", "error", "send"]),
        ("who sends", &["readable", "send", "send", "receive", "peer"]),
        ("who names an address", &["readable", "ask 10.96.0.53:53", "ask 10.96.0.53:53"]),
    ];
    let mut clients = Vec::new();
    for (family, address, _) in Clients::KINDS {
        for (who, steps) in steps {
            let mut client = Datagrams::start(check::mesh_client(&node)?)?;
            client.did(&format!("open {family}"))?;
            client.did(&format!("connect {address}"))?;
            client.ask("ask")?;
            clients.push((client, who, steps, address));
        }
    }
    let now = dns("one").endpoint("10.0.0.2");
    node.agent.write_services("test.yaml", &Service::file(&[now]))?;
    for (mut client, who, steps, address) in clients {
        let mut seen = Vec::new();
        for step in steps {
            let step = step.replace("10.96.0.53:53", address);
            seen.push(client.step(&step)?.error.unwrap_or_default());
        }
        let seen: Vec<&str> = seen.iter().map(String::as_str).collect();
        let expected: &[&str] = match who {
            "who reads" => &["ECONNABORTED", "EDESTADDRREQ"],
            "who polls and asks why" => &["", "ECONNABORTED", "EDESTADDRREQ"],
            "who sends" => &["", "EDESTADDRREQ", "EDESTADDRREQ", "ECONNABORTED", "ENOTCONN"],
            // Of IPv6 there is no endpoint any more.
            _ if address.starts_with('[') => &["", "ECONNREFUSED", "ECONNREFUSED"],
            _ => &["", "ECONNABORTED", ""],
        };
        ensure!(seen == expected, "{who} {address}: {seen:?}, expected {expected:?}");
    }
    Ok(())
}
