//! What is measured: which traffic, by which way.

use crate::peers;
use crate::timeline;

/// By which way connections come to a backend.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Way {
    /// Dialled itself; no agent runs on the machine.
    Direct,
    /// Through a service of the data plane.
    Service,
    /// Through another way's.
    Peer(peers::Kind),
}

/// What is done.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Traffic {
    /// Requests and answers on so many connections that stay open.
    Kept(u32),
    /// Connect, request, answer, close.
    Short,
    /// One long answer.
    Bulk,
}

/// What a figure says of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Measure {
    /// How long a request takes.
    Request,
    /// How long all of them took, for each request, or each MiB: the inverse of the throughput.
    All,
}

/// What one figure is about.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Subject {
    /// By which way.
    pub way: Way,
    /// What is done.
    pub traffic: Traffic,
    /// What of it.
    pub measure: Measure,
}

/// All ways but the direct one.
pub const WAYS: [Way; 4] = [
    Way::Service,
    Way::Peer(peers::Kind::Nftables(1)),
    Way::Peer(peers::Kind::Haproxy),
    Way::Peer(peers::Kind::Envoy),
];

/// All traffic.
pub const TRAFFIC: [Traffic; 5] =
    [Traffic::Kept(1), Traffic::Kept(16), Traffic::Kept(256), Traffic::Short, Traffic::Bulk];

/// MiB of a long answer.
const LONG: u32 = 256;

// === impl Subject ===

impl timeline::Subject for Subject {
    fn baseline(self) -> Self {
        Self { way: Way::Direct, ..self }
    }
}

// === impl Way ===

impl Way {
    /// The name in tables and JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Service => "service",
            Self::Peer(peers::Kind::Nftables(_)) => "nftables",
            Self::Peer(peers::Kind::Haproxy) => "haproxy",
            Self::Peer(peers::Kind::Envoy) => "envoy",
        }
    }
}

// === impl Traffic ===

impl Traffic {
    /// The name in tables and JSON.
    pub fn name(self) -> String {
        match self {
            Self::Kept(connections) => format!("kept-{connections}"),
            Self::Short => "connect-request-close".to_owned(),
            Self::Bulk => "bulk".to_owned(),
        }
    }

    /// The order for a client.
    pub fn order(self) -> String {
        match self {
            Self::Kept(connections) => format!("kept {connections} {}", self.units()),
            Self::Short => format!("short {}", self.units()),
            Self::Bulk => format!("bulk {}", u64::from(LONG) << 20),
        }
    }

    /// How many requests that is, or MiB: about a tenth of a second.
    pub fn units(self) -> u32 {
        match self {
            Self::Kept(1) => 4_000,
            Self::Kept(_) => 12_800,
            Self::Short => 1_500,
            Self::Bulk => LONG,
        }
    }
}
