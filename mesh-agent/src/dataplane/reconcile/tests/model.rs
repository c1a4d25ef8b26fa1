//! Random sequences of changes of whole services, of everything that a definition and the conditions of
//! endpoints can say, against what the compiler wants: whenever nothing is in the way, the maps hold that,
//! all of it, and nothing else.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use mesh_common::affinity::By;
use mesh_common::alias::{self, Column, Entry};
use mesh_common::maglev::{self, Turn};
use mesh_common::{Marks, State, balance};

use super::*;
use crate::compile::{Condition, Here, Input};
use crate::model::{
    Affinity, EjectionPolicy, Endpoint, Fallback, Health, Locality, Service, ServicePort,
    WhenAllUnhealthy,
};

/// Entries of consistent hashes take most of the slots: so many tables may have them, twice.
pub(super) const WIDE: Capacity = Capacity { slots: 256 + 40 * 256, ..ROOMY };

/// An endpoint: the last byte of its address, and what is known of it.
#[derive(Clone, Copy, Debug)]
struct End {
    number: u8,
    weight: u16,
    priority: u8,
    near: bool,
    condition: Condition,
}

/// A service as one step has it.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    service: u8,
    /// Of both families, and each with all ports.
    addresses: Vec<u8>,
    /// TCP, UDP or both.
    protocols: u8,
    algorithm: u8,
    /// Affinity, ejection, locality, refusal when all are unhealthy: a bit each.
    policies: u8,
    /// The service that this one falls back to, if it is another one.
    fallback: u8,
    ends: Vec<End>,
}

/// Even numbers are IPv4, odd ones IPv6.
fn ip(network: u8, n: u8) -> IpAddr {
    match n % 2 {
        0 => Ipv4Addr::new(10, network, 0, n).into(),
        _ => Ipv6Addr::new(0xfd00, network.into(), 0, 0, 0, 0, 0, n.into()).into(),
    }
}

fn end() -> impl Strategy<Value = End> {
    let weight = prop_oneof![Just(0u16), Just(1), Just(100), Just(65_535), 1u16..300];
    let ramp = prop_oneof![Just(Condition::FULL), 100u16..1_000];
    let state = (0u8..4).prop_map(State::from_number);
    (0u8..8, weight, 0u8..3, any::<bool>(), (state, any::<bool>(), ramp)).prop_map(
        |(number, weight, priority, near, (state, is_out, ramp))| {
            let condition = Condition { state, is_out, ramp, by_command: near && is_out };
            End { number, weight, priority, near, condition }
        },
    )
}

pub(super) fn plan() -> impl Strategy<Value = Plan> {
    let addresses = prop::collection::vec(0u8..6, 0..4);
    let ends = prop::collection::vec(end(), 0..7);
    // Consistent hashes cost the test most.
    let algorithm = prop_oneof![3 => 0u8..3, 1 => 3u8..8];
    (0u8..4, addresses, 1u8..4, algorithm, 0u8..16, 0u8..8, ends).prop_map(
        |(service, addresses, protocols, algorithm, policies, fallback, mut ends)| {
            // No endpoint twice.
            ends.sort_by_key(|end| end.number);
            ends.dedup_by_key(|end| end.number);
            Plan { service, addresses, protocols, algorithm, policies, fallback, ends }
        },
    )
}

/// The definition, at the addresses that are the service's own.
fn service(plan: &Plan) -> Service {
    let port = |protocol| ServicePort { name: String::new(), port: 80, target: 8080, protocol };
    let protocols = [(1, Protocol::Tcp), (2, Protocol::Udp)];
    let of = |(bit, protocol)| (plan.protocols & bit != 0).then(|| port(protocol));
    let has = |bit| plan.policies & bit != 0;
    Service {
        name: name(plan.service),
        addresses: plan.addresses.iter().map(|&n| ip(96, n)).collect(),
        ports: protocols.into_iter().filter_map(of).collect(),
        algorithm: Algorithm::from_number(plan.algorithm),
        health: Health::Off,
        ejection: has(2).then(EjectionPolicy::default),
        when_all_unhealthy: if has(8) {
            WhenAllUnhealthy::Refuse
        } else {
            WhenAllUnhealthy::UseAll
        },
        panic_threshold: 0,
        end_waiting: false,
        drain_timeout: None,
        affinity: has(1).then_some(Affinity {
            by: if plan.fallback.is_multiple_of(2) { By::Client } else { By::Namespace },
            timeout: Duration::from_secs(u64::from(plan.algorithm) + 1),
        }),
        locality: has(4).then(Locality::default),
        slow_start: None,
        fallback: has(8).then(Fallback::default),
        fallback_service: None,
        endpoints: plan.ends.iter().map(|end| endpoint(plan.service, end)).collect(),
    }
}

/// Of another service, another address.
fn endpoint(service: u8, end: &End) -> Endpoint {
    Endpoint {
        address: ip(service, end.number),
        port: None,
        weight: end.weight,
        zone: Some(if end.near { "near" } else { "far" }.into()),
        node: None,
        priority: end.priority,
        drain: false,
    }
}

/// All services, and what is wanted of each.
#[derive(Default)]
pub(super) struct Model {
    plans: BTreeMap<u8, Plan>,
    pub(super) wanted: BTreeMap<u8, Arc<Tables>>,
}

impl Model {
    /// Makes these plans the ones in force, as the catalog would: an address belongs to one service. Gives
    /// what has changed.
    pub(super) fn apply(&mut self, batch: Vec<Plan>) -> Vec<(ServiceName, Arc<Tables>)> {
        for mut plan in batch {
            plan.addresses.sort_unstable();
            plan.addresses.dedup();
            for other in self.plans.values_mut() {
                other.addresses.retain(|n| !plan.addresses.contains(n));
            }
            self.plans.insert(plan.service, plan);
        }
        let mut changed = Vec::new();
        for n in self.plans.keys().copied().collect::<Vec<_>>() {
            let tables = Arc::new(self.compiled(n));
            if self.wanted.get(&n) != Some(&tables) {
                self.wanted.insert(n, Arc::clone(&tables));
                changed.push((name(n), tables));
            }
        }
        changed
    }

    fn compiled(&self, n: u8) -> Tables {
        let plan = &self.plans[&n];
        let own = service(plan);
        let frontends: Vec<_> = own
            .addresses
            .iter()
            .flat_map(|&a| own.ports.iter().map(move |p| (a, p)))
            .map(|(a, p)| FrontendKey::new(a.into(), p.port, p.protocol))
            .collect();
        let other = self.plans.get(&plan.fallback).filter(|other| other.service != n).map(service);
        let condition = |of: &Service, address: SocketAddr| {
            let plan = self.plans.values().find(|plan| name(plan.service) == of.name);
            let plan = plan.expect("a plan");
            let found = plan.ends.iter().find(|end| ip(plan.service, end.number) == address.ip());
            found.expect("an endpoint").condition
        };
        let before = self.wanted.get(&n).map(|tables| tables.groups.clone()).unwrap_or_default();
        let input = Input {
            service: &own,
            frontends: &frontends,
            fallback: other.as_ref(),
            here: Here { node: "here", zone: Some("near"), tick: 4_000_000 },
            before: &before,
            source: 0,
        };
        compile::compile(input, condition)
    }

    /// Everything that is in the maps, and nothing else.
    pub(super) fn ensure_held<M: Maps>(
        &self,
        reconciler: &Reconciler<M>,
        memory: &Memory,
    ) -> Result<(), TestCaseError> {
        let mut keys = BTreeSet::new();
        for (n, tables) in &self.wanted {
            let held: HashMap<_, _> = reconciler.backends(&name(*n)).collect();
            prop_assert_eq!(held.len(), tables.backends.len());
            for backend in &tables.backends {
                let id = held.get(&backend.key);
                prop_assert!(id.is_some(), "{:?} is not there", backend);
                let record = Maps::backend(memory, id.copied().unwrap_or_default());
                prop_assert_eq!(record.map(|held| written(&held)), Some(wanted(backend)));
            }
            for (key, place) in &tables.frontends {
                keys.insert(format!("{key:?}"));
                keys.insert(format!("{:?}", FrontendKey::address_only(key.addr)));
                let (_, rows) = &tables.tables[*place];
                ensure_frontend(memory, key, tables, rows)?;
            }
        }
        let there: BTreeSet<_> = memory.frontends().map(|(key, _)| format!("{key:?}")).collect();
        prop_assert_eq!(there, keys);
        Ok(())
    }
}

/// What a record of `BACKENDS` says besides whose life it is.
type Record = (Addr, u16, u8, Marks, u16, u16);

fn written(held: &Backend) -> Record {
    (held.addr, held.port, held.protocol, held.marks, held.weight, held.service_port)
}

fn wanted(backend: &compile::Backend) -> Record {
    let BackendKey { address, protocol, .. } = backend.key;
    let marks = Marks::of(backend.state).listed(backend.listed).by_command(backend.by_command);
    let port = address.port().to_be();
    (address.ip().into(), port, protocol as u8, marks, backend.weight, backend.key.port)
}

/// What is dialled leads to its record, and that to these rows by this algorithm and these rules.
fn ensure_frontend(
    memory: &Memory,
    key: &FrontendKey,
    tables: &Tables,
    rows: &Rows,
) -> Result<(), TestCaseError> {
    let value = Maps::frontend(memory, key);
    prop_assert!(value.is_some(), "{:?} is not there", key);
    let value = value.unwrap_or_default();
    let service = mesh_common::Tables::service(memory, value.service).expect("a record");
    prop_assert_eq!((service.key, service.generation()), (*key, value.generation));
    prop_assert_eq!(
        (service.policy(), service.affinity()),
        (tables.rules.policy, tables.rules.affinity)
    );
    let table = service.table();
    let candidates = match rows {
        Rows::Refuse(reason) => {
            prop_assert_eq!(table, Table::refuse(*reason));
            return Ok(());
        }
        Rows::Candidates(candidates) => candidates,
    };
    prop_assert_eq!(table.len() as usize, candidates.len());
    prop_assert_eq!(table.algorithm(), tables.algorithm);
    let slot = |n: u32| Maps::slot(memory, table.base() + n).expect("a slot");
    let weights: Vec<u32> = candidates.iter().map(|row| row.weight.into()).collect();
    let mut columns = vec![Column::default(); weights.len()];
    alias::build(&weights, &mut columns, &mut vec![Entry::default(); weights.len()]);
    let mut ends = vec![0; weights.len()];
    balance::tickets(&weights, &mut ends);
    for ((n, row), (column, end)) in (0..).zip(candidates).zip(columns.into_iter().zip(ends)) {
        let (slot, backend) = (slot(n), tables.backends[row.place]);
        let has = (slot.addr, slot.port, slot.weight, slot.threshold, slot.alias, slot.end);
        let (addr, port, ..) = wanted(&backend);
        prop_assert_eq!(has, (addr, port, row.weight, column.threshold, column.alias, end));
        let named = Maps::backend(memory, slot.backend).expect("a record");
        prop_assert_eq!((written(&named), named.generation), (wanted(&backend), slot.generation));
    }
    if tables.algorithm.is_hash() {
        let names = candidates.iter().map(|row| {
            let address = tables.backends[row.place].key.address;
            let [a, b, c, d] = Addr::from(address.ip()).words().map(u64::from);
            maglev::name(a << 32 | b, c << 32 | d, address.port())
        });
        let names: Vec<_> = names.collect();
        let weights: Vec<_> = candidates.iter().map(|row| row.weight).collect();
        let mut due = vec![0; table.size().entries() as usize];
        maglev::build(&names, &weights, &mut due, &mut vec![Turn::default(); names.len()]);
        let entry = |n: u32| slot(table.len() + n / maglev::PER_SLOT).entry(n);
        let held: Vec<_> = (0..table.size().entries()).map(entry).collect();
        prop_assert!(held == due, "{:?} of {:?}", table, candidates);
    }
    Ok(())
}

/// A step of a sequence.
#[derive(Clone, Debug)]
enum Step {
    Apply(Vec<Plan>),
    StartProgram,
    Grace,
    Retry,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => prop::collection::vec(plan(), 1..3).prop_map(Step::Apply),
        1 => Just(Step::StartProgram),
        2 => Just(Step::Grace),
        1 => Just(Step::Retry),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// One operation in ten fails, or none does.
    #[test]
    fn the_maps_are_what_is_wanted(
        steps in prop::collection::vec(step(), 1..30),
        fails in prop_oneof![Just(None), any::<u64>().prop_map(Some)],
    ) {
        let mut random = fails.unwrap_or_default();
        let fails: Fails = Box::new(move |_| {
            random = random.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
            fails.is_some() && (random >> 33) % 10 == 0
        });
        let mut reconciler = Reconciler::new(Faulty::new(Memory::new(WIDE), fails));
        let mut model = Model::default();
        for step in steps {
            match step {
                Step::Apply(batch) => {
                    reconciler.apply(model.apply(batch));
                }
                Step::StartProgram => reconciler.maps_mut().maps.start_readers(),
                Step::Grace => {
                    let begun = reconciler.begin_grace();
                    reconciler.maps_mut().maps.end_readers();
                    if begun {
                        reconciler.end_grace(true);
                    }
                }
                Step::Retry => {
                    reconciler.retry();
                }
            }
            if !reconciler.is_unfinished() {
                model.ensure_held(&reconciler, &reconciler.maps().maps)?;
            }
        }
        reconciler.maps_mut().maps.end_readers();
        reconciler.maps_mut().fails = Box::new(|_| false);
        finish(&mut reconciler);
        prop_assert!(!reconciler.is_unfinished());
        model.ensure_held(&reconciler, &reconciler.maps().maps)?;

        let nothing = model.wanted.keys().map(|n| (name(*n), Arc::default())).collect();
        reconciler.apply(nothing);
        finish(&mut reconciler);
        prop_assert_eq!(reconciler.usage(), Usage::default());
        prop_assert_eq!(reconciler.maps().maps.frontends().count(), 0);
    }
}
