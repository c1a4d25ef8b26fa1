//! Backends that refuse many connects, but never so many in a row as their service asks for.

use anyhow::{Result, ensure};
use mesh_tests::mortal::Pace;

use crate::scene::{Scene, nft, wait};

/// b refuses three of five, in turn.
const MOODY: &str = "add table inet t; \
                     add chain inet t in { type filter hook input priority 0; }; \
                     add rule inet t in ip daddr 10.0.0.2 tcp flags & (syn | ack) == syn \
                     numgen inc mod 5 < 3 reject with tcp reset";

/// What became of b while a client connected for some seconds, and which part of its connects to b failed.
fn moody(ejection: &str) -> Result<(Scene, bool)> {
    let scene = Scene::local(&["a", "b"], ejection)?;
    nft(&scene.node.namespace(), MOODY)?;
    let storm = scene.storm(Pace { threads: 1, ..Pace::BRISK })?;
    wait(2_000);
    let b = scene.standing("10.0.0.2:8080")?;
    let trials = storm.finish()?;
    println!("{b:?}");
    ensure!(trials.len() > 200, "only {} connects", trials.len());
    ensure!(b.failed_by("refused") >= 10, "{b:?}");
    let is_out = b.is_out();
    // One that is out has not been given more than it took to see that, and the rest of the window.
    ensure!(!is_out || b.opened < 60, "{b:?}");
    ensure!(is_out || b.opened > 100, "{b:?}");
    Ok((scene, is_out))
}

#[test]
fn a_backend_that_fails_often_is_out() -> Result<()> {
    let keys = "{failures: 10, failure-rate: 50%, samples: 20, base: 60s}";
    let (scene, is_out) = moody(keys)?;
    ensure!(is_out, "60% failed");
    scene.control()
}

#[test]
fn one_that_fails_less_often_is_not() -> Result<()> {
    let (scene, is_out) = moody("{failures: 10, failure-rate: 80%, samples: 20, base: 60s}")?;
    ensure!(!is_out, "80% never failed, and never more than three in a row");
    scene.control()
}
