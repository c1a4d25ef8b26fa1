//! The JSON that the API serves and the command line prints. It is a promise: fields are added,
//! never renamed.

use serde::{Deserialize, Serialize};

/// `GET /v1/services`, an element.
#[derive(Clone, PartialEq, Serialize, Deserialize, Debug)]
pub struct Service {
    /// Name.
    pub name: String,
    /// The source that defined it.
    pub source: String,
    /// Algorithm.
    pub balance: String,
    /// What clients dial.
    pub frontends: Vec<Frontend>,
    /// Counts over all backends.
    pub backends: BackendCounts,
    /// Connections that are open, or being opened, to its backends.
    #[serde(default)]
    pub active: u64,
    /// Connections given to its present backends.
    #[serde(default)]
    pub opened: u64,
    /// How many of those failed: the sum of `failures`.
    #[serde(default)]
    pub failed: u64,
    /// The same by reason.
    #[serde(default)]
    pub failures: Failures,
    /// Connects to its frontends that were refused, by reason; reasons that did not occur are left
    /// out.
    #[serde(default)]
    pub refused: Vec<Refused>,
    /// What keeps a part of this service out of the kernel: shadowed by another definition, a
    /// limit, a failed write.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub problems: Vec<String>,
}

/// What a client dials.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, Debug)]
pub struct Frontend {
    /// IP address.
    pub address: String,
    /// Port.
    pub port: u16,
    /// `tcp` or `udp`.
    pub protocol: String,
}

/// Numbers of backends.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Debug, Default)]
pub struct BackendCounts {
    /// All.
    pub total: usize,
    /// Those in state `healthy`.
    pub healthy: usize,
}

/// `GET /v1/backends`, an element.
#[derive(Clone, PartialEq, Serialize, Deserialize, Debug)]
pub struct Backend {
    /// Service name.
    pub service: String,
    /// Service port.
    pub port: u16,
    /// `tcp` or `udp`.
    pub protocol: String,
    /// `ip:port` or `[ip]:port`.
    pub address: String,
    /// `healthy`, `unhealthy`, `unknown`, `draining` or `ejected`.
    pub state: String,
    /// Why it is in that state.
    pub reason: String,
    /// Weight.
    pub weight: u32,
    /// Zone, when known.
    pub zone: Option<String>,
    /// Connections that are open, or being opened, now.
    pub active: u64,
    /// Connections given to it since it appeared.
    pub opened: u64,
    /// Connections that failed since it appeared: the sum of `failures`.
    pub failed: u64,
    /// The same by reason.
    #[serde(default)]
    pub failures: Failures,
    /// Round-trip time to it in microseconds, a decaying average; measured for services balanced by
    /// latency.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub latency_us: Option<u64>,
    /// When it came into its state, RFC 3339.
    pub since: String,
    /// All that is said of it, in the order in which it is heard: the first that has a state decides.
    #[serde(default)]
    pub inputs: Vec<Input>,
}

/// What somebody says of a backend.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, Debug)]
pub struct Input {
    /// Who: `source`, `command`, `checks` or `kernel`.
    pub by: String,
    /// A state as that of backends, or `suspected`: the kernel has it out for one client alone, which decides
    /// nothing.
    pub state: String,
    /// Why.
    pub reason: String,
    /// Since when, RFC 3339, if that is known.
    pub since: Option<String>,
}

/// Failed connections by reason.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Debug, Default)]
pub struct Failures {
    /// Refused by the peer, or by a firewall.
    pub refused: u64,
    /// Never answered.
    pub timeout: u64,
    /// The host cannot be reached.
    pub unreachable: u64,
    /// Reset before the first byte came back.
    pub reset: u64,
}

/// `GET /v1/connections`, an element.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, Debug)]
pub struct Connection {
    /// The service that gave it its backend; empty when that is gone, whoever has its address now.
    pub service: String,
    /// What was dialled, `ip:port` or `[ip]:port`.
    pub frontend: String,
    /// Where it went; empty when that backend was gone before the agent began.
    pub backend: String,
    /// `tcp` or `udp`.
    pub protocol: String,
    /// Who holds the socket now; of several processes, the oldest. Nothing when none does any more, or
    /// its network namespace is out of reach.
    pub pid: Option<u32>,
    /// Its name.
    pub command: Option<String>,
    /// The cgroup of the process that connected.
    pub cgroup: String,
    /// Seconds since it connected; of a datagram socket that is not connected, since it last sent there.
    pub age: u64,
    /// State of the socket, as ss(8) names it; of a datagram socket `connected` or `unconnected`;
    /// `closed` when its connection has ended and the application still holds it.
    pub state: String,
}

/// `GET /v1/status`.
#[derive(Clone, PartialEq, Serialize, Deserialize, Debug)]
pub struct Status {
    /// Version of the agent.
    pub version: String,
    /// Name of the node.
    pub node: String,
    /// Zone of the node, when configured.
    pub zone: Option<String>,
    /// Whether the node balances what its sources define.
    pub ready: bool,
    /// Why it is not ready, or what else needs attention.
    pub reasons: Vec<String>,
    /// Process id of the agent.
    pub pid: u32,
    /// The cgroup whose sockets are balanced.
    pub cgroup: String,
    /// Kernel programs.
    pub programs: Vec<Program>,
    /// Sources.
    pub sources: Vec<Source>,
    /// Maps.
    pub maps: Vec<Map>,
    /// Memory of the agent and its maps.
    #[serde(default)]
    pub memory: Memory,
    /// Counters of the data plane since the programs were loaded.
    pub counters: Counters,
    /// Health checks since the agent was started.
    #[serde(default)]
    pub checks: Checks,
    /// What the last audit of records found; `null` before the first.
    #[serde(default)]
    pub audit: Option<Audit>,
    /// The last thing that went wrong, if anything did.
    pub last_error: Option<LastError>,
}

/// Health checks.
#[derive(Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, Debug)]
pub struct Checks {
    /// Those that passed.
    pub passed: u64,
    /// Those that did not.
    pub failed: u64,
    /// Those that could not be made.
    pub unmade: u64,
    /// Those that failed while the agent did not run, and were made again.
    #[serde(default)]
    pub unjudged: u64,
    /// Those that began more than 100 ms after they were due.
    pub late: u64,
    /// The longest time that one began after it was due, in microseconds.
    pub longest_delay_us: u64,
}

/// `GET /v1/audit`: the records of balanced sockets, compared with the sockets that exist.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, Debug)]
pub struct Audit {
    /// When, RFC 3339.
    pub time: String,
    /// How many passes there were, this one included.
    pub passes: u64,
    /// Records in use.
    pub records: usize,
    /// Whose socket exists.
    pub seen: usize,
    /// Whose socket was not found: its connection is over. Released when it is so twice.
    pub unseen: usize,
    /// That were released during the pass.
    pub ended: usize,
    /// Of sockets in network namespaces that the agent cannot find or enter.
    pub in_unknown_namespaces: usize,
    /// Of sockets in namespaces whose sockets could not all be listed.
    pub undecided: usize,
    /// Records that this pass released.
    pub released: u64,
    /// Records that all passes released.
    pub released_ever: u64,
    /// Whether every record is where the table has it now; after it has grown, the programs look at two
    /// places until that is so.
    #[serde(default)]
    pub settled: bool,
    /// What was in the way.
    pub problem: Option<String>,
}

/// Something that went wrong.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, Debug)]
pub struct LastError {
    /// When, RFC 3339.
    pub time: String,
    /// What.
    pub error: String,
}

/// A kernel program.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, Debug)]
pub struct Program {
    /// Name.
    pub name: String,
    /// Attachment point.
    pub hook: String,
    /// The kernel's number for it; `null` when it is not loaded.
    pub id: Option<u32>,
    /// Whether it is attached.
    pub attached: bool,
}

/// A source.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, Debug)]
pub struct Source {
    /// Name.
    pub name: String,
    /// `starting`, `ready` or `error`.
    pub state: String,
    /// How many services it defines.
    pub services: usize,
    /// What is wrong, or `null`.
    pub error: Option<String>,
}

/// A map.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, Debug)]
pub struct Map {
    /// Name.
    pub name: String,
    /// Entries used.
    pub used: u64,
    /// Entries for which there is memory now.
    #[serde(default)]
    pub size: u64,
    /// Entries it can hold.
    pub max: u64,
}

/// Memory, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Debug, Default)]
pub struct Memory {
    /// Anonymous memory of the agent that is resident.
    pub anonymous: u64,
    /// What the kernel has taken for the maps.
    pub maps: u64,
}

/// Counters of the data plane.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, Debug, Default)]
pub struct Counters {
    /// Connects that were given a backend.
    pub balanced: u64,
    /// Balanced connects without a flow record, because the tables of records were full.
    pub no_flow_record: u64,
    /// Balanced connects whose place in the first table of records was taken.
    #[serde(default)]
    pub collisions: u64,
    /// Records in the second table now.
    #[serde(default)]
    pub overflowed: u64,
    /// Connects that went to an ejected backend because all were.
    #[serde(default)]
    pub all_ejected: u64,
    /// Times a backend was not ejected because as many as may be were.
    #[serde(default)]
    pub share_reached: u64,
    /// Records of datagram sockets that gave way to another one of the same socket.
    #[serde(default)]
    pub gave_way: u64,
    /// Connects of clients that could not be given an endpoint to keep, because there was no room.
    #[serde(default)]
    pub no_pin: u64,
    /// Events that were left out.
    #[serde(default)]
    pub events_lost: u64,
    /// Changes of the maps since the agent was started.
    #[serde(default)]
    pub map_writes: u64,
    /// Attempts repeated because the tables changed.
    pub retries: u64,
    /// Connects refused.
    pub refused: Vec<Refused>,
}

/// Connects refused for one reason.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, Debug)]
pub struct Refused {
    /// Name of the reason.
    pub reason: String,
    /// How many.
    pub count: u64,
}

/// `GET /v1/explain`.
#[derive(Clone, PartialEq, Serialize, Deserialize, Debug)]
pub struct Explanation {
    /// Who connects.
    pub client: Option<String>,
    /// `ip:port/protocol` that is dialled.
    pub frontend: String,
    /// The service that owns it, if one does.
    pub service: Option<String>,
    /// Its algorithm.
    pub algorithm: Option<String>,
    /// What happens, in order.
    pub steps: Vec<Step>,
    /// The backends that were considered.
    pub candidates: Vec<Candidate>,
    /// What comes of it; `null` when the connect is not touched.
    pub answer: Option<Answer>,
}

/// A step of an explanation.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, Debug)]
pub struct Step {
    /// Short name.
    pub step: String,
    /// What was found.
    pub detail: String,
}

/// A backend that was considered.
#[derive(Clone, PartialEq, Serialize, Deserialize, Debug)]
pub struct Candidate {
    /// `ip:port`.
    pub address: String,
    /// State.
    pub state: String,
    /// Probability of being chosen, 0 to 1, for `random`.
    pub score: f64,
}

/// The outcome of a connect.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, Debug)]
#[serde(untagged)]
pub enum Answer {
    /// A backend: for a random choice, one draw.
    Backend {
        /// `ip:port`.
        backend: String,
    },
    /// Refused.
    Refused {
        /// Symbolic error number.
        errno: String,
        /// Name of the reason.
        reason: String,
    },
}

/// `GET /v1/events`, an element, or a line of `GET /v1/events?follow=true`: something rare that has
/// happened.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, Debug)]
pub struct Event {
    /// Its number: one more than that of the event before.
    pub seq: u64,
    /// When, RFC 3339.
    pub time: String,
    /// `refused`: a connect was refused. `failed`: a connect to a backend failed. `suspected`: a
    /// backend is out for one client. `ejected`: it is out for all. `recovered`: it is in again.
    /// `spared`: it should be out, but too many others are. `healthy`, `unhealthy`: what its checks
    /// have found. `missed`: events that are not here.
    pub kind: String,
    /// The service, when it is known.
    pub service: Option<String>,
    /// `ip:port/protocol` that was dialled.
    pub frontend: Option<String>,
    /// `ip:port` or `[ip]:port`.
    pub backend: Option<String>,
    /// Name of the reason of a refusal or of a failure; what a check found.
    pub reason: Option<String>,
    /// Who connected: its cgroup's place in the hierarchy, or `cgroup 1234` when that is not found.
    pub client: Option<String>,
    /// What it means, for people.
    pub detail: String,
    /// With the kind `missed`: how many.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub missed: Option<u64>,
}

/// `GET /v1/version`.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, Debug)]
pub struct Version {
    /// Version of the agent.
    pub version: String,
    /// Version of the map layouts, see `mesh_common::ABI_VERSION`.
    pub abi: u32,
    /// Process id of the agent.
    pub pid: u32,
}

/// The body of every answer that is not a success.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, Debug)]
pub struct ErrorBody {
    /// What went wrong and what to do next.
    pub error: String,
}
