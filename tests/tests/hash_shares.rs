//! Consistent hashes, through the real hook: where each of very many clients is led, and the share of each
//! endpoint, after every kind of change.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use anyhow::{Context, Result, ensure};
use mesh_common::Addr;
use mesh_common::maglev::{self, Size, Turn};
use mesh_tests::shares::ensure_credible;
use mesh_tests::{Node, Service, check};

const VIP: &str = "10.96.0.10:80";

/// Endpoints by the last byte of their address, with their weights.
type Weights<'w> = &'w [(u8, u16)];

fn weighted(weights: Weights<'_>, more: &str) -> Service {
    let app = Service::new("app").address("10.96.0.10").udp(80, 8080);
    let app = app.key(&format!("balance: consistent-hash{more}"));
    weights
        .iter()
        .fold(app, |app, (n, weight)| app.weighted(&format!("10.0.0.{n}"), (*weight).into()))
}

/// The table that the paper's construction gives for these, by the last bytes of addresses.
fn table(weights: Weights<'_>) -> Result<Vec<u8>> {
    let used: Vec<_> = weights.iter().copied().filter(|(_, weight)| *weight > 0).collect();
    let names = used.iter().map(|(n, _)| {
        let [a, b, c, d] = Addr::from(Ipv4Addr::new(10, 0, 0, *n)).words().map(u64::from);
        maglev::name(a << 32 | b, c << 32 | d, 8080)
    });
    let (names, weights): (Vec<_>, Vec<_>) =
        (names.collect(), used.iter().map(|(_, w)| *w).collect());
    let mut columns = vec![0; Size::of(names.len()).entries() as usize];
    let turns = &mut vec![Turn::default(); names.len()];
    ensure!(maglev::build(&names, &weights, &mut columns, turns), "no table");
    Ok(columns.into_iter().map(|column| used[usize::from(column)].0).collect())
}

fn ensure_shares(counts: &BTreeMap<u8, u32>, weights: Weights<'_>, of: u32) -> Result<()> {
    let named = counts.iter().map(|(n, count)| (format!("10.0.0.{n}"), *count)).collect();
    let places: Vec<_> =
        weights.iter().map(|(n, weight)| (format!("10.0.0.{n}"), f64::from(*weight))).collect();
    let due: Vec<_> = places.iter().map(|(place, weight)| (&**place, *weight)).collect();
    ensure_credible(&named, &due, of)
}

/// 2,000 cgroups connect fifty times each after every kind of change: each time, each of them is led to
/// the very endpoint that the table has for it, and all together heed the weights.
#[test]
fn each_of_many_clients_after_every_change() -> Result<()> {
    const CLIENTS: u32 = 2_000;
    const EACH: u32 = 50;
    let first: Weights<'_> = &[(1, 1), (2, 2), (3, 7)];
    let mut node = Node::builder().service(weighted(first, "")).start()?;
    for n in 1..=4 {
        node.add_address(Ipv4Addr::new(10, 0, 0, n).into())?;
    }
    (0..CLIENTS).try_for_each(|n| node.cgroup().child(&format!("c{n}")).map(drop))?;
    let ask = |node: &Node| -> Result<BTreeMap<u64, u8>> {
        let mut command = check::mesh_client(node)?;
        command.args(["select-by-cgroup", VIP]).arg(node.cgroup().path()).arg(EACH.to_string());
        check::printed(command)
    };
    let shares = |step: &str, weights: Weights<'_>| {
        let (chosen, table) = (ask(&node)?, table(weights)?);
        ensure!(chosen.len() == CLIENTS as usize, "{} clients", chosen.len());
        let mut counts = BTreeMap::<_, u32>::new();
        for (cgroup, place) in chosen {
            let entry = maglev::hash(cgroup) >> (32 - table.len().trailing_zeros());
            let due = table[entry as usize];
            ensure!(place == due, "{step}: cgroup {cgroup} has {place}, not {due}");
            *counts.entry(place).or_default() += 1;
        }
        ensure_shares(&counts, weights, CLIENTS).with_context(|| step.to_owned())
    };
    let change = |weights: Weights<'_>| {
        node.agent.write_services("test.yaml", &Service::file(&[weighted(weights, "")]))?;
        node.agent.until_backends("app", |all| {
            all.iter().map(|b| b.weight).eq(weights.iter().map(|(_, weight)| u32::from(*weight)))
        })
    };
    let did = |order: &str| {
        let output = node.agent.mesh(&[order, "app", "10.0.0.3"])?;
        ensure!(output.status.success(), "{order}: {output:?}");
        Ok(())
    };
    shares("as made", first)?;
    let four: Weights<'_> = &[(1, 1), (2, 2), (3, 7), (4, 10)];
    change(four)?;
    shares("one has come", four)?;
    let other: Weights<'_> = &[(1, 5), (2, 0), (3, 5), (4, 10)];
    change(other)?;
    shares("other weights", other)?;
    did("drain")?;
    shares("one is drained", &[(1, 5), (4, 10)])?;
    did("undrain")?;
    shares("and is not", other)?;
    let three: Weights<'_> = &[(2, 3), (3, 5), (4, 10)];
    change(three)?;
    shares("one has gone", three)?;
    // What is less than a 256th of the greatest counts as that.
    let far: Weights<'_> = &[(1, 65_535), (3, 1)];
    change(far)?;
    let (chosen, table) = (ask(&node)?, table(far)?);
    let few = table.iter().filter(|place| **place == 3).count();
    ensure!((15..=17).contains(&few), "{few} of 4,096");
    for (cgroup, place) in chosen {
        let entry = maglev::hash(cgroup) >> (32 - table.len().trailing_zeros());
        ensure!(place == table[entry as usize], "far apart: cgroup {cgroup} has {place}");
    }
    node.agent.stop()?;
    ensure!(ask(&node).is_err(), "control");
    Ok(())
}

/// 20,000 processes that connect five times each: all of one are led to one endpoint, and all together
/// heed the weights.
#[test]
fn shares_of_many_processes() -> Result<()> {
    const PROCESSES: u32 = 20_000;
    let weights: Weights<'_> = &[(1, 1), (2, 2), (3, 7)];
    let node = Node::builder().service(weighted(weights, "\n  hash-by: process")).start()?;
    for n in 1..=3 {
        node.add_address(Ipv4Addr::new(10, 0, 0, n).into())?;
    }
    let mut command = check::mesh_client(&node)?;
    command.args(["select-by-process", VIP, &PROCESSES.to_string(), "5"]);
    ensure_shares(&check::printed(command)?, weights, PROCESSES)
}
