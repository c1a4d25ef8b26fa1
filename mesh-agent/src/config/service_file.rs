//! Service files: `services.d/*.yaml`.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;

use mesh_common::{Algorithm, Protocol};

use super::ejection::ejection;
use super::health::health;
use super::spread::{affinity, fallback, locality, slow_start};
use super::values::{self, address, duration, name, percent, port_number};
use crate::model::{Endpoint, Service, ServiceName, ServicePort, WhenAllUnhealthy};
use crate::yaml::{
    self, Fields, Keys, Node, Position, Problem, Problems, Value, boolean, excerpt, fields,
    integer, is_nothing, items, text,
};

/// The most ports that one service may have.
pub const MAX_PORTS: usize = 1024;

/// The most addresses that one service may have. With [`MAX_PORTS`] it bounds the frontends of a
/// service to the 65,536 that a single address could have.
pub const MAX_ADDRESSES: usize = 64;

/// The most backends that one service may have: each endpoint is one for each port. More would let
/// a file of a few megabytes fill the memory of the agent.
pub const MAX_BACKENDS: usize = 65_536;

/// How long connections to a removed endpoint may be let go on.
const DRAIN_TIMEOUT: RangeInclusive<Duration> = Duration::ZERO..=Duration::from_secs(7 * 86_400);

const FILE: Keys = Keys { of: "a service file", known: &["services"], later: &[] };

const SERVICE: Keys = Keys {
    of: "a service",
    known: &[
        "name",
        "address",
        "addresses",
        "ports",
        "balance",
        "hash-by",
        "affinity",
        "health",
        "ejection",
        "when-all-unhealthy",
        "panic-threshold",
        "end-waiting",
        "drain-timeout",
        "locality",
        "slow-start",
        "fallback",
        "endpoints",
    ],
    later: &[],
};

const PORT: Keys =
    Keys { of: "a port", known: &["name", "port", "target", "protocol"], later: &[] };

const ENDPOINT: Keys = Keys {
    of: "an endpoint",
    known: &["address", "port", "weight", "zone", "node", "priority", "drain"],
    later: &[],
};

/// What to do about a file that says nothing: it may be half written, so it does not mean "none".
const EMPTY: &str = "write `services: []` for a file that defines none";

/// Reads a service file. What it hands out satisfies what [`Service`] promises.
///
/// # Errors
///
/// Everything that is wrong, in the order of the file. One mistake refuses the whole file: half of
/// it would be a state that nobody wrote.
pub fn parse_services(bytes: &[u8]) -> Result<Vec<Service>, Vec<Problem>> {
    let root = yaml::parse(bytes).map_err(|problem| vec![problem])?;
    let Some(root) = root.filter(|root| !is_nothing(root)) else {
        return Err(vec![Problem::at(Position::START, format!("the file is empty; {EMPTY}"))]);
    };
    let mut problems = Problems::default();
    let services = file(&root, &mut problems).unwrap_or_default();
    problems.finish(services)
}

fn file(root: &Node, problems: &mut Problems) -> Option<Vec<Service>> {
    let fields = fields(root, &FILE, problems)?;
    let services = fields.require("services", EMPTY, problems)?;
    let list = items(services, "a list of services, or []", problems)?;
    let mut names: HashMap<ServiceName, Position> = HashMap::new();
    let mut services = Vec::with_capacity(list.len());
    for node in list {
        let Some((at, service)) = service(node, problems) else { continue };
        if let Some(first) = names.insert(service.name.clone(), at) {
            let name = excerpt(service.name.as_str());
            problems.add(
                at,
                format!(
                    "a service of the name {name} is already at line {}; names are unique",
                    first.line
                ),
            );
        }
        services.push(service);
    }
    Some(services)
}

/// A service and where its name stands. Problems of single values do not keep the rest from being
/// read, so that all of them are found; the file is refused in any case.
fn service(node: &Node, problems: &mut Problems) -> Option<(Position, Service)> {
    let fields = fields(node, &SERVICE, problems)?;
    let algorithm = balance(&fields, problems);
    let name_node = fields.require("name", "every service has a unique name", problems);
    let name = name_node.and_then(|node| name(node, "a service name", problems));
    let addresses = addresses(&fields, problems);
    let ports = fields
        .require("ports", "write ports: [{port: 80}] for what clients dial", problems)
        .and_then(|node| ports(node, problems));
    let health = health(&fields, problems);
    let ejection = ejection(&fields, problems);
    let when_all_unhealthy = when_all_unhealthy(&fields, problems);
    let panic_threshold = panic_threshold(&fields, when_all_unhealthy, problems);
    let end_waiting = match fields.get("end-waiting") {
        Some(node) => boolean(node, "end-waiting", problems).unwrap_or_default(),
        None => false,
    };
    let drain_timeout = fields
        .get("drain-timeout")
        .and_then(|node| duration(node, "drain-timeout", DRAIN_TIMEOUT, problems));
    let affinity = affinity(&fields, problems);
    let locality = locality(&fields, problems);
    let slow_start = slow_start(&fields, problems);
    let fallback = fallback(&fields, name, problems);
    let endpoints = fields
        .require("endpoints", "write endpoints: [] for a service without any", problems)
        .and_then(|node| endpoints(node, problems));
    let (addresses, ports, endpoints) = (addresses?, ports?, endpoints?);
    let backends = ports.len() * endpoints.len();
    if backends > MAX_BACKENDS {
        problems.add(
            fields.key_at("endpoints"),
            format!(
                "{} ports × {} endpoints are {backends} backends; the limit of one service is \
                 {MAX_BACKENDS}: split it",
                ports.len(),
                endpoints.len()
            ),
        );
        return None;
    }
    check_endpoints(&addresses, &ports, &endpoints, problems);
    // It is kept for long, and would keep the room that reading took.
    let mut endpoints: Vec<_> = endpoints.into_iter().map(|(_, endpoint)| endpoint).collect();
    endpoints.shrink_to_fit();
    let service = Service {
        name: ServiceName::new(name?),
        addresses,
        ports,
        algorithm,
        health: health.unwrap_or_default(),
        ejection,
        when_all_unhealthy,
        panic_threshold,
        end_waiting,
        drain_timeout,
        affinity,
        locality,
        slow_start,
        fallback: fallback.as_ref().map(|(fallback, _)| *fallback),
        fallback_service: fallback.and_then(|(_, other)| other),
        endpoints,
    };
    Some((name_node?.at, service))
}

fn balance(fields: &Fields<'_>, problems: &mut Problems) -> Algorithm {
    const EXPECTED: &str = "random, round-robin, least-connections, latency or consistent-hash";
    const BY: &str = "client, namespace, process or unit";
    let by = fields.get("hash-by").and_then(|node| {
        let by = match text(node, BY, problems)? {
            "client" => Some(Algorithm::HashClient),
            "namespace" => Some(Algorithm::HashNamespace),
            "process" => Some(Algorithm::HashProcess),
            "unit" => Some(Algorithm::HashUnit),
            other => {
                problems.add(node.at, format!("expected {BY}; found {}", excerpt(other)));
                None
            }
        };
        let balance = fields.get("balance").and_then(|node| match &node.value {
            Value::Scalar { text, .. } => Some(text.as_str()),
            _ => None,
        });
        if balance != Some(Algorithm::HashClient.name()) {
            problems.add(
                fields.key_at("hash-by"),
                "`hash-by` says nothing without `balance: consistent-hash`",
            );
        }
        by
    });
    let Some(node) = fields.get("balance") else { return Algorithm::default() };
    let Some(name) = text(node, EXPECTED, problems) else { return Algorithm::default() };
    if let Some(known) = Algorithm::ALL.into_iter().find(|known| known.name() == name) {
        return by.filter(|_| known.is_hash()).unwrap_or(known);
    }
    problems.add(node.at, format!("unknown algorithm {}; expected {EXPECTED}", excerpt(name)));
    Algorithm::default()
}

fn when_all_unhealthy(fields: &Fields<'_>, problems: &mut Problems) -> WhenAllUnhealthy {
    const EXPECTED: &str = "use-all or refuse";
    let Some(node) = fields.get("when-all-unhealthy") else { return WhenAllUnhealthy::default() };
    match text(node, EXPECTED, problems) {
        Some("use-all") => WhenAllUnhealthy::UseAll,
        Some("refuse") => WhenAllUnhealthy::Refuse,
        Some(other) => {
            problems.add(node.at, format!("expected {EXPECTED}; found {}", excerpt(other)));
            WhenAllUnhealthy::default()
        }
        None => WhenAllUnhealthy::default(),
    }
}

fn panic_threshold(fields: &Fields<'_>, when_all: WhenAllUnhealthy, problems: &mut Problems) -> u8 {
    let Some(node) = fields.get("panic-threshold") else { return 0 };
    if when_all == WhenAllUnhealthy::Refuse {
        problems.add(
            fields.key_at("panic-threshold"),
            "`panic-threshold` uses endpoints whose checks fail, and `when-all-unhealthy: refuse` does not; \
             remove one of them",
        );
    }
    percent(node, "panic-threshold", 1..=100, problems).unwrap_or_default()
}

fn addresses(fields: &Fields<'_>, problems: &mut Problems) -> Option<Vec<IpAddr>> {
    match (fields.get("address"), fields.get("addresses")) {
        (Some(_), Some(_)) => {
            problems.add(
                fields.key_at("addresses"),
                "`address` and `addresses` are both here; put all of them into `addresses`",
            );
            None
        }
        (Some(node), None) => Some(vec![address(node, problems)?]),
        (None, Some(node)) => address_list(node, problems),
        (None, None) => {
            problems.add(
                fields.at,
                "`address` or `addresses` is missing; expected what clients dial (giving out \
                 addresses from `virtual-ips` is not supported yet)",
            );
            None
        }
    }
}

fn address_list(node: &Node, problems: &mut Problems) -> Option<Vec<IpAddr>> {
    let list = bounded(node, "a list of IP addresses", MAX_ADDRESSES, "addresses", problems)?;
    let mut found = Vec::with_capacity(list.len());
    for node in list {
        let Some(address) = address(node, problems) else { continue };
        if found.contains(&address) {
            problems.add(node.at, format!("the address {address} is here twice; keep one"));
        }
        found.push(address);
    }
    Some(found)
}

/// The items of a list that has at least one and at most `limit`.
fn bounded<'n>(
    node: &'n Node,
    expected: &str,
    limit: usize,
    of: &str,
    problems: &mut Problems,
) -> Option<&'n [std::rc::Rc<Node>]> {
    let list = items(node, expected, problems)?;
    if list.is_empty() {
        problems.add(node.at, format!("the list is empty; expected at least one of the {of}"));
        return None;
    }
    if list.len() > limit {
        problems.add(
            node.at,
            format!("{} {of}; the limit of one service is {limit}: split it", list.len()),
        );
        return None;
    }
    Some(list)
}

fn ports(node: &Node, problems: &mut Problems) -> Option<Vec<ServicePort>> {
    let list = bounded(node, "a list such as [{port: 80}]", MAX_PORTS, "ports", problems)?;
    let mut seen = HashSet::new();
    let mut found = Vec::with_capacity(list.len());
    for node in list {
        let Some(port) = port(node, problems) else { continue };
        if !seen.insert((port.port, port.protocol)) {
            problems.add(
                node.at,
                format!("the port {}/{} is here twice; keep one", port.port, port.protocol.name()),
            );
        }
        found.push(port);
    }
    Some(found)
}

fn port(node: &Node, problems: &mut Problems) -> Option<ServicePort> {
    let fields = fields(node, &PORT, problems)?;
    let protocol = fields.get("protocol").map_or(Some(Protocol::Tcp), |node| {
        match text(node, "tcp or udp", problems)? {
            "tcp" => Some(Protocol::Tcp),
            "udp" => Some(Protocol::Udp),
            other => {
                let found = excerpt(other);
                problems.add(node.at, format!("unknown protocol {found}; expected tcp or udp"));
                None
            }
        }
    });
    let port = fields
        .require("port", "expected the number that clients dial", problems)
        .and_then(|node| port_number(node, "port", problems));
    let target = match fields.get("target") {
        Some(node) => port_number(node, "target", problems),
        None => port,
    };
    let name = match fields.get("name") {
        Some(node) => name(node, "a port name", problems)?.to_owned(),
        None => String::new(),
    };
    Some(ServicePort { name, port: port?, target: target?, protocol: protocol? })
}

fn endpoints(node: &Node, problems: &mut Problems) -> Option<Vec<(Position, Endpoint)>> {
    let list = items(node, "a list such as [{address: 10.0.0.1}], or []", problems)?;
    Some(list.iter().filter_map(|node| Some((node.at, endpoint(node, problems)?))).collect())
}

fn endpoint(node: &Node, problems: &mut Problems) -> Option<Endpoint> {
    let fields = fields(node, &ENDPOINT, problems)?;
    let address = fields
        .require("address", "expected the IP address of a server", problems)
        .and_then(|node| values::endpoint(node, problems));
    // A key that is absent is nothing; one that is there and wrong has been reported.
    let port = fields.get("port").map(|node| port_number(node, "port", problems));
    let weight =
        fields.get("weight").map(|node| integer(node, "weight", 0..=u64::from(u16::MAX), problems));
    let zone = fields.get("zone").map(|node| name(node, "a zone name", problems));
    let node = fields.get("node").map(|node| name(node, "a node name", problems));
    let highest = u64::from(Endpoint::MAX_PRIORITY);
    let priority =
        fields.get("priority").map(|node| integer(node, "priority", 0..=highest, problems));
    let drain = fields.get("drain").and_then(|node| boolean(node, "drain", problems));
    Some(Endpoint {
        drain: drain.unwrap_or_default(),
        address: address?,
        port: port.flatten(),
        weight: weight.flatten().unwrap_or(Endpoint::DEFAULT_WEIGHT),
        zone: zone.flatten().map(Arc::from),
        node: node.flatten().map(Arc::from),
        priority: priority.flatten().unwrap_or_default(),
    })
}

/// What is wrong with endpoints only together with the rest of their service.
///
/// Its time is the number of endpoints plus the number of ports, not their product.
fn check_endpoints(
    addresses: &[IpAddr],
    ports: &[ServicePort],
    endpoints: &[(Position, Endpoint)],
    problems: &mut Problems,
) {
    let dialled: HashSet<(u16, Protocol)> = ports.iter().map(|p| (p.port, p.protocol)).collect();
    let targets: HashSet<u16> = ports.iter().map(|p| p.target).collect();
    // The port of an endpoint without one that leads back to the service.
    let back = ports.iter().map(|p| p.target).find(|&target| {
        ports.iter().any(|p| p.target == target && dialled.contains(&(target, p.protocol)))
    });
    let default_port: HashSet<IpAddr> =
        endpoints.iter().filter(|(_, e)| e.port.is_none()).map(|(_, e)| e.address).collect();
    let mut seen = HashSet::new();
    for (at, endpoint) in endpoints {
        let ip = endpoint.address;
        if !addresses.iter().any(|address| address.is_ipv4() == ip.is_ipv4()) {
            let (is, needs) = if ip.is_ipv4() { ("IPv4", "IPv6") } else { ("IPv6", "IPv4") };
            problems.add(
                *at,
                format!(
                    "the endpoint {ip} is {is} and every address of the service is {needs}, so no \
                     connect could go there; add an {is} address to `addresses`"
                ),
            );
        }
        // An endpoint whose own port is a target meets the one without a port there.
        let repeats =
            endpoint.port.is_some_and(|port| targets.contains(&port) && default_port.contains(&ip));
        if !seen.insert((ip, endpoint.port)) || repeats {
            let port = endpoint.port.map_or_else(String::new, |port| format!(" port {port}"));
            problems.add(*at, format!("the endpoint {ip}{port} is here twice; keep one"));
        }
        let own = match endpoint.port {
            Some(port) => [Protocol::Tcp, Protocol::Udp]
                .iter()
                .any(|&protocol| dialled.contains(&(port, protocol)))
                .then_some(port),
            None => back,
        };
        if let Some(port) = own.filter(|_| addresses.contains(&ip)) {
            problems.add(
                *at,
                format!(
                    "the endpoint {} is the service's own address, a loop; expected the address \
                     and port of a server",
                    std::net::SocketAddr::new(ip, port)
                ),
            );
        }
    }
}
