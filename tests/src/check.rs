//! What most tests assert, each with its control.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use serde::de::DeserializeOwned;

use crate::client::Outcome;
use crate::node::Node;
use crate::storm::{Connect, Report};
use crate::{process, storm};

/// Connects after which one of up to four backends of equal weight has been missed with a
/// probability of less than 1e-11.
const ENOUGH: usize = 100;

/// Runs a client again and again: each answer must come from one of `backends`, and each of them
/// must have answered. Then the control: with the agent stopped the same client must fail.
///
/// # Errors
///
/// Any of that is not so.
pub fn balanced(
    node: &mut Node,
    backends: &[&str],
    client: impl Fn(&Node) -> Result<String>,
) -> Result<()> {
    let wanted: BTreeSet<_> = backends.iter().copied().map(str::to_owned).collect();
    let mut seen = BTreeSet::new();
    for _ in 0..ENOUGH {
        let name = client(node).context("with the agent running")?;
        ensure!(wanted.contains(&name), "{name:?} answered, and is none of {backends:?}");
        seen.insert(name);
        if seen == wanted {
            break;
        }
    }
    ensure!(seen == wanted, "after {ENOUGH} connects only {seen:?} of {backends:?} have answered");

    node.agent.stop()?;
    match client(node) {
        Ok(name) => bail!("control: with the agent stopped, {name:?} answered all the same"),
        Err(_) => Ok(()),
    }
}

/// A `mesh-client` command that will run balanced.
///
/// # Errors
///
/// The program has not been built.
pub fn mesh_client(node: &Node) -> Result<Command> {
    Ok(node.command(process::binary("mesh-client")?))
}

/// Asks who answers, with `mesh-client ask --way WAY ADDRESS`, balanced.
///
/// # Errors
///
/// The client cannot be run. A connect that fails is an [`Outcome`].
pub fn ask(node: &Node, way: &str, address: &str) -> Result<Outcome> {
    ask_by(mesh_client(node)?, way, address)
}

/// As [`ask`], from outside the balanced cgroup.
///
/// # Errors
///
/// As [`ask`].
pub fn ask_outside(node: &Node, way: &str, address: &str) -> Result<Outcome> {
    ask_by(node.outside(process::binary("mesh-client")?), way, address)
}

/// As [`ask`], from a cgroup of the caller's choice.
///
/// # Errors
///
/// As [`ask`].
pub fn ask_in(node: &Node, cgroup: &Path, way: &str, address: &str) -> Result<Outcome> {
    ask_by(node.command_in(cgroup, process::binary("mesh-client")?)?, way, address)
}

fn ask_by(mut command: Command, way: &str, address: &str) -> Result<Outcome> {
    command.args(["ask", "--way", way, address]);
    printed(command)
}

/// Connects one socket to `first` and then to `second`, see [`crate::client::reconnect`].
///
/// # Errors
///
/// The client cannot be run. A connect that fails is an [`Outcome`].
pub fn reconnect(node: &Node, first: &str, second: &str) -> Result<[Outcome; 2]> {
    let mut command = mesh_client(node)?;
    command.args(["reconnect", first, second]);
    printed(command)
}

/// Begins to connect one socket to `first` and then to `second`, see [`crate::client::abandon`].
///
/// # Errors
///
/// The client cannot be run. A connect that fails is an [`Outcome`].
pub fn abandon(node: &Node, first: &str, second: &str) -> Result<Outcome> {
    let mut command = mesh_client(node)?;
    command.args(["abandon", first, second]);
    printed(command)
}

/// Who answers, by a blocking connect; fails when nobody does.
///
/// # Errors
///
/// The connect failed: then naming step and error.
pub fn who(node: &Node, address: &str) -> Result<String> {
    ask(node, "blocking", address)?.name()
}

/// How often each backend answered (or each error came) in `times` connects.
///
/// # Errors
///
/// The client cannot be run.
pub fn histogram(node: &Node, address: &str, times: u32) -> Result<BTreeMap<String, u32>> {
    let mut command = mesh_client(node)?;
    command.args(["histogram", address, &times.to_string()]);
    printed(command)
}

/// What a command prints as JSON; it must succeed.
///
/// # Errors
///
/// It fails, or prints something else.
pub fn printed<T: DeserializeOwned>(command: Command) -> Result<T> {
    let text = process::stdout(command)?;
    serde_json::from_str(&text).with_context(|| format!("mesh-client printed {text}"))
}

/// A client that connects without pause, balanced, until it is told to stop. Should a test fail
/// before, it ends with the node's cgroup.
#[derive(Debug)]
pub struct Storm {
    child: Child,
    record: PathBuf,
}

impl Storm {
    /// Starts it.
    ///
    /// # Errors
    ///
    /// The client cannot be run.
    pub fn start(node: &Node, address: &str) -> Result<Self> {
        Self::of_clients(node, address, 2)
    }

    /// As [`Storm::start`], as so many clients, each of which connects again when it is answered.
    ///
    /// # Errors
    ///
    /// As [`Storm::start`].
    pub fn of_clients(node: &Node, address: &str, clients: u32) -> Result<Self> {
        let record = node.directory().join("storm");
        let mut command = mesh_client(node)?;
        command.args(["storm", address, "--bound", "300", "--threads", &clients.to_string()]);
        command.arg("--record").arg(&record);
        let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        Ok(Self { child, record })
    }

    /// Stops it; gives what came of it, and the connects that were answered by their start.
    ///
    /// # Errors
    ///
    /// The client failed otherwise than in connecting.
    pub fn finish(mut self) -> Result<(Report, Vec<Connect>)> {
        drop(self.child.stdin.take());
        let output = self.child.wait_with_output()?;
        ensure!(output.status.success(), "the storm failed: {output:?}");
        Ok((serde_json::from_slice(&output.stdout)?, storm::read(&self.record)?))
    }
}

/// Connects, and demands that it is refused, and counted for this reason and no other.
///
/// # Errors
///
/// Any of that is not so.
pub fn refused(node: &Node, address: &str, reason: &str) -> Result<()> {
    let before = node.agent.refused_by_reason()?;
    let outcome = ask(node, "blocking", address)?;
    ensure!(outcome.error.as_deref() == Some("connect: ECONNREFUSED"), "{address}: {outcome:?}");
    let after = node.agent.refused_by_reason()?;
    for (name, count) in &after {
        let more = count - before.get(name).copied().unwrap_or_default();
        ensure!(more == u64::from(name == reason), "{address}: {more} more refused for {name}");
    }
    ensure!(after.contains_key(reason), "{reason} is not among the counters: {after:?}");
    Ok(())
}

/// Connects, and demands that the programs leave it alone: it fails (or is answered) exactly as it
/// does for a client that is not balanced.
///
/// # Errors
///
/// The client cannot be run, or it is treated otherwise.
pub fn untouched(node: &Node, address: &str) -> Result<Outcome> {
    let parsed: SocketAddr = address.parse()?;
    let (inside, outside) =
        (ask(node, "blocking", address)?, ask_outside(node, "blocking", address)?);
    ensure!(inside == outside, "{parsed}: balanced {inside:?}, not balanced {outside:?}");
    Ok(inside)
}

impl Outcome {
    /// Who answered.
    ///
    /// # Errors
    ///
    /// Nobody did: then what failed.
    pub fn name(self) -> Result<String> {
        match (self.backend, self.error) {
            (Some(name), None) => Ok(name),
            (backend, error) => bail!("no answer: {backend:?} {error:?}"),
        }
    }
}
