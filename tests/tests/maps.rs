//! The reconciler over the kernel's own maps, with operations that fail at random: whatever fails
//! on the way, the end is what was wanted last, and once all is removed nothing is in use.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use mesh_agent::compile::{Backend, BackendKey, Candidate, Rows, Rules, TableKey, Tables};
use mesh_agent::dataplane::fault::Faulty;
use mesh_agent::dataplane::grace::Grace;
use mesh_agent::dataplane::load::{self, Loaded, Options};
use mesh_agent::dataplane::maps::Maps;
use mesh_agent::dataplane::pindir::PinDir;
use mesh_agent::dataplane::reconcile::{Reconciler, Usage};
use mesh_agent::model::ServiceName;
use mesh_common::{
    Algorithm, Caller, Choice, FrontendKey, Policy, Protocol, State, Token, Verdict, translate,
};
use mesh_tests::sys::mounts;

/// Somebody who asks and does not connect.
struct Asking;

impl Caller for Asking {
    fn chance(&self) -> u32 {
        fastrand::u32(..)
    }

    fn key(&self, _: Algorithm) -> u64 {
        self.chance().into()
    }

    fn enter(&self, _: u32, _: Policy) -> Option<Token> {
        Some(Token::NONE)
    }
}

/// Frontends by service; each has one owner.
type Wanted = BTreeMap<u8, (BTreeSet<u8>, BTreeSet<u8>)>;

fn frontend(n: u8) -> FrontendKey {
    FrontendKey::new(Ipv4Addr::new(10, 96, 0, n).into(), 80, Protocol::Tcp)
}

fn endpoint(n: u8) -> SocketAddr {
    SocketAddr::from(([10, 0, 0, n], 8080))
}

fn tables(frontends: &BTreeSet<u8>, endpoints: &BTreeSet<u8>) -> Arc<Tables> {
    let backend = |&n: &u8| Backend {
        key: BackendKey { port: 80, protocol: Protocol::Tcp, address: endpoint(n) },
        weight: 1 + u16::from(n),
        state: State::Healthy,
        listed: true,
        by_command: false,
    };
    let backends: Vec<Backend> = endpoints.iter().map(backend).collect();
    let rows = (0..).zip(&backends).map(|(place, b)| Candidate { place, weight: b.weight });
    let rows = Rows::Candidates(rows.collect());
    let table = (TableKey { port: 80, protocol: Protocol::Tcp, v4: true }, rows);
    Arc::new(Tables {
        backends,
        tables: if frontends.is_empty() { Vec::new() } else { vec![table] },
        frontends: frontends.iter().map(|&n| (frontend(n), 0)).collect(),
        rules: Rules::default(),
        algorithm: if endpoints.len().is_multiple_of(2) {
            Algorithm::Random
        } else {
            Algorithm::LeastConnections
        },
        groups: BTreeMap::new(),
        panics: BTreeSet::new(),
        source: 0,
    })
}

fn some(random: &mut fastrand::Rng, below: u8, most: usize) -> BTreeSet<u8> {
    (0..random.usize(..=most)).map(|_| random.u8(..below)).collect()
}

fn finish<M: Maps>(reconciler: &mut Reconciler<M>, grace: &Grace) -> Result<()> {
    for _ in 0..4 {
        reconciler.retry();
        if reconciler.begin_grace() {
            grace.wait()?;
            reconciler.end_grace(true);
        }
    }
    Ok(())
}

#[test]
fn the_kernels_maps_survive_faults() -> Result<()> {
    let mounts = mounts::create().context("run as root")?;
    mounts::inside(&mounts, survive)?
}

fn survive() -> Result<()> {
    let pins = Arc::new(PinDir::take(Path::new("/sys/fs/bpf/mesh-test-maps"))?);
    let loaded = load::load(Options::default(), &pins)?;
    let Loaded { maps, grace, programs: _programs, .. } = loaded;
    // A failure can be run again with the seed that it prints.
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let (faults, on) = (RefCell::new(random.fork()), Rc::new(Cell::new(true)));
    let failing = Rc::clone(&on);
    let fails = move |_: &'static str| failing.get() && faults.borrow_mut().u8(..100) < 15;
    let mut reconciler = Reconciler::new(Faulty::new(maps, fails));
    let mut wanted = Wanted::new();
    for _ in 0..300 {
        let service = random.u8(..5);
        let frontends = some(&mut random, 8, 4);
        let endpoints: BTreeSet<u8> =
            some(&mut random, 40, 12).into_iter().chain([random.u8(..40)]).collect();
        let mut changed = BTreeSet::from([service]);
        for (&other, (theirs, _)) in wanted.iter_mut().filter(|(other, _)| **other != service) {
            if theirs.intersection(&frontends).next().is_some() {
                theirs.retain(|n| !frontends.contains(n));
                changed.insert(other);
            }
        }
        wanted.insert(service, (frontends, endpoints));
        let batch = changed.iter().map(|n| {
            let (frontends, endpoints) = &wanted[n];
            (ServiceName::new(&n.to_string()), tables(frontends, endpoints))
        });
        reconciler.apply(batch.collect());
        if random.u8(..10) == 0 && reconciler.begin_grace() {
            grace.wait()?;
            reconciler.end_grace(true);
        }
    }
    on.set(false);
    finish(&mut reconciler, &grace)?;
    ensure!(!reconciler.is_unfinished());
    for n in 0..8 {
        let owner = wanted.values().find(|(frontends, _)| frontends.contains(&n));
        let mut seen = BTreeSet::new();
        for _ in 0..20_000 {
            match translate(&reconciler.maps().maps, &Asking, &frontend(n)) {
                Verdict::Balance(Choice { slot, .. }) => {
                    seen.insert(SocketAddr::new(slot.addr.ip(), u16::from_be(slot.port)));
                }
                verdict => ensure!(owner.is_none() && verdict == Verdict::Pass, "{verdict:?}"),
            }
        }
        let expected: BTreeSet<SocketAddr> =
            owner.into_iter().flat_map(|(_, endpoints)| endpoints).map(|&n| endpoint(n)).collect();
        ensure!(seen == expected, "frontend {n}: {seen:?} instead of {expected:?}");
    }
    let nothing = |n: &u8| (ServiceName::new(&n.to_string()), Arc::default());
    reconciler.apply(wanted.keys().map(nothing).collect());
    finish(&mut reconciler, &grace)?;
    ensure!(reconciler.usage() == Usage::default(), "{:?}", reconciler.usage());
    let gone = |n| Maps::frontend(reconciler.maps(), &frontend(n)).is_none();
    ensure!((0..8).all(gone), "entries are left in FRONTENDS");
    Ok(())
}
