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
    /// Connections open now; `null` while the kernel does not count them.
    pub active: Option<u64>,
    /// Connections given to it since it appeared.
    pub opened: u64,
    /// Connections that failed since it appeared; `null` while the kernel does not count them.
    pub failed: Option<u64>,
    /// When it came into its state, RFC 3339.
    pub since: String,
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
    /// Counters of the data plane since the programs were loaded.
    pub counters: Counters,
    /// The last thing that went wrong, if anything did.
    pub last_error: Option<LastError>,
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
    /// Entries it can hold.
    pub max: u64,
}

/// Counters of the data plane.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, Debug, Default)]
pub struct Counters {
    /// Connects that were given a backend.
    pub balanced: u64,
    /// Balanced connects without a flow record.
    pub no_flow_record: u64,
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
