//! From a service and the states of its endpoints to tables: a pure function, the same bytes for
//! the same input.

use std::net::SocketAddr;
use std::time::Duration;

use mesh_common::alias::{self, Column, Entry};
use mesh_common::ejection::TICK_SHIFT;
use mesh_common::{Algorithm, FrontendKey, Policy, Protocol, Reason, State, balance};

use crate::model::{EjectionPolicy, Endpoint, Service, ServicePort, WhenAllUnhealthy};

/// What distinguishes a backend from the others of its service.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct BackendKey {
    /// The service port that it serves.
    pub port: u16,
    /// Transport protocol.
    pub protocol: Protocol,
    /// Where it listens.
    pub address: SocketAddr,
}

/// A backend as it is wanted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Backend {
    /// Which one.
    pub key: BackendKey,
    /// Weight.
    pub weight: u16,
    /// State.
    pub state: State,
}

/// Which table of a service: endpoints are balanced within their address family.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct TableKey {
    /// The service port.
    pub port: u16,
    /// Transport protocol.
    pub protocol: Protocol,
    /// IPv4, or IPv6.
    pub v4: bool,
}

/// What a table holds.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Rows {
    /// Nothing: connects are refused.
    Refuse(Reason),
    /// One slot for each of these: their places in [`Tables::backends`], in order.
    Candidates(Vec<usize>),
}

impl Rows {
    /// Number of slots.
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            Self::Refuse(_) => 0,
            Self::Candidates(places) => places.len(),
        }
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// All that the kernel is to hold for one service; the default is nothing.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Tables {
    /// Every backend, in the order of their keys, also those that no table uses now.
    pub backends: Vec<Backend>,
    /// The tables, in the order of their keys.
    pub tables: Vec<(TableKey, Rows)>,
    /// What clients dial, and the place of its table in `tables`.
    pub frontends: Vec<(FrontendKey, usize)>,
    /// When backends are ejected.
    pub policy: Policy,
    /// How a backend of a table is chosen.
    pub algorithm: Algorithm,
}

/// Where an endpoint listens for a service port.
#[must_use]
pub fn target(endpoint: &Endpoint, port: &ServicePort) -> SocketAddr {
    SocketAddr::new(endpoint.address, endpoint.port.unwrap_or(port.target))
}

/// Compiles a service. `frontends` are those that it owns (others may be shadowed), `state` tells
/// what is known of an endpoint's address.
pub fn compile(
    service: &Service,
    frontends: &[FrontendKey],
    state: impl Fn(SocketAddr) -> State,
) -> Tables {
    let mut backends: Vec<Backend> = service
        .ports
        .iter()
        .flat_map(|port| service.endpoints.iter().map(move |endpoint| (port, endpoint)))
        .map(|(port, endpoint)| {
            let address = target(endpoint, port);
            let key = BackendKey { port: port.port, protocol: port.protocol, address };
            Backend { key, weight: endpoint.weight, state: state(address) }
        })
        .collect();
    backends.sort_by_key(|backend| backend.key);
    // Two endpoints of one address whose ports come out the same are one backend.
    backends.dedup_by_key(|backend| backend.key);

    let mut keys: Vec<(FrontendKey, TableKey)> = frontends
        .iter()
        .filter_map(|key| {
            let protocol = Protocol::from_number(key.protocol)?;
            let table = TableKey { port: key.host_port(), protocol, v4: key.addr.is_v4() };
            Some((*key, table))
        })
        .collect();
    keys.sort_by_key(|&(key, table)| (table, key.addr.octets()));

    let mut tables: Vec<(TableKey, Rows)> = Vec::new();
    let mut owned = Vec::with_capacity(keys.len());
    for (key, table) in keys {
        if tables.last().is_none_or(|(last, _)| *last != table) {
            tables.push((table, rows(&backends, table, service.when_all_unhealthy)));
        }
        owned.push((key, tables.len() - 1));
    }
    let (policy, algorithm) = (policy(service.ejection), service.algorithm);
    Tables { backends, tables, frontends: owned, policy, algorithm }
}

/// The rules of ejection as the kernel programs use them. Times are rounded up to whole ticks, and one
/// more, because the present is rounded down: nothing is out for less than it should be.
#[must_use]
pub fn policy(ejection: Option<EjectionPolicy>) -> Policy {
    let Some(EjectionPolicy { failures, base, max, share }) = ejection else { return Policy::OFF };
    let ticks = |time: Duration| {
        let ticks = time.as_nanos().div_ceil(1 << TICK_SHIFT) + 1;
        u32::try_from(ticks).unwrap_or(Policy::MAX_TICKS)
    };
    Policy::new(failures, ticks(base), ticks(max), share)
}

/// The rows of one table. The backends are sorted by key, so those of a port are a slice.
fn rows(backends: &[Backend], table: TableKey, when_all_unhealthy: WhenAllUnhealthy) -> Rows {
    let of_port = |backend: &Backend| (backend.key.port, backend.key.protocol);
    let first = backends.partition_point(|b| of_port(b) < (table.port, table.protocol));
    let end = backends.partition_point(|b| of_port(b) <= (table.port, table.protocol));
    let of_family = |&i: &usize| backends[i].key.address.is_ipv4() == table.v4;
    let all: Vec<usize> = (first..end).filter(of_family).collect();
    if all.is_empty() {
        return Rows::Refuse(Reason::NoEndpoint);
    }
    let weighted: Vec<usize> = all.into_iter().filter(|&i| backends[i].weight > 0).collect();
    if weighted.is_empty() {
        return Rows::Refuse(Reason::NoWeight);
    }
    let usable: Vec<usize> =
        weighted.iter().copied().filter(|&i| backends[i].state.is_usable()).collect();
    if !usable.is_empty() {
        return Rows::Candidates(usable);
    }
    // What drains is well, and better than nothing (KEP-1669).
    let draining: Vec<usize> =
        weighted.iter().copied().filter(|&i| backends[i].state == State::Draining).collect();
    match when_all_unhealthy {
        _ if !draining.is_empty() => Rows::Candidates(draining),
        WhenAllUnhealthy::UseAll => Rows::Candidates(weighted),
        WhenAllUnhealthy::Refuse => Rows::Refuse(Reason::AllUnhealthy),
    }
}

/// The columns of an alias table over these weights; none of them is 0.
#[must_use]
pub fn columns(weights: impl Iterator<Item = u16>) -> Vec<Column> {
    let weights: Vec<u32> = weights.map(u32::from).collect();
    let mut columns = vec![Column::default(); weights.len()];
    let mut scratch = vec![Entry::default(); weights.len()];
    alias::build(&weights, &mut columns, &mut scratch);
    columns
}

/// Where the tickets of each of these weights end; none of them is 0.
#[must_use]
pub fn ends(weights: impl Iterator<Item = u16>) -> Vec<u32> {
    let weights: Vec<u32> = weights.map(u32::from).collect();
    let mut ends = vec![0; weights.len()];
    balance::tickets(&weights, &mut ends);
    ends
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;
    use crate::model::{EjectionPolicy, ServiceName};

    /// A service at 10.96.0.10 and fd00::10, ports 80 → 8080, of endpoints `(address, weight)`.
    fn service(endpoints: &[(&str, u16)]) -> Service {
        Service {
            name: ServiceName::new("s"),
            addresses: ["10.96.0.10", "fd00::10"].map(|a| a.parse().expect("address")).into(),
            ports: vec![ServicePort {
                name: String::new(),
                port: 80,
                target: 8080,
                protocol: Protocol::Tcp,
            }],
            health: None,
            algorithm: Algorithm::default(),
            ejection: Some(EjectionPolicy::default()),
            when_all_unhealthy: WhenAllUnhealthy::UseAll,
            drain_timeout: None,
            endpoints: endpoints
                .iter()
                .map(|&(address, weight)| Endpoint {
                    address: address.parse().expect("address"),
                    port: None,
                    weight,
                    zone: None,
                    drain: false,
                })
                .collect(),
        }
    }

    fn frontends(service: &Service) -> Vec<FrontendKey> {
        let ports = &service.ports;
        let address = |&a: &IpAddr| ports.iter().map(move |p| (a, p));
        let key = |(a, p): (IpAddr, &ServicePort)| FrontendKey::new(a.into(), p.port, p.protocol);
        service.addresses.iter().flat_map(address).map(key).collect()
    }

    /// The addresses in the table for IPv4, or its refusal.
    fn v4(service: &Service, down: &[&str]) -> Result<Vec<String>, Reason> {
        let tables = compile(service, &frontends(service), |address| {
            let known = down.contains(&address.ip().to_string().as_str());
            if known { State::Unhealthy } else { State::Healthy }
        });
        let (_, rows) = tables.tables.iter().find(|(key, _)| key.v4).expect("a table for IPv4");
        match rows {
            Rows::Refuse(reason) => Err(*reason),
            Rows::Candidates(places) => {
                let address = |&i: &usize| tables.backends[i].key.address.ip().to_string();
                Ok(places.iter().map(address).collect())
            }
        }
    }

    #[test]
    fn who_is_a_candidate() {
        let two = service(&[("10.0.0.1", 100), ("10.0.0.2", 100), ("fd00::1", 1)]);
        let both = Ok(vec!["10.0.0.1".to_owned(), "10.0.0.2".to_owned()]);
        let refusing = Service { when_all_unhealthy: WhenAllUnhealthy::Refuse, ..two.clone() };
        assert_eq!(v4(&two, &[]), both);
        assert_eq!(v4(&two, &["10.0.0.1"]), Ok(vec!["10.0.0.2".to_owned()]));
        assert_eq!(v4(&two, &["10.0.0.1", "10.0.0.2"]), both, "panic uses all");
        assert_eq!(v4(&refusing, &["10.0.0.1", "10.0.0.2"]), Err(Reason::AllUnhealthy));
        assert_eq!(v4(&service(&[("fd00::1", 1)]), &[]), Err(Reason::NoEndpoint));
        assert_eq!(v4(&service(&[("10.0.0.1", 0)]), &[]), Err(Reason::NoWeight));
        // An endpoint of weight 0 does not count as usable: it could not take the traffic.
        let drained = service(&[("10.0.0.1", 0), ("10.0.0.2", 5)]);
        assert_eq!(v4(&drained, &["10.0.0.2"]), Ok(vec!["10.0.0.2".to_owned()]));
    }

    #[test]
    fn what_drains_is_used_when_nothing_else_is() {
        let three = service(&[("10.0.0.1", 1), ("10.0.0.2", 1), ("10.0.0.3", 1)]);
        let refusing = Service { when_all_unhealthy: WhenAllUnhealthy::Refuse, ..three.clone() };
        use State::{Draining, Healthy, Unhealthy};
        for (states, expected) in [
            ([Healthy, Draining, Healthy], &["10.0.0.1", "10.0.0.3"][..]),
            ([Draining, Unhealthy, Draining], &["10.0.0.1", "10.0.0.3"]),
            ([Unhealthy, Draining, Unhealthy], &["10.0.0.2"]),
            ([Draining, Draining, Draining], &["10.0.0.1", "10.0.0.2", "10.0.0.3"]),
        ] {
            for service in [&three, &refusing] {
                let state = |address: SocketAddr| match address.ip().to_string().as_str() {
                    "10.0.0.1" => states[0],
                    "10.0.0.2" => states[1],
                    _ => states[2],
                };
                let tables = compile(service, &frontends(service), state);
                let v4 = tables.tables.iter().find(|(key, _)| key.v4).expect("a table");
                let Rows::Candidates(places) = &v4.1 else { panic!("{states:?}: {v4:?}") };
                let used: Vec<_> = places
                    .iter()
                    .map(|&i| tables.backends[i].key.address.ip().to_string())
                    .collect();
                assert_eq!(used, expected, "{states:?}");
            }
        }
    }

    #[test]
    fn order_of_endpoints_does_not_matter() {
        let one = service(&[("10.0.0.1", 1), ("10.0.0.2", 2), ("fd00::1", 3)]);
        let mut other = one.clone();
        other.endpoints.reverse();
        other.addresses.reverse();
        let healthy = |_| State::Healthy;
        assert_eq!(
            compile(&one, &frontends(&one), healthy),
            compile(&other, &frontends(&other), healthy)
        );
    }
}
