//! Backends that are removed and come back: what is known of their failures.

use mesh_common::ejection::{Phase, ticks};
use mesh_common::{Client, Ejection, Policy, Token};

use super::*;
use crate::dataplane::clock;

/// Days, so that nothing ends while a test runs.
const LONG: u32 = 1 << 24;

fn rules(share: u8) -> Rules {
    Rules { policy: Policy::new(1, LONG, LONG, share), ..Rules::default() }
}

/// At the frontend of the same number.
fn of(service: u8, endpoints: &[u8], share: u8) -> (ServiceName, Arc<Tables>) {
    let tables = Tables::clone(&tables(&[service], endpoints));
    (name(service), Arc::new(Tables { rules: rules(share), ..tables }))
}

fn gone(service: u8) -> (ServiceName, Arc<Tables>) {
    (name(service), Arc::default())
}

fn id<M: Maps>(reconciler: &Reconciler<M>, service: u8, endpoint: u8) -> Option<u32> {
    let name = name(service);
    let mut backends = reconciler.backends(&name);
    backends.find(|(key, _)| key.address == address(endpoint)).map(|(_, id)| id)
}

fn known<M: Maps>(reconciler: &Reconciler<M>, service: u8, endpoint: u8) -> Ejection {
    let id = id(reconciler, service, endpoint).expect("a backend");
    reconciler.maps().counts(id).ejection
}

/// An ejection that began so many ticks later, if it were.
fn ejected(later: u64) -> Ejection {
    let (policy, now) = (rules(100).policy, ticks(clock::monotonic()) + later);
    let suspected = Ejection::NONE.fail(policy, Client::of_cgroup(7), Token::NONE, now);
    suspected.and_then(|known| known.confirm(policy, now)).expect("a change")
}

fn eject(reconciler: &mut Reconciler<Memory>, service: u8, endpoint: u8) -> Ejection {
    let (id, ejection) = (id(reconciler, service, endpoint).expect("a backend"), ejected(0));
    reconciler.maps_mut().find(id, ejection);
    ejection
}

/// A service with these endpoints, of which the first is ejected.
fn one(endpoints: &[u8]) -> (Reconciler<Memory>, Ejection) {
    let mut reconciler = Reconciler::new(Memory::new(ROOMY));
    reconciler.apply(vec![of(1, endpoints, 100)]);
    let ejection = eject(&mut reconciler, 1, endpoints[0]);
    (reconciler, ejection)
}

#[test]
fn an_endpoint_comes_back_as_it_went() {
    let (mut reconciler, ejection) = one(&[1, 2]);
    let before = id(&reconciler, 1, 1);
    // Several times, with and without time for its id to be free.
    for n in 0..4 {
        reconciler.apply(vec![of(1, &[2], 100)]);
        assert_eq!(
            reconciler.absent(&name(1)).map(|key| key.address).collect::<Vec<_>>(),
            [address(1)]
        );
        if n % 2 == 0 {
            finish(&mut reconciler);
        }
        reconciler.apply(vec![of(1, &[1, 2], 100)]);
        assert_eq!(known(&reconciler, 1, 1), ejection);
        assert_eq!(known(&reconciler, 1, 2), Ejection::NONE);
        let returned = reconciler.take_returned();
        assert!(matches!(&returned[..], [one] if one.ejection == ejection && !one.is_spared));
        assert_eq!(reconciler.absent(&name(1)).count(), 0);
    }
    assert_ne!(id(&reconciler, 1, 1), before, "another life");
    // Once it is in, it comes back in.
    let back = id(&reconciler, 1, 1).expect("a backend");
    reconciler.maps_mut().find(back, Ejection::NONE);
    reconciler.apply(vec![of(1, &[2], 100)]);
    reconciler.apply(vec![of(1, &[1, 2], 100)]);
    assert_eq!(reconciler.take_returned(), []);
}

/// Its service goes as a whole and comes back; or has another name meanwhile; or none that knows it.
#[test]
fn a_service_comes_back_with_what_it_knew() {
    let (mut reconciler, ejection) = one(&[1, 2]);
    reconciler.apply(vec![gone(1)]);
    finish(&mut reconciler);
    reconciler.apply(vec![of(1, &[1, 2], 100)]);
    assert_eq!(known(&reconciler, 1, 1), ejection);

    reconciler.apply(vec![of(1, &[2], 100)]);
    let (_, renamed) = of(1, &[1, 2], 100);
    reconciler.apply(vec![gone(1), (name(2), renamed)]);
    assert_eq!(known(&reconciler, 2, 1), ejection);

    // Another service with the same endpoint has seen nothing.
    reconciler.apply(vec![of(3, &[1, 2], 100)]);
    assert_eq!(known(&reconciler, 3, 1), Ejection::NONE);
    reconciler.apply(vec![gone(2)]);
    reconciler.apply(vec![of(4, &[1, 2], 100)]);
    assert_eq!(known(&reconciler, 4, 1), Ejection::NONE);
}

/// Where nothing is ejected, nothing is out, and nothing is remembered.
#[test]
fn without_ejection_nothing_is_remembered() {
    let off = |endpoints: &[u8]| vec![(name(1), tables(&[1], endpoints))];
    for steps in [
        vec![of(1, &[2], 100), off(&[1, 2]).remove(0)],
        vec![off(&[2]).remove(0), of(1, &[1, 2], 100)],
        vec![of(1, &[2], 100), off(&[2]).remove(0), of(1, &[1, 2], 100)],
    ] {
        let (mut reconciler, _) = one(&[1, 2]);
        reconciler.maps_mut().known.clear();
        for step in steps {
            reconciler.apply(vec![step]);
        }
        assert_eq!(known(&reconciler, 1, 1), Ejection::NONE);
    }
}

/// How the try ends is told of a life that is over: nobody else is sent there for it.
#[test]
fn a_try_that_was_under_way_is_void() {
    let (mut reconciler, ejection) = one(&[1, 2]);
    let trying = ejection.take(ticks(clock::monotonic()));
    let before = id(&reconciler, 1, 1).expect("a backend");
    reconciler.maps_mut().find(before, trying);
    reconciler.maps_mut().known.clear();
    reconciler.apply(vec![of(1, &[2], 100)]);
    reconciler.apply(vec![of(1, &[1, 2], 100)]);
    let back = known(&reconciler, 1, 1);
    assert_eq!((back.phase(), back.level(), back.token()), (Phase::Ejected, 1, Token::NONE));
    assert!(back.until() > trying.until());
}

/// Of four, two may be out. One went out while two were away that were out.
#[test]
fn no_more_than_the_share_is_out() {
    let mut reconciler = Reconciler::new(Memory::new(ROOMY));
    reconciler.apply(vec![of(1, &[1, 2, 3, 4], 50)]);
    let [one, _] = [1, 2].map(|endpoint| eject(&mut reconciler, 1, endpoint));
    reconciler.apply(vec![of(1, &[3, 4], 50)]);
    let other = eject(&mut reconciler, 1, 3);
    reconciler.maps_mut().known.clear();
    reconciler.apply(vec![of(1, &[1, 2, 3, 4], 50)]);
    assert_eq!((known(&reconciler, 1, 1), known(&reconciler, 1, 3)), (one, other));
    let spared = known(&reconciler, 1, 2);
    assert!(spared.is_in() && spared.level() == 1, "{spared:?}");
    let returned = reconciler.take_returned();
    let spared: Vec<_> = returned.iter().map(|one| (one.key.address, one.is_spared)).collect();
    assert_eq!(spared, [(address(1), false), (address(2), true)]);
    // Without any other in, it is not out.
    reconciler.apply(vec![of(1, &[], 50)]);
    reconciler.apply(vec![of(1, &[1], 50)]);
    assert!(known(&reconciler, 1, 1).is_in());
}

/// The same endpoint behind another port of the service, instead of the former one; not beside it.
#[test]
fn another_port_leads_to_the_same_endpoint() {
    let at = |ports: &[u16]| {
        let (name, one) = of(1, &[1, 2], 100);
        let mut all = Tables { backends: Vec::new(), tables: Vec::new(), ..Tables::clone(&one) };
        all.frontends.clear();
        for (n, &port) in ports.iter().enumerate() {
            let first = all.backends.len();
            all.backends.extend(one.backends.iter().map(|backend| compile::Backend {
                key: BackendKey { port, ..backend.key },
                ..*backend
            }));
            let (key, _) = one.tables[0];
            let rows = (first..first + 2).map(|place| Candidate { place, weight: 1 });
            all.tables.push((TableKey { port, ..key }, Rows::Candidates(rows.collect())));
            let key = FrontendKey::new(frontend(1).addr, port, Protocol::Tcp);
            all.frontends.push((key, n));
        }
        vec![(name, Arc::new(all))]
    };
    let words = |reconciler: &Reconciler<Memory>| {
        let backends: BTreeMap<_, _> = reconciler.backends(&name(1)).collect();
        let first = backends.iter().filter(|(key, _)| key.address == address(1));
        first
            .map(|(key, id)| (key.port, reconciler.maps().counts(*id).ejection))
            .collect::<Vec<_>>()
    };
    let start = || {
        let mut reconciler = Reconciler::new(Memory::new(ROOMY));
        reconciler.apply(at(&[80]));
        let ejection = eject(&mut reconciler, 1, 1);
        reconciler.maps_mut().known.clear();
        (reconciler, ejection)
    };
    let (mut reconciler, ejection) = start();
    reconciler.apply(at(&[81]));
    assert_eq!(words(&reconciler), [(81, ejection)]);
    reconciler.apply(at(&[81, 82]));
    assert_eq!(words(&reconciler), [(81, ejection), (82, Ejection::NONE)]);
    // With the service away in between.
    let (mut reconciler, ejection) = start();
    reconciler.apply(vec![gone(1)]);
    reconciler.apply(at(&[81]));
    assert_eq!(words(&reconciler), [(81, ejection)]);
}

/// A step of the storm.
#[derive(Clone, Debug)]
enum Step {
    /// A service with these endpoints, or without anything.
    Apply(u8, Option<Vec<u8>>),
    /// This endpoint of a service goes out, for another time each time.
    Eject(u8, u8),
    StartProgram,
    Grace,
    Retry,
}

fn step() -> impl Strategy<Value = Step> {
    let endpoints = prop::collection::vec(0u8..5, 0..5);
    prop_oneof![
        6 => (0u8..3, prop::option::weighted(0.8, endpoints)).prop_map(|(n, e)| Step::Apply(n, e)),
        4 => (0u8..3, 0u8..5).prop_map(|(n, e)| Step::Eject(n, e)),
        1 => Just(Step::StartProgram),
        2 => Just(Step::Grace),
        1 => Just(Step::Retry),
    ]
}

proptest! {
    /// Whatever fails on the way, no table ever leads to a backend of which less is known than there was
    /// (`Memory` panics), and what is known in the end is what was known last.
    #[test]
    fn nothing_is_forgotten_under_faults(
        steps in prop::collection::vec(step(), 1..60),
        faults in prop::collection::btree_set(0usize..300, 0..60),
        small in any::<bool>(),
    ) {
        let capacity = if small { Capacity { services: 4, slots: 18, backends: 9, ..ROOMY } } else { ROOMY };
        let mut calls = 0;
        let fails: Fails = Box::new(move |_| {
            calls += 1;
            faults.contains(&calls)
        });
        let mut reconciler = Reconciler::new(Faulty::new(Memory::new(capacity), fails));
        for (n, step) in (0..).zip(steps) {
            match step {
                Step::Apply(service, None) => drop(reconciler.apply(vec![gone(service)])),
                Step::Apply(service, Some(endpoints)) => {
                    drop(reconciler.apply(vec![of(service, &endpoints, 100)]));
                }
                Step::Eject(service, endpoint) => {
                    let named = reconciler.services.get(&name(service)).is_some_and(|held| {
                        held.backends.values().all(|held| held.record.owner != UNNAMED)
                    });
                    if let Some(id) = id(&reconciler, service, endpoint).filter(|_| named) {
                        reconciler.maps_mut().maps.find(id, ejected(n));
                    }
                }
                Step::StartProgram => reconciler.maps_mut().maps.start_readers(),
                Step::Grace => {
                    let begun = reconciler.begin_grace();
                    reconciler.maps_mut().maps.end_readers();
                    if begun {
                        reconciler.end_grace(true);
                    }
                }
                Step::Retry => drop(reconciler.retry()),
            }
        }
        reconciler.maps_mut().maps.end_readers();
        reconciler.maps_mut().fails = Box::new(|_| false);
        finish(&mut reconciler);
        let all = [0, 1, 2, 3, 4];
        for service in 0..3 {
            reconciler.apply(vec![of(service, &all, 100)]);
        }
        finish(&mut reconciler);
        for (service, endpoint) in (0..3).flat_map(|n| all.map(|endpoint| (n, endpoint))) {
            let wanted = reconciler.maps().maps.known.get(&(name(service).to_string(), address(endpoint)));
            if id(&reconciler, service, endpoint).is_some() {
                prop_assert_eq!(known(&reconciler, service, endpoint), wanted.copied().unwrap_or_default());
            } else {
                prop_assert!(small, "there is room");
            }
        }
    }
}
