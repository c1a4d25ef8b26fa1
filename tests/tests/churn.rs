//! A client that reconnects without pause while the endpoints of its service are added, removed and
//! rewritten a thousand times: no connect fails, and none goes to an endpoint that had been removed
//! when the connect started.

use std::collections::BTreeSet;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use mesh_tests::sys::socket::monotonic_nanos;
use mesh_tests::{Builder, Node, Service, check, storm};

const VIP: &str = "10.96.0.10:80";
/// `MESH_UPDATES=10000` for more, and `MESH_BALANCE` for another algorithm (one that lets one client meet
/// all endpoints).
const UPDATES: u32 = 1_000;
const BACKENDS: u8 = 8;

/// What the file said, and when: from `written` on it could be in force, from `applied` on nothing
/// older could be.
struct Update {
    written: u64,
    applied: u64,
    backends: BTreeSet<u8>,
}

#[test]
fn no_connect_fails_and_none_goes_to_a_removed_endpoint() -> Result<()> {
    let count = match std::env::var("MESH_UPDATES") {
        Ok(count) => count.parse()?,
        Err(_) => UPDATES,
    };
    let mut node = node().start()?;
    let storm = check::Storm::start(&node, VIP)?;
    let mut random = fastrand::Rng::with_seed(2);
    let mut updates = vec![Update { written: 0, applied: 0, backends: (0..BACKENDS).collect() }];
    for number in 0..count {
        updates.push(update(&node, number, &mut random)?);
        // Long enough for connects to start while exactly this holds.
        sleep(Duration::from_millis(1));
    }
    let (report, connects) = storm.finish()?;
    ensure!(report.failed.is_empty(), "connects failed: {report:?}");
    ensure!(report.connects > u64::from(count), "too few connects to tell: {report:?}");
    ensure!(report.by_backend.len() == usize::from(BACKENDS), "{report:?}");

    let certain = ensure_none_late(&connects, &updates)?;
    ensure!(certain > u64::from(count) / 2, "only {certain} connects between two updates");
    println!("{} connects, {certain} of them while one update was in force alone", connects.len());

    let last = app().endpoint(&place(0)).endpoint(&place(1));
    node.agent.write_services("test.yaml", &Service::file(&[last]))?;
    node.agent.until_places("app", &[&place(0), &place(1)])?;
    check::balanced(&mut node, &["backend-0", "backend-1"], |node| check::who(node, VIP))
}

/// Writes another set of endpoints with other weights, and waits until the kernel holds it.
fn update(node: &Node, number: u32, random: &mut fastrand::Rng) -> Result<Update> {
    let mut wanted = Vec::new();
    for backend in 0..BACKENDS {
        if random.bool() {
            wanted.push((backend, random.u32(1..=500)));
        }
    }
    if wanted.is_empty() {
        wanted.push((random.u8(0..BACKENDS), 1));
    }
    if number.is_multiple_of(10) {
        // Frontends come and go beside it, and their records, slots and backends are reused.
        let others = (0..random.u8(0..20)).map(|n| {
            let other = Service::new(&format!("other-{n}")).address(&format!("10.97.0.{n}"));
            other.port(80, 8080).endpoint("10.0.0.1").endpoint("10.0.0.2")
        });
        node.agent.write_services("others.yaml", &Service::file(&others.collect::<Vec<_>>()))?;
    }
    let app = wanted.iter().fold(app(), |app, &(b, weight)| app.weighted(&place(b), weight));
    let written = monotonic_nanos();
    node.agent.write_services("test.yaml", &Service::file(&[app]))?;
    let mut held: Vec<_> = wanted.iter().map(|&(b, weight)| (place(b), weight)).collect();
    held.sort();
    node.agent
        .until_backends("app", |backends| {
            backends.iter().map(|b| (b.address.clone(), b.weight)).eq(held.iter().cloned())
        })
        .with_context(|| format!("update {number}"))?;
    let backends = wanted.into_iter().map(|(b, _)| b).collect();
    Ok(Update { written, applied: monotonic_nanos(), backends })
}

/// Each connect went to an endpoint of an update that could be in force while it ran: the last one
/// applied before it started, or one written since and before it ended. Returns for how many
/// connects that was a single one.
fn ensure_none_late(connects: &[storm::Connect], updates: &[Update]) -> Result<u64> {
    let (mut current, mut certain) = (0, 0);
    for connect in connects {
        while updates.get(current + 1).is_some_and(|next| next.applied <= connect.start) {
            current += 1;
        }
        let later = updates[current + 1..].iter().take_while(|next| next.written <= connect.end);
        let possible = 1 + later.count();
        let mut possible = updates[current..current + possible].iter();
        certain += u64::from(possible.len() == 1);
        let backend: u8 = connect.backend.strip_prefix("backend-").context("a name")?.parse()?;
        ensure!(
            possible.any(|update| update.backends.contains(&backend)),
            "a connect went to {}, which update {current} had removed {} ns before it started",
            connect.backend,
            connect.start - updates[current].applied,
        );
    }
    Ok(certain)
}

fn node() -> Builder {
    let node = (0..BACKENDS)
        .fold(Node::builder(), |node, b| node.backend(&format!("backend-{b}"), &place(b)));
    node.service((0..BACKENDS).fold(app(), |app, b| app.endpoint(&place(b))))
}

fn app() -> Service {
    let balance = std::env::var("MESH_BALANCE").unwrap_or_else(|_| "random".to_owned());
    let app = Service::new("app").address("10.96.0.10").port(80, 8080);
    app.key(&format!("balance: {balance}"))
}

fn place(backend: u8) -> String {
    format!("10.0.0.{}:8080", backend + 1)
}
