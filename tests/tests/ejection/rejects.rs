//! A firewall on the way says at once that a connect fails. The kernel often tells that while connect(2) still
//! has the socket: then the program asks for the error, which is gone when the socket ends.

use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use mesh_tests::mortal::Pace;
use mesh_tests::mortal::server::Manner;
use mesh_tests::{Datagrams, Node, Service, check};

use crate::lan::Lan;
use crate::scene::{Scene, Standing, VIP, app, nft};

/// Nobody is tried again while a test runs.
const ONCE: &str = "{failures: 1, base: 60s, max: 60s, share: 50%}";

/// A case that has not met its second endpoint after so many connects fails once in 10^12.
const MANY: usize = 40;

/// A firewall's chain, its rule for IPv4, for IPv6, and what a connect that it rejects counts as. Each has a
/// port of its own, from [`PORT`] on.
const RULES: [(&str, &str, &str, &str); 5] = [
    ("input", "icmp port-unreachable", "icmpv6 port-unreachable", "refused"),
    ("input", "icmp host-prohibited", "icmpv6 addr-unreachable", "unreachable"),
    ("input", "icmp admin-prohibited", "icmpv6 admin-prohibited", "unreachable"),
    ("input", "tcp reset", "tcp reset", "refused"),
    // The node's own, which cannot be told from another one's.
    ("output", "icmp port-unreachable", "icmpv6 port-unreachable", "refused"),
];
const PORT: u16 = 8081;

/// How a client connects: the argument of `mesh-client ask --way`, or the family of a connected datagram
/// socket; and whether the service is one of IPv6.
const WAYS: [(&str, bool); 17] = [
    ("prompt", false),
    ("prompt-mapped", false),
    ("nonblocking", false),
    ("nonblocking", true),
    ("blocking", false),
    ("blocking", true),
    ("mapped", false),
    ("4", false),
    ("6", true),
    // IPv4-mapped.
    ("6", false),
    // By one rule only.
    ("prompt", true),
    ("prompt-reset", false),
    ("prompt-queue", false),
    ("at-once", false),
    ("uring", false),
    ("mptcp", false),
    ("fast-open", false),
];

/// How many of them are tried with the rules of other machines' firewalls, and with that of the node itself.
const BY_MOST: usize = 10;
const BY_OWN: usize = 2;

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
            let (chain, four, six, _) = RULES[case.rule];
            let ways = if chain == "output" { BY_OWN } else { BY_MOST };
            if case.rule > 0 && case.way >= ways {
                return false;
            }
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

    fn is_prompt_v4(self) -> bool {
        let (way, six) = WAYS[self.way];
        way.starts_with("prompt") && !six
    }

    fn name(self) -> String {
        format!("case-{}-{}", self.rule, self.way)
    }

    fn frontend(self) -> String {
        let Self { rule, way } = self;
        if WAYS[way].1 { format!("fd00:96::{rule}:{way}") } else { format!("10.96.{rule}.{way}") }
    }

    fn service(self, ejection: &str) -> Service {
        let service = Service::new(&self.name()).address(&self.frontend()).ejection(ejection);
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

    /// Where nobody is taken out, each connect that fails is counted, once.
    fn count(self, node: &Node, datagrams: &mut Datagrams) -> Result<()> {
        let mut failed = 0;
        for _ in 0..12 {
            failed += u64::from(self.ask(node, datagrams)?.is_err());
        }
        let (a, b) = self.standings(node)?;
        ensure!(a.failed == 0 && !b.is_out(), "{a:?} {b:?}");
        ensure!(b.failed == failed && failed > 0, "{failed} connects failed: {b:?}");
        Ok(())
    }

    /// Connects until one fails, and on: no other one does.
    fn run(self, node: &Node, datagrams: &mut Datagrams) -> Result<()> {
        let (.., said) = RULES[self.rule];
        // Nothing is left of what was said, only that it was.
        let reason = if WAYS[self.way].0 == "prompt-queue" { "unreachable" } else { said };
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

/// A node with all endpoints, and the services of these cases.
fn node(cases: impl Iterator<Item = Case>, ejection: &str) -> Result<Node> {
    let node = (0..RULES.len()).try_fold(Node::builder().quiet(), |node, rule| {
        let port = PORT + u16::try_from(rule)?;
        let places = ["10.0.0.1", "10.0.0.2", "[fd00::1]", "[fd00::2]"];
        let named = places.iter().zip(["a", "b", "a6", "b6"]);
        anyhow::Ok(named.fold(node, |node, (place, name)| {
            node.backend(&format!("{name}-{rule}"), &format!("{place}:{port}"))
        }))
    })?;
    cases.fold(node, |node, case| node.service(case.service(ejection))).start()
}

/// Has the firewall reject what goes to the second endpoint of each.
fn reject(node: &Node) -> Result<()> {
    let mut rules = String::from("add table inet t; ");
    for chain in ["input", "output"] {
        rules += &format!("add chain inet t {chain} {{ type filter hook {chain} priority 0; }}; ");
    }
    for (port, (chain, four, six, _)) in (PORT..).zip(RULES) {
        for (to, with) in [("ip daddr 10.0.0.2", four), ("ip6 daddr fd00::2", six)] {
            let protocols = if with == "tcp reset" { "tcp" } else { "{ tcp, udp }" };
            let rule = format!("{to} meta l4proto {protocols} th dport {port} reject with {with}");
            rules += &format!("add rule inet t {chain} {rule}; ");
        }
    }
    nft(&node.namespace(), &rules)
}

/// Tries all of them, and tells of those that went wrong.
fn each(cases: impl Iterator<Item = Case>, mut run: impl FnMut(Case) -> Result<()>) -> Result<()> {
    let mut wrong = Vec::new();
    for case in cases {
        if let Err(error) = run(case) {
            let (rule, way) = (RULES[case.rule], WAYS[case.way]);
            wrong.push(format!("{rule:?} {way:?}: {error:#}"));
        }
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}

/// In every way in which the kernel tells of it, the endpoint is out at the first connect that is rejected.
#[test]
fn rejected_on_this_node() -> Result<()> {
    let node = node(Case::all(), ONCE)?;
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
    let case = Case { rule: 0, way: 7 };
    let mut forbidden = 0;
    for _ in 0..MANY {
        forbidden += u32::from(case.ask(&node, &mut datagrams)? == Err("EPERM".to_owned()));
    }
    let (a, b) = case.standings(&node)?;
    ensure!(forbidden > 0, "nothing was forbidden");
    ensure!(a.failed + b.failed == 0 && !b.is_out(), "{a:?} {b:?}");
    nft(&node.namespace(), "delete table inet o")?;

    reject(&node)?;
    each(Case::all(), |case| case.run(&node, &mut datagrams))
}

/// Who believes what poll(2) tells first fails in microseconds, and so do the next: each is counted.
#[test]
fn counted_each_time() -> Result<()> {
    let prompt = |case: &Case| matches!(WAYS[case.way].0, "at-once" | "4") || case.is_prompt_v4();
    let cases = || Case::all().filter(prompt);
    let node = node(cases(), "off")?;
    let mut datagrams = Datagrams::start(check::mesh_client(&node)?)?;
    reject(&node)?;
    each(cases(), |case| case.count(&node, &mut datagrams))
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

/// The same of who believes what poll(2) tells first: the answer comes before connect(2) returns, which goes by
/// way of the bridge to the machine's firewall and back.
#[test]
fn rejected_behind_a_bridge() -> Result<()> {
    for with in ["icmp port-unreachable", "icmp host-prohibited", "icmp admin-prohibited"] {
        let mut scene = Scene::bare(app(ONCE).endpoint("10.9.0.1").endpoint("10.9.0.2"))?;
        let lan = Lan::new(&scene.node, 2)?;
        for (n, name) in [(1, "a"), (2, "b")] {
            let place = SocketAddr::from(([10, 9, 0, n], 8080));
            scene.start(&lan.machine(n)?, name, place, Manner::Plain)?;
        }
        scene.node.agent.start()?;
        let connects = |times: usize| -> Result<Vec<bool>> {
            let ask = |_| Ok(check::ask(&scene.node, "prompt", VIP)?.error.is_some());
            (0..times).map(ask).collect()
        };
        let before = connects(8)?;
        ensure!(!before.contains(&true), "failed without a firewall: {before:?}");
        let reject = format!(
            "add table inet t; add chain inet t in {{ type filter hook prerouting priority 0; }}; \
             add rule inet t in tcp dport 8080 reject with {with}"
        );
        nft(&lan.machine(2)?, &reject)?;
        let failed = connects(MANY)?.into_iter().filter(|&failed| failed).count();
        let shown = scene.standing("10.9.0.2:8080")?;
        ensure!(failed == 1, "{with}: {failed} connects failed: {shown:?}");
        ensure!(shown.failed == 1 && shown.is_out(), "{with}: {shown:?}");
        drop(lan);
        scene.control()?;
    }
    Ok(())
}

/// A SYN that is sent again is answered: the connect has not failed, and its endpoint is out all the same, since
/// others need not wait for that.
#[test]
fn answered_after_all() -> Result<()> {
    let case = Case { rule: 0, way: 2 };
    let node = node(std::iter::once(case), "{failures: 1, base: 60s, max: 60s, share: 100%}")?;
    let mut datagrams = Datagrams::start(check::mesh_client(&node)?)?;
    // The first SYN, and no other one.
    let once = "add table inet t; \
                add chain inet t in { type filter hook input priority 0; }; \
                add rule inet t in tcp dport 8081 limit rate 1/hour burst 1 packets reject";
    nft(&node.namespace(), once)?;
    let answer = case.ask(&node, &mut datagrams)?;
    ensure!(answer.is_ok(), "the second SYN was not answered: {answer:?}");
    let (a, b) = case.standings(&node)?;
    ensure!(a.failed + b.failed == 0, "{a:?} {b:?}");
    ensure!(a.active + b.active == 0 && a.opened + b.opened == 1, "{a:?} {b:?}");
    ensure!(a.is_out() != b.is_out(), "{a:?} {b:?}");
    Ok(())
}

/// What was said to a connect that its application dissolved is not held against whom the socket connects to next,
/// although the kernel forgets neither its queue nor its soft error. With IPv6 there is nothing else to know it by,
/// and the README says so.
#[test]
fn the_next_connect_of_a_socket() -> Result<()> {
    let service = |name, ip, endpoint| {
        Service::new(name).address(ip).port(80, PORT).endpoint(endpoint).ejection("off")
    };
    let node = Node::builder()
        .quiet()
        .backend("b", &format!("10.0.0.2:{PORT}"))
        .backend("c", &format!("10.0.0.3:{PORT}"))
        .backend("b6", &format!("[fd00::2]:{PORT}"))
        .backend("c6", &format!("[fd00::3]:{PORT}"))
        .service(service("rejects", "10.96.0.1", "10.0.0.2"))
        .service(service("silent", "10.96.0.2", "10.0.0.3"))
        .service(service("rejects-6", "fd00:96::1", "fd00::2"))
        .service(service("silent-6", "fd00:96::2", "fd00::3"))
        .start()?;
    reject(&node)?;
    let drop = "insert rule inet t input ip daddr 10.0.0.3 tcp dport 8081 drop; \
                insert rule inet t input ip6 daddr fd00::3 tcp dport 8081 drop";
    nft(&node.namespace(), drop)?;
    for _ in 0..5 {
        for [first, second] in
            [["10.96.0.1:80", "10.96.0.2:80"], ["[fd00:96::1]:80", "[fd00:96::2]:80"]]
        {
            let outcome = check::abandon(&node, first, second)?;
            ensure!(outcome.error.is_none(), "{first}: {outcome:?}");
        }
    }
    let expected = [("rejects", 5), ("silent", 0), ("rejects-6", 0), ("silent-6", 5)];
    for (name, failed) in expected {
        let all: Vec<Standing> = node.agent.json(&["backends", name])?;
        let shown = all.into_iter().next().context("no endpoint")?;
        ensure!(shown.opened == 5 && shown.active == 0, "{name}: {shown:?}");
        ensure!(shown.failed == failed, "{name}: {shown:?}");
    }
    Ok(())
}
