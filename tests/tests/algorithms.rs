//! Algorithms that know more than chance, through the real hook: exact turns, the lighter of two, and
//! the change from one to another.

use std::collections::BTreeMap;
use std::thread::{self, sleep};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use mesh_tests::process::{LIMIT, until};
use mesh_tests::server::Kind;
use mesh_tests::{Later, Node, Service, check};

const FOUR: &str = "10.96.0.10:80";
const SIX: &str = "[fd00:96::10]:80";
const NAMES: [&str; 4] = ["a", "b", "c", "d"];

fn place(four: bool, number: usize) -> String {
    if four {
        format!("10.0.0.{}:8080", number + 1)
    } else {
        format!("[fd00::{}]:8080", number + 1)
    }
}

/// Backends a to d of these weights, of both families; without weight they are not there.
fn app(balance: &str, weights: [u32; 4]) -> Service {
    let app = Service::new("app").address("10.96.0.10").address("fd00:96::10").port(80, 8080);
    let app = app.key(&format!("balance: {balance}"));
    let there = (0..4).filter(|&number| weights[number] > 0);
    there.fold(app, |app, n| {
        [true, false].into_iter().fold(app, |app, four| app.weighted(&place(four, n), weights[n]))
    })
}

fn node(balance: &str, weights: [u32; 4]) -> Result<Node> {
    let node = (0..4).fold(Node::builder(), |node, n| {
        let six = format!("{}6", NAMES[n]);
        node.backend(NAMES[n], &place(true, n)).backend(&six, &place(false, n))
    });
    node.service(app(balance, weights)).start()
}

/// Changes the service, and waits until the kernel has the change.
fn change(node: &Node, balance: &str, weights: [u32; 4]) -> Result<()> {
    node.agent.write_services("test.yaml", &Service::file(&[app(balance, weights)]))?;
    let there = (0..4).filter(|&n| weights[n] > 0);
    let mut wanted: Vec<_> =
        there.flat_map(|n| [true, false].map(|four| (place(four, n), weights[n]))).collect();
    wanted.sort();
    node.agent.until_backends("app", |backends| {
        let mut held: Vec<_> = backends.iter().map(|b| (b.address.clone(), b.weight)).collect();
        held.sort();
        held == wanted
    })?;
    until("the algorithm", LIMIT, || {
        let services: Vec<serde_json::Value> = node.agent.json(&["services"])?;
        Ok((services[0]["balance"] == balance).then_some(()))
    })
}

/// Each has answered as often as its weight, in so many rounds.
fn ensure_exact(seen: &BTreeMap<String, u32>, weights: [u32; 4], rounds: u32) -> Result<()> {
    for (name, weight) in NAMES.into_iter().zip(weights) {
        let count = seen.get(name).copied().unwrap_or_default();
        ensure!(count == weight * rounds, "{weights:?}, {rounds} rounds: {seen:?}");
    }
    Ok(())
}

/// Exactly by weight after each round, also when several connect at the same time, and from where
/// the turns had got to before a change.
#[test]
fn in_turn() -> Result<()> {
    let mut node = node("round-robin", [1, 2, 3, 4])?;
    ensure_exact(&check::histogram(&node, FOUR, 20_000)?, [1, 2, 3, 4], 2_000)?;
    let six = check::histogram(&node, SIX, 1_000)?.into_iter();
    let six = six.map(|(name, count)| (name.trim_end_matches('6').to_owned(), count)).collect();
    ensure_exact(&six, [1, 2, 3, 4], 100)?;
    // Not at the end of a round.
    check::histogram(&node, FOUR, 7)?;
    change(&node, "round-robin", [1, 2, 7, 0])?;
    ensure_exact(&check::histogram(&node, FOUR, 1_000)?, [1, 2, 7, 0], 100)?;
    change(&node, "round-robin", [300, 0, 300, 300])?;
    ensure_exact(&check::histogram(&node, FOUR, 999)?, [1, 0, 1, 1], 333)?;

    let mut clients = Vec::new();
    for _ in 0..2 {
        let mut command = check::mesh_client(&node)?;
        command.args(["histogram", FOUR, "6000"]);
        clients.push(thread::spawn(|| check::printed::<BTreeMap<String, u32>>(command)));
    }
    let mut sum = BTreeMap::new();
    for client in clients {
        let seen = client.join().map_err(|_| anyhow!("a client's thread panicked"))??;
        seen.into_iter().for_each(|(name, count)| *sum.entry(name).or_default() += count);
    }
    ensure_exact(&sum, [1, 0, 1, 1], 4_000)?;

    change(&node, "round-robin", [65_535, 1, 0, 0])?;
    let seen = check::histogram(&node, FOUR, 65_536)?;
    ensure_exact(&seen, [65_535, 1, 0, 0], 1)?;
    check::balanced(&mut node, &["a"], |node| check::who(node, FOUR))
}

/// Of two, the one with fewer connections: one of three that has twenty open is chosen only when it
/// is drawn twice, one time in nine, where chance alone would choose it one time in three.
#[test]
fn the_lighter_of_two() -> Result<()> {
    const CONNECTS: u32 = 5_000;
    let mut node = node("least-connections", [1, 0, 0, 0])?;
    let held: Vec<Later> = (0..20)
        .map(|_| {
            let mut later = Later::start(check::mesh_client(&node)?, FOUR)?;
            ensure!(later.connect(None)?.name()? == "a", "a is the only one");
            Ok(later)
        })
        .collect::<Result<_>>()?;
    change(&node, "least-connections", [1, 1, 1, 0])?;
    let seen = check::histogram(&node, FOUR, CONNECTS)?;
    let share = |seen: &BTreeMap<String, u32>| {
        f64::from(seen.get("a").copied().unwrap_or_default()) / f64::from(CONNECTS)
    };
    // Six standard deviations of a share of one in nine among 5,000 are 0.027.
    ensure!((share(&seen) - 1.0 / 9.0).abs() < 0.027, "{seen:?}");

    change(&node, "random", [1, 1, 1, 0])?;
    let random = check::histogram(&node, FOUR, CONNECTS)?;
    ensure!((share(&random) - 1.0 / 3.0).abs() < 0.04, "by chance: {random:?}");

    drop(held);
    change(&node, "least-connections", [1, 2, 3, 4])?;
    let explained = |node: &Node| node.agent.json::<serde_json::Value>(&["explain", FOUR]);
    until("the held connections to end", LIMIT, || {
        let candidates = explained(&node)?["candidates"].clone();
        let shares: Vec<_> = candidates
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|c| c["score"].as_f64())
            .collect();
        let even =
            shares.iter().zip([0.1, 0.2, 0.3, 0.4]).all(|(have, due)| (have - due).abs() < 1e-6);
        Ok(even.then_some(()))
    })
    .with_context(|| format!("{:?}", explained(&node)))?;
    ensure!(explained(&node)?["algorithm"] == "least-connections", "{:?}", explained(&node));
    check::balanced(&mut node, &NAMES, |node| check::who(node, FOUR))
}

/// A backend that has failed is left out by each algorithm, and tried and used again once it is back:
/// within a second or two of connects, however the backends are chosen.
#[test]
fn what_failed_comes_back() -> Result<()> {
    for balance in ["round-robin", "least-connections"] {
        let mut node = node(balance, [1, 1, 1, 1])?;
        let all = check::histogram(&node, FOUR, 200)?;
        ensure!(all.keys().eq(&NAMES), "{balance}: {all:?}");
        node.kill_server("a")?;
        let seen = check::histogram(&node, FOUR, 200)?;
        let failed = seen.get("connect: ECONNREFUSED").copied().unwrap_or_default();
        // The first, those that were under way when it was seen, and a try or two.
        ensure!((1..=5).contains(&failed) && !seen.contains_key("a"), "{balance}: {seen:?}");
        node.start_server(Kind::Plain, "a", &place(true, 0))?;
        until("the backend that came back to be used", LIMIT, || {
            let seen = check::histogram(&node, FOUR, 100)?;
            sleep(Duration::from_millis(50));
            Ok((seen.get("a").is_some_and(|count| *count >= 10)).then_some(()))
        })
        .with_context(|| balance.to_owned())?;
        check::balanced(&mut node, &NAMES, |node| check::who(node, FOUR))?;
    }
    Ok(())
}

/// From each algorithm to each other, while clients connect without pause: no connect fails.
#[test]
fn changed_while_running() -> Result<()> {
    let mut node = node("random", [1, 2, 3, 4])?;
    let storm = check::Storm::start(&node, FOUR)?;
    let order = ["round-robin", "least-connections", "random", "least-connections", "round-robin"];
    for (number, balance) in order.into_iter().cycle().take(30).enumerate() {
        change(&node, balance, if number % 2 == 0 { [1, 2, 3, 4] } else { [4, 3, 2, 0] })?;
        sleep(Duration::from_millis(20));
    }
    let (report, _) = storm.finish()?;
    ensure!(report.failed.is_empty(), "connects failed: {report:?}");
    ensure!(report.connects > 1_000 && report.by_backend.len() == 4, "{report:?}");
    check::balanced(&mut node, &["a", "b", "c"], |node| check::who(node, FOUR))
}
