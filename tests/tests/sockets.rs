//! Ways to open and connect a socket, and what getpeername(2) says afterwards. Each test ends with
//! its control: with the agent stopped the same connect must fail.

use anyhow::{Context, Result, ensure};
use mesh_tests::cgroup::Cgroup;
use mesh_tests::process::{self, until};
use mesh_tests::{Builder, Later, Node, Service, check};

const FOUR: &str = "10.96.0.10:80";
const SIX: &str = "[fd00:96::10]:80";

/// One service of both families: a and b answer over IPv4, c and d over IPv6.
fn both() -> Builder {
    Node::builder()
        .backend("a", "10.0.0.1:8080")
        .backend("b", "10.0.0.2:8080")
        .backend("c", "[fd00::1]:8080")
        .backend("d", "[fd00::2]:8081")
        .service(
            Service::new("app")
                .address("10.96.0.10")
                .address("fd00:96::10")
                .port(80, 8080)
                .endpoint("10.0.0.1")
                .endpoint("10.0.0.2")
                .endpoint("fd00::1")
                .endpoint("[fd00::2]:8081"),
        )
}

/// The answer of a connect after which getpeername(2) must say what was dialled.
fn answer(node: &Node, way: &str, address: &str, peer: &str) -> Result<String> {
    let outcome = check::ask(node, way, address)?;
    if outcome.error.is_none() {
        ensure!(outcome.peer == Some(peer.parse()?), "getpeername: {outcome:?}");
    }
    outcome.name()
}

#[test]
fn blocking_v4() -> Result<()> {
    check::balanced(&mut both().start()?, &["a", "b"], |node| answer(node, "blocking", FOUR, FOUR))
}

#[test]
fn blocking_v6() -> Result<()> {
    check::balanced(&mut both().start()?, &["c", "d"], |node| answer(node, "blocking", SIX, SIX))
}

#[test]
fn nonblocking_v4() -> Result<()> {
    check::balanced(&mut both().start()?, &["a", "b"], |node| {
        answer(node, "nonblocking", FOUR, FOUR)
    })
}

#[test]
fn nonblocking_v6() -> Result<()> {
    check::balanced(&mut both().start()?, &["c", "d"], |node| answer(node, "nonblocking", SIX, SIX))
}

#[test]
fn v4_mapped() -> Result<()> {
    check::balanced(&mut both().start()?, &["a", "b"], |node| {
        answer(node, "mapped", FOUR, "[::ffff:10.96.0.10]:80")
    })
}

#[test]
fn io_uring_v4() -> Result<()> {
    check::balanced(&mut both().start()?, &["a", "b"], |node| answer(node, "uring", FOUR, FOUR))
}

#[test]
fn io_uring_v6() -> Result<()> {
    check::balanced(&mut both().start()?, &["c", "d"], |node| answer(node, "uring", SIX, SIX))
}

/// getpeername(2) is not asserted: the flow record is kept for the subflow, which is what connects,
/// and the application's socket is its parent.
#[test]
fn mptcp() -> Result<()> {
    check::balanced(&mut both().start()?, &["a", "b"], |node| {
        check::ask(node, "mptcp", FOUR)?.name()
    })
}

/// The first connection to a server fetches a cookie; after it the question travels in the SYN, so
/// the destination is decided in sendto(2) and not in connect(2).
#[test]
fn fast_open() -> Result<()> {
    let mut node = both().start()?;
    node.sysctl("net/ipv4/tcp_fastopen", "3")?;
    let mut in_syn = 0;
    for _ in 0..20 {
        in_syn += u32::from(check::ask(&node, "fast-open", FOUR)?.question_in_syn);
    }
    ensure!(in_syn > 0, "no SYN carried data: this did not try fast open");
    check::balanced(&mut node, &["a", "b"], |node| answer(node, "fast-open", FOUR, FOUR))
}

/// TCP does not take a `sockaddr_in` on an `AF_INET6` socket; the programs do not change that.
#[test]
fn wrong_family_fails_as_ever() -> Result<()> {
    let node = both().start()?;
    let inside = check::ask(&node, "wrong-family", FOUR)?;
    let outside = check::ask_outside(&node, "wrong-family", FOUR)?;
    ensure!(inside.error.is_some() && inside == outside, "{inside:?}, not balanced {outside:?}");
    Ok(())
}

/// A process that is not in the cgroup is not balanced.
#[test]
fn outside_is_not_balanced() -> Result<()> {
    let mut node = both().start()?;
    for address in [FOUR, SIX] {
        let error = check::ask_outside(&node, "blocking", address)?.error;
        ensure!(error.as_deref() == Some("connect: ENETUNREACH"), "{address}: {error:?}");
    }
    check::balanced(&mut node, &["a", "b"], |node| check::who(node, FOUR))
}

/// A socket that is connected again, elsewhere, must not go on telling the first address.
#[test]
fn getpeername_after_reconnecting() -> Result<()> {
    let mut node = both().start()?;
    // To an endpoint itself, also one that the first connection may have been given, and to
    // another frontend.
    for (first, second) in
        [(FOUR, "10.0.0.1:8080"), (SIX, "[fd00::1]:8080"), ("10.0.0.2:8080", FOUR)]
    {
        let [before, after] = check::reconnect(&node, first, second)?;
        ensure!(before.peer == Some(first.parse()?), "{first}, then {second}: {before:?}");
        ensure!(after.error.is_none(), "{first}, then {second}: {after:?}");
        ensure!(after.peer == Some(second.parse()?), "{first}, then {second}: {after:?}");
    }
    check::balanced(&mut node, &["a", "b"], |node| {
        let [_, after] = check::reconnect(node, "10.0.0.1:8080", FOUR)?;
        after.name()
    })
}

/// Opened and active connections of all backends.
fn counts(node: &Node) -> Result<[u64; 2]> {
    let backends: Vec<serde_json::Value> = node.agent.json(&["backends"])?;
    let sum = |name: &str| backends.iter().filter_map(|backend| backend[name].as_u64()).sum();
    Ok([sum("opened"), sum("active")])
}

/// Waits for the figures that so many connections leave when all are closed, in the audit's too.
fn ensure_counted(node: &Node, opened: u64) -> Result<()> {
    until("the connections to be over", process::LIMIT, || {
        Ok((counts(node)? == [opened, 0]).then_some(()))
    })
    .with_context(|| format!("{:?} in place of {opened}", counts(node)))?;
    let audit: serde_json::Value = node.agent.json(&["audit"])?;
    ensure!(audit["records"] == 0 && audit["released_ever"] == 0, "{audit:#}");
    Ok(())
}

/// A socket belongs to the cgroup that it was made in, wherever its process is when it connects.
#[test]
fn inherited_into_another_cgroup() -> Result<()> {
    let mut node = both().start()?;
    let elsewhere = tempfile::tempdir()?;
    let elsewhere = Cgroup::create(elsewhere.path())?;
    let before = counts(&node)?;
    ensure!(before == [0, 0], "{before:?}");
    for (number, (address, backends)) in (1..).zip([(FOUR, ["a", "b"]), (SIX, ["c", "d"])]) {
        let mut inside = Later::start(check::mesh_client(&node)?, address)?;
        let name = inside.connect(Some(elsewhere.path()))?.name()?;
        ensure!(backends.contains(&&*name), "{address}: {name} answered");
        ensure!(counts(&node)? == [number, 1], "{:?}", counts(&node));
        drop(inside);
        ensure_counted(&node, number)?;
        let outside = node.outside(process::binary("mesh-client")?);
        let outside = Later::start(outside, address)?.connect(Some(node.cgroup().path()))?;
        ensure!(outside.error.as_deref() == Some("connect: ENETUNREACH"), "{outside:?}");
        ensure_counted(&node, number)?;
    }
    check::balanced(&mut node, &["a", "b"], |node| check::who(node, FOUR))
}

/// Sockets that are there before the programs: one that is connected then ends without a trace; one
/// that connects later is balanced and counted like any other.
#[test]
fn older_than_the_programs() -> Result<()> {
    let mut node = both().start_without_agent()?;
    let mut connected = Later::start(check::mesh_client(&node)?, "10.0.0.1:8080")?;
    ensure!(connected.connect(None)?.name()? == "a", "it dialled a");
    let connecting: Vec<_> = [FOUR, FOUR, SIX, SIX]
        .iter()
        .map(|address| Later::start(check::mesh_client(&node)?, address))
        .collect::<Result<_>>()?;
    node.agent.start()?;
    drop(connected);
    ensure_counted(&node, 0)?;
    for (opened, mut later) in (1..).zip(connecting) {
        let outcome = later.connect(None)?;
        ensure!(outcome.peer.is_some(), "{outcome:?}");
        let name = outcome.name()?;
        ensure!(["a", "b", "c", "d"].contains(&&*name), "{name} answered");
        ensure!(counts(&node)? == [opened, 1], "{:?}", counts(&node));
        drop(later);
        ensure_counted(&node, opened)?;
    }
    check::balanced(&mut node, &["a", "b"], |node| check::who(node, FOUR))
}
