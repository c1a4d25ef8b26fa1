//! What Prometheus and whoever probes the agent get over HTTP, read by Prometheus' own parser.

use anyhow::{Context, Result, ensure};
use mesh_tests::process::{Echo, LIMIT, stdout, until};
use mesh_tests::{Agent, Node, Service, check};
use serde_json::Value;

const VIP: &str = "10.96.0.10:80";

/// Prints what was scraped as a list of name, labels and value; fails on what is no OpenMetrics.
const PARSE: &str = "
import json, sys
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse
print(json.dumps([[s.name, s.labels, s.value] for f in parse(sys.argv[1]) for s in f.samples]))
";

fn node() -> Result<Node> {
    let app = Service::new("app").address("10.96.0.10").port(80, 8080).endpoint("10.0.0.1");
    let gone = Service::new("gone").address("10.96.0.11").port(80, 8080).endpoint("10.0.0.9");
    Node::builder().backend("a", "10.0.0.1:8080").service(app).service(gone).start()
}

/// The status and the body.
fn get(node: &Node, path: &str) -> Result<(String, String)> {
    let mut curl = node.outside("curl");
    curl.args(["--silent", "--show-error", "--max-time", "10", "--write-out", "%{http_code}"]);
    curl.arg(format!("http://127.0.0.1:9464{path}"));
    let mut body = stdout(curl)?;
    let status = body.split_off(body.len().saturating_sub(3));
    Ok((status, body))
}

fn scrape(node: &Node) -> Result<Vec<(String, Value, f64)>> {
    let (status, text) = get(node, "/metrics")?;
    ensure!(status == "200", "{status}: {text}");
    let mut python = node.outside("/usr/bin/python3");
    python.args(["-c", PARSE, &text]);
    serde_json::from_str(&stdout(python)?).context("not what the parser prints")
}

/// The value of a metric with these labels among others.
fn value(samples: &[(String, Value, f64)], name: &str, labels: &[(&str, &str)]) -> Option<f64> {
    let mut samples = samples.iter().filter(|(found, ..)| found == name);
    let found = samples.find(|(_, of, _)| labels.iter().all(|(label, text)| of[*label] == *text));
    found.map(|(.., value)| *value)
}

#[test]
fn connects_are_counted() -> Result<()> {
    let mut node = node()?;
    until("metrics", LIMIT, || Ok(get(&node, "/healthz").ok()))?;
    ensure!(get(&node, "/healthz")? == ("200".into(), "ok\n".into()), "healthz");
    let (status, text) = get(&node, "/readyz")?;
    ensure!(status == "200" && text.starts_with("ready\n"), "{status}: {text}");

    let before = scrape(&node)?;
    let of_a = [("service", "app"), ("backend", "10.0.0.1:8080"), ("protocol", "tcp")];
    ensure!(value(&before, "mesh_backend_connects_total", &of_a).is_none(), "{before:?}");
    ensure!(value(&before, "mesh_ready", &[]) == Some(1.0), "{before:?}");
    ensure!(value(&before, "mesh_source_services", &[]) == Some(2.0), "{before:?}");
    let attached = before.iter().filter(|(name, ..)| name == "mesh_program_attached");
    ensure!(attached.clone().count() > 9 && attached.clone().all(|(.., value)| *value == 1.0));

    let seen = check::histogram(&node, VIP, 20)?;
    ensure!(seen.get("a") == Some(&20), "{seen:?}");
    // Nobody has this address.
    check::ask(&node, "blocking", "10.96.0.11:80")?;
    let after = scrape(&node)?;
    ensure!(value(&after, "mesh_backend_connects_total", &of_a) == Some(20.0), "{after:?}");
    ensure!(value(&after, "mesh_backend_connections", &of_a) == Some(0.0), "{after:?}");
    ensure!(value(&after, "mesh_connects_total", &[]) == Some(21.0), "{after:?}");
    let of_gone = [("service", "gone"), ("backend", "10.0.0.9:8080")];
    ensure!(value(&after, "mesh_backend_connects_total", &of_gone) == Some(1.0), "{after:?}");

    node.agent.stop()?;
    ensure!(get(&node, "/healthz").is_err(), "control: answered with the agent stopped");
    Ok(())
}

/// While its programs are not attached, the agent is alive, but the node is not ready.
#[test]
fn alive_but_not_ready() -> Result<()> {
    let node = Node::builder().backend("a", "10.0.0.1:8080").start_without_agent()?;
    let slice = node.cgroup().child("slice")?;
    let directory = node.directory().join("own");
    let mut agent = Agent::new(&directory, &slice, node.namespace(), &[], Echo::On)?;
    agent.start()?;
    std::fs::remove_dir(&slice)?;
    let (status, text) = get(&node, "/readyz")?;
    ensure!(status == "503" && text.contains("nothing is balanced"), "{status}: {text}");
    ensure!(get(&node, "/healthz")?.0 == "200");
    std::fs::create_dir(&slice)?;
    until("the node to be ready again", LIMIT, || {
        Ok((get(&node, "/readyz")?.0 == "200").then_some(()))
    })?;
    agent.stop()?;
    std::fs::remove_dir(&slice)?;
    Ok(())
}

/// Whoever else listens there keeps nobody from being balanced.
#[test]
fn where_somebody_else_listens() -> Result<()> {
    let app = Service::new("app").address("10.96.0.10").port(80, 8080).endpoint("10.0.0.1");
    let node = Node::builder().backend("other", "127.0.0.1:9464").backend("a", "10.0.0.1:8080");
    let mut node = node.service(app).start()?;
    let says = |node: &Node| -> Result<bool> {
        let told = |reason: &String| reason.contains("127.0.0.1:9464: Address already in use");
        Ok(node.agent.status()?.reasons.iter().any(told))
    };
    until("what is said of it", LIMIT, || Ok(says(&node)?.then_some(())))?;
    ensure!(node.agent.status()?.ready, "not ready");
    ensure!(check::who(&node, VIP)? == "a");
    node.kill_server("other")?;
    until("metrics", LIMIT, || {
        Ok(get(&node, "/healthz").ok().filter(|(status, _)| status == "200"))
    })?;
    ensure!(!says(&node)?, "it is said still");
    Ok(())
}

#[test]
fn elsewhere_or_nowhere() -> Result<()> {
    for (listen, other) in [("none", None), ("\"[::1]:9000\"", Some("http://[::1]:9000/healthz"))] {
        let mut node = Node::builder().start_without_agent()?;
        node.agent.append(&format!("metrics: {{listen: {listen}}}\n"))?;
        node.agent.start()?;
        ensure!(get(&node, "/healthz").is_err(), "{listen}: answered at the usual place");
        if let Some(other) = other {
            let mut curl = node.outside("curl");
            curl.args(["--silent", "--show-error", "--fail", "--max-time", "10", other]);
            ensure!(stdout(curl)? == "ok");
        }
    }
    Ok(())
}
