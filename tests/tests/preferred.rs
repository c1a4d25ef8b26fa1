//! Which endpoints are preferred: near ones, those of a higher rank, those that have been there for
//! long; and how that changes when some of them fail.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use mesh_tests::process::{LIMIT, until};
use mesh_tests::server::Kind;
use mesh_tests::{Node, Service, check};
use serde_json::Value;

const VIP: &str = "10.96.0.10:80";
const NAMES: [&str; 4] = ["a", "b", "c", "d"];

fn place(number: usize) -> String {
    format!("10.0.0.{}:8080", number + 1)
}

fn app() -> Service {
    Service::new("app").address("10.96.0.10").port(80, 8080)
}

fn node(services: Vec<Service>) -> Result<Node> {
    let node = (0..4).fold(Node::builder(), |node, n| node.backend(NAMES[n], &place(n)));
    services.into_iter().fold(node, mesh_tests::Builder::service).start()
}

/// Connects until the shares are as expected, each with a tolerance of six standard deviations.
fn until_shares(node: &Node, expected: [f64; 4]) -> Result<()> {
    const CONNECTS: u32 = 1_000;
    let mut last = BTreeMap::new();
    until("the shares", LIMIT, || {
        last = check::histogram(node, VIP, CONNECTS)?;
        let fits = NAMES.iter().zip(expected).all(|(name, due)| {
            let share =
                f64::from(last.get(*name).copied().unwrap_or_default()) / f64::from(CONNECTS);
            let tolerance = 6.0 * (due * (1.0 - due) / f64::from(CONNECTS)).sqrt();
            (share - due).abs() <= tolerance
        });
        Ok(fits.then_some(()))
    })
    .with_context(|| format!("{last:?}, expected {expected:?}"))
}

fn event(node: &Node, kind: &str) -> Result<bool> {
    let events: Vec<Value> = node.agent.json(&["events", "--service", "app"])?;
    Ok(events.iter().any(|event| event["kind"] == kind))
}

/// The node is called `test`. Its own endpoint takes all; when it fails, the kernel goes on with others
/// at once, and the agent then prefers the nearer of those; when it is back, it takes all again.
#[test]
fn the_nearest_first() -> Result<()> {
    let app = app().key("locality: {}").checked_every(200);
    let app = app
        .endpoint_with(&place(0), "node: test")
        .endpoint_with(&place(1), "zone: here")
        .endpoint_with(&place(2), "zone: here")
        .endpoint(&place(3));
    let mut node = node(Vec::new())?;
    node.agent.stop()?;
    let file = std::fs::read_to_string(node.agent.file())?;
    let file = file.replace("{name: test}", "{name: test, zone: here}");
    std::fs::write(node.agent.file(), file)?;
    node.agent.write_services("test.yaml", &Service::file(&[app]))?;
    node.agent.start()?;
    until_shares(&node, [1.0, 0.0, 0.0, 0.0])?;
    node.kill_server("a")?;
    let seen = check::histogram(&node, VIP, 200)?;
    let failed = seen.get("connect: ECONNREFUSED").copied().unwrap_or_default();
    ensure!(failed <= 5, "the kernel goes elsewhere by itself: {seen:?}");
    until_shares(&node, [0.0, 0.5, 0.5, 0.0])?;
    node.kill_server("b")?;
    // One of two is less than 70 per cent, and takes 5/7.
    until_shares(&node, [0.0, 0.0, 5.0 / 7.0, 2.0 / 7.0])?;
    node.start_server(Kind::Plain, "a", &place(0))?;
    until_shares(&node, [1.0, 0.0, 0.0, 0.0])?;
    check::balanced(&mut node, &["a"], |node| check::who(node, VIP))
}

/// By priority, and behind that another service; and back again.
#[test]
fn fallen_back_to_and_left_again() -> Result<()> {
    let app = app().key("fallback: {service: other}").checked_every(200);
    let app = app.endpoint(&place(0)).endpoint_with(&place(1), "priority: 1");
    let other = Service::new("other").address("10.96.0.11").port(80, 8080).checked_every(200);
    let other = other.endpoint(&place(2)).endpoint(&place(3));
    let mut node = node(vec![app, other])?;
    until_shares(&node, [1.0, 0.0, 0.0, 0.0])?;
    node.kill_server("a")?;
    until_shares(&node, [0.0, 1.0, 0.0, 0.0])?;
    ensure!(event(&node, "fallback")?, "it is told");
    node.kill_server("b")?;
    until_shares(&node, [0.0, 0.0, 0.5, 0.5])?;
    node.kill_server("c")?;
    until_shares(&node, [0.0, 0.0, 0.0, 1.0])?;
    let explained: Value = node.agent.json(&["explain", VIP])?;
    ensure!(explained["answer"]["backend"] == place(3), "{explained}");
    node.start_server(Kind::Plain, "b", &place(1))?;
    until_shares(&node, [0.0, 1.0, 0.0, 0.0])?;
    node.start_server(Kind::Plain, "a", &place(0))?;
    until_shares(&node, [1.0, 0.0, 0.0, 0.0])?;
    ensure!(event(&node, "back")?, "it is told");
    Ok(())
}

/// To come back from the endpoints behind takes more than to stay; the next agent knows where it stays.
#[test]
fn an_agent_that_comes_back_does_not_come_back_too_early() -> Result<()> {
    let app =
        app().key("fallback: {below: 60%, back: 90%}").key("ejection: off").checked_every(200);
    let app = (0..3).fold(app, |app, number| app.endpoint(&place(number)));
    let mut node = node(vec![app.endpoint_with(&place(3), "priority: 1")])?;
    node.agent.stop()?;
    node.agent.stays = true;
    node.agent.start()?;
    let third = 1.0 / 3.0;
    until_shares(&node, [third, third, third, 0.0])?;
    node.kill_server("a")?;
    node.kill_server("b")?;
    until_shares(&node, [0.0, 0.0, 0.0, 1.0])?;
    node.start_server(Kind::Plain, "b", &place(1))?;
    node.agent.until_backends("app", |backends| {
        backends.iter().map(|backend| &*backend.state).eq([
            "unhealthy",
            "healthy",
            "healthy",
            "healthy",
        ])
    })?;
    node.agent.kill()?;
    node.agent.start()?;
    // Enough to stay with the first, and not enough to come back to them.
    let status: Value = node.agent.get("/v1/status")?;
    ensure!(status["counters"]["map_writes"] == 0, "{}", status["counters"]);
    until_shares(&node, [0.0, 0.0, 0.0, 1.0])?;
    node.start_server(Kind::Plain, "a", &place(0))?;
    until_shares(&node, [third, third, third, 0.0])?;
    node.agent.stop()?;
    node.agent.stays = false;
    node.agent.start()?;
    check::balanced(&mut node, &["a", "b", "c"], |node| check::who(node, VIP))
}

/// What is wrong with the service behind is said, and the service works.
#[test]
fn circles_and_what_is_not_there() -> Result<()> {
    let app = app().endpoint(&place(0)).key("fallback: {service: other}");
    let other = Service::new("other").address("10.96.0.11").port(80, 8080).endpoint(&place(1));
    let round = other.clone().key("fallback: {service: app}");
    let node = node(vec![app.clone(), round])?;
    let reasons = |node: &Node| Ok::<_, anyhow::Error>(node.agent.status()?.reasons.join("\n"));
    let said = reasons(&node)?;
    ensure!(said.contains("app → other → app") && said.contains("other → app → other"), "{said}");
    until_shares(&node, [1.0, 0.0, 0.0, 0.0])?;
    node.agent.write_services("test.yaml", &Service::file(std::slice::from_ref(&app)))?;
    until("what is missing to be said", LIMIT, || {
        Ok(reasons(&node)?.contains("other, which is not defined").then_some(()))
    })?;
    node.agent.write_services("test.yaml", &Service::file(&[app, other]))?;
    until("it to be there", LIMIT, || Ok(reasons(&node)?.is_empty().then_some(())))
}

/// What comes has a tenth of its weight at first, and all of it in the end.
#[test]
fn what_comes_is_not_flooded() -> Result<()> {
    let app = |count: usize| {
        (0..count).fold(app().key("slow-start: 8s"), |app, number| app.endpoint(&place(number)))
    };
    let mut node = node(vec![app(1)])?;
    std::thread::sleep(Duration::from_millis(8_200));
    node.agent.write_services("test.yaml", &Service::file(&[app(2)]))?;
    node.agent.until_places("app", &["10.0.0.1:8080", "10.0.0.2:8080"])?;
    let share = |node: &Node| -> Result<f64> {
        let seen = check::histogram(node, VIP, 400)?;
        Ok(f64::from(seen.get("b").copied().unwrap_or_default()) / 400.0)
    };
    let first = share(&node)?;
    ensure!(first < 0.3, "a share of {first} at first");
    until("an even share", LIMIT, || Ok(((share(&node)? - 0.5).abs() < 0.1).then_some(())))?;
    let settled: Value = node.agent.json(&["explain", VIP])?;
    until("the end of it", LIMIT, || {
        let explained: Value = node.agent.json(&["explain", VIP])?;
        let even = |c: &Value| c["score"].as_f64().is_some_and(|score| (score - 0.5).abs() < 1e-6);
        Ok(explained["candidates"].as_array().is_some_and(|all| all.iter().all(even)).then_some(()))
    })
    .with_context(|| settled.to_string())?;
    check::balanced(&mut node, &["a", "b"], |node| check::who(node, VIP))
}
