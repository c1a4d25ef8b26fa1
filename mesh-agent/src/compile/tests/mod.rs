//! Who is a candidate, and with which weight.

mod preferred;

use std::net::IpAddr;
use std::time::Duration;

use mesh_common::Pin;
use mesh_common::affinity::By;
use proptest::prelude::*;

use super::*;
use crate::dataplane::clock::{self, NANOS};
use crate::model::{EjectionPolicy, Health, ServiceName, WhenAllUnhealthy};

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
        health: Health::Off,
        algorithm: Algorithm::default(),
        ejection: Some(EjectionPolicy::default()),
        when_all_unhealthy: WhenAllUnhealthy::UseAll,
        panic_threshold: 0,
        end_waiting: false,
        drain_timeout: None,
        affinity: None,
        locality: None,
        slow_start: None,
        fallback: None,
        fallback_service: None,
        endpoints: endpoints
            .iter()
            .map(|&(address, weight)| Endpoint {
                address: address.parse().expect("address"),
                port: None,
                weight,
                zone: None,
                node: None,
                priority: 0,
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

/// Far from everything, with endpoints that have been in their states for long.
fn compiled(service: &Service, state: impl Fn(SocketAddr) -> State) -> Tables {
    let input = Input {
        service,
        frontends: &frontends(service),
        fallback: None,
        here: Here::default(),
        before: &BTreeMap::new(),
        source: 0,
    };
    compile(input, |_, address| Condition::settled(state(address)))
}

/// The addresses in the table for IPv4, or its refusal.
fn v4(service: &Service, down: &[&str]) -> Result<Vec<String>, Reason> {
    let tables = compiled(service, |address| {
        let known = down.contains(&address.ip().to_string().as_str());
        if known { State::Unhealthy } else { State::Healthy }
    });
    let (_, rows) = tables.tables.iter().find(|(key, _)| key.v4).expect("a table for IPv4");
    match rows {
        Rows::Refuse(reason) => Err(*reason),
        Rows::Candidates(places) => {
            let address = |&i: &usize| tables.backends[i].key.address.ip().to_string();
            Ok(places.iter().map(|candidate| address(&candidate.place)).collect())
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
            let tables = compiled(service, state);
            let v4 = tables.tables.iter().find(|(key, _)| key.v4).expect("a table");
            let Rows::Candidates(places) = &v4.1 else { panic!("{states:?}: {v4:?}") };
            let used: Vec<_> = places
                .iter()
                .map(|c| tables.backends[c.place].key.address.ip().to_string())
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
    assert_eq!(compiled(&one, healthy), compiled(&other, healthy));
}

proptest! {
    /// A client keeps its backend for the whole of the timeout, whenever within a tick it connects, and for three ticks
    /// more at the most: as the kernel decides it, which counts whole ticks.
    #[test]
    fn affinity_ends_when_it_says(
        hz in prop::sample::select(vec![100_u64, 250, 300, 1_000]),
        timeout in prop_oneof![1_000_u64..10_000, 10_000_u64..30 * 86_400_000],
        connected in 0_u64..100_000_000_000,
    ) {
        // As the kernel tells it, rounded (`KTIME_LOW_RES`).
        let tick = (NANOS + hz / 2) / hz;
        let timeout = Duration::from_millis(timeout);
        let affinity = pins(model::Affinity { by: By::Client, timeout }, tick);
        let nanos = |at: Duration| u64::try_from(at.as_nanos()).expect("some days");
        let jiffies = |at: Duration| clock::jiffies_at(nanos(at), tick);
        let connected = Duration::from_nanos(connected);
        let until = Pin::deadline(jiffies(connected) + affinity.timeout());
        let is_kept = |after: Duration| until >= jiffies(connected + after);
        prop_assert!(is_kept(timeout));
        let tolerance = Duration::from_nanos(3 * tick);
        prop_assert!(tolerance <= Duration::from_millis(50));
        prop_assert!(!is_kept(timeout + tolerance));
    }
}
