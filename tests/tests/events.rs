//! What the kernel tells about connects that fail or are refused, as a person reads it.

use std::net::TcpListener;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use mesh_tests::process::{Echo, LIMIT, Process, until};
use mesh_tests::server::Kind;
use mesh_tests::sys::netns;
use mesh_tests::{Node, Service, check};
use serde::Deserialize;
use socket2::Socket;

const APP: &str = "10.96.0.10:80";
const EMPTY: &str = "10.96.0.11:80";
const DEAD: &str = "10.0.0.2:8080";

/// What the tests read of `events -o json`.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
struct Event {
    seq: u64,
    time: String,
    kind: String,
    service: Option<String>,
    frontend: Option<String>,
    backend: Option<String>,
    reason: Option<String>,
    client: Option<String>,
    detail: String,
}

/// `app` has a backend that lives and one whose port is closed, and `empty` has none.
fn node() -> Result<Node> {
    let app = Service::new("app").address("10.96.0.10").port(80, 8080);
    let empty = Service::new("empty").address("10.96.0.11").port(80, 8080);
    let node = Node::builder()
        .backend("a", "10.0.0.1:8080")
        .service(app.endpoint("10.0.0.1").endpoint("10.0.0.2"))
        .service(empty)
        .start()?;
    // Without the address there would be no route, which says nothing about a backend.
    node.add_address("10.0.0.2".parse()?)?;
    Ok(node)
}

fn events(node: &Node, arguments: &[&str]) -> Result<Vec<Event>> {
    node.agent.json(&[&["events"], arguments].concat())
}

/// The first event of this kind, when it has come, after at most so many calls of `meanwhile`.
fn until_kind(node: &Node, kind: &str, mut meanwhile: impl FnMut() -> Result<()>) -> Result<Event> {
    let mut last = Vec::new();
    let found = until(&format!("an event {kind}"), LIMIT, || {
        meanwhile()?;
        last = events(node, &[])?;
        Ok(last.iter().find(|event| event.kind == kind).cloned())
    });
    found.with_context(|| format!("{last:?}"))
}

/// Connects once; whether it succeeds does not matter.
fn connect(node: &Node, address: &str) -> Result<()> {
    check::ask(node, "blocking", address).map(drop)
}

#[test]
fn a_backend_fails_goes_out_and_comes_back() -> Result<()> {
    let mut node = node()?;
    let suspected = until_kind(&node, "suspected", || connect(&node, APP))?;
    let failed = until_kind(&node, "failed", || Ok(()))?;
    for event in [&failed, &suspected] {
        ensure!(event.service.as_deref() == Some("app"), "{event:?}");
        ensure!(event.frontend.as_deref() == Some("10.96.0.10:80/tcp"), "{event:?}");
        ensure!(event.backend.as_deref() == Some(DEAD), "{event:?}");
        ensure!(event.reason.as_deref() == Some("refused"), "{event:?}");
        let client = event.client.as_deref().unwrap_or_default();
        ensure!(client == node.cgroup().place()?, "{event:?}");
    }
    ensure!(
        failed.seq < suspected.seq && failed.time <= suspected.time,
        "{failed:?} {suspected:?}"
    );
    ensure!(suspected.detail.contains("out for this client for 1.0 s"), "{suspected:?}");

    // The agent asks for itself, and cannot connect either: now it is out for all.
    let ejected = until_kind(&node, "ejected", || Ok(()))?;
    ensure!(ejected.client.is_none() && ejected.detail.contains("the agent's own"), "{ejected:?}");
    ensure!(ejected.backend.as_deref() == Some(DEAD), "{ejected:?}");
    ensure!(ejected.frontend == suspected.frontend, "{ejected:?}");

    node.start_server(Kind::Plain, "b", DEAD)?;
    let recovered = until_kind(&node, "recovered", || connect(&node, APP))?;
    ensure!(recovered.service.as_deref() == Some("app"), "{recovered:?}");
    ensure!(recovered.backend.as_deref() == Some(DEAD), "{recovered:?}");
    ensure!(recovered.seq > ejected.seq, "{recovered:?} {ejected:?}");

    // For people, too: within 100 columns, in order.
    let table = node.agent.mesh(&["events", "--service", "app"])?;
    let table = String::from_utf8(table.stdout)?;
    ensure!(table.lines().all(|line| line.chars().count() <= 100), "{table}");
    let kinds = ["failed", "suspected", "ejected", "recovered"];
    let mut places = kinds.iter().map(|kind| table.find(kind));
    ensure!(places.by_ref().is_sorted() && !table.contains("empty"), "{table}");
    ensure!(kinds.iter().all(|kind| table.contains(kind)), "{table}");
    check::balanced(&mut node, &["a", "b"], |node| check::who(node, APP))
}

#[test]
fn what_checks_find_is_told_too() -> Result<()> {
    let app = Service::new("app").address("10.96.0.10").port(80, 8080).checked_every(200);
    let node = Node::builder().backend("a", "10.0.0.1:8080").service(app.endpoint("10.0.0.1"));
    let mut node = node.start()?;
    let healthy = until_kind(&node, "healthy", || Ok(()))?;
    ensure!(healthy.backend.as_deref() == Some("10.0.0.1:8080"), "{healthy:?}");
    node.kill_server("a")?;
    let unhealthy = until_kind(&node, "unhealthy", || Ok(()))?;
    ensure!(unhealthy.service.as_deref() == Some("app"), "{unhealthy:?}");
    ensure!(unhealthy.seq > healthy.seq, "{healthy:?} {unhealthy:?}");
    Ok(())
}

#[test]
fn a_refusal_is_followed_as_it_happens() -> Result<()> {
    let mut node = node()?;
    check::refused(&node, EMPTY, "no-endpoint")?;
    let refused = until_kind(&node, "refused", || Ok(()))?;
    ensure!(refused.service.as_deref() == Some("empty"), "{refused:?}");
    ensure!(refused.reason.as_deref() == Some("no-endpoint"), "{refused:?}");
    ensure!(refused.frontend.as_deref() == Some("10.96.0.11:80/tcp"), "{refused:?}");
    ensure!(refused.backend.is_none(), "{refused:?}");
    ensure!(refused.client == Some(node.cgroup().place()?), "{refused:?}");
    ensure!(events(&node, &["--service", "app"])?.is_empty());

    let mut follow = Process::spawn(
        "follow",
        node.agent.cli(&["events", "--follow", "--service", "empty", "-o", "json"])?,
        Echo::Off,
    )?;
    let log = follow.log().clone();
    let number = |seq: u64| format!("{{\"seq\":{seq},");
    until("the past", LIMIT, || Ok(log.has(&[&number(refused.seq)]).then_some(())))?;
    let before = events(&node, &[])?.len();
    connect(&node, EMPTY)?;
    let next = number(u64::try_from(before)? + 1);
    let told = until("what happens", Duration::from_secs(5), || {
        Ok(log.has(&[&next, "\"kind\":\"refused\"", "\"service\":\"empty\""]).then_some(()))
    });
    told.with_context(|| format!("{next}: {}", log.tail()))?;

    // However the agent goes, who follows it is told.
    node.agent.kill()?;
    let status = follow.wait(LIMIT)?;
    ensure!(status.code() == Some(3), "{status}: {}", log.tail());
    ensure!(log.has(&["no more events come"]), "{}", log.tail());
    Ok(())
}

/// More than anybody wants to read: what is kept is bounded, the rest is counted, and what works
/// goes on.
#[test]
fn a_flood_of_refusals() -> Result<()> {
    #[derive(Deserialize)]
    struct Status {
        counters: Counters,
    }
    #[derive(Deserialize)]
    struct Counters {
        events_lost: u64,
    }
    let lost = |node: &Node| -> Result<u64> {
        Ok(node.agent.json::<Status>(&["status"])?.counters.events_lost)
    };
    let mut node = node()?;
    let before = lost(&node)?;
    let seen = check::histogram(&node, EMPTY, 5_000)?;
    ensure!(seen.get("connect: ECONNREFUSED") == Some(&5_000), "{seen:?}");
    let refused = node.agent.refused_by_reason()?;
    ensure!(refused.get("no-endpoint") == Some(&5_000), "{refused:?}");
    let lost = lost(&node)? - before;
    ensure!((1..5_000).contains(&lost), "{lost} of 5,000");
    // Those that were sent are told, all of them: none is lost without being counted.
    let sent = 5_000 - lost;
    let mut last = 0;
    let told = until("all that was sent", LIMIT, || {
        last = events(&node, &[])?.last().map_or(0, |event| event.seq);
        Ok((last == sent).then_some(()))
    });
    told.with_context(|| format!("{last} of {sent}"))?;
    let kept = events(&node, &[])?;
    ensure!(kept.len() as u64 == sent.min(1_000), "{} are kept of {sent}", kept.len());
    node.start_server(Kind::Plain, "b", DEAD)?;
    check::balanced(&mut node, &["a", "b"], |node| check::who(node, APP))
}

/// A connection fails that had come by an address which another service has by now.
#[test]
fn a_failure_is_told_of_the_service_that_gave_the_backend() -> Result<()> {
    const PLACE: &str = "10.0.0.1:9000";
    let old = Service::new("old").address("10.96.0.41").port(80, 9000).endpoint("10.0.0.1");
    let new = Service::new("new").address("10.96.0.40").port(80, 8080).endpoint("10.0.0.2");
    let node = Node::builder().backend("b", "10.0.0.2:8080");
    let node = node.service(old.clone().address("10.96.0.40")).start()?;
    node.add_address("10.0.0.1".parse()?)?;
    let listener = netns::inside(node.netns(), || TcpListener::bind(PLACE))??;
    let mut client = check::mesh_client(&node)?;
    client.args(["ask", "10.96.0.40:80"]).stdout(Stdio::piped());
    let mut client = client.spawn()?;
    let (accepted, _) = listener.accept()?;
    node.agent.write_services("test.yaml", &Service::file(&[old, new]))?;
    // Not by connects: one that still came to the old one would wait there for as long as the client does.
    node.agent.until_backends("new", |backends| backends.len() == 1)?;
    ensure!(check::who(&node, "10.96.0.40:80")? == "b", "the address is the other's");
    // Reset before the first byte.
    Socket::from(accepted).set_linger(Some(Duration::ZERO))?;
    let failed = until_kind(&node, "failed", || Ok(()))?;
    let _ = client.wait();
    ensure!(failed.service.as_deref() == Some("old"), "{failed:?}");
    ensure!(failed.frontend.as_deref() == Some("10.96.0.40:80/tcp"), "{failed:?}");
    ensure!(failed.backend.as_deref() == Some(PLACE), "{failed:?}");
    ensure!(events(&node, &["--service", "new"])?.iter().all(|event| event.kind != "failed"));
    Ok(())
}
