//! Explanations over tables in memory, built with the same functions as the real ones.

use std::cell::Cell;
use std::collections::HashMap;

use mesh_common::{Addr, Choice, Half, Reason, Word, alias};

use super::*;
use crate::api::types::Answer;

#[derive(Default)]
struct Memory {
    frontends: HashMap<FrontendKey, FrontendValue>,
    services: Vec<Service>,
    slots: Vec<Slot>,
    virtual_ip: Option<Addr>,
    random: Cell<u32>,
    /// By backend, which is the slot's number here.
    ejections: HashMap<u32, Ejection>,
    /// Open connections, likewise.
    active: HashMap<u32, u64>,
}

/// In ticks.
const NOW: u64 = 1000;

impl Memory {
    /// A frontend with these weighted backends; none refuses for `reason`.
    fn serve(&mut self, key: FrontendKey, backends: &[(&str, u32)], reason: Reason) {
        let weights: Vec<u32> = backends.iter().map(|(_, weight)| *weight).collect();
        let mut columns = vec![alias::Column::default(); weights.len()];
        let mut scratch = vec![alias::Entry::default(); weights.len()];
        let table = if alias::build(&weights, &mut columns, &mut scratch) {
            let base = u32::try_from(self.slots.len()).expect("few");
            Table::slots(base, u32::try_from(weights.len()).expect("few"))
        } else {
            Table::refuse(reason)
        };
        for ((address, _), column) in backends.iter().zip(columns) {
            let address: SocketAddr = address.parse().expect("address");
            self.slots.push(Slot {
                addr: address.ip().into(),
                port: address.port().to_be(),
                backend: u32::try_from(self.slots.len()).expect("few"),
                threshold: column.threshold,
                alias: column.alias,
                ..Slot::default()
            });
        }
        let service = u32::try_from(self.services.len()).expect("few");
        self.services.push(Service {
            table: Word::new(table.0),
            generation: Word::new(1),
            policy: Word::default(),
            key,
            rate: Half::default(),
            position: Word::new(0),
            affinity: Word::new(0),
        });
        self.frontends.insert(key, FrontendValue { service, pad: 0, generation: 1 });
    }
}

impl Tables for Memory {
    fn frontend(&self, key: &FrontendKey) -> Option<FrontendValue> {
        self.frontends.get(key).copied()
    }
    fn service(&self, index: u32) -> Option<&Service> {
        self.services.get(index as usize)
    }
    fn slot(&self, index: u32) -> Option<&Slot> {
        self.slots.get(index as usize)
    }
    fn is_virtual(&self, addr: &Addr) -> bool {
        self.virtual_ip == Some(*addr)
    }
    fn random(&self) -> u32 {
        self.random.get()
    }
    fn ejection(&self, backend: u32) -> Ejection {
        self.ejections.get(&backend).copied().unwrap_or_default()
    }
    fn active(&self, backend: u32) -> u64 {
        self.active.get(&backend).copied().unwrap_or_default()
    }

    fn position(&self, _: u32) -> u64 {
        0
    }

    fn client(&self) -> Client {
        Client::NOBODY
    }
    fn now(&self) -> u64 {
        NOW
    }
}

impl Caller for Memory {
    fn chance(&self) -> u32 {
        self.random()
    }

    fn key(&self, _: Algorithm) -> u64 {
        self.chance().into()
    }

    fn enter(&self, _: u32, _: Policy) -> Option<Token> {
        Some(Token::NONE)
    }
}

/// One service, known by these backends.
struct Known(Vec<BackendInfo>);

impl Names for Known {
    fn frontend(&self, key: &FrontendKey) -> Option<FrontendInfo> {
        (*key == key_of(ORDERS)).then(|| FrontendInfo {
            service: "orders".into(),
            algorithm: "random".into(),
            affinity: None,
            backends: self.0.clone(),
        })
    }

    fn unit(&self, _: u64) -> Option<u64> {
        None
    }
}

const ORDERS: &str = "10.96.0.10:80";

fn query(address: &str) -> Query {
    Query { address: address.parse().expect("address"), protocol: Protocol::Tcp }
}

fn key_of(address: &str) -> FrontendKey {
    let Query { address, protocol } = query(address);
    FrontendKey::new(address.ip().into(), address.port(), protocol)
}

fn backend(address: &str, state: State, weight: u32) -> BackendInfo {
    let address = address.parse().expect("address");
    let ejection = Ejection::NONE;
    BackendInfo { address, state, reason: "3 checks failed".into(), weight, ejection }
}

fn detail<'a>(explanation: &'a types::Explanation, step: &str) -> Option<&'a str> {
    explanation.steps.iter().find(|s| s.step == step).map(|s| s.detail.as_str())
}

#[test]
fn probabilities_are_the_weights_and_the_answer_is_the_draw() {
    let mut tables = Memory::default();
    let weights = [("10.0.0.1:80", 1), ("10.0.0.2:80", 5), ("[fd00::3]:80", 4)];
    tables.serve(key_of(ORDERS), &weights, Reason::NoEndpoint);
    let mut known: Vec<_> =
        weights.iter().map(|(address, weight)| backend(address, State::Healthy, *weight)).collect();
    known.push(backend("10.0.0.4:80", State::Unhealthy, 100));
    known.push(backend("10.0.0.5:80", State::Healthy, 0));
    let names = Known(known);
    let mut answered = std::collections::BTreeSet::new();
    for step in 0..64 {
        tables.random.set(step << 26);
        let explanation = explain(query(ORDERS), None, &tables, &names);
        let scores: Vec<_> = explanation.candidates.iter().map(|c| c.score).collect();
        for (score, expected) in scores.iter().zip([0.1, 0.5, 0.4, 0.0, 0.0]) {
            assert!((score - expected).abs() < 1e-8, "{scores:?}");
            assert!(score.is_sign_positive(), "-0 is no probability: {scores:?}");
        }
        assert_eq!(
            detail(&explanation, "left out"),
            Some("10.0.0.4:80: unhealthy (3 checks failed); 10.0.0.5:80: weight 0")
        );
        assert_eq!(detail(&explanation, "panic"), None);
        let Verdict::Balance(Choice { slot, .. }) = translate(&tables, &tables, &key_of(ORDERS))
        else {
            panic!("the kernel's decision is a backend");
        };
        let expected = SocketAddr::new(slot.addr.ip(), 80).to_string();
        assert_eq!(explanation.answer, Some(Answer::Backend { backend: expected.clone() }));
        answered.insert(expected);
    }
    assert_eq!(answered.len(), 3, "every backend is drawn by some number");
}

#[test]
fn panic_is_named() {
    let mut tables = Memory::default();
    tables.serve(key_of(ORDERS), &[("10.0.0.1:80", 1)], Reason::NoEndpoint);
    let names = Known(vec![backend("10.0.0.1:80", State::Unhealthy, 1)]);
    let explanation = explain(query(ORDERS), None, &tables, &names);
    assert!(detail(&explanation, "panic").is_some());
    assert!(matches!(explanation.answer, Some(Answer::Backend { .. })));
}

#[test]
fn refusals_carry_their_reason() {
    let mut tables = Memory::default();
    tables.serve(key_of(ORDERS), &[("10.0.0.1:80", 0)], Reason::NoWeight);
    let names = Known(vec![backend("10.0.0.1:80", State::Unknown, 0)]);
    let explanation = explain(query(ORDERS), None, &tables, &names);
    let refused = |reason: Reason| {
        Some(Answer::Refused { errno: "ECONNREFUSED".into(), reason: reason.name().into() })
    };
    assert_eq!(explanation.answer, refused(Reason::NoWeight));
    assert!(explanation.candidates.iter().all(|c| c.score.is_sign_positive()));
    assert_eq!(explanation.candidates.len(), 1);
    assert_eq!(detail(&explanation, "left out"), Some("10.0.0.1:80: weight 0"));

    tables.virtual_ip = Some(key_of(ORDERS).addr);
    let explanation = explain(query("10.96.0.10:81"), None, &tables, &names);
    assert_eq!(explanation.answer, refused(Reason::NoService));
    assert_eq!(explanation.service, None);

    let address = FrontendKey::address_only(key_of(ORDERS).addr);
    tables.frontends.insert(address, FrontendValue::default());
    let explanation = explain(query("10.96.0.10:81"), None, &tables, &names);
    assert_eq!(explanation.answer, refused(Reason::NoPort));
}

/// A UDP connect to a service that has no such port, or to no port, goes on as dialled; one to a virtual
/// address of nobody is refused. So is what the kernel decides of them.
#[test]
fn a_connect_of_datagrams_to_a_service_without_that_port_is_passed() {
    let mut tables = Memory::default();
    tables.serve(key_of(ORDERS), &[("10.0.0.1:80", 1)], Reason::NoEndpoint);
    tables.virtual_ip = Some(key_of(ORDERS).addr);
    let explained = |tables: &Memory, address: &str, protocol| {
        let query = Query { address: address.parse().expect("address"), protocol };
        explain(query, None, tables, &Known(Vec::new()))
    };
    let refused = |reason: Reason| {
        Some(Answer::Refused { errno: "ECONNREFUSED".into(), reason: reason.name().into() })
    };
    let nobodys = explained(&tables, ORDERS, Protocol::Udp);
    assert_eq!(nobodys.answer, refused(Reason::NoService));

    let address = FrontendKey::address_only(key_of(ORDERS).addr);
    tables.frontends.insert(address, FrontendValue::default());
    for address in [ORDERS, "10.96.0.10:0"] {
        let passed = explained(&tables, address, Protocol::Udp);
        assert_eq!(passed.answer, None);
        let answer = detail(&passed, "answer").expect("an answer");
        assert!(
            answer.starts_with("passed: a UDP connect") && answer.contains("refused"),
            "{answer}"
        );
    }
    assert_eq!(explained(&tables, "10.96.0.10:0", Protocol::Tcp).answer, refused(Reason::NoPort));
}

/// An endpoint that no draw can reach is no candidate, also when it has a slot.
#[test]
fn weight_zero_in_the_table_is_left_out() {
    let mut tables = Memory::default();
    let weights = [("10.0.0.1:80", 0), ("10.0.0.2:80", 1)];
    tables.serve(key_of(ORDERS), &weights, Reason::NoEndpoint);
    let names = Known(
        weights.iter().map(|(address, weight)| backend(address, State::Healthy, *weight)).collect(),
    );
    let explanation = explain(query(ORDERS), None, &tables, &names);
    assert_eq!(detail(&explanation, "candidates"), Some("1 of 2 endpoints can be chosen"));
    assert_eq!(detail(&explanation, "left out"), Some("10.0.0.1:80: weight 0"));
}

#[test]
fn what_is_no_service_is_passed() {
    let tables = Memory::default();
    let explanation = explain(query("192.0.2.1:443"), None, &tables, &Known(Vec::new()));
    assert_eq!(explanation.answer, None);
    assert_eq!(explanation.service, None);
    assert!(detail(&explanation, "answer").is_some_and(|d| d.starts_with("passed: not a service")));
}

#[test]
fn a_client_outside_is_not_balanced() {
    let mut tables = Memory::default();
    tables.serve(key_of(ORDERS), &[("10.0.0.1:80", 1)], Reason::NoEndpoint);
    let names = Known(vec![backend("10.0.0.1:80", State::Healthy, 1)]);
    let mut client = ClientView {
        name: "pid 7 (curl)".into(),
        cgroup: "/other".into(),
        balanced: "/web".into(),
        inside: false,
        excluded: false,
        id: None,
    };
    let explanation = explain(query(ORDERS), Some(&client), &tables, &names);
    assert_eq!(explanation.answer, None);
    assert_eq!(explanation.client.as_deref(), Some("pid 7 (curl)"));
    assert!(detail(&explanation, "answer").is_some_and(|d| d.starts_with("not balanced")));

    client.inside = true;
    assert!(explain(query(ORDERS), Some(&client), &tables, &names).answer.is_some());
}

/// Of two draws the lighter one: the probabilities that the kernel's choice has.
#[test]
fn the_lighter_of_two() {
    let addresses = ["10.0.0.1:80", "10.0.0.2:80", "10.0.0.3:80"];
    let names = Known(addresses.map(|address| backend(address, State::Healthy, 1)).into());
    let policy = Policy::new(1, 100, 100, 100);
    let out = [1, 2].iter().fold(Ejection::NONE, |known, client| {
        known.fail(policy, Client::of_cgroup(*client), Token::NONE, NOW).expect("a change")
    });
    for (active, ejected, expected) in [
        ([0, 0, 0], None, [1.0 / 3.0; 3]),
        ([0, 1, 2], None, [5.0 / 9.0, 3.0 / 9.0, 1.0 / 9.0]),
        ([2, 2, 0], None, [2.0 / 9.0, 2.0 / 9.0, 5.0 / 9.0]),
        // When both draws are out, it is drawn again by weight.
        ([0, 5, 0], Some(2), [11.0 / 18.0, 7.0 / 18.0, 0.0]),
    ] {
        let mut tables = Memory::default();
        tables.serve(key_of(ORDERS), &addresses.map(|address| (address, 1)), Reason::NoEndpoint);
        let word = &tables.services[0].table;
        word.store(Table(word.load()).by(Algorithm::LeastConnections).0);
        tables.active = (0..).zip(active).collect();
        tables.ejections = ejected.into_iter().map(|backend| (backend, out)).collect();
        let explanation = explain(query(ORDERS), None, &tables, &names);
        let scores: Vec<_> = explanation.candidates.iter().map(|c| c.score).collect();
        let near = scores.iter().zip(expected).all(|(have, due)| (have - due).abs() < 1e-9);
        assert!(scores.len() == 3 && near, "{active:?} {ejected:?}: {scores:?}");
        assert!(detail(&explanation, "choice").is_some_and(|text| text.contains("of two")));
    }
}
