//! An agent of another map layout takes over, and the other way round: what only the agent writes is copied,
//! what the programs write is used by both versions' programs at once.

use std::path::PathBuf;
use std::sync::Arc;
use std::{env, fs};

use anyhow::{Context, Result, ensure};
use mesh_agent::dataplane::load::{self, Loaded, Options};
use mesh_agent::dataplane::pindir::PinDir;
use mesh_common::ABI_VERSION;
use mesh_tests::long::Long;
use mesh_tests::process::{LIMIT, run, until};
use mesh_tests::replaced::{LONG, VIP, ensure_whole, ids, meet, node, service, until_open};
use mesh_tests::sys::mounts;
use mesh_tests::{Agent, Node, Service, check};
use serde_json::Value;

/// Clients have their backends by a consistent hash.
const KINDS: &str = "10.96.0.13:80";

fn kinds() -> Service {
    kinds_of("kinds", "10.96.0.13")
}

fn kinds_of(name: &str, address: &str) -> Service {
    let kinds = Service::new(name).address(address).port(80, 8080).key("balance: consistent-hash");
    kinds.endpoint("10.0.0.1").endpoint("10.0.0.2")
}

/// What is pinned, by directories.
fn pinned(node: &Node) -> Result<Vec<String>> {
    let pins = node.agent.pins();
    let names = || -> Result<Vec<String>> {
        let entries = fs::read_dir(&pins)?.collect::<Result<Vec<_>, _>>()?;
        Ok(entries.iter().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect())
    };
    mounts::inside(node.namespace().mounts(), names)?
}

/// What the agent knows of each backend that the next one has to know as well.
fn known(agent: &Agent) -> Result<Vec<Value>> {
    let mut backends: Vec<Value> = agent.get("/v1/backends")?;
    for backend in &mut backends {
        // Since when, and why, each agent finds out by itself.
        let strip = |value: &mut Value| {
            let fields = value.as_object_mut().context("an object")?;
            fields.retain(|key, _| !matches!(&**key, "since" | "reason"));
            anyhow::Ok(())
        };
        strip(backend)?;
        backend["inputs"].as_array_mut().context("inputs")?.iter_mut().try_for_each(strip)?;
    }
    Ok(backends)
}

fn other() -> String {
    format!("v{}", 1_000 + ABI_VERSION)
}

/// There and back, with open connections: nothing is lost, and nobody notices.
#[test]
fn up_and_down() -> Result<()> {
    let mut node = node()?;
    node.agent.write_services("kinds.yaml", &Service::file(&[kinds()]))?;
    node.agent.until_places("kinds", &["10.0.0.1:8080", "10.0.0.2:8080"])?;
    let hashed = check::who(&node, KINDS)?;
    // Others have the slots of one that is gone.
    let slots = |node: &Node| -> Result<u64> {
        let status: Value = node.agent.get("/v1/status")?;
        let mut maps = status["maps"].as_array().into_iter().flatten();
        let slots = maps.find(|map| map["name"] == "SLOTS").context("SLOTS")?;
        slots["used"].as_u64().context("a number")
    };
    let before = slots(&node)?;
    let gone = kinds_of("gone", "10.96.0.14");
    node.agent.write_services("gone.yaml", &Service::file(&[gone]))?;
    node.agent.until_places("gone", &["10.0.0.1:8080", "10.0.0.2:8080"])?;
    fs::remove_file(node.agent.services_directory().join("gone.yaml"))?;
    node.agent.until_gone("gone")?;
    until("its slots to be free", LIMIT, || Ok((slots(&node)? == before).then_some(())))?;
    let after = Service::new("after").address("10.96.0.15").port(80, 8080);
    let after = (1..=16u32).fold(after, |after, n| after.weighted(&format!("10.0.1.{n}"), n));
    node.agent.write_services("after.yaml", &Service::file(&[after]))?;
    node.agent.until_backends("after", |backends| backends.len() == 16)?;
    let long = Long::start(&node, LONG, 20, 10)?;
    until_open(&node, "long", 40)?;
    let mut met = 0;
    for (other_layout, end) in
        [(true, Agent::kill as fn(&mut Agent) -> _), (false, Agent::stop), (true, Agent::stop)]
    {
        for _ in 0..4 {
            met += meet(&node.namespace(), node.cgroup().path())?;
            ensure!(check::who(&node, KINDS)? == hashed);
        }
        let before = known(&node.agent)?;
        end(&mut node.agent)?;
        node.agent.other_layout = other_layout;
        node.agent.start()?;
        let log = node.agent.log()?;
        ensure!(log.has(&["taken over", "its programs are replaced"]), "{}", log.tail());
        let version = if other_layout { other() } else { format!("v{ABI_VERSION}") };
        ensure!(pinned(&node)? == [version.clone()], "{:?} and not {version}", pinned(&node)?);
        ensure!(
            known(&node.agent)? == before,
            "{:#?}, and before {before:#?}",
            known(&node.agent)?
        );
        ensure!(service(&node.agent, "app", "opened")? == met);
        // The entries of consistent hashes, too, were found to be what they should be.
        let status: Value = node.agent.get("/v1/status")?;
        ensure!(status["counters"]["map_writes"] == 0, "{}", status["counters"]);
        until_open(&node, "long", 40)?;
    }
    // What is pinned by another layout is not understood by those who only look, and they say so.
    node.agent.stop()?;
    let looked =
        node.agent.mesh(&["--pin-dir", &node.agent.pins().to_string_lossy(), "services"])?;
    let said = String::from_utf8_lossy(&looked.stderr);
    ensure!(!looked.status.success() && said.contains("another version"), "{said}");
    ensure!(check::who(&node, KINDS)? == hashed);
    node.agent.other_layout = false;
    node.agent.start()?;
    ensure_whole(node, long)
}

/// The variables that tell [`end_early`] what to do, in a process of its own.
const PINS: &str = "MESH_TEST_HANDOVER_PINS";
const CGROUP: &str = "MESH_TEST_HANDOVER_CGROUP";
const STEPS: &str = "MESH_TEST_HANDOVER_STEPS";

/// Takes over, and ends after so many programs are attached, as by SIGKILL.
fn end_early() -> Result<()> {
    let [pins, cgroup, steps] =
        [PINS, CGROUP, STEPS].map(|name| env::var(name).with_context(|| name.to_owned()));
    let (pins, cgroup, steps): (_, _, u32) =
        (PathBuf::from(pins?), PathBuf::from(cgroup?), steps?.parse()?);
    let pins = Arc::new(PinDir::take(&pins)?);
    let Loaded { mut programs, .. } = load::load(Options::default(), &pins)?;
    let mut done = 0;
    let mut end_if_done = || {
        if done == steps {
            // Nothing is undone.
            std::process::abort();
        }
        done += 1;
    };
    end_if_done();
    programs.attach_watched(&cgroup, |_| end_if_done())?;
    anyhow::bail!("it was to end before")
}

/// Wherever the one that takes over ends, any mix of both versions' programs is right, and the next one goes
/// on from there.
#[test]
fn a_handover_may_end_at_any_step() -> Result<()> {
    const PROGRAMS: u32 = 16;
    if env::var_os(STEPS).is_some() {
        return end_early();
    }
    let mut node = node()?;
    // The layout that is taken over is the other one.
    node.agent.kill()?;
    node.agent.other_layout = true;
    node.agent.start()?;
    let long = Long::start(&node, LONG, 20, 10)?;
    until_open(&node, "long", 40)?;
    node.agent.kill()?;
    let (namespace, cgroup) = (node.namespace(), node.cgroup().path().to_owned());
    let mut met = 0;
    for steps in 0..=PROGRAMS {
        let mut early = namespace.pinning(env::current_exe()?);
        early.args(["--exact", "a_handover_may_end_at_any_step", "--nocapture"]);
        early.env(PINS, node.agent.pins()).env(CGROUP, &cgroup).env(STEPS, steps.to_string());
        let output = run(early)?;
        ensure!(output.status.code().is_none(), "step {steps}: {output:?}");
        ensure!(pinned(&node)?.contains(&other()), "step {steps}: {:?}", pinned(&node)?);
        met += meet(&namespace, &cgroup)?;
    }
    node.agent.other_layout = false;
    node.agent.start()?;
    ensure!(pinned(&node)? == [format!("v{ABI_VERSION}")], "{:?}", pinned(&node)?);
    ensure!(service(&node.agent, "app", "opened")? == met, "{met}");
    let failures = service(&node.agent, "closed", "failed")?;
    ensure!(failures == u64::from(PROGRAMS) + 1, "each failure counts once: {failures}");
    until_open(&node, "app", 0)?;
    until_open(&node, "long", 40)?;
    ensure_whole(node, long)
}

/// What cannot be brought to its end is undone, at the very last step.
#[test]
fn a_handover_that_fails_changes_nothing() -> Result<()> {
    let mut node = node()?;
    let long = Long::start(&node, LONG, 20, 10)?;
    until_open(&node, "long", 40)?;
    let before = ids(&node)?;
    node.agent.stop()?;
    let (namespace, pins) = (node.namespace(), node.agent.pins());
    // Something is there where what is in force is put aside.
    let obstacle = pins.join(format!("v{ABI_VERSION}_former"));
    mounts::inside(namespace.mounts(), || fs::create_dir_all(obstacle.join("foreign")))??;
    // What has changed meanwhile must not come into force by half: all of it has other names.
    let files = node.agent.services_directory();
    let file = files.join("test.yaml");
    let defined = fs::read_to_string(&file)?;
    fs::write(&file, defined.replace("name: ", "name: other-"))?;
    node.agent.other_layout = true;
    let output = run(node.agent.run_command()?)?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.code() == Some(1) && said.contains("something of somebody else"),
        "{said}"
    );
    ensure!(ids(&node)? == before, "{:?}, and before {before:?}", ids(&node)?);
    ensure!(!pinned(&node)?.contains(&format!("{}_next", other())), "{:?}", pinned(&node)?);
    ensure!(check::histogram(&node, VIP, 20)?.len() == 2);

    // The version that is in force does not mind.
    fs::write(&file, defined)?;
    node.agent.other_layout = false;
    node.agent.start()?;
    ensure!(node.agent.log()?.has(&["its programs stay"]));
    ensure!(ids(&node)? == before);
    let status: Value = node.agent.get("/v1/status")?;
    ensure!(status["counters"]["map_writes"] == 0, "{}", status["counters"]);
    until_open(&node, "long", 40)?;
    mounts::inside(namespace.mounts(), || fs::remove_dir_all(&obstacle))??;
    ensure_whole(node, long)
}
