//! What the agent and its runner say to each other: a line of JSON each.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::model::CommandCheck;
use crate::yaml::printable;

/// Run this.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Request {
    pub(super) id: u64,
    /// The program and its arguments.
    pub(super) run: Vec<String>,
    pub(super) service: String,
    pub(super) address: IpAddr,
    pub(super) port: u16,
    pub(super) timeout: Duration,
}

/// It has ended.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Reply {
    pub(super) id: u64,
    pub(super) outcome: Outcome,
}

/// How it has.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Outcome {
    /// With exit status 0.
    Passed,
    /// Otherwise: how, and what it said.
    Failed(String),
    /// Likewise, but the runner did not run all the time meanwhile.
    Paused(String),
    /// It could not be run, for this reason.
    Unmade(String),
}

impl Request {
    /// Without a number yet.
    pub(super) fn new(
        check: &CommandCheck,
        service: &str,
        address: SocketAddr,
        timeout: Duration,
    ) -> Self {
        let (run, service) = (check.run.clone(), service.to_owned());
        Self { id: 0, run, service, address: address.ip(), port: address.port(), timeout }
    }
}

/// What the runner, which is not to be believed, says: as one line that a terminal can show.
pub(super) fn words(text: &str) -> String {
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    printable(&lines.collect::<Vec<_>>().join(" "))
}
