//! `latency`: of two, the one where a connect waits less; against the share that chance gives.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use mesh_tests::process::{self, Echo, LIMIT, Process, until};
use mesh_tests::relay::Relay;
use mesh_tests::{Node, Service, check};
use serde_json::Value;

const VIP: &str = "10.96.0.10:80";
const CONNECTS: u32 = 600;

fn app(balance: &str) -> Service {
    let app = Service::new("app").address("10.96.0.10").port(80, 8080);
    let app = app.key(&format!("balance: {balance}"));
    app.endpoint("10.0.0.1").endpoint("10.0.0.2").endpoint("10.8.0.2")
}

/// The kernel learns a round-trip time from connections that end in order.
fn histogram(node: &Node, times: u32) -> Result<BTreeMap<String, u32>> {
    let mut command = check::mesh_client(node)?;
    command.args(["histogram", "--way", "orderly", VIP, &times.to_string()]);
    check::printed(command)
}

fn share(seen: &BTreeMap<String, u32>) -> f64 {
    f64::from(seen.get("far").copied().unwrap_or_default()) / f64::from(CONNECTS)
}

/// One of three lies behind a path of 10 ms there and back. It is chosen when it is drawn twice: one
/// time in nine.
#[test]
fn the_nearer_of_two() -> Result<()> {
    let node = Node::builder().backend("a", "10.0.0.1:8080").backend("b", "10.0.0.2:8080");
    let mut node = node.service(app("latency")).start()?;
    let relay = Relay::new(&node, Duration::from_millis(5))?;
    let mut server = relay.machine().outside(process::binary("mesh-server")?);
    server.args(["far", "10.8.0.2:8080"]);
    let _server = Process::spawn("far", server, Echo::Off)?;
    let latency = |node: &Node, place: &str| -> Result<u64> {
        let backends: Vec<Value> = node.agent.json(&["backends", "app"])?;
        let of = backends.iter().find(|backend| backend["address"] == place);
        Ok(of.and_then(|backend| backend["latency_us"].as_u64()).unwrap_or_default())
    };
    let mut last = BTreeMap::new();
    until("all to be measured", LIMIT, || {
        last = histogram(&node, 20)?;
        let known = ["10.0.0.1:8080", "10.0.0.2:8080", "10.8.0.2:8080"];
        let known = known.map(|place| latency(&node, place));
        Ok(known.into_iter().all(|latency| latency.is_ok_and(|us| us > 0)).then_some(()))
    })
    .with_context(|| format!("{last:?}, {:?}", node.agent.json::<Value>(&["backends"])))?;
    let seen = histogram(&node, CONNECTS)?;
    let (near, far) = (latency(&node, "10.0.0.1:8080")?, latency(&node, "10.8.0.2:8080")?);
    eprintln!("by latency: {seen:?}; {near} µs and {far} µs");
    ensure!(near < 5_000 && (8_000..100_000).contains(&far), "{near} and {far} µs");
    // Six standard deviations of a share of one in nine among 600 are 0.077.
    ensure!((share(&seen) - 1.0 / 9.0).abs() < 0.077, "{seen:?}");
    let explained: Value = node.agent.json(&["explain", VIP])?;
    let score = |explained: &Value| {
        let far = explained["candidates"].as_array().into_iter().flatten();
        far.filter(|c| c["address"] == "10.8.0.2:8080").find_map(|c| c["score"].as_f64())
    };
    ensure!(score(&explained).is_some_and(|p| (p - 1.0 / 9.0).abs() < 0.01), "{explained}");

    node.agent.write_services("test.yaml", &Service::file(&[app("random")]))?;
    until("the algorithm", LIMIT, || {
        let services: Vec<Value> = node.agent.json(&["services"])?;
        Ok((services[0]["balance"] == "random").then_some(()))
    })?;
    let random = histogram(&node, CONNECTS)?;
    eprintln!("by chance: {random:?}");
    ensure!((share(&random) - 1.0 / 3.0).abs() < 0.116, "{random:?}");

    // What is not asked for a while is forgotten, and tried again.
    until("the far one to be forgotten", Duration::from_secs(240), || {
        std::thread::sleep(Duration::from_secs(2));
        Ok((latency(&node, "10.8.0.2:8080")? < far / 2).then_some(()))
    })?;
    check::balanced(&mut node, &["a", "b", "far"], |node| check::who(node, VIP))
}
