//! Datagrams: of sockets that are connected and that are not, of both families.

use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use mesh_tests::process::{LIMIT, until};
use mesh_tests::server::Kind;
use mesh_tests::{Datagrams, Node, Service, check};

const FOUR: &str = "10.96.0.53:53";
const SIX: &str = "[fd00:96::53]:53";
const NAMES: [&str; 3] = ["a", "b", "c"];

fn place(four: bool, number: usize) -> String {
    if four {
        format!("10.0.0.{}:5353", number + 1)
    } else {
        format!("[fd00::{}]:5353", number + 1)
    }
}

/// A service of datagrams, and of connections on the same port, at so many backends.
fn dns(backends: usize) -> Service {
    let dns = Service::new("dns").address("10.96.0.53").address("fd00:96::53").udp(53, 5353);
    (0..backends).fold(dns.port(53, 5353), |dns, number| {
        dns.endpoint(&place(true, number)).endpoint(&place(false, number))
    })
}

/// Others, of one backend each.
fn other(number: usize) -> Service {
    let target = place(true, number % 3);
    Service::new(&format!("other-{number}"))
        .address(&format!("10.96.1.{number}"))
        .udp(1000, 5353)
        .endpoint(&target)
}

fn node() -> Result<Node> {
    let node = (0..3).fold(Node::builder().virtual_ips("10.96.0.0/16"), |node, n| {
        let six = format!("{}6", NAMES[n]);
        node.backend(NAMES[n], &place(true, n)).backend(&six, &place(false, n))
    });
    let node = node.service(dns(3));
    (1..=12).fold(node, |node, number| node.service(other(number))).start()
}

fn write(node: &Node, dns: Service) -> Result<()> {
    let services: Vec<_> = std::iter::once(dns).chain((1..=12).map(other)).collect();
    node.agent.write_services("test.yaml", &Service::file(&services))
}

fn datagrams(node: &Node) -> Result<Datagrams> {
    Datagrams::start(check::mesh_client(node)?)
}

fn socket(text: &str) -> Result<SocketAddr> {
    Ok(text.parse()?)
}

/// Opened, and open now, over the backends of a service, of one protocol.
fn counts(node: &Node, service: &str) -> Result<(u64, u64)> {
    let backends: Vec<serde_json::Value> = node.agent.json(&["backends", service])?;
    let sum = |key: &str| {
        backends.iter().filter(|b| b["protocol"] == "udp").filter_map(|b| b[key].as_u64()).sum()
    };
    Ok((sum("opened"), sum("active")))
}

fn until_active(node: &Node, service: &str, expected: u64) -> Result<()> {
    let mut last = (0, 0);
    until("open associations", LIMIT, || {
        last = counts(node, service)?;
        Ok((last.1 == expected).then_some(()))
    })
    .with_context(|| format!("{service}: opened and active {last:?}, expected {expected}"))
}

/// A socket that is not connected: each new one is balanced, one stays where it is, and what comes back
/// comes from the service. Both families, and the mapped form.
#[test]
fn not_connected() -> Result<()> {
    let mut node = node()?;
    let mut client = datagrams(&node)?;
    for (family, address, mapped) in [("4", FOUR, false), ("6", SIX, false), ("6", FOUR, true)] {
        let mut seen = std::collections::BTreeSet::new();
        for _ in 0..60 {
            client.did(&format!("open {family}"))?;
            let (first, from) = client.ask(&format!("ask {address}"))?;
            let expected = match mapped {
                true => socket("[::ffff:10.96.0.53]:53")?,
                false => socket(address)?,
            };
            ensure!(from == expected, "{address}: the answer came from {from}");
            for _ in 0..3 {
                let again = client.ask(&format!("ask {address}"))?;
                ensure!(again == (first.clone(), from), "{address}: {first}, then {again:?}");
            }
            seen.insert(first);
        }
        ensure!(seen.len() == 3, "{family} {address}: only {seen:?} of 60 sockets");
    }
    client.did("close")?;
    until_active(&node, "dns", 0)?;
    ensure!(counts(&node, "dns")?.0 == 180, "{:?}", counts(&node, "dns"));
    // The same port of the other protocol is another service.
    check::balanced(&mut node, &NAMES, |node| check::who(node, FOUR))?;
    let reply = datagrams(&node)?.step(&format!("ask {FOUR}"))?;
    ensure!(reply.backend.is_none(), "control: {reply:?} with the programs detached");
    Ok(())
}

/// A connected socket: its peer is the service; to another service it can send all the same.
#[test]
fn connected() -> Result<()> {
    let mut node = node()?;
    let mut client = datagrams(&node)?;
    for (family, address) in [("4", FOUR), ("6", SIX)] {
        client.did(&format!("open {family}"))?;
        client.did(&format!("connect {address}"))?;
        let peer = client.did("peer")?.peer;
        ensure!(peer == Some(socket(address)?), "getpeername: {peer:?}");
        let (first, from) = client.ask("ask")?;
        ensure!(from == socket(address)?, "recvfrom: {from}");
        let named = client.ask(&format!("ask {address}"))?;
        ensure!(named == (first.clone(), from), "by name {named:?}, before {first}");
    }
    client.did("open 4")?;
    client.did(&format!("connect {FOUR}"))?;
    let (first, _) = client.ask("ask")?;
    // The kernel delivers only what its peer sends, so nothing comes back from another backend.
    let number = (1..=3).find(|number| NAMES[number % 3] != first).context("another backend")?;
    let other = format!("other-{number}");
    client.did(&format!("send 10.96.1.{number}:1000"))?;
    ensure!(counts(&node, &other)? == (1, 1), "{:?}", counts(&node, &other));
    ensure!(client.ask("ask")?.0 == first, "its own peer is what it was");
    // Elsewhere, to nobody, and back to sending by name.
    client.did("connect 10.96.1.5:1000")?;
    let there = client.ask("ask")?;
    ensure!(there == ("c".into(), socket("10.96.1.5:1000")?), "reconnected: {there:?}");
    until_active(&node, "dns", 0)?;
    until_active(&node, &other, 0)?;
    until_active(&node, "other-5", 1)?;
    client.did("disconnect")?;
    ensure!(client.ask(&format!("ask {FOUR}"))?.1 == socket(FOUR)?, "after AF_UNSPEC");
    client.did("connect 10.0.0.1:5353")?;
    ensure!(client.did("peer")?.peer == Some(socket("10.0.0.1:5353")?), "none of ours");
    until_active(&node, "other-5", 0)?;
    until_active(&node, "dns", 0)?;
    // What is no service.
    let refused = client.step("connect 10.96.9.9:53")?;
    ensure!(refused.error.as_deref() == Some("ECONNREFUSED"), "{refused:?}");
    client.did("open 4")?;
    let refused = client.step("ask 10.96.9.9:53")?;
    ensure!(refused.error.as_deref() == Some("ECONNREFUSED"), "{refused:?}");
    let refused = client.step("ask 10.96.0.53:54")?;
    ensure!(refused.error.as_deref() == Some("ECONNREFUSED"), "{refused:?}");
    let by_reason = node.agent.refused_by_reason()?;
    ensure!(by_reason["no-service"] == 2 && by_reason["no-port"] == 1, "{by_reason:?}");
    node.agent.stop()
}

/// One socket that sends to many services: each answer has its own service's address, also when there
/// are more than a socket has records for; and closing it ends all.
#[test]
fn many_services() -> Result<()> {
    let node = node()?;
    let mut client = datagrams(&node)?;
    let all: Vec<usize> = (1..=9).collect();
    // Answers that come in another order than the questions.
    for number in [1, 2, 3] {
        client.ask(&format!("ask 10.96.1.{number}:1000"))?;
    }
    for number in [3, 1] {
        client.did(&format!("send 10.96.1.{number}:1000"))?;
    }
    let mut from = vec![client.ask("receive")?.1, client.ask("receive")?.1];
    from.sort();
    ensure!(from == [socket("10.96.1.1:1000")?, socket("10.96.1.3:1000")?], "{from:?}");
    // Of those that share a backend, it comes from the one that was asked last.
    for _ in 0..2 {
        for number in &all {
            let address = format!("10.96.1.{number}:1000");
            let reply = client.ask(&format!("ask {address}"))?;
            ensure!(reply == (NAMES[number % 3].into(), socket(&address)?), "{address}: {reply:?}");
        }
    }
    for number in &all {
        let counts = counts(&node, &format!("other-{number}"))?;
        ensure!(counts == (1, 1), "other-{number}: {counts:?}");
    }
    for number in 10..=12 {
        let address = format!("10.96.1.{number}:1000");
        ensure!(client.ask(&format!("ask {address}"))?.1 == socket(&address)?, "{address}");
    }
    let mut open = 0;
    for number in 1..=12 {
        open += counts(&node, &format!("other-{number}"))?.1;
    }
    ensure!(open == 9, "{open} associations of one socket");
    let counters: serde_json::Value = node.agent.json(&["status"])?;
    ensure!(counters["counters"]["gave_way"] == 3, "{}", counters["counters"]);
    client.did("close")?;
    for number in 1..=12 {
        until_active(&node, &format!("other-{number}"), 0)?;
    }
    // Killed instead of closed.
    client.ask(&format!("ask {FOUR}"))?;
    client.ask("ask 10.96.1.1:1000")?;
    drop(client);
    until_active(&node, "dns", 0)?;
    until_active(&node, "other-1", 0)
}

/// A socket whose backend is removed goes to another one with its next datagram, and what the removed
/// one still sends does not come from the service; a drained one finishes what it has.
#[test]
fn removed_and_drained() -> Result<()> {
    let node = node()?;
    write(&node, dns(1))?;
    node.agent.until_places("dns", &all_places(1))?;
    let mut client = datagrams(&node)?;
    ensure!(client.ask(&format!("ask {FOUR}"))?.0 == "a", "the only one");
    client.did("keep")?;
    client.did("keep")?;
    ensure!(client.ask(&format!("ask {FOUR}"))?.0 == "a", "the only one");
    client.did(&format!("send {FOUR}"))?;
    write(
        &node,
        Service::new("dns").address("10.96.0.53").udp(53, 5353).endpoint(&place(true, 1)),
    )?;
    node.agent.until_places("dns", &["10.0.0.2:5353"])?;
    let (name, from) = client.ask("receive")?;
    ensure!((&*name, from) == ("a", socket("10.0.0.1:5353")?), "{name} from {from}");
    ensure!(client.ask(&format!("ask {FOUR}"))? == ("b".into(), socket(FOUR)?), "it has moved");

    write(&node, dns(2))?;
    node.agent.until_places("dns", &all_places(2))?;
    let drained = node.agent.mesh(&["drain", "dns", "10.0.0.2"])?;
    ensure!(drained.status.success(), "{drained:?}");
    ensure!(client.ask(&format!("ask {FOUR}"))?.0 == "b", "it finishes what it has");
    let counts = client.did(&format!("count {FOUR} 50"))?.counts;
    ensure!(counts.keys().eq(["a"]), "new ones go elsewhere: {counts:?}");
    Ok(())
}

/// When all are unhealthy, all are used, and a socket keeps the one that it has all the same.
#[test]
fn kept_when_there_is_nothing_better() -> Result<()> {
    let down = Service::new("down").address("10.96.2.1").udp(53, 5399);
    let down = down.key("health: {tcp: {}, probe: always, interval: 20ms, fall: 1}");
    let down = (0..3).fold(down, |down, n| down.endpoint(&place(true, n).replace("5353", "5399")));
    let node = (0..3).fold(Node::builder(), |node, n| node.backend(NAMES[n], &place(true, n)));
    let node = node.service(down).start()?;
    node.agent.until_backends("down", |all| {
        all.len() == 3 && all.iter().all(|backend| backend.state == "unhealthy")
    })?;
    ensure!(node.agent.status()?.reasons.join(" ").contains("connect by TCP"), "it is said");
    let mut client = datagrams(&node)?;
    for _ in 0..20 {
        client.did("send 10.96.2.1:53")?;
    }
    ensure!(counts(&node, "down")? == (1, 1), "{:?}", counts(&node, "down"));
    Ok(())
}

/// A backend that is back is found out by sockets that are not connected, too: by what comes back.
#[test]
fn tried_by_what_is_sent() -> Result<()> {
    let mut node = node()?;
    let mut client = datagrams(&node)?;
    node.kill_server("a")?;
    until("a connected socket to meet it", LIMIT, || {
        client.did("open 4")?;
        client.did(&format!("connect {FOUR}"))?;
        Ok((client.step("ask")?.error.as_deref() == Some("ECONNREFUSED")).then_some(()))
    })?;
    client.did("close")?;
    node.start_server(Kind::Plain, "a", &place(true, 0))?;
    let reason = |node: &Node| -> Result<String> {
        let backends: Vec<serde_json::Value> = node.agent.json(&["backends", "dns"])?;
        let a = |b: &&serde_json::Value| b["address"] == "10.0.0.1:5353" && b["protocol"] == "udp";
        Ok(backends.iter().find(a).context("it")?["reason"].to_string())
    };
    ensure!(reason(&node)?.contains("a connect failed"), "{:?}", reason(&node));
    until("an unconnected socket to try it", LIMIT, || {
        client.did(&format!("count {FOUR} 20"))?;
        Ok((!reason(&node)?.contains("a connect failed")).then_some(()))
    })
    .with_context(|| format!("{:?}", reason(&node)))
}

/// A refused connect leaves a datagram socket where it was; one that was disconnected goes where it
/// sends.
#[test]
fn refused_and_disconnected() -> Result<()> {
    let node = node()?;
    let mut client = datagrams(&node)?;
    client.did(&format!("connect {FOUR}"))?;
    let (first, _) = client.ask("ask")?;
    let refused = client.step("connect 10.96.9.9:53")?;
    ensure!(refused.error.as_deref() == Some("ECONNREFUSED"), "{refused:?}");
    ensure!(client.did("peer")?.peer == Some(socket(FOUR)?), "its peer is what it was");
    ensure!(client.ask("ask")? == (first, socket(FOUR)?), "so is what comes back");
    ensure!(counts(&node, "dns")?.1 == 1, "{:?}", counts(&node, "dns"));
    // Removed soon after it was disconnected: nobody ends it, and it moves.
    client.did("disconnect")?;
    client.ask(&format!("ask {FOUR}"))?;
    write(&node, Service::new("dns").address("10.96.0.53").udp(53, 5353))?;
    node.agent.until_places("dns", &[])?;
    std::thread::sleep(std::time::Duration::from_millis(300));
    write(&node, dns(3))?;
    node.agent.until_places("dns", &all_places(3))?;
    ensure!(client.ask(&format!("ask {FOUR}"))?.1 == socket(FOUR)?, "it was not ended");
    Ok(())
}

fn all_places(backends: usize) -> Vec<&'static str> {
    // Once for each protocol.
    const PLACES: [&str; 6] = [
        "10.0.0.1:5353",
        "[fd00::1]:5353",
        "10.0.0.2:5353",
        "[fd00::2]:5353",
        "10.0.0.3:5353",
        "[fd00::3]:5353",
    ];
    let places = &PLACES[..backends * 2];
    places.iter().chain(places).copied().collect()
}

/// A backend that is down is noticed by connected sockets, and then left by all; once it is back, it is
/// used again.
#[test]
fn refused_datagrams() -> Result<()> {
    let mut node = node()?;
    let mut client = datagrams(&node)?;
    node.kill_server("a")?;
    let mut refused = 0;
    for _ in 0..100 {
        client.did("open 4")?;
        client.did(&format!("connect {FOUR}"))?;
        let reply = client.step("ask")?;
        match reply.error.as_deref() {
            None => ensure!(reply.backend.as_deref() != Some("a"), "{reply:?}"),
            Some("ECONNREFUSED") => refused += 1,
            Some(_) => anyhow::bail!("{reply:?}"),
        }
    }
    // The first, and tries.
    ensure!((1..=5).contains(&refused), "{refused} of 100 met the one that is down");
    let counts = client.did(&format!("count {FOUR} 100"))?.counts;
    ensure!(counts.len() <= 3 && !counts.contains_key("a"), "{counts:?}");
    let backends: Vec<serde_json::Value> = node.agent.json(&["backends", "dns"])?;
    let a = backends.iter().find(|b| b["address"] == "10.0.0.1:5353" && b["protocol"] == "udp");
    let a = a.context("the backend")?;
    ensure!(a["failed"] == refused && a["failures"]["refused"] == refused, "{refused}: {a}");
    node.start_server(Kind::Plain, "a", &place(true, 0))?;
    until("the backend that came back to be used", LIMIT, || {
        let counts = client.did(&format!("count {FOUR} 60"))?.counts;
        Ok(counts.get("a").is_some_and(|count| *count >= 10).then_some(()))
    })
}
