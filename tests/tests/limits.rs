//! Maps of other sizes, as the agent file says: what fits works, what does not is named, and comes in
//! when there is room.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use mesh_tests::process::{LIMIT, until};
use mesh_tests::{Node, Service, check};
use serde_json::Value;

fn service(number: u32) -> Service {
    let service = Service::new(&format!("s{number:02}")).address(&format!("10.96.0.{number}"));
    service.port(80, 8080).endpoint("10.0.0.1").endpoint("10.0.0.2")
}

/// Maps by name, with what is used and what there is room for.
fn maps(node: &Node) -> Result<BTreeMap<String, (u64, u64)>> {
    let status: Value = node.agent.json(&["status"])?;
    let maps = status["maps"].as_array().context("maps")?.iter();
    let figures = |map: &Value| {
        let name = map["name"].as_str()?.to_owned();
        Some((name, (map["used"].as_u64()?, map["max"].as_u64()?)))
    };
    maps.map(|map| figures(map).context("a map")).collect()
}

#[test]
fn what_fits_works_and_the_rest_comes_in_later() -> Result<()> {
    let node = Node::builder().backend("a", "10.0.0.1:8080").backend("b", "10.0.0.2:8080");
    let mut node = node.start_without_agent()?;
    node.agent.append("limits: {frontends: 16, backends: 26, connections: 70000}\n")?;
    // Each takes two entries of FRONTENDS, and so does the agent itself: seven of twelve fit.
    let all: Vec<_> = (1..=12).map(service).collect();
    node.agent.write_services("test.yaml", &Service::file(&all))?;
    node.agent.start()?;

    let held = maps(&node)?;
    let room = |name: &str| held.get(name).map(|&(_, max)| max);
    for (name, max) in [
        ("FRONTENDS", 16),
        ("SERVICES", 16),
        ("SLOTS", 1_076),
        ("BACKENDS", 26),
        // Rounded up to a power of two.
        ("FLOWS", 131_072),
        ("OVERFLOW", 131_072),
    ] {
        ensure!(room(name) == Some(max), "{name}: {held:?}");
    }
    ensure!(held["FRONTENDS"].0 == 16, "{held:?}");
    let status: Value = node.agent.json(&["status"])?;
    let reasons = status["reasons"].to_string();
    ensure!(reasons.contains("FRONTENDS holds 16"), "{reasons}");

    let served = |node: &Node| {
        let answers = (1..=12)
            .map(|n| Ok(check::ask(node, "blocking", &format!("10.96.0.{n}:80"))?.error.is_none()));
        answers.collect::<Result<Vec<_>>>()
    };
    let before = served(&node)?;
    ensure!(before.iter().filter(|served| **served).count() == 7, "{before:?}");

    // Those that fitted go, and those that did not come in.
    let kept: Vec<_> = (1..=12).filter(|n| !before[*n as usize - 1]).map(service).collect();
    node.agent.write_services("test.yaml", &Service::file(&kept))?;
    until("the rest to come in", LIMIT, || {
        let now = served(&node)?;
        Ok(now.iter().zip(&before).all(|(now, before)| now != before).then_some(()))
    })?;
    ensure!(maps(&node)?["FRONTENDS"].0 == 12, "{:?}", maps(&node));
    let first = kept.len();
    ensure!(first == 5, "{first} were left out");
    let number = (1..=12).find(|n| !before[*n - 1]).context("one that came in")?;
    let address = format!("10.96.0.{number}:80");
    check::balanced(&mut node, &["a", "b"], |node| check::who(node, &address))
}
