//! An agent takes over maps in which there may be anything at all, and is told what it is to bring them to.
//!
//! The maps are those in memory, which panic on a write that a kernel program could see half done. They are
//! first filled by a former agent, so that what is written over them is next to what makes sense.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use mesh_agent::compile::{self, BackendKey, Candidate, Rows, Rules, TableKey, Tables};
use mesh_agent::dataplane::fault::Faulty;
use mesh_agent::dataplane::maps::{Capacity, Contents as _, Kind, Maps};
use mesh_agent::dataplane::memory::Memory;
use mesh_agent::dataplane::reconcile::{Problem, Reconciler, Usage};
use mesh_agent::model::ServiceName;
use mesh_common::{
    Affinity, Algorithm, Backend, FrontendKey, Name, Policy, Protocol, Rate, Reason, Slot, State,
    Table,
};

use crate::damage;
use crate::script::Script;

/// Room for all that is wanted beside all that may be found. Tables of consistent hashes with more than four
/// backends do not fit, so that each has the same size.
const CAPACITY: Capacity =
    Capacity { frontends: 160, services: 64, slots: 2_000, backends: 96, virtual_ips: 4 };

/// Services that may be wanted.
const SERVICES: u8 = 4;
/// Addresses that each of them may have.
const ADDRESSES: u8 = 8;
/// Endpoints of each service, in both families; one more has a consistent hash with another size.
const ENDPOINTS: u8 = 4;

/// How many writes each step of an agent may take: some for each record, and for each entry.
const MOST_WRITES: usize = 4 * (160 + 64 + 96);

type Wanted = Vec<(ServiceName, Arc<Tables>)>;
type Adopting<'w> = Reconciler<Faulty<Memory, Box<dyn FnMut(&'static str) -> bool + 'w>>>;

/// What the kernel holds for what is dialled, but for ids and generations.
#[derive(PartialEq, Debug)]
struct Served {
    rules: Rules,
    owner: Option<Name>,
    table: Table,
    /// Of each slot what the programs go by, and the record of its backend.
    slots: Vec<(Slot, Backend)>,
    /// What lies behind them.
    entries: Vec<Slot>,
}

/// Does all of it.
///
/// # Panics
///
/// When the agent does, or believes what makes no sense, or does not bring the maps to what is wanted.
pub fn check<'s>(script: &'s Script<'s>) {
    let mut former = Reconciler::new(Memory::new(CAPACITY));
    for _ in 0..script.byte() % 3 {
        former.apply(wanted(script));
        // It may have ended at any time.
        if script.byte().is_multiple_of(2) {
            finish(&mut former);
        }
    }
    let mut memory = former.into_maps();
    damage::fill(&mut memory, script);
    for _ in 0..script.byte() % 64 {
        memory.spoil(damage::anything(script));
    }

    let writes = Cell::new(0);
    let count = |_: &'static str| {
        writes.set(writes.get() + 1);
        assert!(writes.get() <= MOST_WRITES, "it does not end");
        false
    };
    let maps = Faulty::new(memory, Box::new(count) as Box<dyn FnMut(&'static str) -> bool>);
    let (mut reconciler, adopted) = Reconciler::adopt(maps).expect("nothing fails");
    ensure_sound(&reconciler);
    let held = reconciler.services().map(|name| reconciler.backends(name).count()).sum::<usize>();
    assert_eq!((adopted.services, adopted.backends), (reconciler.services().count(), held));
    reconciler.set_virtual_ips(&[]).expect("nothing fails");
    assert_eq!(reconciler.maps().virtual_ips().expect("nothing fails"), []);

    writes.set(0);
    let wanted = wanted(script);
    reconciler.apply(wanted.clone());
    let defined: BTreeSet<&str> = wanted.iter().map(|(name, _)| name.as_str()).collect();
    let stale: Vec<_> =
        reconciler.services().filter(|name| !defined.contains(name.as_str())).cloned().collect();
    reconciler.apply(stale.into_iter().map(|name| (name, Arc::default())).collect());
    writes.set(0);
    let left = finish(&mut reconciler);
    assert!(!reconciler.is_unfinished(), "it is never done: {left:?}");
    ensure_as_wanted(&reconciler, &wanted);

    writes.set(0);
    reconciler.apply(wanted.into_iter().map(|(name, _)| (name, Arc::default())).collect());
    finish(&mut reconciler);
    assert_eq!(reconciler.usage(), Usage::default(), "something is left");
    ensure_empty(&reconciler.maps().maps);
}

/// Until nothing is left to be done; otherwise says what is in the way.
fn finish<M: Maps>(reconciler: &mut Reconciler<M>) -> Vec<(ServiceName, Vec<Problem>)> {
    for _ in 0..8 {
        reconciler.retry();
        if reconciler.begin_grace() {
            reconciler.end_grace(true);
        }
    }
    reconciler.retry()
}

// === what is asserted ===

/// What was taken over leads to what is there, and no table lies in another one.
fn ensure_sound(reconciler: &Adopting<'_>) {
    let memory = &reconciler.maps().maps;
    let mut tables: Vec<(u32, u32)> = Vec::new();
    for (key, value) in memory.frontends().filter(|(key, _)| key.protocol != 0) {
        assert!(reconciler.owner(key).is_some(), "{key:?} is nobody's, and not removed");
        let record = memory.service(value.service).expect("a record");
        assert_eq!((record.key, record.generation), (*key, value.generation));
        assert_ne!(value.generation, 0);
        let table = record.table;
        assert!(table.is_empty() || table.base() + table.extent() <= CAPACITY.slots, "{table:?}");
        for slot in slots(memory, table) {
            let backend = Maps::backend(memory, slot.backend).expect("a backend");
            assert_eq!(backend.generation, slot.generation);
            assert_ne!(backend.protocol, 0, "a slot of no backend");
        }
        if !table.is_empty() {
            tables.push((table.base(), table.base() + table.extent()));
        }
    }
    tables.sort_unstable();
    tables.dedup();
    let apart = tables.is_sorted_by(|(_, end), (base, _)| end <= base);
    assert!(apart, "one table lies in another: {tables:?}");
}

/// The maps hold what those of a new agent hold, to whom the same was told, and nothing else.
fn ensure_as_wanted(reconciler: &Adopting<'_>, wanted: &Wanted) {
    let mut fresh = Reconciler::new(Memory::new(CAPACITY));
    fresh.apply(wanted.clone());
    let left = finish(&mut fresh);
    assert!(!fresh.is_unfinished(), "there is not room for all that is wanted: {left:?}");
    assert_eq!(reconciler.usage(), fresh.usage(), "something is lost");
    let (held, due) = (&reconciler.maps().maps, fresh.maps());
    let keys = |memory: &Memory| {
        memory.frontends().map(|(key, _)| format!("{key:?}")).collect::<BTreeSet<_>>()
    };
    assert_eq!(keys(held), keys(due));
    for (name, tables) in wanted {
        let keys = |backends: &mut dyn Iterator<Item = (BackendKey, u32)>| {
            backends.map(|(key, _)| key).collect::<Vec<_>>()
        };
        assert_eq!(keys(&mut reconciler.backends(name)), keys(&mut fresh.backends(name)));
        for (key, _) in &tables.frontends {
            assert_eq!(reconciler.owner(key), Some(name));
            assert_eq!(served(held, key), served(due, key), "{key:?}");
        }
    }
}

/// What the kernel holds for a frontend.
fn served(memory: &Memory, key: &FrontendKey) -> Served {
    let value = Maps::frontend(memory, key).expect("an entry");
    let record = memory.service(value.service).expect("a record");
    assert_eq!((record.key, record.generation), (*key, value.generation));
    let table = record.table;
    let of = |slot: Slot| {
        let backend = Maps::backend(memory, slot.backend).expect("a backend");
        assert_eq!(backend.generation, slot.generation, "a slot of another life");
        assert_eq!(
            memory.life(slot.backend),
            u64::from(slot.generation),
            "counters of another life"
        );
        let (slot, owner) = (Slot { backend: 0, generation: 0, ..slot }, 0);
        (slot, Backend { generation: 0, owner, ..backend })
    };
    let behind = table.base() + table.len()..table.base() + table.extent();
    Served {
        rules: record.rules,
        owner: memory.name(record.owner),
        slots: slots(memory, table).map(of).collect(),
        entries: behind.filter_map(|index| Maps::slot(memory, index)).collect(),
        // Where it is, is its own matter.
        table: if table.is_empty() { table } else { Table(table.0 & !u64::from(u32::MAX)) },
    }
}

/// The slots of a table, all of which are there.
fn slots(memory: &Memory, table: Table) -> impl Iterator<Item = Slot> {
    let slots = table.base()..table.base().saturating_add(table.len());
    slots.map(|index| Maps::slot(memory, index).expect("a slot"))
}

/// Nothing is left of anything.
fn ensure_empty(memory: &Memory) {
    assert_eq!(memory.frontends().count(), 0);
    for id in 0..memory.there(Kind::Backends) {
        assert_eq!(Maps::backend(memory, id).map(|backend| backend.protocol), Some(0));
        assert_eq!(memory.life(id), 0);
    }
    for index in 0..memory.there(Kind::Names) {
        assert_eq!(memory.name(index), Some(Name::NONE));
    }
}

// === what is wanted ===

/// Some services; each address belongs to one of them.
fn wanted(script: &Script<'_>) -> Wanted {
    let owners: Vec<u8> = (0..ADDRESSES).map(|_| script.byte() % (SERVICES + 1)).collect();
    let of = |service| {
        let addresses = (0..ADDRESSES).zip(&owners).filter(|(_, owner)| **owner == service);
        let addresses: Vec<_> = addresses.map(|(address, _)| ip(96, address)).collect();
        (name(service), Arc::new(tables(script, service, &addresses)))
    };
    (0..SERVICES).map(of).collect()
}

/// What services are called, which damage may also name.
pub(crate) fn name(service: u8) -> ServiceName {
    ServiceName::new(&format!("s{service}"))
}

/// Even numbers are IPv4, odd ones IPv6.
pub(crate) fn ip(network: u8, n: u8) -> IpAddr {
    match n % 2 {
        0 => Ipv4Addr::new(10, network, 0, n).into(),
        _ => Ipv6Addr::new(0xfd00, network.into(), 0, 0, 0, 0, 0, n.into()).into(),
    }
}

/// As a definition with these addresses could be compiled.
fn tables(script: &Script<'_>, service: u8, addresses: &[IpAddr]) -> Tables {
    let (endpoints, protocols) = (script.byte(), script.byte());
    // Consistent hashes take most of the slots and most of the time.
    let algorithm = match script.byte() {
        by @ 0..48 if service == 0 => Algorithm::from_number(by % 8),
        by => Algorithm::from_number(by % 3),
    };
    let protocols = match protocols % 4 {
        0 => &[Protocol::Tcp, Protocol::Udp][..],
        1 => &[Protocol::Udp],
        _ => &[Protocol::Tcp],
    };
    let mut all = Tables {
        rules: Rules {
            policy: Policy::new(script.byte(), 10, 60, 50),
            rate: Rate::new(script.byte(), script.byte().into()),
            affinity: Affinity(script.byte().into()),
        },
        algorithm,
        ..Tables::default()
    };
    for (&protocol, v4) in
        protocols.iter().flat_map(|protocol| [(protocol, true), (protocol, false)])
    {
        let place = all.backends.len();
        let there = (0..ENDPOINTS).filter(|n| endpoints >> n & 1 != 0);
        let there = there.map(|n| ip(service, 2 * n + u8::from(!v4)));
        all.backends.extend(there.map(|address| compile::Backend {
            key: BackendKey { port: 80, protocol, address: (address, 8080).into() },
            weight: script.half(),
            state: State::from_number(script.byte() % 4),
            listed: true,
            by_command: false,
        }));
        let candidates = (place..all.backends.len())
            .map(|place| Candidate { place, weight: all.backends[place].weight.max(1) });
        let candidates: Vec<_> = candidates.collect();
        let rows = match candidates[..] {
            [] => Rows::Refuse(Reason::NoEndpoint),
            _ => Rows::Candidates(candidates),
        };
        let table = all.tables.len();
        let dialled = addresses.iter().filter(|address| address.is_ipv4() == v4);
        let frontends: Vec<_> = dialled
            .map(|&address| (FrontendKey::new(address.into(), 80, protocol), table))
            .collect();
        all.frontends.extend(frontends);
        all.tables.push((TableKey { port: 80, protocol, v4 }, rows));
    }
    all
}
