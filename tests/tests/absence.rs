//! A backend dies while no agent runs. The kernel finds out by itself, and the next agent goes on from there.

use std::collections::BTreeMap;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use mesh_tests::process::{LIMIT, until};
use mesh_tests::server::Kind;
use mesh_tests::{Node, Service, check};
use serde_json::Value;

const B: &str = "10.0.0.2:8080";
const ALL: [&str; 3] = ["a", "b", "c"];
const OTHERS: [&str; 2] = ["a", "c"];

/// Connects after which one of three backends has been missed with a probability of 2e-18.
const ENOUGH: u32 = 100;

/// A service of a, b and c.
#[derive(Clone, Copy, Debug)]
struct Served {
    number: u8,
    /// For how many milliseconds a backend is out each time; none: it stays in.
    base: Option<u32>,
    checked: bool,
}

/// b is out for longer than a test takes.
const STEADY: Served = Served { number: 1, base: Some(60_000), checked: false };
/// It is tried again soon.
const QUICK: Served = Served { number: 2, base: Some(500), checked: false };
/// The control: nobody takes it out.
const BARE: Served = Served { number: 3, base: None, checked: false };
/// The kernel does, and the agent's checks.
const CHECKED: Served = Served { number: 4, base: Some(500), checked: true };
/// Only the agent does.
const UNEJECTED: Served = Served { number: 5, base: None, checked: true };

// === impl Served ===

impl Served {
    fn name(self) -> String {
        format!("s{}", self.number)
    }

    fn vip(self) -> String {
        format!("10.96.0.{}:80", self.number)
    }

    fn service(self) -> Service {
        let ejection = self.base.map_or("off".to_owned(), |base| {
            format!("{{failures: 1, base: {base}ms, max: {base}ms, share: 50%}}")
        });
        let service =
            Service::new(&self.name()).address(self.vip().trim_end_matches(":80")).port(80, 8080);
        let service = service.ejection(&ejection);
        let service = if self.checked { service.checked_every(200) } else { service };
        service.endpoint("10.0.0.1").endpoint("10.0.0.2").endpoint("10.0.0.3")
    }

    /// Connects one after the other. Who answered, and how many were refused: nothing else may happen.
    fn connect(self, node: &Node) -> Result<(BTreeMap<String, u32>, u32)> {
        let mut by = check::histogram(node, &self.vip(), ENOUGH)?;
        let refused = by.remove("connect: ECONNREFUSED").unwrap_or_default();
        ensure!(by.keys().all(|name| ALL.contains(&&**name)), "{self:?}: {by:?}");
        Ok((by, refused))
    }

    /// All of these answer, nobody else does, and no connect is refused.
    fn ensure_whole(self, node: &Node, names: &[&str]) -> Result<()> {
        let (by, refused) = self.connect(node)?;
        ensure!(refused == 0 && by.keys().eq(names), "{self:?}: {by:?}, {refused} refused");
        Ok(())
    }

    /// b is dead: the first connect that goes there is refused, and then one each time that b has been out
    /// for long enough; all others are answered. Gives how many were refused.
    fn ensure_shunned(self, node: &Node) -> Result<u32> {
        let (started, base) = (Instant::now(), self.base.context("ejections")?);
        let (mut by, refused) = self.connect(node)?;
        ensure!(refused > 0, "{self:?}: nobody noticed that b is dead: {by:?}");
        let (more, again) = self.connect(node)?;
        let tries = started.elapsed().as_millis() / u128::from(base);
        by.extend(more);
        ensure!(by.keys().eq(OTHERS), "{self:?}: {by:?}");
        let refused = refused + again;
        ensure!(u128::from(refused) <= 1 + tries, "{self:?}: {refused}, but {tries} tries");
        Ok(refused)
    }

    /// b is dead, and nobody does anything about it.
    fn ensure_refused_again_and_again(self, node: &Node) -> Result<()> {
        for _ in 0..2 {
            let (by, refused) = self.connect(node)?;
            // A third of them; so few with a probability of 1e-8.
            ensure!(refused >= 10 && by.keys().eq(OTHERS), "{self:?}: {by:?}, {refused} refused");
        }
        Ok(())
    }

    /// Waits until b answers, and nobody is refused any more.
    fn until_back(self, node: &Node) -> Result<()> {
        until("b to be found", LIMIT, || Ok(self.connect(node)?.0.get("b").copied()))?;
        self.ensure_whole(node, &ALL)
    }

    /// What is shown of b, by the agent or, if none runs, by whoever reads the pins.
    fn b(self, node: &Node) -> Result<Value> {
        let pins = node.agent.pins().to_string_lossy().into_owned();
        let backends: Vec<Value> =
            node.agent.json(&["--pin-dir", &pins, "backends", &self.name()])?;
        let b = backends.into_iter().find(|backend| backend["address"] == B);
        b.with_context(|| format!("b of {self:?}"))
    }

    /// What the agent shows of the service.
    fn summary(self, node: &Node) -> Result<Value> {
        let services: Vec<Value> = node.agent.json(&["services"])?;
        let found = services.into_iter().find(|service| service["name"] == self.name());
        found.with_context(|| format!("{self:?}"))
    }
}

// === functions ===

/// Whether the kernel has a backend out for anybody.
fn is_out(shown: &Value) -> bool {
    let reason = shown["reason"].as_str().unwrap_or_default();
    shown["state"] == "ejected" || reason.contains("a connect failed; out for")
}

/// These services; balancing goes on when the agent ends.
fn node(services: &[Served]) -> Result<Node> {
    let node = Node::builder().backend("a", "10.0.0.1:8080").backend("b", B);
    let mut node = node.backend("c", "10.0.0.3:8080").start_without_agent()?;
    let file: Vec<_> = services.iter().map(|served| served.service()).collect();
    node.agent.write_services("test.yaml", &Service::file(&file))?;
    node.agent.stays = true;
    node.agent.start()?;
    for served in services {
        served.ensure_whole(&node, &ALL)?;
    }
    Ok(node)
}

/// The next agent comes, and has nothing to write: all that is known of b is the kernel's.
fn come_back(node: &mut Node) -> Result<()> {
    ensure!(node.agent.status().is_err(), "an agent runs");
    node.agent.start()?;
    let status: Value = node.agent.get("/v1/status")?;
    ensure!(status["counters"]["map_writes"] == 0, "{}", status["counters"]);
    Ok(())
}

/// The control of every test: it was the programs that led to all backends.
fn control(mut node: Node, served: Served) -> Result<()> {
    node.agent.stop()?;
    node.agent.stays = false;
    node.agent.start()?;
    check::balanced(&mut node, &ALL, |node| check::who(node, &served.vip()))
}

// === tests ===

#[test]
fn the_kernel_takes_it_out_and_the_next_agent_knows() -> Result<()> {
    let mut node = node(&[STEADY, QUICK, BARE])?;
    node.agent.kill()?;
    node.kill_server("b")?;
    let refused = STEADY.ensure_shunned(&node)?;
    QUICK.ensure_shunned(&node)?;
    BARE.ensure_refused_again_and_again(&node)?;
    let alone = STEADY.b(&node)?;
    ensure!(is_out(&alone) && alone["failed"] == refused, "{refused} refused: {alone:?}");

    come_back(&mut node)?;
    let shown = STEADY.b(&node)?;
    ensure!(is_out(&shown) && shown["failed"] == refused, "{shown:?}, and before {alone:?}");
    ensure!(STEADY.summary(&node)?["failed"] == refused, "{}", STEADY.summary(&node)?);
    ensure!(!is_out(&BARE.b(&node)?), "control: {:?}", BARE.b(&node)?);
    STEADY.ensure_whole(&node, &OTHERS)?;
    // The next try fails for the agent too, so from then on it is out for all.
    until("b to be ejected", LIMIT, || {
        let (by, _) = QUICK.connect(&node)?;
        ensure!(by.keys().eq(OTHERS), "{by:?}");
        Ok((QUICK.b(&node)?["state"] == "ejected").then_some(()))
    })?;

    node.start_server(Kind::Plain, "b", B)?;
    QUICK.until_back(&node)?;
    ensure!(!is_out(&QUICK.b(&node)?), "{:?}", QUICK.b(&node)?);
    BARE.ensure_whole(&node, &ALL)?;
    control(node, QUICK)
}

#[test]
fn it_comes_back_before_the_next_agent() -> Result<()> {
    let mut node = node(&[QUICK, BARE])?;
    node.agent.kill()?;
    node.kill_server("b")?;
    let refused = QUICK.ensure_shunned(&node)?;
    BARE.ensure_refused_again_and_again(&node)?;
    node.start_server(Kind::Plain, "b", B)?;
    QUICK.until_back(&node)?;

    come_back(&mut node)?;
    let shown = QUICK.b(&node)?;
    ensure!(!is_out(&shown) && shown["failed"] == refused, "{refused} refused: {shown:?}");
    QUICK.ensure_whole(&node, &ALL)?;
    control(node, QUICK)
}

/// What the kernel has found, the next agent's checks find too; and what only they can find.
#[test]
fn the_next_agents_checks_agree() -> Result<()> {
    let mut node = node(&[CHECKED, UNEJECTED, BARE])?;
    let until_checked = |node: &Node, state: &str| -> Result<()> {
        for served in [CHECKED, UNEJECTED] {
            node.agent.until_backends(&served.name(), |backends| {
                backends.iter().all(|b| b.state == if b.address == B { state } else { "healthy" })
            })?;
        }
        Ok(())
    };
    until_checked(&node, "healthy")?;
    node.agent.kill()?;
    node.kill_server("b")?;
    CHECKED.ensure_shunned(&node)?;
    UNEJECTED.ensure_refused_again_and_again(&node)?;
    ensure!(UNEJECTED.b(&node)?["state"] == "healthy", "control: nobody checks it");

    node.agent.start()?;
    until_checked(&node, "unhealthy")?;
    for served in [CHECKED, UNEJECTED] {
        served.ensure_whole(&node, &OTHERS)?;
        let summary = served.summary(&node)?;
        ensure!(summary["backends"]["healthy"] == 2, "{summary}");
    }
    // The control: it was the checks.
    BARE.ensure_refused_again_and_again(&node)?;

    node.start_server(Kind::Plain, "b", B)?;
    // Nobody but a connect finds out what the kernel wants to know.
    CHECKED.until_back(&node)?;
    until_checked(&node, "healthy")?;
    UNEJECTED.ensure_whole(&node, &ALL)?;
    control(node, CHECKED)
}
