//! The agent ends, and the kernel goes on; the next one takes over what it finds.

use std::fs;
use std::os::fd::AsFd as _;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use mesh_agent::dataplane::sys::links;
use mesh_tests::long::Long;
use mesh_tests::process::{LIMIT, run, until};
use mesh_tests::server::Kind;
use mesh_tests::sys::bpf::Stranger;
use mesh_tests::sys::mounts;
use mesh_tests::{Agent, Node, Service, check};
use serde_json::Value;

const VIP: &str = "10.96.0.10:80";
const OTHER: &str = "10.96.0.11:80";
const LONG: &str = "10.96.0.12:90";
const A: &str = "10.0.0.1:8080";
const B: &str = "10.0.0.2:8080";

fn app(endpoints: &[&str]) -> Service {
    let service = Service::new("app").address("10.96.0.10").port(80, 8080);
    endpoints.iter().fold(service, |service, endpoint| service.endpoint(endpoint))
}

fn other() -> Service {
    Service::new("other").address("10.96.0.11").port(80, 8080).endpoint("10.0.0.2")
}

fn long() -> Service {
    let service = Service::new("long").address("10.96.0.12").port(90, 9090).udp(90, 9090);
    service.endpoint("10.0.0.3").endpoint("10.0.0.4")
}

/// Services `app` and `other` of a and b, and `long` of c and d; balancing goes on when the agent ends.
fn node() -> Result<Node> {
    let mut node = Node::builder()
        .backend("a", A)
        .backend("b", B)
        .server(Kind::Long, "c", "10.0.0.3:9090")
        .server(Kind::Long, "d", "10.0.0.4:9090")
        .start_without_agent()?;
    node.agent.stays = true;
    node.agent.write_services("app.yaml", &Service::file(&[app(&["10.0.0.1", "10.0.0.2"])]))?;
    node.agent.write_services("other.yaml", &Service::file(&[other()]))?;
    node.agent.write_services("long.yaml", &Service::file(&[long()]))?;
    node.agent.start()?;
    Ok(node)
}

/// Backends of `app` by address, with what is counted for each.
fn opened(agent: &Agent) -> Result<Vec<(String, u64, u64)>> {
    let backends: Vec<Value> = agent.get("/v1/backends?service=app")?;
    let count = |backend: &Value, key: &str| backend[key].as_u64().context("a number");
    let one = |backend: &Value| {
        let address = backend["address"].as_str().unwrap_or_default().to_owned();
        Ok((address, count(backend, "opened")?, count(backend, "active")?))
    };
    backends.iter().map(one).collect()
}

fn active(agent: &Agent, service: &str) -> Result<u64> {
    let services: Vec<Value> = agent.get("/v1/services")?;
    let found = services.iter().find(|found| found["name"] == service);
    found.and_then(|found| found["active"].as_u64()).context("the service")
}

fn ids(agent: &Agent) -> Result<Vec<u64>> {
    let status: Value = agent.get("/v1/status")?;
    let programs = status["programs"].as_array().context("programs")?;
    programs.iter().map(|program| program["id"].as_u64().context("an id")).collect()
}

/// `cleanup`, which has to work; then nobody answers any more.
fn ensure_cleaned(node: &Node) -> Result<()> {
    let output = node.agent.mesh(&["cleanup", "--config", &node.agent.file().to_string_lossy()])?;
    ensure!(output.status.success(), "{output:?}");
    until("the programs to be detached", Duration::from_secs(5), || {
        Ok(node.attached()?.is_empty().then_some(()))
    })?;
    let error = check::ask(node, "blocking", VIP)?.error;
    ensure!(error.as_deref() == Some("connect: ENETUNREACH"), "control: {error:?}");
    let pins = node.agent.pins();
    let left = mounts::inside(node.namespace().mounts(), || pins.exists())?;
    ensure!(!left, "{output:?}");
    Ok(())
}

/// However it ends, connects are balanced meanwhile, connections go on, and the next one knows of all that
/// and writes nothing.
#[test]
fn killed_terminated_and_started_again() -> Result<()> {
    let mut node = node()?;
    let long = Long::start(&node, LONG, 20, 10)?;
    until("all connections to be there", Duration::from_secs(20), || {
        Ok((active(&node.agent, "long")? == 40).then_some(()))
    })?;
    for _ in 0..8 {
        check::who(&node, VIP)?;
    }
    let programs = ids(&node.agent)?;
    let mut counted = 8;
    for end in [Agent::kill, Agent::stop, Agent::kill] {
        end(&mut node.agent)?;
        let seen = check::histogram(&node, VIP, 20)?;
        ensure!(seen.len() == 2, "{seen:?}");
        node.agent.start()?;
        counted += 20;
        let log = node.agent.log()?;
        ensure!(log.has(&["taken over", "its programs stay"]), "{}", log.tail());
        let status: Value = node.agent.get("/v1/status")?;
        ensure!(status["counters"]["map_writes"] == 0, "{}", status["counters"]);
        ensure!(ids(&node.agent)? == programs, "{}", status["programs"]);
        let now = opened(&node.agent)?;
        ensure!(now.iter().map(|(_, opened, _)| opened).sum::<u64>() == counted, "{now:?}");
        ensure!(active(&node.agent, "long")? == 40);
        ensure!(status["counters"]["balanced"].as_u64() >= Some(counted + 40), "{status}");
    }
    let listed: Vec<Value> = node.agent.json(&["connections", "long"])?;
    ensure!(listed.len() == 40, "{}", listed.len());
    long.finish_whole()?;
    until("the records to be released", Duration::from_secs(10), || {
        Ok((active(&node.agent, "long")? == 0).then_some(()))
    })?;
    node.agent.stop()?;
    ensure_cleaned(&node)
}

/// What changed meanwhile is applied, and nothing else is written.
#[test]
fn what_changed_meanwhile_is_applied() -> Result<()> {
    let mut node = node()?;
    node.agent.stop()?;
    node.agent.write_services("app.yaml", &Service::file(&[app(&["10.0.0.2"])]))?;
    fs::remove_file(node.agent.services_directory().join("other.yaml"))?;
    ensure!(check::who(&node, OTHER)? == "b");
    node.agent.start()?;
    node.agent.until_places("app", &[B])?;
    let seen = check::histogram(&node, VIP, 20)?;
    ensure!(seen.keys().eq(["b"]), "{seen:?}");
    node.agent.until_gone("other")?;
    check::untouched(&node, OTHER)?;
    let status: Value = node.agent.get("/v1/status")?;
    let writes = status["counters"]["map_writes"].as_u64().context("a number")?;
    // Of app: its slots, its table, its removed backend twice and the state of none; of other: its
    // frontend, its address, its record, its backend and its name.
    ensure!((5..=12).contains(&writes), "{writes}");
    node.agent.stop()?;
    ensure_cleaned(&node)
}

/// Nothing is removed because a source has not been read, or not without errors.
#[test]
fn a_source_that_does_not_answer_removes_nothing() -> Result<()> {
    let mut node = node()?;
    node.agent.stop()?;
    let (directory, away) = (node.agent.services_directory(), node.directory().join("away"));
    fs::rename(&directory, &away)?;
    node.agent.launch()?;
    let held = |node: &Node| {
        until("the agent to say what it holds", Duration::from_secs(20), || {
            let Ok(status) = node.agent.status() else { return Ok(None) };
            let said = status.reasons.iter().any(|reason| {
                reason.contains("as a former agent left them") && reason.contains("other")
            });
            Ok(said.then_some(()))
        })
    };
    held(&node)?;
    let services: Vec<Value> = node.agent.json(&["services"])?;
    ensure!(services.len() == 3, "{services:?}");
    let problems = services.iter().map(|service| service["problems"][0].as_str().unwrap_or(""));
    ensure!(problems.clone().all(|text| text.contains("held as it was found")), "{services:?}");
    let seen = check::histogram(&node, VIP, 20)?;
    ensure!(seen.len() == 2, "{seen:?}");

    // A file that cannot be read may define what it defined before.
    fs::write(away.join("other.yaml"), "services: [")?;
    fs::rename(&away, &directory)?;
    node.agent.until_places("app", &[A, B])?;
    held(&node)?;
    ensure!(check::who(&node, OTHER)? == "b");
    fs::remove_file(directory.join("other.yaml"))?;
    node.agent.until_gone("other")?;
    check::untouched(&node, OTHER)?;
    node.agent.stop()?;
    ensure_cleaned(&node)
}

/// A directory that is not mounted yet looks like one in which nothing is defined any more.
#[test]
fn an_empty_directory_removes_nothing_until_told() -> Result<()> {
    let mut node = node()?;
    node.agent.kill()?;
    let (directory, away) = (node.agent.services_directory(), node.directory().join("away"));
    fs::rename(&directory, &away)?;
    fs::create_dir(&directory)?;
    node.agent.start()?;
    ensure!(check::who(&node, OTHER)? == "b");
    let told = node.agent.mesh(&["forget", "other"])?;
    ensure!(told.status.success() && told.stdout == b"other is no longer held\n", "{told:?}");
    check::untouched(&node, OTHER)?;
    let told = node.agent.mesh(&["forget", "other"])?;
    ensure!(!told.status.success(), "{told:?}");
    ensure!(check::histogram(&node, VIP, 20)?.len() == 2);

    // Another service cannot have what is held, until it is known that nobody defines it any more.
    let taker = Service::new("taker").address("10.96.0.10").port(80, 8080).endpoint("10.0.0.2");
    fs::write(directory.join("broken.yaml"), "services: [")?;
    node.agent.write_services("taker.yaml", &Service::file(&[taker]))?;
    let problem = |node: &Node| -> Result<Option<String>> {
        let services: Vec<Value> = node.agent.json(&["services"])?;
        let found = services.iter().find(|service| service["name"] == "taker");
        Ok(found.map(|service| service["problems"][0].as_str().unwrap_or("").to_owned()))
    };
    let text = until("the service", Duration::from_secs(20), || problem(&node))?;
    ensure!(text.contains("still an address of service app"), "{text}");
    ensure!(check::histogram(&node, VIP, 20)?.len() == 2);
    fs::remove_file(directory.join("broken.yaml"))?;
    node.agent.until_gone("app")?;
    node.agent.until_gone("long")?;
    let seen = check::histogram(&node, VIP, 20)?;
    ensure!(seen.keys().eq(["b"]), "{seen:?}");
    ensure!(problem(&node)?.as_deref() == Some(""), "{:?}", problem(&node)?);
    let told = node.agent.mesh(&["forget", "--all"])?;
    ensure!(told.stdout == b"nothing is held\n", "{told:?}");
    node.agent.stop()?;
    ensure_cleaned(&node)
}

/// What checks and people have said is known to the next agent.
#[test]
fn states_and_drains_survive() -> Result<()> {
    let mut node = node()?;
    let checked = app(&["10.0.0.1", "10.0.0.9"]).checked_every(200);
    node.agent.write_services("app.yaml", &Service::file(&[checked]))?;
    let state = |node: &Node, address: &str| -> Result<String> {
        let backends = node.agent.backends("app")?;
        let found = backends.into_iter().find(|backend| backend.address == address);
        Ok(found.context("the backend")?.state)
    };
    node.agent.until_backends("app", |backends| {
        backends.iter().map(|backend| &*backend.state).eq(["healthy", "unhealthy"])
    })?;
    node.agent.mesh(&["drain", "long", "10.0.0.3"])?;
    node.agent.kill()?;
    node.agent.start()?;
    let log = node.agent.log()?;
    ensure!(state(&node, "10.0.0.9:8080")? == "unhealthy", "{}", log.tail());
    let drained = node.agent.backends("long")?;
    ensure!(drained.iter().map(|b| &*b.state).eq(["draining", "draining", "unknown", "unknown"]));
    let undrained = node.agent.mesh(&["undrain", "long", "10.0.0.3"])?;
    ensure!(undrained.status.success(), "{undrained:?}");
    ensure!(node.agent.backends("long")?.iter().all(|backend| backend.state == "unknown"));
    node.agent.stop()?;
    ensure_cleaned(&node)
}

/// Without an agent the commands that look read what is pinned, and say so; the others do not answer.
#[test]
fn inspection_without_an_agent() -> Result<()> {
    let mut node = node()?;
    let long = Long::start(&node, LONG, 3, 1)?;
    until("all connections to be there", Duration::from_secs(20), || {
        Ok((active(&node.agent, "long")? == 5).then_some(()))
    })?;
    let cgroup = node.cgroup().path().to_string_lossy().into_owned();
    let pins = node.agent.pins().to_string_lossy().into_owned();
    let questions: [&[&str]; 6] = [
        &["services"],
        &["services", "app"],
        &["backends"],
        &["backends", "app"],
        &["connections", "long"],
        &["explain", VIP, "--from", &cgroup],
    ];
    let ask = |node: &Node, question: &[&str]| -> Result<(Value, String)> {
        let output = node.agent.mesh(&[&["-o", "json", "--pin-dir", &pins], question].concat())?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.success(), "{question:?}: {said}");
        Ok((serde_json::from_slice(&output.stdout)?, said))
    };
    // What only an agent knows.
    let strip = |mut value: Value| {
        let strip = |value: &mut Value| {
            if let Some(fields) = value.as_object_mut() {
                for unknown in ["source", "since", "reason", "zone", "age", "inputs"] {
                    fields.remove(unknown);
                }
            }
        };
        // Who would answer may be another one each time, but not among whom.
        if value.is_object() {
            return value["candidates"].clone();
        }
        let list = value.as_array_mut();
        if let Some(list) = list {
            list.iter_mut().for_each(strip);
            // The order may depend on what was stripped.
            list.sort_by_key(Value::to_string);
        }
        value
    };
    let before: Vec<Value> =
        questions.iter().map(|q| Ok(strip(ask(&node, q)?.0))).collect::<Result<_>>()?;
    node.agent.kill()?;
    for (question, before) in questions.iter().zip(before) {
        let (found, said) = ask(&node, question)?;
        ensure!(said.contains("no agent runs") && said.contains(&pins), "{said}");
        ensure!(strip(found.clone()) == before, "{question:?}: {found}, and before {before}");
    }
    let unknown = node.agent.mesh(&["--pin-dir", &pins, "backends", "nothing"])?;
    ensure!(unknown.status.code() == Some(1), "{unknown:?}");
    let status = node.agent.mesh(&["--pin-dir", &pins, "status"])?;
    ensure!(status.status.code() == Some(3), "{status:?}");
    let nothing = node.agent.mesh(&["--pin-dir", "/sys/fs/bpf/nothing", "services"])?;
    ensure!(nothing.status.code() == Some(3), "{nothing:?}");
    ensure!(String::from_utf8_lossy(&nothing.stderr).contains("nothing is pinned"), "{nothing:?}");

    // Looking has changed nothing.
    node.agent.start()?;
    let status: Value = node.agent.get("/v1/status")?;
    ensure!(status["counters"]["map_writes"] == 0, "{}", status["counters"]);
    long.finish_whole()?;
    node.agent.stop()?;
    ensure_cleaned(&node)
}

#[test]
fn pins_that_are_removed_are_made_again() -> Result<()> {
    let mut node = node()?;
    let (namespace, pins) = (node.namespace(), node.agent.pins());
    let count = || -> Result<usize> {
        let version = fs::read_dir(&pins)?.next().context("a directory")??.path();
        Ok(fs::read_dir(version)?.count())
    };
    let before = mounts::inside(namespace.mounts(), count)??;
    ensure!(before == 19 + 2 * 16, "{before}");
    mounts::inside(namespace.mounts(), || fs::remove_dir_all(&pins))??;
    until("the pins to be made again", Duration::from_secs(10), || {
        Ok(mounts::inside(namespace.mounts(), count)?.is_ok_and(|now| now == before).then_some(()))
    })?;
    until("it to be told", LIMIT, || {
        Ok(node.agent.log()?.has(&["pins were removed by somebody else"]).then_some(()))
    })?;
    node.agent.kill()?;
    let seen = check::histogram(&node, VIP, 20)?;
    ensure!(seen.len() == 2, "{seen:?}");
    ensure_cleaned(&node)
}

/// Ended with status 1 and these texts, and nothing was changed.
fn ensure_refused(node: &Node, pins: &str, texts: &[&str]) -> Result<()> {
    let mut command = node.agent.run_command()?;
    command.args(["--pin-dir", pins]);
    let output = run(command)?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.code() == Some(1), "{output:?}");
    for text in texts {
        ensure!(said.contains(text), "{text:?} is not in: {said}");
    }
    ensure!(node.attached()?.is_empty(), "{said}");
    Ok(())
}

#[test]
fn directories_that_are_no_place_for_pins() -> Result<()> {
    let mut node = Node::builder().start_without_agent()?;
    // Where none is mounted, the agent mounts it.
    mounts::without_bpf(node.namespace().mounts())?;
    let elsewhere = node.directory().join("elsewhere");
    ensure_refused(&node, &elsewhere.to_string_lossy(), &["not on a BPF file system"])?;
    ensure!(!elsewhere.exists());

    // The file system is mounted by now.
    node.agent.start()?;
    node.agent.stop()?;
    let namespace = node.namespace();
    let inside = |work: &(dyn Fn() -> std::io::Result<()> + Sync)| -> Result<()> {
        Ok(mounts::inside(namespace.mounts(), work)??)
    };
    inside(&|| {
        fs::create_dir("/sys/fs/bpf/foreign")?;
        std::os::unix::fs::chown("/sys/fs/bpf/foreign", Some(65_534), None)
    })?;
    ensure_refused(&node, "/sys/fs/bpf/foreign", &["belongs to user 65534"])?;
    // A link makes it one that is in force, and it says nothing of its layout.
    let below = node.cgroup().path().join("below");
    fs::create_dir(&below)?;
    let link = Stranger::load(None)?.attach(&below)?;
    inside(&|| {
        fs::create_dir_all("/sys/fs/bpf/future/v4000")?;
        links::pin(link.as_fd(), Path::new("/sys/fs/bpf/future/v4000/mesh_connect4_link"))
    })?;
    ensure_refused(&node, "/sys/fs/bpf/future", &["v4000", "another version", "cleanup"])?;
    drop(link);
    inside(&|| fs::remove_file("/sys/fs/bpf/future/v4000/mesh_connect4_link"))?;
    fs::remove_dir(&below)?;
    inside(&|| {
        let here = rustix::mount::MountFlags::RDONLY | rustix::mount::MountFlags::BIND;
        fs::create_dir("/sys/fs/bpf/readonly")?;
        rustix::mount::mount_bind("/sys/fs/bpf/readonly", "/sys/fs/bpf/readonly")?;
        Ok(rustix::mount::mount_remount("/sys/fs/bpf/readonly", here, c"")?)
    })?;
    ensure_refused(&node, "/sys/fs/bpf/readonly", &["Read-only", "readonly"])
}

/// What is pinned by somebody else under one of our names is named, and left.
#[test]
fn a_foreign_pin() -> Result<()> {
    let mut node = node()?;
    node.agent.stop()?;
    let (namespace, pins) = (node.namespace(), node.agent.pins());
    mounts::inside(namespace.mounts(), || -> Result<()> {
        let version = fs::read_dir(&pins)?.next().context("a directory")??.path();
        // A map in place of a program, and one map in place of another.
        fs::rename(version.join("UNITS"), version.join("mesh_release"))?;
        fs::rename(version.join("GRACE"), version.join("COUNTERS"))?;
        Ok(())
    })??;
    let output = run(node.agent.run_command()?)?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.code() == Some(1) && said.contains("mesh_release"), "{said}");
    ensure!(said.contains("bpf-map where this agent has bpf-prog"), "{said}");
    ensure!(check::who(&node, OTHER)? == "b", "what was attached is so still");

    mounts::inside(namespace.mounts(), || -> Result<()> {
        let version = fs::read_dir(&pins)?.next().context("a directory")??.path();
        Ok(fs::remove_file(version.join("mesh_release"))?)
    })??;
    let output = run(node.agent.run_command()?)?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(
        output.status.code() == Some(1) && said.contains("COUNTERS is a map of type"),
        "{said}"
    );
    ensure!(check::who(&node, OTHER)? == "b", "what was attached is so still");
    ensure_cleaned(&node)
}

#[test]
fn a_second_agent_with_the_same_pins_refuses() -> Result<()> {
    let node = node()?;
    let cgroup = node.cgroup().child("other")?;
    let directory = node.directory().join("second");
    let second =
        Agent::new(&directory, &cgroup, node.namespace(), &[], mesh_tests::process::Echo::On)?;
    let mut command = second.run_command()?;
    command.arg("--pin-dir").arg(node.agent.pins());
    let output = run(command)?;
    let said = String::from_utf8_lossy(&output.stderr);
    let pid = format!("(process {})", node.agent.id()?);
    ensure!(output.status.code() == Some(1) && said.contains(&pid), "{said}");
    ensure!(check::who(&node, OTHER)? == "b");
    fs::remove_dir(cgroup)?;
    Ok(())
}
