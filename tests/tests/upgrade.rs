//! Programs of another build replace those that are attached, hook by hook, while everybody uses them.
//!
//! Programs that log refusals are others than those that do not: the kernel's verifier removes that code
//! from the latter.

use std::fs;
use std::sync::Arc;

use anyhow::{Result, ensure};
use mesh_agent::dataplane::load::{self, Loaded, Options};
use mesh_agent::dataplane::pindir::PinDir;
use mesh_tests::check;
use mesh_tests::long::Long;
use mesh_tests::process::run;
use mesh_tests::replaced::{LONG, VIP, ensure_whole, ids, meet, node, service, until_open};
use mesh_tests::restarts::{self, Plan};
use mesh_tests::sys::mounts;

/// After each single replacement everything is as it should be, and nothing is counted twice or not at all.
#[test]
fn any_mix_of_programs() -> Result<()> {
    let mut node = node()?;
    let long = Long::start(&node, LONG, 20, 10)?;
    until_open(&node, "long", 40)?;
    node.agent.kill()?;
    let (namespace, cgroup, pins) =
        (node.namespace(), node.cgroup().path().to_owned(), node.agent.pins());
    let replace = || -> Result<Vec<u64>> {
        let pins = Arc::new(PinDir::take(&pins)?);
        let loaded = load::load(Options { log: true, ..Options::default() }, &pins)?;
        let Loaded { mut programs, are_kept, .. } = loaded;
        ensure!(!are_kept, "this tests nothing: they are the same programs");
        let mut met = Vec::new();
        programs.attach_watched(&cgroup, |_| met.push(meet(&namespace, &cgroup)))?;
        met.into_iter().collect()
    };
    let met = mounts::inside(namespace.mounts(), replace)??;
    ensure!(met.len() == 16, "{met:?}");

    // This one has the former programs, so it replaces them once more.
    node.agent.start()?;
    ensure!(node.agent.log()?.has(&["its programs are replaced"]));
    let opened = service(&node.agent, "app", "opened")?;
    ensure!(opened == met.iter().sum::<u64>(), "{opened}");
    ensure!(service(&node.agent, "closed", "opened")? == 16);
    ensure!(service(&node.agent, "closed", "failed")? == 16, "each failure counts once");
    until_open(&node, "app", 0)?;
    until_open(&node, "closed", 0)?;
    until_open(&node, "long", 40)?;
    ensure_whole(node, long)
}

/// Agents of two builds, killed at any moment or told to end, under load (`cargo xtask soak restarts`).
#[test]
fn nobody_notices_restarts() -> Result<()> {
    let report = restarts::run(Plan { times: 16, tcp: 100, udp: 20 }, |_| {})?;
    println!("{report:?}");
    report.ensure_unnoticed()
}

/// What cannot be brought to its end is undone, also at its last step.
#[test]
fn an_upgrade_that_fails_changes_nothing() -> Result<()> {
    let mut node = node()?;
    let before = ids(&node)?;
    node.agent.stop()?;
    let (namespace, pins) = (node.namespace(), node.agent.pins());
    let obstacle = pins.join(format!("v{}", mesh_common::ABI_VERSION)).join("mesh_retransmit_next");
    mounts::inside(namespace.mounts(), || fs::create_dir(&obstacle))??;
    node.agent.arguments = vec!["--log-refusals"];
    let output = run(node.agent.run_command()?)?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.code() == Some(1) && said.contains("mesh_retransmit"), "{said}");
    ensure!(ids(&node)? == before, "{:?}, and before {before:?}", ids(&node)?);
    let seen = check::histogram(&node, VIP, 20)?;
    ensure!(seen.len() == 2, "{seen:?}");

    mounts::inside(namespace.mounts(), || fs::remove_dir(&obstacle))??;
    node.agent.stays = false;
    node.agent.start()?;
    let after = ids(&node)?;
    ensure!(after.iter().all(|id| !before.contains(id)), "{before:?} and {after:?}");
    check::balanced(&mut node, &["a", "b"], |node| check::who(node, VIP))
}
