//! The services that are dialled, the backends behind them, and what a network namespace needs for
//! these.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use crate::Service;

/// A service. All but the last two have one backend in each family.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Target {
    /// Answers. There are [`ANSWERS`] of these; the last one speaks MPTCP.
    Answer(u8),
    /// Accepts, and resets at once.
    Reset,
    /// Its port is closed.
    Closed,
    /// Does not react. Clients wait for it until they time out.
    Silent,
    /// Does not react either, and clients do not wait for it.
    Hang,
    /// A firewall in front of it says that it cannot be reached.
    Reject,
    /// There is no route to it.
    NoRoute,
    /// Has all [`MIXED`] as backends.
    Mixed,
    /// Its endpoints change all the while.
    Changing,
}

/// How many services answer.
pub const ANSWERS: u8 = 4;

/// The backends of [`Target::Mixed`]. A client can tell from how a connection ends which one it was.
pub const MIXED: [Target; 5] =
    [Target::Answer(0), Target::Answer(1), Target::Reset, Target::Closed, Target::NoRoute];

/// The port of backends that listen, and with it that of those that would.
const PORT: u16 = 8080;

/// Below [`PORTS`], so that no client's own port can be the one it connects to.
const CLOSED: u16 = 7;

/// From where clients take their ports. Wide, because closed connections keep theirs for a second.
pub const PORTS: &str = "10000 65000";

/// Places at which the endpoints of [`Target::Changing`] are while they change.
pub const POOL: u16 = 16;

// === impl Target ===

impl Target {
    /// All services.
    pub fn all() -> impl Iterator<Item = Self> {
        let one = [Self::Reset, Self::Closed, Self::Silent, Self::Hang, Self::Reject];
        let more = [Self::NoRoute, Self::Mixed, Self::Changing];
        (0..ANSWERS).map(Self::Answer).chain(one).chain(more)
    }

    /// The service's name.
    #[must_use]
    pub fn name(self) -> String {
        match self {
            Self::Answer(n) => format!("answer-{n}"),
            Self::Reset => "reset".to_owned(),
            Self::Closed => "closed".to_owned(),
            Self::Silent => "silent".to_owned(),
            Self::Hang => "hang".to_owned(),
            Self::Reject => "reject".to_owned(),
            Self::NoRoute => "no-route".to_owned(),
            Self::Mixed => "mixed".to_owned(),
            Self::Changing => "changing".to_owned(),
        }
    }

    const fn number(self) -> u8 {
        match self {
            Self::Answer(n) => 1 + n,
            Self::Reset => 21,
            Self::Closed => 22,
            Self::Silent => 23,
            Self::Hang => 24,
            Self::Reject => 25,
            Self::NoRoute => 26,
            Self::Mixed => 27,
            Self::Changing => 28,
        }
    }

    /// What clients dial.
    #[must_use]
    pub fn dialled(self, six: bool) -> SocketAddr {
        SocketAddr::new(address(96, 0, self.number(), six), 80)
    }

    /// The backend.
    #[must_use]
    pub fn backend(self, six: bool) -> SocketAddr {
        let (ip, port) = match self {
            Self::NoRoute if six => (Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1).into(), PORT),
            Self::NoRoute => (Ipv4Addr::new(192, 0, 2, 1).into(), PORT),
            Self::Closed => (address(0, 1, self.number(), six), CLOSED),
            _ => (address(0, 1, self.number(), six), PORT),
        };
        SocketAddr::new(ip, port)
    }

    /// The name of the account of this service's backend, see [`super::tally::Tally`].
    #[must_use]
    pub fn account(self, backend: SocketAddr) -> String {
        format!("{} {backend}", self.name())
    }

    /// The definition; without endpoints for [`Target::Changing`].
    #[must_use]
    pub fn service(self) -> Service {
        let [four, six] = [false, true].map(|six| self.dialled(six).ip().to_string());
        let service = Service::new(&self.name()).address(&four).address(&six).port(80, PORT);
        let backends = match &self {
            Self::Mixed => &MIXED[..],
            Self::Changing => &[],
            one => std::slice::from_ref(one),
        };
        backends.iter().fold(service, |service, backend| {
            let [four, six] = [false, true].map(|six| backend.backend(six).to_string());
            service.endpoint(&four).endpoint(&six)
        })
    }
}

// === functions ===

/// `10.network.group.host` or `fd00:network:group::host`.
fn address(network: u8, group: u8, host: u8, six: bool) -> IpAddr {
    if six {
        Ipv6Addr::new(0xfd00, network.into(), group.into(), 0, 0, 0, 0, host.into()).into()
    } else {
        Ipv4Addr::new(10, network, group, host).into()
    }
}

/// A place of the pool of [`Target::Changing`]: every second one differs from that before it only in
/// the port.
#[must_use]
pub fn pooled(number: u16, six: bool) -> SocketAddr {
    let host = u8::try_from(number / 2 + 1).unwrap_or(u8::MAX);
    SocketAddr::new(address(0, 2, host, six), PORT + number % 2)
}

/// The endpoints of [`Target::Changing`] when they change no more: none of them was one before.
#[must_use]
pub fn settled() -> Vec<SocketAddr> {
    let place = |host| [false, true].map(|six| SocketAddr::new(address(0, 3, host, six), PORT));
    (1..=3).flat_map(place).collect()
}

/// Everywhere that a backend listens.
pub fn listeners() -> Vec<(Target, SocketAddr)> {
    let answers = (0..ANSWERS).map(Target::Answer).chain([Target::Reset]);
    let mut all: Vec<_> =
        answers.flat_map(|target| [false, true].map(|six| (target, target.backend(six)))).collect();
    let pool = (0..POOL).flat_map(|number| [false, true].map(|six| pooled(number, six)));
    all.extend(pool.chain(settled()).map(|place| (Target::Changing, place)));
    all
}

/// The addresses of backends that are the namespace's own: all but those without a route.
#[must_use]
pub fn own_addresses() -> BTreeSet<IpAddr> {
    let silent = [Target::Closed, Target::Silent, Target::Hang, Target::Reject];
    let silent = silent.into_iter().flat_map(|target| [false, true].map(|six| target.backend(six)));
    let listening = listeners().into_iter().map(|(_, place)| place);
    listening.chain(silent).map(|place| place.ip()).collect()
}

/// What makes a network namespace one in which the backends can be: commands for `ip -batch`.
#[must_use]
pub fn links() -> String {
    let mut text = String::from("link set lo up\n");
    for ip in own_addresses() {
        // Writing to a string cannot fail.
        let _ = match ip {
            IpAddr::V4(ip) => writeln!(text, "address add {ip}/32 dev lo"),
            IpAddr::V6(ip) => writeln!(text, "address add {ip}/128 dev lo nodad"),
        };
    }
    text
}

/// The firewall of that namespace, for `nft -f`.
#[must_use]
pub fn firewall() -> String {
    let mut rules = String::new();
    for target in [Target::Silent, Target::Hang, Target::Reject] {
        for six in [false, true] {
            let (family, reject) = if six {
                ("ip6", "reject with icmpv6 type addr-unreachable")
            } else {
                ("ip", "reject with icmp type host-unreachable")
            };
            let verdict = if target == Target::Reject { reject } else { "drop" };
            let ip = target.backend(six).ip();
            // Writing to a string cannot fail.
            let _ = writeln!(rules, "{family} daddr {ip} tcp flags syn {verdict}");
        }
    }
    format!(
        "table inet ugly {{ chain input {{ type filter hook input priority 0; policy accept;\n\
         {rules}}}\n}}\n"
    )
}
