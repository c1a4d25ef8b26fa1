//! Tables that grow while everybody uses them: of records, when many sockets are open, and of services and
//! backends, when many are defined.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::net::{IpAddr, Ipv4Addr};
use std::process::{Child, Stdio};

use anyhow::{Context, Result, ensure};
use mesh_tests::process::{LIMIT, until};
use mesh_tests::{Node, Service, check};
use serde_json::Value;

/// How many records there are to begin with.
const FIRST: u64 = 65_536;

/// How many sockets one process holds: it may not be allowed more.
const EACH: u64 = 17_500;

/// A process that holds sockets until its input ends.
struct Holder(Child);

impl Holder {
    /// From an address of its own, whose ports last for so many.
    fn start(node: &Node, address: &str, from: IpAddr) -> Result<Self> {
        node.add_address(from)?;
        let mut command = check::mesh_client(node)?;
        command.args(["hold", "--datagrams-from", &from.to_string(), address, &EACH.to_string()]);
        let mut holder = Self(command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?);
        let mut line = String::new();
        BufReader::new(holder.0.stdout.take().context("its output")?).read_line(&mut line)?;
        ensure!(line == "held\n", "{line:?}");
        Ok(holder)
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What `status` says of a map.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Map {
    used: u64,
    size: u64,
}

fn maps(node: &Node) -> Result<BTreeMap<String, Map>> {
    let status: Value = node.agent.json(&["status"])?;
    let maps = status["maps"].as_array().context("maps")?.iter();
    let figures = |map: &Value| {
        let (used, size) = (map["used"].as_u64()?, map["size"].as_u64()?);
        Some((map["name"].as_str()?.to_owned(), Map { used, size }))
    };
    maps.map(|map| figures(map).context("a map")).collect()
}

fn active(node: &Node) -> Result<u64> {
    let backends: Vec<Value> = node.agent.json(&["backends", "dns"])?;
    Ok(backends.iter().filter_map(|backend| backend["active"].as_u64()).sum())
}

/// More sockets than there are records at first: those that came before keep theirs, and all of them are
/// counted, listed and released, whichever table they are in.
#[test]
fn records_of_sockets() -> Result<()> {
    let dns = Service::new("dns").address("10.96.0.53").udp(53, 8080);
    let dns = (1..=4).fold(dns, |dns, n| dns.endpoint(&format!("10.0.0.{n}")));
    let node = Node::builder().service(dns).start()?;
    // Nobody answers there, and a socket is connected all the same.
    for n in 1..=4 {
        node.add_address(Ipv4Addr::new(10, 0, 0, n).into())?;
    }
    let start = |n| Holder::start(&node, "10.96.0.53:53", Ipv4Addr::new(10, 0, 2, n).into());
    let mut holders = (1..=4).map(start).collect::<Result<Vec<_>>>()?;
    let many = 4 * EACH;
    ensure!(active(&node)? == many, "{} of {many} counted", active(&node)?);
    let grown = until("the table to grow", LIMIT, || {
        let maps = maps(&node)?;
        Ok((maps["FLOWS"].size > FIRST).then_some(maps))
    })?;
    ensure!(grown["FLOWS"].used + grown["OVERFLOW"].used == many, "{grown:?}");
    ensure!(grown["OVERFLOW"].used >= many - FIRST, "it grew because they were there: {grown:?}");

    // What comes now is at places that there were not before.
    let before = grown["OVERFLOW"].used;
    holders.push(start(5)?);
    let now = maps(&node)?;
    ensure!(now["FLOWS"].used > FIRST, "{now:?}");
    ensure!(now["OVERFLOW"].used < before + EACH / 2, "there is room in the larger one: {now:?}");
    let listed: Vec<Value> = node.agent.json(&["connections", "dns"])?;
    ensure!(listed.len() as u64 == many + EACH, "{} listed", listed.len());
    ensure!(active(&node)? == many + EACH, "{} active", active(&node)?);

    // Of the first ones, which are where they were, and then of all.
    drop(holders.remove(0));
    until("the first to end", LIMIT, || Ok((active(&node)? == many).then_some(())))?;
    drop(holders);
    until("all of them to end", LIMIT, || Ok((active(&node)? == 0).then_some(())))?;
    let released: Value = node.agent.json(&["audit"])?;
    ensure!(released["released_ever"] == 0, "by the programs, and not by the audit: {released}");
    let left = maps(&node)?;
    ensure!(left["FLOWS"].used == 0 && left["OVERFLOW"].used == 0, "{left:?}");
    Ok(())
}

/// More services and endpoints than the tables have room for at first.
#[test]
fn services_and_backends() -> Result<()> {
    let node = Node::builder().backend("a", "10.0.0.1:8080").backend("b", "10.0.0.2:8080");
    let service = |name: &str, address: &str| Service::new(name).address(address).port(80, 8080);
    let app = service("app", "10.96.0.10").endpoint("10.0.0.1").endpoint("10.0.0.2");
    let mut node = node.service(app).start()?;
    let first = maps(&node)?;

    // 4,500 services of two ports and two endpoints, and then one more
    // that works.
    let many = (0..4_500u32).map(|n| {
        let name = format!("s{n}");
        let s = service(&name, &format!("10.97.{}.{}", n / 250, n % 250 + 1)).port(81, 8081);
        (1..=2).fold(s, |s, e| s.endpoint(&format!("10.{e}.{}.{}", n / 250, n % 250 + 1)))
    });
    let last = service("zlast", "10.98.0.1").endpoint("10.0.0.2");
    let all: Vec<_> = many.chain([last]).collect();
    node.agent.write_services("many.yaml", &Service::file(&all))?;
    node.agent.until_places("zlast", &["10.0.0.2:8080"])?;
    let grown = maps(&node)?;
    for name in ["SERVICES", "BACKENDS"] {
        ensure!(grown[name].size > first[name].size, "{name}: {first:?} {grown:?}");
        ensure!(grown[name].used > first[name].size, "{name}: {grown:?}");
    }
    let answers = check::ask(&node, "blocking", "10.98.0.1:80")?;
    ensure!(answers.backend.as_deref() == Some("b"), "{answers:?}");
    check::balanced(&mut node, &["a", "b"], |node| check::who(node, "10.96.0.10:80"))
}

/// An agent that has nothing to balance takes little, and says so.
#[test]
fn memory_at_rest() -> Result<()> {
    let node = Node::builder().start()?;
    let status: Value = node.agent.json(&["status"])?;
    let memory = &status["memory"];
    eprintln!("memory at rest, in bytes: {memory}");
    let maps = memory["maps"].as_u64().context("maps")?;
    ensure!((1 << 20..16 << 20).contains(&maps), "{memory}");
    ensure!(memory["anonymous"].as_u64().is_some_and(|bytes| bytes > 0), "{memory}");
    Ok(())
}
