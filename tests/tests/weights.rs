//! How connects are spread.

use std::collections::BTreeMap;

use anyhow::{Result, ensure};
use mesh_tests::{Builder, Node, Service, check};

const VIP: &str = "10.96.0.10:80";
const CONNECTS: u32 = 20_000;

/// Four backends a to d of these weights.
fn node(weights: [u32; 4]) -> Builder {
    let app = Service::new("app").address("10.96.0.10").port(80, 8080);
    let places = ["10.0.0.1:8080", "10.0.0.2:8080", "10.0.0.3:8080", "10.0.0.4:8080"];
    let app = places.iter().zip(weights).fold(app, |app, (place, w)| app.weighted(place, w));
    let named = ["a", "b", "c", "d"].into_iter().zip(places);
    named.fold(Node::builder(), |node, (name, place)| node.backend(name, place)).service(app)
}

/// Pearson's statistic must stay below 45: a fair choice among up to four exceeds that with a
/// probability below 1e-9 (chi-square, three degrees of freedom), and 20,000 connects exceed it
/// when a share is off by a tenth.
fn ensure_spread(seen: &BTreeMap<String, u32>, weights: [u32; 4]) -> Result<()> {
    let total = f64::from(weights.iter().sum::<u32>());
    let mut statistic = 0.0;
    for (name, weight) in ["a", "b", "c", "d"].into_iter().zip(weights) {
        let count = f64::from(seen.get(name).copied().unwrap_or_default());
        let expected = f64::from(CONNECTS) * f64::from(weight) / total;
        if weight == 0 {
            ensure!(count == 0.0, "{name} has no weight: {seen:?}");
        } else {
            statistic += (count - expected).powi(2) / expected;
        }
    }
    ensure!(seen.values().sum::<u32>() == CONNECTS, "not all were answered: {seen:?}");
    ensure!(statistic < 45.0, "{weights:?} gave {seen:?}: chi-square {statistic}");
    Ok(())
}

#[test]
fn by_weight() -> Result<()> {
    for weights in [[1, 2, 3, 4], [5, 0, 5, 10], [100; 4]] {
        let mut node = node(weights).start()?;
        ensure_spread(&check::histogram(&node, VIP, CONNECTS)?, weights)?;
        node.agent.stop()?;
        let seen = check::histogram(&node, VIP, 10)?;
        ensure!(seen.keys().eq(["connect: ENETUNREACH"]), "control: {seen:?}");
    }
    Ok(())
}
