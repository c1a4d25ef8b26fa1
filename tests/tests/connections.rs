//! `mesh-agent connections`: what is open, whose it is, and where it goes.

use std::collections::BTreeMap;
use std::io::{self, BufRead, BufReader};
use std::net::SocketAddr;
use std::process::{Child, Stdio};

use anyhow::{Context, Result, ensure};
use mesh_tests::process::{self, LIMIT, until};
use mesh_tests::sys::netns;
use mesh_tests::{Datagrams, Later, Node, Service, check};
use serde_json::Value;
use socket2::{Domain, Socket, Type};

/// How many connections are listed at once in CI.
const MANY: usize = 5_000;

/// How many one process holds: it may not be allowed more.
const EACH: usize = 15_000;

fn node() -> Result<Node> {
    let app = Service::new("app").address("10.96.0.10").address("fd00:96::10").port(80, 8080);
    let app = app.endpoint("10.0.0.1").endpoint("10.0.0.2").endpoint("fd00::1");
    let dns = Service::new("dns").address("10.96.0.53").udp(53, 8080).endpoint("10.0.0.1");
    let node = Node::builder().backend("a", "10.0.0.1:8080").backend("b", "10.0.0.2:8080");
    node.backend("a6", "[fd00::1]:8080").service(app).service(dns).start()
}

fn connections(node: &Node, service: Option<&str>) -> Result<Vec<Value>> {
    let arguments = [&["connections"][..], service.as_slice()].concat();
    node.agent.json(&arguments)
}

/// Each with everything that is known of it, TCP and datagrams, and only as long as it is open.
#[test]
fn listed_with_whose_they_are() -> Result<()> {
    let node = node()?;
    ensure!(connections(&node, None)?.is_empty(), "nothing is open yet");
    let mut later = Later::start(check::mesh_client(&node)?, "10.96.0.10:80")?;
    let name = later.connect(None)?.name()?;
    let mut six = Later::start(check::mesh_client(&node)?, "[fd00:96::10]:80")?;
    ensure!(six.connect(None)?.name()? == "a6", "the only one");
    let mut datagrams = Datagrams::start(check::mesh_client(&node)?)?;
    datagrams.ask("ask 10.96.0.53:53")?;
    datagrams.did("keep")?;
    datagrams.did("connect 10.96.0.53:53")?;

    let of_app = connections(&node, Some("app"))?;
    let of = |frontend: &str| of_app.iter().find(|c| c["frontend"] == frontend).cloned();
    let four = of("10.96.0.10:80").with_context(|| format!("{of_app:?}"))?;
    let place = if name == "a" { "10.0.0.1:8080" } else { "10.0.0.2:8080" };
    let cgroup = node.cgroup().place()?;
    ensure!(
        four["service"] == "app" && four["backend"] == place && four["protocol"] == "tcp",
        "{four}"
    );
    ensure!(four["pid"] == later.id() && four["command"] == "mesh-client", "{four}");
    ensure!(four["cgroup"].as_str().is_some_and(|path| path == cgroup), "{four}");
    ensure!(four["age"].as_u64().is_some_and(|age| age < 30), "{four}");
    // The backend closes first.
    ensure!(["established", "close-wait"].iter().any(|s| four["state"] == *s), "{four}");
    let there = of("[fd00:96::10]:80").context("IPv6")?;
    ensure!(there["backend"] == "[fd00::1]:8080" && there["pid"] == six.id(), "{there}");
    ensure!(of_app.len() == 2, "{of_app:?}");

    let of_dns = connections(&node, Some("dns"))?;
    let mut states: Vec<_> = of_dns.iter().filter_map(|c| c["state"].as_str()).collect();
    states.sort_unstable();
    ensure!(states == ["connected", "unconnected"], "{of_dns:?}");
    ensure!(of_dns.iter().all(|c| c["pid"] == datagrams.id() && c["protocol"] == "udp"));
    ensure!(connections(&node, None)?.len() == 4, "all of them");

    let table = process::stdout(node.agent.cli(&["connections", "dns"])?)?;
    ensure!(table.lines().count() == 3 && table.contains("unconnected"), "{table}");
    ensure!(table.lines().all(|line| line.chars().count() <= 100), "{table}");
    let unknown = node.agent.mesh(&["connections", "nope"])?;
    ensure!(unknown.status.code() == Some(1), "{unknown:?}");

    // Its service goes, and it goes on.
    node.agent.write_services("test.yaml", "services: []\n")?;
    node.agent.until_gone("app")?;
    let orphans = connections(&node, None)?;
    ensure!(orphans.len() == 4, "{orphans:?}");
    ensure!(orphans.iter().all(|c| c["service"] == ""), "{orphans:?}");
    drop((later, six, datagrams));
    until("all of them to end", LIMIT, || Ok(connections(&node, None)?.is_empty().then_some(())))
}

/// A process that holds connections until its input ends.
struct Holder(Child);

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A socket whose connections wait to be accepted, however many: they are open all the same.
fn listen(place: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    socket.bind(&place.into())?;
    socket.listen(65_535)?;
    Ok(socket)
}

/// All of very many. `MESH_CONNECTIONS=100000` for those of a busy node, which takes 1 GiB.
#[test]
fn exact_when_there_are_many() -> Result<()> {
    let many = match std::env::var("MESH_CONNECTIONS") {
        Ok(many) => many.parse()?,
        Err(_) => MANY,
    };
    // Ephemeral ports last for 28,000 to each.
    let places: Vec<String> = (1..=8).map(|n| format!("10.0.1.{n}:9000")).collect();
    let app = Service::new("app").address("10.96.0.10").port(80, 9000).key("balance: round-robin");
    let app = places.iter().fold(app, |app, place| app.endpoint(place));
    let node = Node::builder().service(app).start()?;
    node.sysctl("net/core/somaxconn", "65535")?;
    let mut listeners = Vec::new();
    for place in &places {
        let place: SocketAddr = place.parse()?;
        node.add_address(place.ip())?;
        listeners.push(netns::inside(node.netns(), || listen(place))??);
    }
    let mut holders = BTreeMap::new();
    for begin in (0..many).step_by(EACH) {
        let mut command = check::mesh_client(&node)?;
        command.args(["hold", "10.96.0.10:80", &(many - begin).min(EACH).to_string()]);
        let mut holder = Holder(command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?);
        let mut line = String::new();
        BufReader::new(holder.0.stdout.take().context("its output")?).read_line(&mut line)?;
        ensure!(line == "held\n", "{line:?}");
        holders.insert(u64::from(holder.0.id()), holder);
    }
    let begin = std::time::Instant::now();
    let listed = connections(&node, Some("app"))?;
    eprintln!("{} connections listed in {:?}", listed.len(), begin.elapsed());
    ensure!(listed.len() == many, "{} of {many}", listed.len());
    let mut by_backend = BTreeMap::<_, usize>::new();
    for connection in &listed {
        let is_held = connection["pid"].as_u64().is_some_and(|pid| holders.contains_key(&pid));
        ensure!(is_held && connection["state"] == "established", "{connection}");
        *by_backend.entry(connection["backend"].as_str().unwrap_or_default()).or_default() += 1;
    }
    let shares: Vec<usize> = places.iter().map(|place| by_backend[&**place]).collect();
    ensure!(shares.iter().all(|share| share.abs_diff(many / 8) <= 1), "{shares:?}");
    drop((holders, listeners));
    let mut left = BTreeMap::<String, usize>::new();
    until("all of them to end", LIMIT, || {
        left.clear();
        for connection in connections(&node, Some("app"))? {
            *left.entry(connection["state"].to_string()).or_default() += 1;
        }
        Ok(left.is_empty().then_some(()))
    })
    .with_context(|| format!("left: {left:?}"))
}

/// The name of a service in the kernel is by its record: neither its address nor its name makes what was another's its own.
#[test]
fn named_by_the_service_that_gave_it() -> Result<()> {
    let old = || Service::new("old").address("10.96.0.40").port(80, 8080).udp(53, 8080);
    let old = || old().endpoint("10.0.0.1");
    let new = || Service::new("new").address("10.96.0.40").port(80, 8080).udp(53, 8080);
    let new = || new().endpoint("10.0.0.2");
    let node = Node::builder().backend("a", "10.0.0.1:8080").backend("b", "10.0.0.2:8080");
    let mut node = node.service(old()).start()?;
    node.agent.stays = true;
    let mut later = Later::start(check::mesh_client(&node)?, "10.96.0.40:80")?;
    ensure!(later.connect(None)?.name()? == "a");
    let mut datagrams = Datagrams::start(check::mesh_client(&node)?)?;
    datagrams.ask("ask 10.96.0.40:53")?;
    ensure!(connections(&node, Some("old"))?.len() == 2, "the control");

    node.agent.write_services("test.yaml", &Service::file(&[new()]))?;
    node.agent.until_places("new", &["10.0.0.2:8080", "10.0.0.2:8080"])?;
    let unnamed = |node: &Node| -> Result<()> {
        ensure!(connections(node, Some("new"))?.is_empty(), "they were never of this one");
        let all = connections(node, None)?;
        ensure!(all.len() == 2 && all.iter().all(|c| c["service"] == ""), "{all:?}");
        let table = process::stdout(node.agent.cli(&["connections"])?)?;
        ensure!(table.matches("(removed)").count() == 2 && !table.contains("new"), "{table}");
        let services: Vec<Value> = node.agent.json(&["services"])?;
        ensure!(services.iter().all(|service| service["active"] == 0), "{services:?}");
        Ok(())
    };
    unnamed(&node)?;
    let all = connections(&node, None)?;
    ensure!(all.iter().all(|c| c["backend"] == "10.0.0.1:8080"), "{all:?}");
    let mut own = Later::start(check::mesh_client(&node)?, "10.96.0.40:80")?;
    ensure!(own.connect(None)?.name()? == "b");
    ensure!(connections(&node, Some("new"))?.len() == 1, "its own");
    drop(own);
    until("it to end", LIMIT, || Ok((connections(&node, None)?.len() == 2).then_some(())))?;

    // The next agent has nothing but the records.
    node.agent.kill()?;
    node.agent.start()?;
    unnamed(&node)?;
    node.agent.stays = false;
    Ok(())
}
