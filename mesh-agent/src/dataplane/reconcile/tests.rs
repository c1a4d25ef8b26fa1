//! The order of updates, against maps that check it, with faults and with programs still running.

mod adopt;
mod away;
mod model;
mod rename;

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use mesh_common::maglev::Size;
use mesh_common::{Algorithm, Choice, Protocol, Reason, Slot, State, Verdict, translate};
use proptest::prelude::*;

use super::extents::{Content, Written};
use super::*;
use crate::compile::{self, BackendKey, Candidate, Rows, Rules, TableKey};
use crate::dataplane::fault::Faulty;
use crate::dataplane::maps::Capacity;
use crate::dataplane::memory::Memory;

/// Which operations fail.
type Fails = Box<dyn FnMut(&'static str) -> bool>;

const ROOMY: Capacity =
    Capacity { frontends: 64, services: 64, slots: 256, backends: 128, virtual_ips: 2 };

fn name(n: u8) -> ServiceName {
    ServiceName::new(&format!("s{n}"))
}

fn frontend(n: u8) -> FrontendKey {
    FrontendKey::new(Addr::from(std::net::Ipv4Addr::new(10, 96, 0, n)), 80, Protocol::Tcp)
}

fn address(n: u8) -> SocketAddr {
    SocketAddr::from(([10, 0, 0, n], 8080))
}

/// A service of these frontends and endpoints; none of the latter refuses.
fn tables(frontends: &[u8], endpoints: &[u8]) -> Arc<Tables> {
    let backend = |&n: &u8| compile::Backend {
        key: BackendKey { port: 80, protocol: Protocol::Tcp, address: address(n) },
        weight: 1,
        state: State::Healthy,
        listed: true,
        by_command: false,
    };
    let endpoints: BTreeSet<u8> = endpoints.iter().copied().collect();
    let backends: Vec<_> = endpoints.iter().map(backend).collect();
    let rows = if endpoints.is_empty() {
        Rows::Refuse(Reason::NoEndpoint)
    } else {
        let weight = |place: usize| Candidate { place, weight: backends[place].weight };
        Rows::Candidates((0..endpoints.len()).map(weight).collect())
    };
    let key = TableKey { port: 80, protocol: Protocol::Tcp, v4: true };
    Arc::new(Tables {
        backends,
        tables: if frontends.is_empty() { Vec::new() } else { vec![(key, rows)] },
        frontends: frontends.iter().map(|&n| (frontend(n), 0)).collect(),
        rules: Rules::default(),
        algorithm: algorithm(&endpoints),
        groups: BTreeMap::new(),
        panics: BTreeSet::new(),
        source: 0,
    })
}

/// Another one for other endpoints, as often as not.
fn algorithm<'e>(endpoints: impl IntoIterator<Item = &'e u8>) -> Algorithm {
    let endpoints: BTreeSet<u8> = endpoints.into_iter().copied().collect();
    Algorithm::from_number(endpoints.iter().sum::<u8>() % 3)
}

/// Everyone who answers at a frontend, or why nobody does.
fn answers(memory: &Memory, key: &FrontendKey) -> Result<BTreeSet<SocketAddr>, Option<Reason>> {
    let mut seen = BTreeSet::new();
    for _ in 0..64 {
        match translate(memory, memory, key) {
            Verdict::Pass => return Err(None),
            Verdict::Refuse(reason, _) => return Err(Some(reason)),
            Verdict::Balance(Choice { slot, .. }) => {
                seen.insert(SocketAddr::new(slot.addr.ip(), u16::from_be(slot.port)));
            }
        }
    }
    Ok(seen)
}

fn finish<M: Maps>(reconciler: &mut Reconciler<M>) {
    for _ in 0..8 {
        reconciler.retry();
        if reconciler.begin_grace() {
            reconciler.end_grace(true);
        }
    }
}

#[test]
fn a_service_comes_changes_and_goes() {
    let mut reconciler = Reconciler::new(Memory::new(ROOMY));
    let mut apply = |frontends: &[u8], endpoints: &[u8]| {
        let outcome = reconciler.apply(vec![(name(1), tables(frontends, endpoints))]);
        assert!(outcome.iter().all(|(_, problems)| problems.is_empty()), "{outcome:?}");
        let who = answers(reconciler.maps(), &frontend(1));
        finish(&mut reconciler);
        (who, reconciler.usage())
    };
    let both = BTreeSet::from([address(1), address(2)]);
    assert_eq!(apply(&[1], &[1, 2]).0, Ok(both));
    assert_eq!(apply(&[1], &[2]).0, Ok(BTreeSet::from([address(2)])));
    assert_eq!(apply(&[1], &[]).0, Err(Some(Reason::NoEndpoint)));
    assert_eq!(apply(&[], &[]), (Err(None), Usage::default()));
}

#[test]
fn unchanged_tables_are_not_written() {
    let writes = std::cell::Cell::new(0);
    let maps = Faulty::new(Memory::new(ROOMY), |_: &'static str| {
        writes.set(writes.get() + 1);
        false
    });
    let mut reconciler = Reconciler::new(maps);
    reconciler.apply(vec![(name(1), tables(&[1, 2], &[1, 2]))]);
    assert!(writes.replace(0) > 0);
    reconciler.apply(vec![(name(1), tables(&[1, 2], &[1, 2]))]);
    assert_eq!(writes.get(), 0);
}

/// The slots serve all algorithms: another one is one store for each frontend, and needs no grace.
#[test]
fn another_algorithm_is_one_store() {
    let writes = std::cell::RefCell::new(Vec::new());
    let maps = Faulty::new(Memory::new(ROOMY), |operation: &'static str| {
        writes.borrow_mut().push(operation);
        false
    });
    let mut reconciler = Reconciler::new(maps);
    let of = |algorithm| {
        let tables = Tables::clone(&tables(&[1, 2], &[1, 2]));
        vec![(name(1), Arc::new(Tables { algorithm, ..tables }))]
    };
    reconciler.apply(of(Algorithm::Random));
    finish(&mut reconciler);
    for algorithm in [Algorithm::RoundRobin, Algorithm::LeastConnections, Algorithm::Random] {
        writes.borrow_mut().clear();
        reconciler.apply(of(algorithm));
        assert_eq!(*writes.borrow(), ["switching a table in SERVICES"; 2]);
        assert!(!reconciler.begin_grace());
        for key in [frontend(1), frontend(2)] {
            let record = Maps::frontend(reconciler.maps(), &key).expect("an entry").service;
            let service = mesh_common::Tables::service(&reconciler.maps().maps, record);
            assert_eq!(service.expect("a record").table().algorithm(), algorithm);
        }
    }
    reconciler.apply(vec![(name(1), tables(&[], &[]))]);
    finish(&mut reconciler);
    assert_eq!(reconciler.usage(), Usage::default());
}

#[test]
fn an_address_moves_without_a_gap() {
    let mut reconciler = Reconciler::new(Memory::new(ROOMY));
    reconciler.apply(vec![(name(1), tables(&[1], &[1])), (name(2), tables(&[2], &[2]))]);
    let before = reconciler.maps().frontend(&frontend(1));
    reconciler.apply(vec![(name(1), tables(&[], &[])), (name(2), tables(&[1, 2], &[2]))]);
    assert_eq!(answers(reconciler.maps(), &frontend(1)), Ok(BTreeSet::from([address(2)])));
    // Replaced by one with a generation of its own: what clients have of the former is not the other's.
    let after = Maps::frontend(reconciler.maps(), &frontend(1)).expect("an entry");
    assert_ne!(Some(after.generation), before.map(|before| before.generation));
    finish(&mut reconciler);
    assert_eq!(reconciler.usage().slots, 1);
}

/// The texts of what was in the way of each service.
fn texts(outcome: &[(ServiceName, Vec<Problem>)]) -> Vec<String> {
    outcome.iter().flat_map(|(_, problems)| problems).map(ToString::to_string).collect()
}

#[test]
fn what_does_not_fit_is_named_and_the_rest_works() {
    let capacity = Capacity { backends: 4, ..ROOMY };
    let mut reconciler = Reconciler::new(Memory::new(capacity));
    let wanted = vec![(name(1), tables(&[1], &[1, 2])), (name(2), tables(&[2], &[3, 4]))];
    let problems = texts(&reconciler.apply(wanted));
    assert!(problems.len() == 1 && problems[0].contains("2 of 2 backends"), "{problems:?}");
    assert!(problems[0].contains("BACKENDS holds 4"), "{problems:?}");
    assert!(answers(reconciler.maps(), &frontend(1)).is_ok());
    // It is refused and does not leave for a router.
    assert_eq!(answers(reconciler.maps(), &frontend(2)), Err(Some(Reason::NoRoom)));
    // Room is made: what did not fit comes by itself.
    reconciler.apply(vec![(name(1), tables(&[], &[]))]);
    finish(&mut reconciler);
    assert!(answers(reconciler.maps(), &frontend(2)).is_ok());
}

/// As full as it gets, a service can be changed, replaced and renamed, and serves all the while.
#[test]
fn full_maps_follow_every_change() {
    let capacity = Capacity { backends: 7, slots: 14, ..ROOMY };
    let mut reconciler = Reconciler::new(Memory::new(capacity));
    let others = vec![(name(1), tables(&[1], &[1, 2, 3])), (name(2), tables(&[2], &[9]))];
    assert_eq!(texts(&reconciler.apply(others)), [""; 0]);
    let mut service = 1;
    for (rename, endpoints) in
        [(false, &[2, 3][..]), (false, &[3, 4]), (true, &[4, 5, 6]), (true, &[7, 8, 10])]
    {
        let before = answers(reconciler.maps(), &frontend(1));
        let old = service;
        service += u8::from(rename) * 2;
        let wanted = [(name(old), tables(&[], &[])), (name(service), tables(&[1], endpoints))];
        reconciler.apply(wanted[usize::from(!rename)..].to_vec());
        let after = Ok(endpoints.iter().map(|&n| address(n)).collect());
        // At once, or when those that went have given back what they had.
        let now = answers(reconciler.maps(), &frontend(1));
        assert!(now == after || now == before, "{now:?}");
        finish(&mut reconciler);
        assert_eq!(answers(reconciler.maps(), &frontend(1)), after);
        assert!(!reconciler.is_unfinished());
    }
}

/// Many changes within one grace period use up the slots: the table stays until there are some.
#[test]
fn changes_faster_than_a_grace_period() {
    let capacity = Capacity { backends: 10, slots: 20, ..ROOMY };
    let mut reconciler = Reconciler::new(Memory::new(capacity));
    let mut last = Vec::new();
    for n in 0..8 {
        last = vec![n, n + 1, n + 2, n + 3, n + 4];
        reconciler.apply(vec![(name(1), tables(&[1], &last))]);
        let now = answers(reconciler.maps(), &frontend(1)).expect("it serves");
        assert_eq!(now.len(), 5, "no table is cut short for what will be there in a moment");
        reconciler.begin_grace();
    }
    reconciler.end_grace(true);
    finish(&mut reconciler);
    let wanted = last.iter().map(|&n| address(n)).collect();
    assert_eq!(answers(reconciler.maps(), &frontend(1)), Ok(wanted));
    assert!(!reconciler.is_unfinished());
}

/// Free slots in pieces: the table has what fits, and is not written again and again.
#[test]
fn slots_in_pieces() {
    let capacity = Capacity { backends: 12, slots: 24, ..ROOMY };
    let mut extents = Extents::new(capacity.slots, 0);
    let mut memory = Memory::new(capacity);
    let slots = |n: u32| {
        let slots: Vec<_> = (0..n).map(|backend| Slot { backend, ..Slot::default() }).collect();
        Content { backends: slots.len(), slots, ..Content::default() }
    };
    let mut held = Vec::new();
    for _ in 0..6 {
        for len in [3, 1] {
            match extents.write(&mut memory, &slots(len), None).expect("no fault") {
                Written::Table(table) => held.push(table),
                _ => panic!("there is room"),
            }
        }
    }
    for table in held.iter().filter(|table| table.len() == 3) {
        extents.release(*table);
    }
    let write = |extents: &mut Extents, memory: &mut Memory, len| {
        extents.write(memory, &slots(len), None).expect("no fault")
    };
    assert!(matches!(write(&mut extents, &mut memory, 4), Written::Busy));
    extents.begin_grace();
    assert!(matches!(write(&mut extents, &mut memory, 4), Written::Busy));
    extents.end_grace(&memory, &mut Vec::new());
    assert!(matches!(write(&mut extents, &mut memory, 4), Written::Room(3)));
    let Written::Table(table) = write(&mut extents, &mut memory, 3) else {
        panic!("there is room")
    };
    assert!(extents.is_as_good(&memory, table, &slots(4).slots, 3));
    assert!(!extents.is_as_good(&memory, table, &slots(4).slots, 4), "a longer one is better");
    assert!(!extents.is_as_good(&memory, table, &slots(2).slots, 2), "it has one that is gone");
}

/// From and to consistent hashes: entries come and go with their tables, a larger table stays, and what
/// has no room for entries is served all the same.
#[test]
fn consistent_hashes() {
    let hashed = |frontends: &[u8], endpoints: &[u8]| {
        let tables = (*tables(frontends, endpoints)).clone();
        Arc::new(Tables { algorithm: Algorithm::HashClient, ..tables })
    };
    let capacity = Capacity { backends: 64, slots: 128 + 2_600, ..ROOMY };
    let mut reconciler = Reconciler::new(Memory::new(capacity));
    let table = |reconciler: &Reconciler<Memory>, n| {
        let record = Maps::frontend(reconciler.maps(), &frontend(n)).expect("an entry").service;
        mesh_common::Tables::service(reconciler.maps(), record).expect("a record").table()
    };
    let all = |places: &[u8]| Ok(places.iter().map(|&n| address(n)).collect::<BTreeSet<_>>());
    for (wanted, size, slots) in [
        (hashed(&[1], &[1, 2, 3]), Some(Size::Small), 3 + 256),
        (tables(&[1], &[1, 2, 3]), None, 3),
        (hashed(&[1], &[1, 2, 3, 4, 5]), Some(Size::Middle), 5 + 2_048),
        // The second set of entries has no room beside the first, so it is smaller for a while.
        (hashed(&[1], &[1, 2, 3]), Some(Size::Small), 3 + 256),
        (hashed(&[1], &[1, 2]), Some(Size::Small), 2 + 256),
        (hashed(&[1], &[]), None, 0),
    ] {
        reconciler.apply(vec![(name(1), Arc::clone(&wanted))]);
        finish(&mut reconciler);
        let table = table(&reconciler, 1);
        assert_eq!(table.algorithm().is_hash() && !table.is_empty(), size.is_some(), "{table:?}");
        assert!(size.is_none_or(|size| table.size() == size), "{table:?}");
        assert_eq!(reconciler.usage().slots, slots);
        if !wanted.backends.is_empty() {
            let places: Vec<u8> = (1..=u8::try_from(wanted.backends.len()).expect("few")).collect();
            assert_eq!(answers(reconciler.maps(), &frontend(1)), all(&places));
        }
    }
    // Two of middle size do not fit beside each other.
    let five = [1, 2, 3, 4, 5];
    for n in [2, 3] {
        reconciler.apply(vec![(name(n), hashed(&[n], &five))]);
        finish(&mut reconciler);
    }
    assert_eq!([2, 3].map(|n| table(&reconciler, n).size()), [Size::Middle, Size::Small]);
    for n in 4..=8 {
        let outcome = reconciler.apply(vec![(name(n), hashed(&[n], &five))]);
        finish(&mut reconciler);
        assert_eq!(answers(reconciler.maps(), &frontend(n)), all(&five));
        if !table(&reconciler, n).algorithm().is_hash() {
            assert!(matches!(&outcome[0].1[..], [Problem::Entries { .. }]), "{outcome:?}");
        }
    }
    assert!(!table(&reconciler, 8).algorithm().is_hash(), "no room for that many");
    for n in 1..=8 {
        reconciler.apply(vec![(name(n), Arc::default())]);
    }
    finish(&mut reconciler);
    assert_eq!(reconciler.usage(), Usage::default());
}

#[test]
fn an_address_stays_until_its_new_owner_has_it() {
    let fail = std::cell::Cell::new(false);
    let maps = Faulty::new(Memory::new(ROOMY), |operation: &'static str| {
        fail.get() && operation == "writing SLOTS"
    });
    let mut reconciler = Reconciler::new(maps);
    reconciler.apply(vec![(name(1), tables(&[1], &[1]))]);
    fail.set(true);
    reconciler.apply(vec![(name(1), tables(&[], &[])), (name(2), tables(&[1], &[2]))]);
    finish(&mut reconciler);
    let at = |n| Ok(BTreeSet::from([address(n)]));
    assert_eq!(answers(&reconciler.maps().maps, &frontend(1)), at(1));
    fail.set(false);
    finish(&mut reconciler);
    assert_eq!(answers(&reconciler.maps().maps, &frontend(1)), at(2));
    reconciler.apply(vec![(name(2), tables(&[], &[]))]);
    finish(&mut reconciler);
    assert_eq!(reconciler.usage(), Usage::default());
}

#[test]
fn virtual_ips() {
    let mut reconciler = Reconciler::new(Memory::new(ROOMY));
    reconciler.apply(vec![(name(1), tables(&[1], &[1]))]);
    let ranges = ["10.96.0.0/16", "fd00:96::/64"].map(|range| range.parse().expect("a range"));
    reconciler.set_virtual_ips(&ranges).expect("room for two");
    let at = |address: &str, port| {
        let address: std::net::IpAddr = address.parse().expect("an address");
        answers(reconciler.maps(), &FrontendKey::new(address.into(), port, Protocol::Tcp))
    };
    assert!(at("10.96.0.1", 80).is_ok());
    assert_eq!(at("10.96.0.1", 81), Err(Some(Reason::NoPort)));
    assert_eq!(at("10.96.0.9", 80), Err(Some(Reason::NoService)));
    assert_eq!(at("fd00:96::1", 80), Err(Some(Reason::NoService)));
    assert_eq!(at("10.97.0.1", 80), Err(None));
    let three = [ranges[0], ranges[1], ranges[0]];
    let error = reconciler.set_virtual_ips(&three).expect_err("no room for three");
    assert!(error.to_string().contains("1 of 3 ranges do not fit: VIRTUAL_IPS holds 2"), "{error}");
}

/// A step of the storm.
#[derive(Clone, Debug)]
enum Step {
    Apply(Vec<(u8, Vec<u8>, Vec<u8>)>),
    StartProgram,
    EndPrograms,
    BeginGrace,
    EndGrace,
    Retry,
}

fn step() -> impl Strategy<Value = Step> {
    let some = |below: u8, most: usize| prop::collection::vec(0..below, 0..most);
    prop_oneof![
        6 => prop::collection::vec((0u8..4, some(6, 4), some(12, 6)), 1..3).prop_map(Step::Apply),
        1 => Just(Step::StartProgram),
        1 => Just(Step::EndPrograms),
        2 => Just(Step::BeginGrace),
        2 => Just(Step::EndGrace),
        1 => Just(Step::Retry),
    ]
}

proptest! {
    /// Whatever fails on the way: `Memory` has seen nothing half visible (it panics), the end is
    /// what was wanted last, and once all is removed nothing is left in use.
    #[test]
    fn converges_under_faults(
        steps in prop::collection::vec(step(), 1..60),
        faults in prop::collection::btree_set(0usize..300, 0..60),
        small in any::<bool>(),
        // For how many records of each kind there is memory, for good.
        short in prop::option::of((0u32..6, 0u32..20, 0u32..10)),
    ) {
        let capacity =
            if small { Capacity { frontends: 9, services: 5, slots: 18, backends: 9, ..ROOMY } } else { ROOMY };
        let mut calls = 0;
        let mut memory = Memory::new(capacity);
        if let Some((services, slots, backends)) = short {
            memory.memory = Capacity { services, slots, backends, ..capacity };
        }
        let fails: Fails = Box::new(move |_| {
            calls += 1;
            faults.contains(&calls)
        });
        let maps = Faulty::new(memory, fails);
        let mut reconciler = Reconciler::new(maps);
        let mut wanted: HashMap<u8, (Vec<u8>, Vec<u8>)> = HashMap::new();
        let mut grace = false;
        for step in steps {
            match step {
                Step::Apply(batch) => {
                    let mut changed = BTreeSet::new();
                    for (service, frontends, endpoints) in batch {
                        // A frontend belongs to one service: the catalog sees to that.
                        for (other, (theirs, _)) in &mut wanted {
                            let before = theirs.len();
                            theirs.retain(|n| !frontends.contains(n));
                            if theirs.len() != before {
                                changed.insert(*other);
                            }
                        }
                        wanted.insert(service, (frontends, endpoints));
                        changed.insert(service);
                    }
                    let batch = changed.iter().map(|n| {
                        let (frontends, endpoints) = &wanted[n];
                        (name(*n), tables(frontends, endpoints))
                    });
                    reconciler.apply(batch.collect());
                }
                Step::StartProgram => reconciler.maps_mut().maps.start_readers(),
                Step::EndPrograms if !grace => reconciler.maps_mut().maps.end_readers(),
                Step::EndPrograms => {}
                Step::BeginGrace => grace |= reconciler.begin_grace(),
                Step::EndGrace => {
                    if std::mem::take(&mut grace) {
                        // A grace period is over when the programs have ended.
                        reconciler.maps_mut().maps.end_readers();
                        reconciler.end_grace(true);
                    }
                }
                Step::Retry => {
                    reconciler.retry();
                }
            }
        }
        reconciler.maps_mut().maps.end_readers();
        reconciler.end_grace(true);
        reconciler.maps_mut().fails = Box::new(|_| false);
        finish(&mut reconciler);
        prop_assert!(small || short.is_some() || !reconciler.is_unfinished());
        for key in (0..6).map(frontend) {
            let owner = wanted.values().find(|(f, _)| f.iter().any(|&n| frontend(n) == key));
            let expected = match owner {
                None => Err(None),
                Some((_, endpoints)) if endpoints.is_empty() => Err(Some(Reason::NoEndpoint)),
                Some((_, endpoints)) => Ok(endpoints.iter().map(|&n| address(n)).collect()),
            };
            let seen = answers(&reconciler.maps().maps, &key);
            if !reconciler.is_unfinished() {
                prop_assert_eq!(seen, expected);
                if let Some((_, endpoints)) = owner.filter(|(_, endpoints)| !endpoints.is_empty()) {
                    let memory = &reconciler.maps().maps;
                    let record = Maps::frontend(memory, &key).expect("an entry").service;
                    let service = mesh_common::Tables::service(memory, record).expect("a record");
                    prop_assert_eq!(service.table().algorithm(), algorithm(endpoints));
                }
                continue;
            }
            // Not all fits: fewer endpoints, or none, or no frontend; never one that is gone.
            match (seen, expected) {
                (Ok(seen), Ok(expected)) => prop_assert!(seen.is_subset(&expected)),
                (Err(None | Some(Reason::NoRoom)), _) => {}
                (seen, expected) => prop_assert_eq!(seen, expected),
            }
        }
        let nothing = wanted.keys().map(|n| (name(*n), tables(&[], &[]))).collect();
        reconciler.apply(nothing);
        finish(&mut reconciler);
        prop_assert_eq!(reconciler.usage(), Usage::default());
        prop_assert_eq!(reconciler.maps().maps.frontends().count(), 0);
    }
}
