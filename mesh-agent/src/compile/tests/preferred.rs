//! Which endpoints are preferred: by distance, by priority, and by how long they have been there.

use super::*;
use crate::model::{Fallback, Locality};

/// An endpoint: the last octet of its address, node, zone, priority, weight, and its condition.
#[derive(Clone, Copy)]
struct End(u8, &'static str, &'static str, u8, u16, Condition);

const UP: Condition = Condition::settled(State::Healthy);
const DOWN: Condition = Condition::settled(State::Unhealthy);
const OUT: Condition = Condition { is_out: true, ..UP };

fn far(n: u8, condition: Condition) -> End {
    End(n, "other", "far", 0, 100, condition)
}

/// The weights in the table for IPv4 by the last octet, on node `here` in zone `near`, and the group.
fn weights(
    service: &Service,
    fallback: Option<&Service>,
    ends: &[End],
    before: u8,
) -> (Result<Vec<(u8, u16)>, Reason>, u8) {
    let endpoint = |end: &End| Endpoint {
        address: std::net::Ipv4Addr::new(10, 0, 0, end.0).into(),
        port: None,
        weight: end.4,
        zone: Some(end.2.into()),
        node: Some(end.1.into()),
        priority: end.3,
        drain: false,
    };
    let octet = |address: SocketAddr| match address.ip() {
        IpAddr::V4(ip) => ip.octets()[3],
        IpAddr::V6(_) => 0,
    };
    // What is 100 and above is the other service's.
    let (own, other): (Vec<&End>, Vec<&End>) = ends.iter().partition(|end| end.0 < 100);
    let of = |service: &Service, ends: Vec<&End>| {
        let endpoints = ends.into_iter().map(endpoint).collect();
        Service { endpoints, ..service.clone() }
    };
    let (service, fallback) = (of(service, own), fallback.map(|fallback| of(fallback, other)));
    let key = TableKey { port: 80, protocol: Protocol::Tcp, v4: true };
    let before = BTreeMap::from([(key, before)]);
    let input = Input {
        service: &service,
        frontends: &frontends(&service),
        fallback: fallback.as_ref(),
        here: Here { node: "here", zone: Some("near"), tick: 4_000_000 },
        before: &before,
        source: 0,
    };
    let condition = |_: &Service, address: SocketAddr| {
        ends.iter().find(|end| end.0 == octet(address)).map_or(DOWN, |end| end.5)
    };
    let tables = compile(input, condition);
    let (_, rows) = tables.tables.iter().find(|(found, _)| *found == key).expect("a table");
    let group = tables.groups.get(&key).copied().unwrap_or(0);
    let rows = match rows {
        Rows::Refuse(reason) => Err(*reason),
        Rows::Candidates(rows) => {
            let row = |row: &Candidate| (octet(tables.backends[row.place].key.address), row.weight);
            Ok(rows.iter().map(row).collect())
        }
    };
    (rows, group)
}

fn near_first(threshold: u8) -> Service {
    Service { locality: Some(Locality { threshold }), ..service(&[]) }
}

fn of(service: &Service, ends: &[End]) -> Vec<(u8, u16)> {
    weights(service, None, ends, 0).0.expect("candidates")
}

#[test]
fn the_nearest_take_what_they_can() {
    let here = |n, condition| End(n, "here", "near", 0, 100, condition);
    let near = |n, condition| End(n, "other", "near", 0, 100, condition);
    let app = near_first(50);
    let all = [here(1, UP), near(2, UP), near(3, UP), far(4, UP)];
    // The others are there without a weight, for when the kernel finds the first out.
    assert_eq!(of(&app, &all), [(1, 100), (2, 0), (3, 0), (4, 0)]);
    assert_eq!(of(&service(&[]), &all), [(1, 100), (2, 100), (3, 100), (4, 100)], "off");
    assert_eq!(of(&app, &all[1..]), [(2, 100), (3, 100), (4, 0)]);
    assert_eq!(of(&app, &all[3..]), [(4, 100)]);
    // One of four is a quarter, which is half of what suffices: half of all goes further.
    let quarter = [here(1, UP), here(5, DOWN), here(6, DOWN), here(7, DOWN), far(4, UP)];
    assert_eq!(of(&app, &quarter), [(1, 65_535), (4, 65_535)]);
    // What the kernel has out cannot take anything, and keeps its weight for when it is back.
    let out = [here(1, OUT), here(2, UP), here(3, OUT), here(5, OUT), far(4, UP), far(6, UP)];
    let shares = of(&app, &out);
    let weight = |n| f64::from(shares.iter().find(|(found, _)| *found == n).expect("there").1);
    let ours = [1, 2, 3, 5].map(weight).iter().sum::<f64>();
    let theirs = [4, 6].map(weight).iter().sum::<f64>();
    assert!((ours / theirs - 1.0).abs() < 0.001, "{shares:?}");
    let away = [here(1, OUT), near(2, UP), far(4, UP)];
    assert_eq!(of(&app, &away), [(1, 10), (2, 100), (4, 0)], "it is tried from time to time");
    // All are out: no distance.
    let none = [here(1, OUT), far(4, OUT)];
    assert_eq!(of(&app, &none), [(1, 100), (4, 100)]);
    // A fifth of what suffices here, two fifths in the zone, and the rest would be more than is left:
    // what nobody has room for goes where the rest goes.
    let few = |n: u8, up: u8, make: &dyn Fn(u8, Condition) -> End| -> Vec<End> {
        (0..10).map(|i| make(n + i, if i < up { UP } else { DOWN })).collect()
    };
    let scarce = [few(10, 1, &here), few(20, 2, &near)].concat();
    let shares = of(&app, &scarce);
    assert_eq!(shares, [(10, 65_535), (20, 65_535), (21, 65_535)]);
}

#[test]
fn weights_hold_at_each_distance() {
    let app = near_first(100);
    let ends = [
        End(1, "here", "near", 0, 10, UP),
        End(2, "here", "near", 0, 30, UP),
        End(3, "here", "near", 0, 40, DOWN),
        End(4, "other", "far", 0, 1, UP),
        End(5, "other", "far", 0, 3, UP),
    ];
    let shares = of(&app, &ends);
    let weights: Vec<f64> = shares.iter().map(|(_, weight)| f64::from(*weight)).collect();
    let all: f64 = weights.iter().sum();
    for (weight, due) in weights.iter().zip([0.125, 0.375, 0.125, 0.375]) {
        assert!((weight / all - due).abs() < 0.001, "{shares:?}");
    }
}

#[test]
fn what_has_just_come_has_less() {
    let app = Service { slow_start: Some(Duration::from_secs(1)), ..service(&[]) };
    let new = |ramp| Condition { ramp, ..UP };
    assert_eq!(of(&app, &[far(1, new(100)), far(2, new(100))]), [(1, 100), (2, 100)], "all alike");
    let shares = of(&app, &[far(1, UP), far(2, new(100)), far(3, new(550))]);
    assert_eq!(shares, [(1, 65_535), (2, 6_553), (3, 36_044)]);
    // However small, something.
    let mut tiny = far(2, new(100));
    tiny.4 = 1;
    let mut huge = far(1, UP);
    huge.4 = 65_535;
    assert_eq!(of(&app, &[huge, tiny]), [(1, 65_535), (2, 1)]);
}

#[test]
fn later_endpoints_are_used_when_too_few_before_serve() {
    let app = Service { fallback: Some(Fallback { below: 40, back: 60 }), ..service(&[]) };
    let standby = |n, condition| End(n, "other", "far", 3, 100, condition);
    let five = |up: usize| -> Vec<End> {
        let own = (1..=5).map(|n| far(n, if usize::from(n) <= up { UP } else { DOWN }));
        own.chain([standby(9, UP)]).collect()
    };
    let group = |up, before| weights(&app, None, &five(up), before).1;
    assert_eq!([5, 2, 1, 0].map(|up| group(up, 0)), [0, 0, 3, 3], "left below 40 per cent");
    assert_eq!([1, 2, 3].map(|up| group(up, 3)), [3, 3, 0], "come back to at 60");
    assert_eq!(weights(&app, None, &five(1), 0).0, Ok(vec![(9, 100)]));
    // Nobody there either: better few than none.
    let mut ends = five(1);
    ends[5].5 = DOWN;
    assert_eq!(weights(&app, None, &ends, 0), (Ok(vec![(1, 100)]), 0));
    // The kernel's own finding counts too.
    let out = [far(1, OUT), far(2, OUT), standby(9, UP)];
    // And they stay where the kernel can try them, beside the one that is used.
    let used = Ok(vec![(1, 10), (2, 10), (9, 100)]);
    assert_eq!(weights(&app, None, &out, 0), (used, 3));
}

#[test]
fn another_service_is_behind_all() {
    let app = Service { fallback: Some(Fallback::default()), ..service(&[]) };
    let other = Service { name: ServiceName::new("other"), ..service(&[]) };
    let ends = |own, theirs| [far(1, own), far(100, theirs), far(101, DOWN)];
    let behind = |own, theirs| weights(&app, Some(&other), &ends(own, theirs), 0);
    assert_eq!(behind(UP, UP), (Ok(vec![(1, 100)]), 0));
    assert_eq!(behind(DOWN, UP), (Ok(vec![(100, 100)]), FALLBACK));
    // When all fails, its own are tried, as without it.
    assert_eq!(behind(DOWN, DOWN), (Ok(vec![(1, 100)]), 0));
    let drained = Condition::settled(State::Draining);
    assert_eq!(behind(drained, UP), (Ok(vec![(100, 100)]), FALLBACK));
    assert_eq!(behind(drained, DOWN), (Ok(vec![(1, 100)]), 0));
    let refusing = Service { when_all_unhealthy: WhenAllUnhealthy::Refuse, ..app.clone() };
    let none = weights(&refusing, Some(&other), &ends(DOWN, DOWN), 0);
    assert_eq!(none, (Err(Reason::AllUnhealthy), 0));
    // Without any of its own.
    let empty = weights(&app, Some(&other), &[far(100, UP)], 0);
    assert_eq!(empty, (Ok(vec![(100, 100)]), FALLBACK));
    // It does not listen on that port.
    let port = ServicePort { port: 81, ..other.ports[0].clone() };
    let elsewhere = Service { ports: vec![port], ..other };
    assert_eq!(weights(&app, Some(&elsewhere), &ends(DOWN, UP), 0), (Ok(vec![(1, 100)]), 0));
}

/// Few usable ones are not left alone with everything: those whose checks fail are used too, but never what
/// drains, nor what belongs to the service behind.
#[test]
fn too_few_usable_ones_are_not_left_alone() {
    let app = Service { panic_threshold: 50, ..service(&[]) };
    let drained = Condition::settled(State::Draining);
    let of = |service: &Service, states: [Condition; 4]| {
        let ends: Vec<_> = (1..).zip(states).map(|(n, state)| far(n, state)).collect();
        let (rows, _) = weights(service, None, &ends, 0);
        rows.map(|rows| rows.into_iter().map(|(n, _)| n).collect::<Vec<_>>())
    };
    assert_eq!(of(&app, [UP, UP, DOWN, DOWN]), Ok(vec![1, 2]), "half is enough");
    assert_eq!(of(&app, [UP, DOWN, DOWN, DOWN]), Ok(vec![1, 2, 3, 4]));
    assert_eq!(of(&app, [UP, DOWN, drained, drained]), Ok(vec![1]));
    assert_eq!(of(&app, [UP, DOWN, DOWN, drained]), Ok(vec![1, 2, 3]));
    assert_eq!(of(&service(&[]), [UP, DOWN, DOWN, DOWN]), Ok(vec![1]), "unless it says so");
    let all = Service { panic_threshold: 100, ..service(&[]) };
    assert_eq!(of(&all, [UP, UP, UP, DOWN]), Ok(vec![1, 2, 3, 4]));
    assert_eq!(of(&all, [UP, UP, drained, drained]), Ok(vec![1, 2]));
    // Another service's are taken as its checks found them.
    let behind = Service { fallback: Some(Fallback::default()), ..all };
    let other = Service { name: ServiceName::new("other"), ..service(&[]) };
    let ends = [far(1, DOWN), far(100, UP), far(101, DOWN)];
    assert_eq!(weights(&behind, Some(&other), &ends, 0), (Ok(vec![(100, 100)]), FALLBACK));
    // What the kernel has out serves nobody.
    let out = Condition { is_out: true, ..UP };
    assert_eq!(of(&app, [UP, out, DOWN, DOWN]), Ok(vec![1, 2, 3, 4]));
}
