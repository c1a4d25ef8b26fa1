//! Bad service files: each gets an error that names file, line, column and what was expected, in
//! `status` and on standard error, and the last good state stays.

use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::symlink;

use anyhow::{Context, Result, ensure};
use mesh_tests::process::{LIMIT, until};
use mesh_tests::{Node, Service, check};
use serde::Deserialize;

const VIP: &str = "10.96.0.10:80";

/// What a file shows, the file, and texts that one line of the error must contain.
struct Case(&'static str, String, &'static [&'static str]);

/// A service `app` that is good but for what is put in the place of `addresses` (line 3), `ports`
/// (line 4) and the endpoint (line 6).
fn service(addresses: &str, ports: &str, endpoint: &str) -> String {
    format!(
        "services:\n- name: app\n  addresses: [{addresses}]\n  ports: [{ports}]\n  endpoints:\n  - {{{endpoint}}}\n"
    )
}

fn cases() -> Vec<Case> {
    const PORT: &str = "{port: 80, target: 8080}";
    const ENDPOINT: &str = "address: 10.0.0.1";
    let mut ports = String::new();
    for port in 1..=65_536 {
        // Writing to a string cannot fail.
        let _ = write!(ports, "{{port: {port}}}, ");
    }
    vec![
        Case(
            "an unknown key",
            service("10.96.0.10", PORT, "adress: 10.0.0.1"),
            &["test.yaml:6:6:", "adress", "address"],
        ),
        Case(
            "a check of a path without a slash",
            service("10.96.0.10", PORT, ENDPOINT) + "  health: {http: {path: healthz}}\n",
            &["test.yaml:7:25:", "begins with /", "healthz"],
        ),
        Case(
            "a check that trusts a file which is missing",
            service("10.96.0.10", PORT, ENDPOINT) + "  health: {https: {ca: /nowhere/ca.pem}}\n",
            &["test.yaml:7:24:", "/nowhere/ca.pem", "No such file"],
        ),
        Case(
            "a check that takes longer than its interval",
            service("10.96.0.10", PORT, ENDPOINT)
                + "  health: {tcp: {}, interval: 1s, timeout: 2s}\n",
            &["test.yaml:7:44:", "longer than `interval`"],
        ),
        Case(
            "an unknown client of affinity",
            service("10.96.0.10", PORT, ENDPOINT) + "  affinity: {by: address}\n",
            &["test.yaml:7:18:", "by", "client or namespace", "address"],
        ),
        Case(
            "an unknown algorithm",
            service("10.96.0.10", PORT, ENDPOINT) + "  balance: fastest\n",
            &["test.yaml:7:12:", "fastest", "round-robin"],
        ),
        Case(
            "a weight that is too large",
            service("10.96.0.10", PORT, "address: 10.0.0.1, weight: 65536"),
            &["test.yaml:6:", "weight", "65535", "65536"],
        ),
        Case(
            "a fallback to itself",
            service("10.96.0.10", PORT, ENDPOINT) + "  fallback: {service: app}\n",
            &["test.yaml:7:23:", "itself"],
        ),
        Case(
            "a wrong type",
            service("10.96.0.10", "{port: http}", ENDPOINT),
            &["test.yaml:4:18:", "port", "number", "http"],
        ),
        Case(
            "an address twice",
            service("10.96.0.10, 10.96.0.10", PORT, ENDPOINT),
            &["test.yaml:3:27:", "10.96.0.10", "twice"],
        ),
        Case(
            "port 0",
            service("10.96.0.10", "{port: 0}", ENDPOINT),
            &["test.yaml:4:18:", "1 to 65535"],
        ),
        Case(
            "65,536 ports",
            service("10.96.0.10", &ports, ENDPOINT),
            &["test.yaml:4:", "ports", "1024"],
        ),
        Case(
            "an endpoint that is its own service",
            service("10.96.0.10", "{port: 80}", "address: 10.96.0.10"),
            &["test.yaml:6:5:", "10.96.0.10:80", "loop"],
        ),
        Case(
            "mixed families",
            service("10.96.0.10", PORT, "address: \"fd00::1\""),
            &["test.yaml:6:5:", "fd00::1", "IPv6", "IPv4"],
        ),
        Case("1 MB of garbage", garbage(1 << 20), &["test.yaml:1:"]),
        Case("nothing", String::new(), &["test.yaml:1:1:", "services: []"]),
        Case("a file that ends early", "services:\n- name: [".to_owned(), &["test.yaml:"]),
    ]
}

/// The same letters and signs at each run, without meaning.
fn garbage(length: usize) -> String {
    let mut random = fastrand::Rng::with_seed(7);
    (0..length).map(|_| char::from(random.u8(b'!'..=b'~'))).collect()
}

fn good() -> String {
    let service = Service::new("app").address("10.96.0.10").port(80, 8080).endpoint("10.0.0.1");
    Service::file(&[service])
}

fn node() -> Result<Node> {
    let node = Node::builder().backend("a", "10.0.0.1:8080").backend("b", "10.0.0.2:8080");
    let mut node = node.start_without_agent()?;
    node.agent.write_services("test.yaml", &good())?;
    node.agent.start()?;
    Ok(node)
}

#[test]
fn each_is_explained_and_changes_nothing() -> Result<()> {
    let mut node = node()?;
    for Case(what, text, expected) in cases() {
        node.agent.write_services("test.yaml", &text)?;
        let error = node.agent.until_error(expected).context(what)?;
        ensure!(error.len() < 4096, "{what}: an error of {} bytes", error.len());
        let log = node.agent.log()?;
        until("the same on standard error", LIMIT, || Ok(log.has(expected).then_some(())))
            .context(what)?;
        ensure!(check::who(&node, VIP)? == "a", "{what}: the last good state is gone");
        node.agent.write_services("test.yaml", &good())?;
        node.agent.until_no_error().context(what)?;
    }
    check::balanced(&mut node, &["a"], |node| check::who(node, VIP))
}

#[test]
fn a_file_that_is_not_text() -> Result<()> {
    let mut node = node()?;
    let mut random = fastrand::Rng::with_seed(7);
    let bytes: Vec<_> = (0..1 << 20).map(|_| random.u8(..)).collect();
    fs::write(node.agent.services_directory().join("test.yaml"), bytes)?;
    let error = node.agent.until_error(&["test.yaml:", "UTF-8"])?;
    ensure!(error.len() < 4096, "an error of {} bytes", error.len());
    check::balanced(&mut node, &["a"], |node| check::who(node, VIP))
}

/// Root may read any file; a link that leads to itself it cannot.
#[test]
fn an_unreadable_file() -> Result<()> {
    let mut node = node()?;
    let file = node.agent.services_directory().join("test.yaml");
    fs::remove_file(&file)?;
    symlink("test.yaml", &file)?;
    node.agent.until_error(&["test.yaml", "symbolic links"])?;
    check::balanced(&mut node, &["a"], |node| check::who(node, VIP))
}

/// One bad file does not keep the good ones from changing.
#[test]
fn the_other_files_go_on() -> Result<()> {
    let mut node = node()?;
    node.agent.write_services("bad.yaml", "services: 5\n")?;
    node.agent.until_error(&["bad.yaml:1:11:"])?;
    let moved = Service::new("app").address("10.96.0.10").port(80, 8080).endpoint("10.0.0.2");
    node.agent.write_services("test.yaml", &Service::file(&[moved]))?;
    node.agent.until_places("app", &["10.0.0.2:8080"])?;
    check::balanced(&mut node, &["b"], |node| check::who(node, VIP))
}

#[derive(Deserialize)]
struct Explanation {
    service: Option<String>,
    candidates: Vec<Candidate>,
    answer: Option<serde_json::Value>,
}

#[derive(Deserialize)]
struct Candidate {
    address: String,
    score: f64,
}

#[test]
fn explain_knows_what_it_does_not_know() -> Result<()> {
    let node = node()?;
    let cgroup = node.cgroup().path().to_string_lossy().into_owned();
    let known: Explanation = node.agent.json(&["explain", VIP, "--from", &cgroup])?;
    ensure!(known.service.as_deref() == Some("app") && known.answer.is_some());
    ensure!(known.candidates.len() == 1 && known.candidates[0].address == "10.0.0.1:8080");
    ensure!((known.candidates[0].score - 1.0).abs() < 1e-6);

    let unknown = node.agent.mesh(&["explain", "198.51.100.1:80"])?;
    ensure!(unknown.status.code() == Some(1), "{unknown:?}");
    let said = String::from_utf8_lossy(&unknown.stdout) + String::from_utf8_lossy(&unknown.stderr);
    ensure!(said.contains("198.51.100.1:80"), "{said}");
    let nonsense = node.agent.mesh(&["explain", "orders"])?;
    ensure!(nonsense.status.code() == Some(2), "{nonsense:?}");
    Ok(())
}
