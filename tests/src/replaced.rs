//! A node whose programs are replaced while everybody uses them, and what clients may see of that.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::client::Outcome;
use crate::long::Long;
use crate::node::{Builder, Namespace, Node};
use crate::process::{binary, until};
use crate::server::Kind;
use crate::service::Service;
use crate::{Agent, check};

/// `app`.
pub const VIP: &str = "10.96.0.10:80";
/// `closed`.
pub const CLOSED: &str = "10.96.0.11:80";
/// `long`.
pub const LONG: &str = "10.96.0.12:90";

/// A node with a and b for those who connect, and `long`, of c and d, for those who stay.
#[must_use]
pub fn builder() -> Builder {
    let long = Service::new("long").address("10.96.0.12").port(90, 9090).udp(90, 9090);
    Node::builder()
        .backend("a", "10.0.0.1:8080")
        .backend("b", "10.0.0.2:8080")
        .server(Kind::Long, "c", "10.0.0.3:9090")
        .server(Kind::Long, "d", "10.0.0.4:9090")
        .service(long.endpoint("10.0.0.3").endpoint("10.0.0.4"))
}

/// `app` of a and b, `closed` where nobody listens, and `long` of c and d; balancing goes on when the agent
/// ends.
///
/// # Errors
///
/// Something does not start.
pub fn node() -> Result<Node> {
    let app = Service::new("app").address("10.96.0.10").port(80, 8080);
    let app = app.endpoint("10.0.0.1").endpoint("10.0.0.2");
    let closed = Service::new("closed").address("10.96.0.11").port(80, 9).endpoint("10.0.0.1");
    let mut node = builder().service(app).service(closed).start_without_agent()?;
    node.agent.stays = true;
    node.agent.start()?;
    Ok(node)
}

/// A number that the agent says of a service.
///
/// # Errors
///
/// It does not.
pub fn service(agent: &Agent, name: &str, field: &str) -> Result<u64> {
    let services: Vec<Value> = agent.get("/v1/services")?;
    let found = services.iter().find(|found| found["name"] == name);
    found.and_then(|found| found[field].as_u64()).context("the service")
}

/// Waits until so many connections of a service are open.
///
/// # Errors
///
/// There are others for longer than a bounded time.
pub fn until_open(node: &Node, name: &str, wanted: u64) -> Result<()> {
    until("the open connections", Duration::from_secs(20), || {
        Ok((service(&node.agent, name, "active")? == wanted).then_some(()))
    })
}

/// What clients in the cgroup meet between the replacement of two programs, which is as it should be. Gives
/// how many connects of `app` that were; there is one of `closed`.
///
/// # Errors
///
/// It is not.
pub fn meet(namespace: &Namespace, cgroup: &Path) -> Result<u64> {
    let client = |arguments: &[&str]| -> Result<_> {
        let mut command = namespace.command_in(cgroup, binary("mesh-client")?)?;
        command.args(arguments);
        Ok(command)
    };
    let seen: BTreeMap<String, u64> = check::printed(client(&["histogram", VIP, "6"])?)?;
    ensure!(seen.keys().all(|name| name == "a" || name == "b"), "{seen:?}");
    let outcome: Outcome = check::printed(client(&["ask", VIP])?)?;
    ensure!(outcome.peer == Some(VIP.parse()?), "{outcome:?}");
    let outcome: Outcome = check::printed(client(&["ask", CLOSED])?)?;
    ensure!(outcome.error.as_deref() == Some("connect: ECONNREFUSED"), "{outcome:?}");
    Ok(7)
}

/// The kernel's numbers for what is attached to the node's cgroup.
///
/// # Errors
///
/// The kernel does not say.
pub fn ids(node: &Node) -> Result<Vec<u32>> {
    Ok(node.attached()?.into_iter().map(|program| program.id).collect())
}

/// After all that was done, the connections of `long` are whole, and no record is left when they have ended;
/// and with the agent's end nobody answers any more.
///
/// # Errors
///
/// It is not so.
pub fn ensure_whole(mut node: Node, long: Long) -> Result<()> {
    long.finish_whole()?;
    until_open(&node, "long", 0)?;
    let audit: Value = node.agent.get("/v1/audit")?;
    ensure!(audit["records"] == 0 && audit["released_ever"] == 0, "{audit}");
    node.agent.stop()?;
    node.agent.stays = false;
    node.agent.start()?;
    check::balanced(&mut node, &["a", "b"], |node| check::who(node, VIP))
}
