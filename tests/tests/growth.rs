//! Tables that grow while everybody uses them: of records, when many sockets are open, and of services and
//! backends, when many are defined.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::net::{IpAddr, Ipv4Addr};
use std::process::{Child, Stdio};

use anyhow::{Context, Result, bail, ensure};
use mesh_tests::process::{LIMIT, until};
use mesh_tests::{Datagrams, Node, Service, check};
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

/// Uses up socket cookies until the next ones have their records neither among the first places nor near
/// the last ones, of a table of the size that it grows to: what is recorded before it grows is then
/// misplaced afterwards, and what comes later finds its place free.
fn pass_first_places() -> Result<()> {
    let wanted = FIRST..FIRST + FIRST / 2;
    // Twice around at most: other processes use cookies, too.
    for _ in 0..8 * FIRST {
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::DGRAM, None)?;
        if wanted.contains(&(socket.cookie()? % (4 * FIRST))) {
            return Ok(());
        }
    }
    bail!("no cookie of {wanted:?}")
}

/// More sockets than there are records at first: those that came before keep theirs, and all of them are
/// counted, listed and released, whichever table they are in.
#[test]
fn records_of_sockets() -> Result<()> {
    let dns = Service::new("dns").address("10.96.0.53").udp(53, 8080);
    let dns = (1..=4).fold(dns, |dns, n| dns.endpoint(&format!("10.0.0.{n}")));
    let mut node = Node::builder().service(dns).start_without_agent()?;
    node.agent.stays = true;
    node.agent.start()?;
    // Nobody answers there, and a socket is connected all the same.
    for n in 1..=4 {
        node.add_address(Ipv4Addr::new(10, 0, 0, n).into())?;
    }
    pass_first_places()?;
    let mut again = Datagrams::start(check::mesh_client(&node)?)?;
    again.did("connect 10.96.0.53:53")?;
    let start =
        |node: &Node, n| Holder::start(node, "10.96.0.53:53", Ipv4Addr::new(10, 0, 2, n).into());
    let mut holders = (1..=4).map(|n| start(&node, n)).collect::<Result<Vec<_>>>()?;
    let many = 4 * EACH + 1;
    ensure!(active(&node)? == many, "{} of {many} counted", active(&node)?);
    let grown = until("the table to grow", LIMIT, || {
        let maps = maps(&node)?;
        Ok((maps["FLOWS"].size > FIRST).then_some(maps))
    })?;
    ensure!(grown["FLOWS"].used + grown["OVERFLOW"].used == many, "{grown:?}");
    ensure!(grown["OVERFLOW"].used > FIRST / 64, "it grew because they were there: {grown:?}");

    // The next agent knows where they are.
    node.agent.kill()?;
    node.agent.start()?;
    ensure!(maps(&node)? == grown, "{grown:?}, and now {:?}", maps(&node)?);

    // What comes now is at places that there were not before.
    holders.push(start(&node, 5)?);
    let now = maps(&node)?;
    let (before, after) = (grown["OVERFLOW"].used, now["OVERFLOW"].used);
    ensure!(after < before + EACH / 2, "there is room in the larger one: {now:?}");
    let listed: Vec<Value> = node.agent.json(&["connections", "dns"])?;
    ensure!(listed.len() as u64 == many + EACH, "{} listed", listed.len());

    // The audit leaves alone what is where it was, and does not say that nothing is.
    let audit: Value = node.agent.json(&["audit"])?;
    ensure!(audit["settled"] == false && audit["records"] == many + EACH, "{audit}");
    let peer = again.did("peer")?.peer;
    ensure!(peer == Some("10.96.0.53:53".parse()?), "by its record, at the former place: {peer:?}");
    again.did("connect 10.96.0.53:53")?;
    let peer = again.did("peer")?.peer;
    ensure!(peer == Some("10.96.0.53:53".parse()?), "at its new place: {peer:?}");
    ensure!(active(&node)? == many + EACH, "{} active", active(&node)?);

    // Of the first ones, which are where they were, and then of all.
    drop(holders.remove(0));
    until("the first to end", LIMIT, || Ok((active(&node)? == many).then_some(())))?;
    drop((holders, again));
    until("all of them to end", LIMIT, || Ok((active(&node)? == 0).then_some(())))?;
    let audit: Value = node.agent.json(&["audit"])?;
    ensure!(audit["released_ever"] == 0, "by the programs, and not by the audit: {audit}");
    ensure!(audit["settled"] == true, "{audit}");
    let left = maps(&node)?;
    ensure!(left["FLOWS"].used == 0 && left["OVERFLOW"].used == 0, "{left:?}");

    // From now on there is one place to look at, and it is the right one.
    let holder = start(&node, 6)?;
    ensure!(active(&node)? == EACH, "{} active", active(&node)?);
    ensure!(maps(&node)?["OVERFLOW"].used == 0, "{:?}", maps(&node)?);
    drop(holder);
    until("the last to end", LIMIT, || Ok((active(&node)? == 0).then_some(())))
}

/// More services and endpoints than the tables have room for at first.
#[test]
fn services_and_backends() -> Result<()> {
    let node = Node::builder().backend("a", "10.0.0.1:8080").backend("b", "10.0.0.2:8080");
    let service = |name: &str, address: &str| Service::new(name).address(address).port(80, 8080);
    let app = service("app", "10.96.0.10").endpoint("10.0.0.1").endpoint("10.0.0.2");
    let mut node = node.service(app).start_without_agent()?;
    node.agent.stays = true;
    node.agent.start()?;
    let first = maps(&node)?;

    // 4,500 services of two ports and two endpoints, and then one more
    // that works.
    let many = (0..4_500u32).map(|n| {
        let name = format!("s{n}");
        let s = service(&name, &format!("10.97.{}.{}", n / 250, n % 250 + 1)).port(81, 8081);
        (1..=2).fold(s, |s, e| s.endpoint(&format!("10.{e}.{}.{}", n / 250, n % 250 + 1)))
    });
    let last = service("zlast", "10.98.0.1").endpoint("10.0.0.2");
    // The entries of its hash begin in the first chunk of slots and end in the second.
    let hashed = service("hashed", "10.98.0.2").key("balance: consistent-hash");
    let hashed = (1..=33).fold(hashed, |hashed, n| hashed.endpoint(&format!("10.0.9.{n}")));
    let all: Vec<_> = many.chain([hashed, last]).collect();
    node.agent.write_services("many.yaml", &Service::file(&all))?;
    node.agent.until_places("zlast", &["10.0.0.2:8080"])?;
    let grown = maps(&node)?;
    for name in ["SERVICES", "BACKENDS", "SLOTS"] {
        ensure!(grown[name].size > first[name].size, "{name}: {first:?} {grown:?}");
        ensure!(grown[name].used > first[name].size, "{name}: {grown:?}");
    }
    node.agent.kill()?;
    node.agent.start()?;
    let status: Value = node.agent.json(&["status"])?;
    ensure!(status["counters"]["map_writes"] == 0, "{}", status["counters"]);
    ensure!(maps(&node)? == grown, "{grown:?}, and now {:?}", maps(&node)?);
    let explained: Value = node.agent.json(&["explain", "10.98.0.2:80"])?;
    let scores = explained["candidates"].as_array().into_iter().flatten();
    let scores: Vec<_> = scores.filter_map(|candidate| candidate["score"].as_f64()).collect();
    ensure!(scores.len() == 33, "{explained}");
    ensure!(scores.iter().all(|score| (score * 33.0 - 1.0).abs() < 0.01), "{scores:?}");
    let answers = check::ask(&node, "blocking", "10.98.0.1:80")?;
    ensure!(answers.backend.as_deref() == Some("b"), "{answers:?}");
    node.agent.stays = false;
    node.agent.stop()?;
    node.agent.start()?;
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
