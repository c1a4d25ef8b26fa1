//! Ways to open and connect a socket, and what getpeername(2) says afterwards. Each test ends with
//! its control: with the agent stopped the same connect must fail.

use anyhow::{Result, ensure};
use mesh_tests::{Builder, Node, Service, check};

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
