//! Values that both kinds of files share: addresses, names, durations, paths.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use ipnet::IpNet;

use crate::yaml::{Node, Problems, excerpt, integer, text};

/// The longest name of anything, in bytes: that of a DNS name, and what `NAMES` has room for.
const MAX_NAME: usize = 253;

/// A name that can be typed on a command line and shown in a column.
pub(super) fn name<'n>(node: &'n Node, what: &str, problems: &mut Problems) -> Option<&'n str> {
    let name = text(node, what, problems)?;
    let wrong = if name.is_empty() {
        "it is empty"
    } else if name.len() > MAX_NAME {
        "it is longer than 253 bytes"
    } else if name.chars().any(|c| c.is_control() || c.is_whitespace()) {
        "it has spaces or control characters"
    } else {
        return Some(name);
    };
    problems.add(
        node.at,
        format!(
            "expected {what} of 1 to {MAX_NAME} visible characters; {wrong}: {}",
            excerpt(name)
        ),
    );
    None
}

/// The address of an endpoint: that of one host, which means the same wherever it is dialled.
pub(super) fn endpoint(node: &Node, problems: &mut Problems) -> Option<IpAddr> {
    let address = address(node, problems)?;
    if matches!(address, IpAddr::V4(ip) if ip.is_link_local()) {
        // Which host has it depends on the interface, and a connect names none.
        problems.add(
            node.at,
            format!(
                "{address} is a link-local address; expected that of an endpoint, which is the same host on every \
                 interface"
            ),
        );
        return None;
    }
    Some(address)
}

/// The address of one host, with IPv4-mapped IPv6 made IPv4.
pub(super) fn address(node: &Node, problems: &mut Problems) -> Option<IpAddr> {
    const EXPECTED: &str = "an IP address such as 10.0.0.1 or \"fd00::1\"";
    let written = text(node, EXPECTED, problems)?;
    let Ok(address) = written.parse::<IpAddr>().map(|address| address.to_canonical()) else {
        let hint = if written.parse::<std::net::SocketAddr>().is_ok() {
            "; the port goes into `port`"
        } else if written.parse::<IpNet>().is_ok() {
            "; a prefix is not an address"
        } else if written.contains('%') {
            "; an address with a scope is not supported"
        } else if written.contains(|c: char| c.is_ascii_alphabetic()) && !written.contains(':') {
            "; host names are not looked up"
        } else {
            ""
        };
        problems.add(node.at, format!("expected {EXPECTED}; found {}{hint}", excerpt(written)));
        return None;
    };
    let kind = if address.is_unspecified() {
        "the unspecified address"
    } else if address.is_multicast() {
        "a multicast address"
    } else if address == IpAddr::V4(Ipv4Addr::BROADCAST) {
        "the broadcast address"
    } else if matches!(address, IpAddr::V4(ip) if ip.octets()[0] == 0) {
        // RFC 1122, 3.2.1.3: this host on this network.
        "an address of this network (0.0.0.0/8)"
    } else if matches!(address, IpAddr::V6(ip) if ip.is_unicast_link_local()) {
        // It means nothing without a scope, and the kernel programs cannot give it one.
        "a link-local address"
    } else {
        return Some(address);
    };
    problems.add(node.at, format!("{address} is {kind}; expected the address of one host"));
    None
}

/// A network in CIDR notation; a bare address is a network of one.
pub(super) fn network(node: &Node, problems: &mut Problems) -> Option<IpNet> {
    const EXPECTED: &str = "a network such as 10.96.0.0/16 or \"fd00:96::/64\"";
    let written = text(node, EXPECTED, problems)?;
    let parsed = written.parse::<IpNet>().or_else(|_| written.parse::<IpAddr>().map(IpNet::from));
    let Ok(network) = parsed else {
        problems.add(node.at, format!("expected {EXPECTED}; found {}", excerpt(written)));
        return None;
    };
    let wrong = if network.addr() != network.network() {
        format!("{network} has bits set behind its prefix; write {}", network.trunc())
    } else if network.prefix_len() == 0 {
        format!(
            "{network} covers every address, so every other connect would be refused; expected a prefix of your own"
        )
    } else if covers_mapped(&network) {
        format!("{network} covers IPv4-mapped addresses; write IPv4 networks as IPv4")
    } else if overlap(&network, &loopback(&network)) {
        format!(
            "{network} covers loopback addresses, so every other connect to them would be refused; expected a range outside {}",
            loopback(&network)
        )
    } else if let Some((kind, range)) = nobodys(&network) {
        format!(
            "{network} covers {kind} addresses, which no service can have, so all that is sent to them would be refused; expected a range outside {range}"
        )
    } else {
        return Some(network);
    };
    problems.add(node.at, wrong);
    None
}

/// What a network covers that no service can have: [`address`] refuses it. Link-local IPv4 addresses are those of
/// services on many nodes, such as a resolver of the node's own.
fn nobodys(network: &IpNet) -> Option<(&'static str, IpNet)> {
    let v4 = |a, prefix| IpNet::V4(ipnet::Ipv4Net::new_assert(Ipv4Addr::new(a, 0, 0, 0), prefix));
    let v6 = |a, prefix| {
        IpNet::V6(ipnet::Ipv6Net::new_assert(Ipv6Addr::new(a, 0, 0, 0, 0, 0, 0, 0), prefix))
    };
    let ranges = [
        ("multicast", v4(224, 4)),
        ("unspecified", v4(0, 8)),
        ("unspecified", v6(0, 128)),
        ("multicast", v6(0xff00, 8)),
        ("link-local", v6(0xfe80, 10)),
    ];
    ranges.into_iter().find(|(_, range)| overlap(network, range))
}

/// Whether an IPv6 network and `::ffff:0:0/96` have an address in common.
fn covers_mapped(network: &IpNet) -> bool {
    let mapped = IpNet::V6(ipnet::Ipv6Net::new_assert(Ipv4Addr::UNSPECIFIED.to_ipv6_mapped(), 96));
    overlap(network, &mapped)
}

/// The loopback addresses of a network's family.
fn loopback(network: &IpNet) -> IpNet {
    match network {
        IpNet::V4(_) => IpNet::V4(ipnet::Ipv4Net::new_assert(Ipv4Addr::new(127, 0, 0, 0), 8)),
        IpNet::V6(_) => IpNet::V6(Ipv6Addr::LOCALHOST.into()),
    }
}

/// Whether two networks have an address in common: then one contains the other.
fn overlap(a: &IpNet, b: &IpNet) -> bool {
    a.contains(b) || b.contains(a)
}

/// The number of a port.
pub(super) fn port_number(node: &Node, what: &str, problems: &mut Problems) -> Option<u16> {
    integer(node, what, 1..=u64::from(u16::MAX), problems)
}

/// A duration with a unit, in a range.
pub(super) fn duration(
    node: &Node,
    what: &str,
    range: RangeInclusive<Duration>,
    problems: &mut Problems,
) -> Option<Duration> {
    let expected = format!(
        "a duration with a unit from {} to {}, such as 300ms or 1s, for `{what}`",
        humantime::format_duration(*range.start()),
        humantime::format_duration(*range.end()),
    );
    let written = text(node, &expected, problems)?;
    let duration = humantime::parse_duration(written).ok();
    let duration = duration.filter(|duration| range.contains(duration));
    if duration.is_none() {
        problems.add(node.at, format!("expected {expected}; found {}", excerpt(written)));
    }
    duration
}

/// Whole per cent, with the sign: of a bare 1 nobody knows whether it means all or a hundredth.
pub(super) fn percent(
    node: &Node,
    what: &str,
    range: RangeInclusive<u8>,
    problems: &mut Problems,
) -> Option<u8> {
    let (least, most) = (*range.start(), *range.end());
    let expected = format!("whole per cent from {least}% to {most}%, such as 50%, for `{what}`");
    let written = text(node, &expected, problems)?;
    let digits = written.strip_suffix('%').filter(|text| text.bytes().all(|b| b.is_ascii_digit()));
    let share = digits.and_then(|digits| digits.parse().ok()).filter(|n| range.contains(n));
    if share.is_none() {
        let bare = written.parse::<f64>().is_ok();
        let hint = if bare { "; write the per cent sign" } else { "" };
        problems.add(node.at, format!("expected {expected}; found {}{hint}", excerpt(written)));
    }
    share
}

/// An absolute path: the agent's working directory is nobody's business.
pub(super) fn path(node: &Node, what: &str, problems: &mut Problems) -> Option<PathBuf> {
    let written = text(node, what, problems)?;
    let path = PathBuf::from(written);
    if path.is_absolute() && !written.contains('\0') {
        return Some(path);
    }
    problems
        .add(node.at, format!("expected {what} that begins with /; found {}", excerpt(written)));
    None
}
