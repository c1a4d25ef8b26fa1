//! Tests of the catalog: the rules by example, then for any order of any changes.

use super::*;
use crate::model::{EjectionPolicy, Endpoint, Health, ServicePort, WhenAllUnhealthy};
use proptest::prelude::*;

fn origin(source: usize, item: &str) -> Origin {
    Origin { source, item: item.into() }
}

/// A service with addresses 10.96.0.N and endpoints 10.0.0.N (10.96.0.N for those above 100).
fn service(name: &str, addresses: &[u8], ports: &[u16], endpoints: &[u8]) -> Arc<Service> {
    let port = |&port: &u16| ServicePort {
        name: String::new(),
        port,
        target: port,
        protocol: Protocol::Tcp,
    };
    let endpoint = |&last: &u8| Endpoint {
        address: IpAddr::from(if last > 100 { [10, 96, 0, last - 100] } else { [10, 0, 0, last] }),
        port: None,
        weight: Endpoint::DEFAULT_WEIGHT,
        zone: None,
        node: None,
        priority: 0,
        drain: false,
    };
    Arc::new(Service {
        name: ServiceName::new(name),
        addresses: addresses.iter().map(|&last| IpAddr::from([10, 96, 0, last])).collect(),
        ports: ports.iter().map(port).collect(),
        algorithm: mesh_common::Algorithm::default(),
        health: Health::Off,
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
        endpoints: endpoints.iter().map(endpoint).collect(),
    })
}

fn names(changed: &[ServiceName]) -> Vec<&str> {
    changed.iter().map(ServiceName::as_str).collect()
}

fn dialled(catalog: &Catalog, name: &str) -> Vec<String> {
    let entry = catalog.get(name).expect("an entry");
    entry.frontends.iter().map(|owned| owned.frontend.to_string()).collect()
}

#[test]
fn the_lesser_origin_defines_a_service() {
    let mut catalog = Catalog::default();
    let (first, second) = (service("a", &[1], &[80], &[1]), service("a", &[2], &[80], &[2]));
    assert_eq!(names(&catalog.apply([(origin(1, "x"), second.clone())], [])), ["a"]);
    assert_eq!(names(&catalog.apply([(origin(0, "y"), first.clone())], [])), ["a"]);
    assert_eq!(catalog.get("a").map(|entry| &entry.service), Some(&first));
    let shadowed: Vec<_> = catalog.shadowed_definitions().map(|s| s.to_string()).collect();
    assert_eq!(shadowed, ["service a in x is not used: y defines it first"]);

    // A change of what is not in force is no change.
    let other = service("a", &[3], &[80], &[]);
    assert!(catalog.apply([(origin(1, "x"), other.clone())], []).is_empty());

    assert_eq!(names(&catalog.apply([], [(origin(0, "y"), first.name.clone())])), ["a"]);
    assert_eq!(catalog.get("a").map(|entry| &entry.service), Some(&other));
    assert_eq!(catalog.shadowed_definitions().count(), 0);
}

#[test]
fn a_frontend_has_one_owner_and_the_next_takes_over() {
    let mut catalog = Catalog::default();
    let loser = service("a", &[1], &[80, 443], &[1]);
    catalog.apply([(origin(1, "x"), loser)], []);
    let winner = service("b", &[1], &[80], &[2]);
    let changed = catalog.apply([(origin(0, "y"), winner.clone())], []);
    assert_eq!(names(&changed), ["a", "b"]);
    assert_eq!(dialled(&catalog, "a"), ["10.96.0.1:443/tcp"]);
    assert_eq!(dialled(&catalog, "b"), ["10.96.0.1:80/tcp"]);
    let entry = catalog.get("a").expect("an entry");
    assert_eq!(entry.shadowed, ["10.96.0.1:80/tcp is taken by service b (y)"]);
    assert_eq!(entry.frontends[0].port_index, 1);

    // Its endpoints are nobody else's matter.
    let changed = catalog.apply([(origin(0, "y"), service("b", &[1], &[80], &[3]))], []);
    assert_eq!(names(&changed), ["b"]);

    let changed = catalog.apply([], [(origin(0, "y"), winner.name.clone())]);
    assert_eq!(names(&changed), ["a", "b"]);
    assert!(catalog.get("b").is_none());
    assert_eq!(dialled(&catalog, "a").len(), 2);
    assert!(catalog.get("a").expect("an entry").shadowed.is_empty());
}

#[test]
fn an_endpoint_that_is_a_frontend_is_warned_about_while_it_is_one() {
    let mut catalog = Catalog::default();
    catalog.apply([(origin(0, "x"), service("a", &[1], &[80], &[102]))], []);
    assert!(catalog.get("a").expect("an entry").warnings.is_empty());
    let changed = catalog.apply([(origin(0, "x"), service("b", &[2], &[80], &[1]))], []);
    assert_eq!(names(&changed), ["a", "b"], "what is said about a is new");
    let warnings = &catalog.get("a").expect("an entry").warnings;
    assert!(
        matches!(&warnings[..], [one] if one.starts_with("the endpoint 10.96.0.2:80/tcp is an address of service b")),
        "{warnings:?}"
    );
    let changed = catalog.apply([], [(origin(0, "x"), ServiceName::new("b"))]);
    assert_eq!(names(&changed), ["a", "b"]);
    assert!(catalog.get("a").expect("an entry").warnings.is_empty());
}

type Change = (Vec<(Origin, Arc<Service>)>, Vec<(Origin, ServiceName)>);

fn any_origin() -> impl Strategy<Value = Origin> {
    (0..2_usize, 0..2_usize).prop_map(|(source, item)| origin(source, ["x", "y"][item]))
}

fn any_name() -> impl Strategy<Value = &'static str> {
    prop::sample::select(vec!["a", "b", "c", "d"])
}

fn any_service() -> impl Strategy<Value = Arc<Service>> {
    let some = |of: Vec<u8>, least: usize| {
        let most = of.len();
        prop::sample::subsequence(of, least..=most)
    };
    let ports = prop::sample::subsequence(vec![80, 81], 1..=2);
    (any_name(), some(vec![1, 2, 3], 1), ports, some(vec![1, 101, 102, 103], 0)).prop_map(
        |(name, addresses, ports, endpoints)| service(name, &addresses, &ports, &endpoints),
    )
}

fn any_change() -> impl Strategy<Value = Change> {
    let upserts = prop::collection::vec((any_origin(), any_service()), 0..4);
    let removed =
        prop::collection::vec((any_origin(), any_name().prop_map(ServiceName::new)), 0..4);
    (upserts, removed)
}

proptest! {
    /// Also proves that no index keeps what is gone: the comparison is of the whole catalog.
    #[test]
    fn incremental_equals_from_scratch(changes in prop::collection::vec(any_change(), 1..12)) {
        let mut catalog = Catalog::default();
        let mut definitions = BTreeMap::new();
        for (upserts, removed) in changes {
            let before = catalog.clone();
            let changed = catalog.apply(upserts.clone(), removed.clone());
            for (origin, name) in removed {
                definitions.remove(&(name, origin));
            }
            for (origin, service) in upserts {
                definitions.insert((service.name.clone(), origin), service);
            }
            let mut scratch = Catalog::default();
            for ((_, origin), service) in &definitions {
                scratch.apply([(origin.clone(), Arc::clone(service))], []);
            }
            prop_assert_eq!(&catalog, &scratch);

            let expected: Vec<_> = ["a", "b", "c", "d"]
                .into_iter()
                .filter(|name| before.get(name) != catalog.get(name))
                .collect();
            prop_assert_eq!(names(&changed), expected);
        }
    }

    #[test]
    fn order_does_not_matter(
        (straight, shuffled) in prop::collection::btree_map(
            (any_origin(), any_name()), any_service(), 1..12
        ).prop_flat_map(|definitions| {
            let all: Vec<_> = definitions
                .into_iter()
                .map(|((origin, name), like)| {
                    (origin, Arc::new(Service { name: ServiceName::new(name), ..Service::clone(&like) }))
                })
                .collect();
            (Just(all.clone()), Just(all).prop_shuffle())
        }),
        cut in 1..12_usize,
    ) {
        let (mut one, mut other) = (Catalog::default(), Catalog::default());
        one.apply(straight, []);
        for batch in shuffled.chunks(cut) {
            other.apply(batch.to_vec(), []);
        }
        prop_assert_eq!(one, other);
    }

    #[test]
    fn every_frontend_has_exactly_one_owner(changes in prop::collection::vec(any_change(), 1..6)) {
        let mut catalog = Catalog::default();
        for (upserts, removed) in changes {
            catalog.apply(upserts, removed);
        }
        let claimed: BTreeSet<_> =
            catalog.iter().flat_map(|(_, e)| frontends(&e.service)).map(|o| o.frontend).collect();
        let mut owned: Vec<_> =
            catalog.iter().flat_map(|(_, e)| &e.frontends).map(|o| o.frontend).collect();
        owned.sort();
        prop_assert_eq!(owned, claimed.into_iter().collect::<Vec<_>>());
    }
}
