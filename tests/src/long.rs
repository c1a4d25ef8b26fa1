//! Connections that are kept and used all the time (`mesh-long`), as a test starts and ends them.

use std::collections::BTreeMap;
use std::process::{Child, Stdio};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use crate::node::Node;
use crate::process::binary;

/// Connections in use. Should a test fail before they end, they end with the node's cgroup.
#[derive(Debug)]
pub struct Long(Child);

/// What came of them.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Report {
    /// How many were to be made.
    pub made: usize,
    /// Words that were echoed.
    pub exchanges: u64,
    /// Those that broke, were never made, or were answered by another backend, by why.
    pub broken: BTreeMap<String, u64>,
    /// How many each backend has answered all the time.
    pub by_backend: BTreeMap<String, u64>,
}

impl Long {
    /// Starts so many connections, datagram sockets that are connected, and as many that are not.
    ///
    /// # Errors
    ///
    /// The client cannot be run.
    pub fn start(node: &Node, address: &str, tcp: usize, udp: usize) -> Result<Self> {
        let mut command = node.command(binary("mesh-long")?);
        command.args(["exchange", address, "--tcp", &tcp.to_string(), "--udp", &udp.to_string()]);
        Ok(Self(command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?))
    }

    /// Ends them.
    ///
    /// # Errors
    ///
    /// The client failed otherwise than in its connections.
    pub fn finish(mut self) -> Result<Report> {
        drop(self.0.stdin.take());
        let output = self.0.wait_with_output()?;
        ensure!(output.status.success(), "the client failed: {output:?}");
        serde_json::from_slice(&output.stdout).context("what the client said")
    }

    /// Ends them, and demands that all of them lived until then.
    ///
    /// # Errors
    ///
    /// One did not.
    pub fn finish_whole(self) -> Result<Report> {
        let report = self.finish()?;
        let answered: u64 = report.by_backend.values().sum();
        ensure!(report.broken.is_empty() && answered == report.made as u64, "{report:?}");
        ensure!(report.exchanges > report.made as u64, "they did nothing: {report:?}");
        Ok(report)
    }
}
