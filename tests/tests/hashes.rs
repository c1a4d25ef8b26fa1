//! Consistent hashes, through the real hook: a client always has the same backend, whoever else comes
//! and goes.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use mesh_tests::process::{LIMIT, until};
use mesh_tests::{Node, Service, check, process};

const VIP: &str = "10.96.0.10:80";
const NAMES: [&str; 4] = ["a", "b", "c", "d"];
const CLIENTS: usize = 40;

fn app(backends: usize, balance: &str) -> Service {
    let app = Service::new("app").address("10.96.0.10").port(80, 8080).key(balance);
    (1..=backends).fold(app, |app, n| app.endpoint(&format!("10.0.0.{n}")))
}

fn node(balance: &str) -> Result<Node> {
    let node = (1..).zip(NAMES);
    node.fold(Node::builder(), |node, (n, name)| node.backend(name, &format!("10.0.0.{n}:8080")))
        .service(app(3, balance))
        .start()
}

/// Who answers a client in this cgroup: always the same.
fn always(node: &Node, cgroup: &Path) -> Result<String> {
    let mut command = node.command_in(cgroup, process::binary("mesh-client")?)?;
    command.args(["histogram", VIP, "6"]);
    let seen: BTreeMap<String, u32> = check::printed(command)?;
    ensure!(seen.len() == 1, "{seen:?}");
    seen.into_keys().next().context("somebody")
}

fn change(node: &Node, app: &Service, backends: usize) -> Result<()> {
    node.agent.write_services("test.yaml", &Service::file(std::slice::from_ref(app)))?;
    node.agent.until_backends("app", |all| all.len() == backends)
}

/// By cgroup: what one backend had goes to the others when it is removed, and nobody else moves; when it
/// is back, all is as before.
#[test]
fn by_client() -> Result<()> {
    let mut node = node("balance: consistent-hash")?;
    let clients: Vec<PathBuf> =
        (0..CLIENTS).map(|n| node.cgroup().child(&format!("c{n}"))).collect::<Result<_>>()?;
    let ask = |node: &Node| -> Result<Vec<String>> {
        clients.iter().map(|client| always(node, client)).collect()
    };
    let before = ask(&node)?;
    // One of three is missed by 40 clients once in 10^6.
    ensure!(before.iter().collect::<BTreeSet<_>>().len() == 3, "{before:?}");
    for (client, name) in clients.iter().zip(&before).take(5) {
        let from = client.display().to_string();
        let explained: serde_json::Value = node.agent.json(&["explain", VIP, "--from", &from])?;
        let number = NAMES.iter().position(|n| n == name).context("a name")? + 1;
        let place = format!("10.0.0.{number}:8080");
        ensure!(explained["answer"]["backend"] == place, "{name}: {explained}");
    }
    let two = Service::new("app").address("10.96.0.10").port(80, 8080);
    let two = two.key("balance: consistent-hash").endpoint("10.0.0.1").endpoint("10.0.0.3");
    change(&node, &two, 2)?;
    let without = ask(&node)?;
    let mut moved = 0;
    for (was, is) in before.iter().zip(&without) {
        ensure!(is != "b", "removed");
        moved += usize::from(was != "b" && was != is);
    }
    ensure!(moved <= 1, "{moved} of the others' clients moved: {before:?}, {without:?}");
    change(&node, &app(3, "balance: consistent-hash"), 3)?;
    ensure!(ask(&node)? == before, "as before");

    // Nobody is pinned by another algorithm, and back again.
    change(&node, &app(3, "balance: random"), 3)?;
    until("another algorithm", LIMIT, || {
        let mut command = node.command_in(&clients[0], process::binary("mesh-client")?)?;
        command.args(["histogram", VIP, "60"]);
        let seen: BTreeMap<String, u32> = check::printed(command)?;
        Ok((seen.len() == 3).then_some(()))
    })?;
    change(&node, &app(3, "balance: consistent-hash"), 3)?;
    until("the hash", LIMIT, || Ok((ask(&node).is_ok_and(|now| now == before)).then_some(())))?;
    node.agent.stop()?;
    ensure!(always(&node, &clients[0])?.contains("ENETUNREACH"), "control");
    Ok(())
}

/// By process and by network namespace: a process keeps its backend, another one has its own; all of one
/// namespace have the same.
#[test]
fn by_process_and_namespace() -> Result<()> {
    let node = node("balance: consistent-hash\n  hash-by: process")?;
    let one_each = |node: &Node| -> Result<BTreeSet<String>> {
        let mut seen = BTreeSet::new();
        for _ in 0..CLIENTS {
            let histogram = check::histogram(node, VIP, 5)?;
            ensure!(histogram.len() == 1, "{histogram:?}");
            seen.extend(histogram.into_keys());
        }
        Ok(seen)
    };
    ensure!(one_each(&node)?.len() == 3, "other processes, other backends");
    change(&node, &app(3, "balance: consistent-hash\n  hash-by: namespace"), 3)?;
    // The change can come between two connects of a process.
    until("the namespace to count", LIMIT, || {
        Ok(one_each(&node).is_ok_and(|seen| seen.len() == 1).then_some(()))
    })
}

/// By unit: a service that is started again, in a cgroup with another number, keeps its backend, and so do
/// the containers of one pod; other units have others. By cgroup they would not.
#[test]
fn by_unit() -> Result<()> {
    let mut node = node("balance: consistent-hash\n  hash-by: unit")?;
    // While it is being seen it may change in the middle.
    let who = |node: &Node, cgroup: &Path| always(node, cgroup).ok();
    // Until it has been seen a cgroup is a client of its own, which `explain` says.
    let explained = |node: &Node, cgroup: &Path| -> Result<String> {
        let from = cgroup.display().to_string();
        let explained: serde_json::Value = until("the unit to be known", LIMIT, || {
            let explained: serde_json::Value =
                node.agent.json(&["explain", VIP, "--from", &from])?;
            Ok((!explained.to_string().contains("not known yet")).then_some(explained))
        })?;
        let place = explained["answer"]["backend"].as_str().context("a backend")?;
        let number = place.strip_prefix("10.0.0.").and_then(|rest| rest.split(':').next());
        let number: usize = number.context("a backend's number")?.parse()?;
        Ok(NAMES[number - 1].to_owned())
    };
    let mut before = BTreeMap::new();
    // What a unit is hashed by has the number of this process in it: so many miss one of three once in 700,000.
    for n in 0..36 {
        let unit = format!("s{n}.service");
        let made = node.cgroup().child(&unit)?;
        let due = explained(&node, &made)?;
        until("the unit to count", LIMIT, || {
            Ok((who(&node, &made).as_ref() == Some(&due)).then_some(()))
        })?;
        before.insert(unit, due);
    }
    ensure!(before.values().collect::<BTreeSet<_>>().len() == 3, "{before:?}");

    // Again: other cgroups, of the same names.
    for (unit, due) in &before {
        let made = node.cgroup().path().join(unit);
        let number = fs::metadata(&made)?.ino();
        fs::remove_dir(&made)?;
        let made = node.cgroup().child(unit)?;
        ensure!(fs::metadata(&made)?.ino() != number, "another cgroup");
        until("the unit to count again", LIMIT, || {
            Ok((who(&node, &made).as_ref() == Some(due)).then_some(()))
        })?;
    }

    // Ten containers of a pod, and what they make below them.
    let pod = node.cgroup().child("pod0f3e8a5c-1d2b-4c3d-9e8f-112233445566")?;
    let due = explained(&node, &pod)?;
    for n in 0..10 {
        let container = pod.join(format!("c{n}"));
        fs::create_dir(&container)?;
        until("the pod to count", LIMIT, || {
            Ok((who(&node, &container).as_ref() == Some(&due)).then_some(()))
        })?;
    }
    change(&node, &app(3, "balance: consistent-hash"), 3)?;
    until("each container by itself", LIMIT, || {
        let each = (0..10).map(|n| who(&node, &pod.join(format!("c{n}"))));
        // Ten of them meet one of three once in 20,000.
        let each: BTreeSet<_> = each.flatten().collect();
        Ok((each.len() > 1).then_some(()))
    })?;
    for n in 0..10 {
        fs::remove_dir(pod.join(format!("c{n}")))?;
    }
    node.agent.stop()
}

/// Cgroups come and go, and the agent keeps nothing of those that went.
#[test]
fn cgroups_come_and_go() -> Result<()> {
    let node = node("balance: consistent-hash\n  hash-by: unit")?;
    let watches = |node: &Node| -> Result<usize> {
        let mut watches = 0;
        for entry in fs::read_dir(format!("/proc/{}/fdinfo", node.agent.id()?))? {
            let text = fs::read_to_string(entry?.path()).unwrap_or_default();
            watches += text.lines().filter(|line| line.starts_with("inotify wd")).count();
        }
        Ok(watches)
    };
    let kept = node.cgroup().child("kept")?;
    // The directory of service files, and two cgroups.
    until("the agent to watch", LIMIT, || Ok((watches(&node)? >= 3).then_some(())))?;
    let before = watches(&node)?;
    for round in 0..10 {
        let all: Vec<_> = (0..20).map(|n| kept.join(format!("g{round}-{n}"))).collect();
        all.iter().try_for_each(fs::create_dir)?;
        until("them to be seen", LIMIT, || Ok((watches(&node)? > before).then_some(())))?;
        all.iter().try_for_each(fs::remove_dir)?;
    }
    until("what went to be forgotten", LIMIT, || Ok((watches(&node)? == before).then_some(())))?;
    let name = always(&node, &kept)?;
    ensure!(NAMES.contains(&&*name), "{name}");
    Ok(())
}

/// Without a client, `explain` says which part of all clients each endpoint has; what the hook gives to very
/// many is in `hash_shares`.
#[test]
fn shares_are_those_of_the_table() -> Result<()> {
    let app = Service::new("app").address("10.96.0.10").port(80, 8080);
    let app = app.key("balance: consistent-hash");
    let app = app.weighted("10.0.0.1", 1).weighted("10.0.0.2", 2).weighted("10.0.0.3", 7);
    let node = Node::builder().service(app).start()?;
    let explained: serde_json::Value = node.agent.json(&["explain", VIP])?;
    let shares: Vec<f64> = explained["candidates"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|candidate| candidate["score"].as_f64())
        .collect();
    let fits = shares.iter().zip([0.1, 0.2, 0.7]).all(|(share, due)| (share - due).abs() < 0.001);
    ensure!(shares.len() == 3 && fits, "{explained}");
    Ok(())
}
