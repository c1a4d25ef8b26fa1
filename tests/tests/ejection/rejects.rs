//! A firewall on the way says at once that a connect fails. The kernel often tells that while connect(2) still
//! has the socket: then the program asks for the error, which is gone when the socket ends.

use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use mesh_tests::mortal::Pace;
use mesh_tests::mortal::server::Manner;
use mesh_tests::{Datagrams, Node, Service, check};

use crate::lan::Lan;
use crate::scene::{Scene, Standing, app, nft};

/// Nobody is tried again while a test runs.
const ONCE: &str = "{failures: 1, base: 60s, max: 60s, share: 50%}";

/// A case that has not met its second endpoint after so many connects fails once in 10^12.
const MANY: usize = 40;

/// A firewall's rule for IPv4, for IPv6, and what a connect that it rejects counts as. Each has a port of its
/// own, from [`PORT`] on.
const RULES: [(&str, &str, &str); 4] = [
    ("icmp port-unreachable", "icmpv6 port-unreachable", "refused"),
    ("icmp host-prohibited", "icmpv6 addr-unreachable", "unreachable"),
    ("icmp admin-prohibited", "icmpv6 admin-prohibited", "unreachable"),
    ("tcp reset", "tcp reset", "refused"),
];
const PORT: u16 = 8081;

/// How a client connects: the argument of `mesh-client ask --way`, or the family of a connected datagram
/// socket; and whether the service is one of IPv6.
const WAYS: [(&str, bool); 8] = [
    ("nonblocking", false),
    ("nonblocking", true),
    ("blocking", false),
    ("blocking", true),
    ("mapped", false),
    ("4", false),
    ("6", true),
    // IPv4-mapped.
    ("6", false),
];

/// A client's way of a rule.
#[derive(Clone, Copy, Debug)]
struct Case {
    rule: usize,
    way: usize,
}

impl Case {
    fn all() -> impl Iterator<Item = Self> {
        let all =
            (0..RULES.len()).flat_map(|rule| (0..WAYS.len()).map(move |way| Self { rule, way }));
        all.filter(|case| {
            let (four, six, _) = RULES[case.rule];
            // There is no reset of a datagram, and what may pass by itself is told to no datagram socket
            // that has not asked for it.
            let untold =
                four == "tcp reset" || six.ends_with("addr-unreachable") && WAYS[case.way].1;
            !(case.is_datagram() && untold)
        })
    }

    fn is_datagram(self) -> bool {
        WAYS[self.way].0.len() == 1
    }

    fn name(self) -> String {
        format!("case-{}-{}", self.rule, self.way)
    }

    fn frontend(self) -> String {
        let Self { rule, way } = self;
        if WAYS[way].1 { format!("fd00:96::{rule}:{way}") } else { format!("10.96.{rule}.{way}") }
    }

    fn service(self) -> Service {
        let service = Service::new(&self.name()).address(&self.frontend()).ejection(ONCE);
        let port = PORT + u16::try_from(self.rule).unwrap_or_default();
        let service = match self.is_datagram() {
            true => service.udp(80, port),
            false => service.port(80, port),
        };
        match WAYS[self.way].1 {
            true => service.endpoint("fd00::1").endpoint("fd00::2"),
            false => service.endpoint("10.0.0.1").endpoint("10.0.0.2"),
        }
    }

    /// Who answers, or the error.
    fn ask(self, node: &Node, datagrams: &mut Datagrams) -> Result<Result<String, String>> {
        let ip = self.frontend().parse()?;
        let (address, way) = (SocketAddr::new(ip, 80).to_string(), WAYS[self.way].0);
        let (backend, error) = if self.is_datagram() {
            datagrams.did(&format!("open {way}"))?;
            datagrams.did(&format!("connect {address}"))?;
            let reply = datagrams.step("ask")?;
            (reply.backend, reply.error)
        } else {
            let outcome = check::ask(node, way, &address)?;
            (outcome.backend, outcome.error)
        };
        Ok(match error {
            Some(error) => Err(error),
            None => Ok(backend.context("neither an answer nor an error")?),
        })
    }

    fn standings(self, node: &Node) -> Result<(Standing, Standing)> {
        let mut all: Vec<Standing> = node.agent.json(&["backends", &self.name()])?;
        all.sort_by(|a, b| a.address.cmp(&b.address));
        match &all[..] {
            [a, b] => Ok((a.clone(), b.clone())),
            other => anyhow::bail!("{other:?}"),
        }
    }

    /// Connects until one fails, and on: no other one does.
    fn run(self, node: &Node, datagrams: &mut Datagrams) -> Result<()> {
        let (_, _, reason) = RULES[self.rule];
        let mut error = None;
        for _ in 0..MANY {
            if let Err(told) = self.ask(node, datagrams)? {
                error = Some(told);
                break;
            }
        }
        let error = error.context("the firewall rejected nothing")?;
        for n in 0..8 {
            let answer = self.ask(node, datagrams)?;
            let by_a = answer.as_ref().is_ok_and(|name| name.starts_with('a'));
            ensure!(by_a, "connect {n} after {error}: {answer:?}");
        }
        let (a, b) = self.standings(node)?;
        ensure!(a.failed == 0, "{a:?}");
        ensure!(b.failed == 1 && b.failed_by(reason) == 1, "{error} is not {reason}: {b:?}");
        ensure!(b.is_out(), "{b:?}");
        Ok(())
    }
}

/// In every way in which the kernel tells of it, the endpoint is out at the first connect that is rejected.
#[test]
fn rejected_on_this_node() -> Result<()> {
    let node = (0..RULES.len()).try_fold(Node::builder().quiet(), |node, rule| {
        let port = PORT + u16::try_from(rule)?;
        let places = ["10.0.0.1", "10.0.0.2", "[fd00::1]", "[fd00::2]"];
        let named = places.iter().zip(["a", "b", "a6", "b6"]);
        anyhow::Ok(named.fold(node, |node, (place, name)| {
            node.backend(&format!("{name}-{rule}"), &format!("{place}:{port}"))
        }))
    })?;
    let node = Case::all().fold(node, |node, case| node.service(case.service())).start()?;
    let mut datagrams = Datagrams::start(check::mesh_client(&node)?)?;

    // The control: without the rules none fails.
    for case in Case::all() {
        for _ in 0..2 {
            let answer = case.ask(&node, &mut datagrams)?;
            ensure!(answer.is_ok(), "{case:?}: {answer:?}");
        }
        let (a, b) = case.standings(&node)?;
        ensure!(a.failed + b.failed == 0 && !b.is_out(), "{case:?}: {a:?} {b:?}");
    }

    // Of this node's own firewall alone: it forbids, and says nothing of the endpoint.
    let forbid = "add table inet o; \
                  add chain inet o out { type filter hook output priority 0; }; \
                  add rule inet o out ip daddr 10.0.0.2 udp dport 8081 drop";
    nft(&node.namespace(), forbid)?;
    let case = Case { rule: 0, way: 5 };
    let mut forbidden = 0;
    for _ in 0..MANY {
        forbidden += u32::from(case.ask(&node, &mut datagrams)? == Err("EPERM".to_owned()));
    }
    let (a, b) = case.standings(&node)?;
    ensure!(forbidden > 0, "nothing was forbidden");
    ensure!(a.failed + b.failed == 0 && !b.is_out(), "{a:?} {b:?}");
    nft(&node.namespace(), "delete table inet o")?;

    let mut rules = String::from(
        "add table inet t; add chain inet t in { type filter hook input priority 0; }; ",
    );
    for (port, (four, six, _)) in (PORT..).zip(RULES) {
        for (to, with) in [("ip daddr 10.0.0.2", four), ("ip6 daddr fd00::2", six)] {
            let protocols = if with == "tcp reset" { "tcp" } else { "{ tcp, udp }" };
            let rule = format!("{to} meta l4proto {protocols} th dport {port} reject with {with}");
            rules += &format!("add rule inet t in {rule}; ");
        }
    }
    nft(&node.namespace(), &rules)?;
    let mut wrong = Vec::new();
    for case in Case::all() {
        if let Err(error) = case.run(&node, &mut datagrams) {
            let (rule, way) = (RULES[case.rule], WAYS[case.way]);
            wrong.push(format!("{rule:?} {way:?}: {error:#}"));
        }
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}

/// The firewall of another machine: the answer comes over a wire.
#[test]
fn rejected_on_another_machine() -> Result<()> {
    let mut scene = Scene::bare(app(ONCE).endpoint("10.9.0.1").endpoint("10.9.0.2"))?;
    let lan = Lan::new(&scene.node, 2)?;
    for (n, name) in [(1, "a"), (2, "b")] {
        let place = SocketAddr::from(([10, 9, 0, n], 8080));
        scene.start(&lan.machine(n)?, name, place, Manner::Plain)?;
    }
    scene.node.agent.start()?;
    let connects = |times| -> Result<usize> {
        let pace = Pace { threads: 1, pause: 500, times, ..Pace::BRISK };
        let trials = scene.storm(pace)?.wait()?;
        Ok(trials.iter().filter(|trial| trial.error.is_some()).count())
    };
    ensure!(connects(MANY as u64)? == 0, "failed without a firewall");
    let reject = "add table inet t; add chain inet t in { type filter hook input priority 0; }; \
                  add rule inet t in tcp dport 8080 reject";
    nft(&lan.machine(2)?, reject)?;
    let failed = connects(200)?;
    ensure!(failed == 1, "{failed} connects failed");
    let shown = scene.standing("10.9.0.2:8080")?;
    ensure!(shown.failed == 1 && shown.failed_by("refused") == 1 && shown.is_out(), "{shown:?}");
    drop(lan);
    scene.control()
}
