//! How the endpoints of a service are checked.

use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;

use http::HeaderMap;
use http::uri::{Authority, PathAndQuery};
use rustls::RootCertStore;
use rustls::pki_types::{CertificateDer, ServerName};

/// Whether the endpoints of a service are checked, and how.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub enum Health {
    /// The service says nothing about it: as the agent file does, which means not at all if that is silent
    /// too.
    #[default]
    Default,
    /// Not at all.
    Off,
    /// Like this.
    Checked(HealthPolicy),
}

impl Health {
    /// What holds, with what the agent file says for services that say nothing.
    #[must_use]
    pub fn policy<'h>(&'h self, default: Option<&'h HealthPolicy>) -> Option<&'h HealthPolicy> {
        match self {
            Self::Default => default,
            Self::Off => None,
            Self::Checked(policy) => Some(policy),
        }
    }
}

/// How, when and how often.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct HealthPolicy {
    /// What a check does.
    pub check: HealthCheck,
    /// Where it goes instead of the endpoint's own port.
    pub port: Option<u16>,
    /// Whether endpoints are checked as often while nobody on this node uses the service.
    pub pace: Pace,
    /// From the start of one check to the start of the next, before jitter.
    pub interval: Duration,
    /// A check that takes longer has failed. At most [`HealthPolicy::interval`].
    pub timeout: Duration,
    /// Consecutive passes after which an unhealthy endpoint is healthy: 1 to 1,000.
    pub rise: u32,
    /// Consecutive failures after which an endpoint is unhealthy: 1 to 1,000.
    pub fall: u32,
    /// Which connections are ended that an endpoint has while it is unhealthy.
    pub ending: Ending,
}

/// Which connections of an unhealthy endpoint are ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Ending {
    /// None: they go on, or wait, as they may.
    #[default]
    Never,
    /// Those that wait, for so long, for something that they sent to be acknowledged.
    Silent(Duration),
    /// All that are there after it was unhealthy for so long.
    All(Duration),
}

impl Ending {
    /// How long it is waited for, unless a file says otherwise.
    pub const AFTER: Duration = Duration::from_secs(10);
}

impl HealthPolicy {
    /// Default of `interval`.
    pub const INTERVAL: Duration = Duration::from_secs(1);
    /// Default of `timeout`, unless the interval is shorter.
    pub const TIMEOUT: Duration = Duration::from_millis(300);
    /// Default of `rise`.
    pub const RISE: u32 = 2;
    /// Default of `fall`.
    pub const FALL: u32 = 3;
}

/// How often endpoints are checked of a service that nobody on this node uses.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Pace {
    /// As often as others.
    Always,
    /// Only so often. Many nodes that know the same endpoints would otherwise check them all.
    WhenUsed {
        /// From one check to the next, while nobody uses it.
        background: Duration,
    },
}

impl Pace {
    /// Default of `background`.
    pub const BACKGROUND: Duration = Duration::from_secs(60);
}

impl Default for Pace {
    fn default() -> Self {
        Self::WhenUsed { background: Self::BACKGROUND }
    }
}

/// What a health check does.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum HealthCheck {
    /// Connects, and closes at once.
    Tcp,
    /// Asks for a page.
    Http(Arc<HttpCheck>),
    /// Asks the endpoint's gRPC health service (`grpc.health.v1.Health/Check`).
    Grpc(Arc<GrpcCheck>),
    /// Runs a program.
    Command(Arc<CommandCheck>),
}

impl HealthCheck {
    /// Its key in service files.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Http(check) if check.tls.is_some() => "https",
            Self::Http(_) => "http",
            Self::Grpc(_) => "grpc",
            Self::Command(_) => "command",
        }
    }
}

/// A GET request that is answered as expected.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct HttpCheck {
    /// The request's target: begins with a slash, and may have a query.
    pub path: PathAndQuery,
    /// What is sent as `Host`, or `:authority`; where it goes, when there is nothing.
    pub host: Option<Authority>,
    /// The status codes of which one has to be answered.
    pub expect: Vec<RangeInclusive<u16>>,
    /// What is sent besides.
    pub headers: HeaderMap,
    /// Whether HTTP/2 is spoken from the first byte on (RFC 9113, 3.3), or agreed on by TLS; otherwise
    /// HTTP/1.1.
    pub http2: bool,
    /// Whether the connection is secured.
    pub tls: Option<Tls>,
}

/// A gRPC health check.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct GrpcCheck {
    /// The name that is asked for; the server as a whole, when it is empty.
    pub service: String,
    /// What is sent as `:authority`; where it goes, when there is nothing.
    pub host: Option<Authority>,
    /// Whether the connection is secured.
    pub tls: Option<Tls>,
}

/// A program that ends with exit status 0.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CommandCheck {
    /// The program, by its absolute path, and what it is given as arguments.
    pub run: Vec<String>,
}

/// How an endpoint proves who it is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Tls {
    /// The name that it has to prove, and that it is told it is asked for; its address, when there is
    /// nothing.
    pub server_name: Option<ServerName<'static>>,
    /// Who has to vouch for it.
    pub trust: Trust,
}

/// Whose word is taken for who an endpoint is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Trust {
    /// Those that this machine trusts.
    System,
    /// Those that a file has listed.
    Listed(Arc<Authorities>),
    /// Nobody's: whoever answers is believed.
    Anybody,
}

/// The certificates of a file, as it was when the definition was read.
#[derive(Debug)]
pub struct Authorities {
    /// At least one.
    pub certificates: Vec<CertificateDer<'static>>,
    /// The same, for who verifies.
    pub roots: Arc<RootCertStore>,
}

impl PartialEq for Authorities {
    fn eq(&self, other: &Self) -> bool {
        self.certificates == other.certificates
    }
}

impl Eq for Authorities {}
