//! A service: addresses and ports that clients dial, endpoints that answer, and the rules between
//! them.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use mesh_common::affinity::By;
use mesh_common::{Algorithm, Protocol};

use super::health::Health;

/// The name of a service: unique on a node, cheap to clone.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ServiceName(Arc<str>);

impl ServiceName {
    /// Takes any text; a source checks what it accepts as a name.
    #[must_use]
    pub fn new(name: &str) -> Self {
        Self(name.into())
    }

    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ServiceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl std::borrow::Borrow<str> for ServiceName {
    fn borrow(&self) -> &str {
        &self.0
    }
}

/// A service as a source defines it. A source hands out only services that satisfy:
///
/// * at least one address and one port; no address twice; no (port, protocol) twice;
/// * no endpoint twice (address and port); no endpoint that equals one of the service's own
///   frontends; every endpoint of a family that one of the addresses has;
/// * ports are not 0;
/// * what the fields of its policies say about their ranges.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Service {
    /// Unique on the node.
    pub name: ServiceName,
    /// What clients dial. IPv4-mapped IPv6 addresses have been made IPv4.
    pub addresses: Vec<IpAddr>,
    /// The ports of each address.
    pub ports: Vec<ServicePort>,
    /// How an endpoint is chosen.
    pub algorithm: Algorithm,
    /// Active checks; without them the state of every endpoint is `unknown`.
    pub health: Health,
    /// When the kernel takes an endpoint out because connects to it failed; without it never.
    pub ejection: Option<EjectionPolicy>,
    /// What happens when no endpoint is usable.
    pub when_all_unhealthy: WhenAllUnhealthy,
    /// While a smaller share of the endpoints is usable, in per cent by weight, those whose checks fail are
    /// used too. 0 is never, but for [`Service::when_all_unhealthy`].
    pub panic_threshold: u8,
    /// Whether connects are ended that wait for an endpoint which was found dead.
    pub end_waiting: bool,
    /// How long connections to an endpoint that was removed may go on; without it, for ever.
    pub drain_timeout: Option<Duration>,
    /// Whether clients keep their endpoints.
    pub affinity: Option<Affinity>,
    /// Whether near endpoints are preferred.
    pub locality: Option<Locality>,
    /// How long an endpoint that has come, or come back, has less than its weight.
    pub slow_start: Option<Duration>,
    /// When endpoints of the next priority are used, and who is behind all of them.
    pub fallback: Option<Fallback>,
    /// The name of the service behind them, if there is one.
    pub fallback_service: Option<ServiceName>,
    /// Who answers.
    pub endpoints: Vec<Endpoint>,
}

impl Service {
    /// When endpoints of the next priority are used.
    #[must_use]
    pub fn fallback(&self) -> Fallback {
        self.fallback.unwrap_or_default()
    }
}

/// Clients keep their endpoints.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Affinity {
    /// What a client is.
    pub by: By,
    /// For how long after its last connect.
    pub timeout: Duration,
}

/// Near endpoints are preferred: those of the same node, then those of the same zone, then all others.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Locality {
    /// Per cent of the endpoints at a distance, by weight, that suffice to take everything: 1 to 100.
    /// Below that, what they cannot take goes further.
    pub threshold: u8,
}

impl Default for Locality {
    fn default() -> Self {
        Self { threshold: 70 }
    }
}

/// When endpoints of the next priority are used instead.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Fallback {
    /// As soon as less than this share of those before serves, in per cent by weight: 1 to 100.
    pub below: u8,
    /// Until at least this share serves again: from `below` to 100.
    pub back: u8,
}

impl Default for Fallback {
    fn default() -> Self {
        Self { below: 30, back: 50 }
    }
}

/// A port of a service.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ServicePort {
    /// For people; may be empty.
    pub name: String,
    /// What clients dial.
    pub port: u16,
    /// Where endpoints listen, unless an endpoint brings its own port.
    pub target: u16,
    /// Transport protocol.
    pub protocol: Protocol,
}

/// Who answers for a service.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Endpoint {
    /// Its address; IPv4-mapped IPv6 has been made IPv4.
    pub address: IpAddr,
    /// Overrides [`ServicePort::target`] for every port of the service.
    pub port: Option<u16>,
    /// 0 (takes no connection) to 65,535.
    pub weight: u16,
    /// Where it is.
    pub zone: Option<Arc<str>>,
    /// The node that it runs on.
    pub node: Option<Arc<str>>,
    /// Endpoints of a higher number are used when those of lower ones do not suffice ([`Fallback`]): 0
    /// to [`Endpoint::MAX_PRIORITY`].
    pub priority: u8,
    /// Takes no new connection while another endpoint is usable.
    pub drain: bool,
}

impl Endpoint {
    /// The weight of an endpoint that names none.
    pub const DEFAULT_WEIGHT: u16 = 100;
    /// The highest priority.
    pub const MAX_PRIORITY: u8 = 9;
}

/// What a service does when none of its endpoints is usable.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum WhenAllUnhealthy {
    /// Panic: all of them are used. When every check fails, the checks are the likelier culprit.
    #[default]
    UseAll,
    /// Connects are refused.
    Refuse,
}

/// When an endpoint to which connects failed is ejected, and for how long. The kernel programs see
/// those failures and act on them without the agent.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct EjectionPolicy {
    /// Consecutive failed connects that eject: 1 to 127.
    pub failures: u8,
    /// So many per cent of failed connects eject, of at least [`EjectionPolicy::samples`] within 10 s: 1 to 99.
    pub rate: u8,
    /// Of how many connects that share is taken at least: 5 to 65,535.
    pub samples: u16,
    /// How long the first ejection lasts: 100 ms or more. One that follows a failed try, or a
    /// recovery that did not last, takes twice as long as the one before.
    pub base: Duration,
    /// How long an ejection lasts at most: from `base` to 6 days.
    pub max: Duration,
    /// So many per cent of a service's endpoints may be ejected at a time, rounded down: 1 to 100.
    pub share: u8,
}

impl Default for EjectionPolicy {
    /// What a service has that says nothing about it.
    fn default() -> Self {
        Self {
            failures: 1,
            rate: 50,
            samples: 20,
            base: Duration::from_secs(1),
            max: Duration::from_secs(60),
            share: 50,
        }
    }
}
