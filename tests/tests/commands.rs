//! Health checks that are programs: they run as the user that the agent file names, with bounds, and leave
//! nothing behind.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use mesh_tests::process::until;
use mesh_tests::{Node, Service, check};
use serde_json::Value;

const VIP: &str = "10.96.0.10:80";

/// Passes for a only, and only as nobody without any right, told where to look.
const PICKY: &str = r#"
test "$(id -u):$(id -g):$(id -G)" = 65534:65534:65534 || { echo "I am $(id)" >&2; exit 2; }
grep -q '^CapEff:[[:space:]]0000000000000000$' /proc/self/status || { echo "capable" >&2; exit 2; }
grep -q '^NoNewPrivs:[[:space:]]1$' /proc/self/status || { echo "privileged" >&2; exit 2; }
test "$(ulimit -n):$(ulimit -c):$(ulimit -d)" = 256:0:262144 || { echo "unbounded" >&2; exit 2; }
test "$(ls /proc/self/fd | wc -l)" -le 5 || { ls -l /proc/self/fd | tail -n +2 | cut -c 35- >&2; exit 2; }
(: < /dev/tty) 2> /dev/null && { echo "a terminal" >&2; exit 2; }
test "$MESH_SERVICE:$MESH_PORT" = app:8080 || { env >&2; exit 2; }
test "$1" = "two words" || { echo "told $1" >&2; exit 2; }
test "$MESH_ADDRESS" = 10.0.0.1 && exit 0
printf 'b is\n  not \033[31mwell\n' >&2
exit 3
"#;

/// Hangs, and has children that hang in sessions of their own, that name themselves by an argument.
const HANGING: &str = r#"
setsid sh -c 'sleep 1000 & sleep 1000; :' left-behind &
sh -c 'sleep 1000; :' left-behind
"#;

struct Scene {
    node: Node,
    scripts: PathBuf,
}

impl Scene {
    fn new(agent_file: &str) -> Result<Self> {
        let node = Node::builder()
            .backend("a", "10.0.0.1:8080")
            .backend("b", "10.0.0.2:8080")
            .start_without_agent()?;
        node.agent.append(agent_file)?;
        let scripts = node.directory().join("scripts");
        fs::create_dir(&scripts)?;
        // For somebody else, whoever made what is above.
        for directory in scripts.ancestors().take(2) {
            fs::set_permissions(directory, PermissionsExt::from_mode(0o755))?;
        }
        Ok(Self { node, scripts })
    }

    fn script(&self, name: &str, text: &str, mode: u32) -> Result<PathBuf> {
        let path = self.scripts.join(name);
        fs::write(&path, format!("#!/bin/sh\n{text}"))?;
        fs::set_permissions(&path, PermissionsExt::from_mode(mode))?;
        Ok(path)
    }

    fn define(&self, health: &str) -> Result<()> {
        let app = Service::new("app").address("10.96.0.10").port(80, 8080).key(health);
        let app = app.endpoint("10.0.0.1").endpoint("10.0.0.2");
        self.node.agent.write_services("test.yaml", &Service::file(&[app]))
    }

    /// Waits until an endpoint has this state, for a reason with this in it.
    fn until(&self, address: &str, state: &str, reason: &str) -> Result<()> {
        let found = self.node.agent.until_backends("app", |all| {
            all.iter().any(|one| {
                one.address == address && one.state == state && one.reason.contains(reason)
            })
        });
        found.with_context(|| format!("{address} should be {state}: {reason}"))
    }

    fn until_reason(&self, words: &str) -> Result<()> {
        until(words, Duration::from_secs(30), || {
            let status = self.node.agent.status()?;
            Ok(status.reasons.iter().any(|reason| reason.contains(words)).then_some(()))
        })
    }
}

fn health(program: &Path, keys: &str) -> String {
    let program = program.display();
    format!(
        "health: {{command: {{run: [{program}, two words]}}, probe: always, interval: 500ms, fall: 1{keys}}}"
    )
}

/// The processes with this in their arguments, or of this program's runner.
fn processes(words: &str) -> Vec<i32> {
    let all = fs::read_dir("/proc").into_iter().flatten().flatten();
    let named = all.filter(|one| {
        let arguments = fs::read(one.path().join("cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&arguments).contains(words)
    });
    named.filter_map(|one| one.file_name().to_str()?.parse().ok()).collect()
}

/// The child of a process whose command line has this.
fn child(parent: i32, words: &str) -> Result<i32> {
    let children = fs::read_to_string(format!("/proc/{parent}/task/{parent}/children"))?;
    let child = children.split_whitespace().find(|id| {
        let line = fs::read(format!("/proc/{id}/cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&line).contains(words)
    });
    Ok(child.with_context(|| format!("{parent} has no child {words}"))?.parse()?)
}

/// The process that runs commands, and the one that keeps it.
fn runner(node: &Node) -> Result<(i32, i32)> {
    let keeper = child(i32::try_from(node.agent.id()?)?, "run-commands")?;
    Ok((child(keeper, "run-commands")?, keeper))
}

fn kill(process: i32) -> Result<()> {
    Ok(mesh_tests::sys::process::signal(u32::try_from(process)?, libc::SIGKILL)?)
}

fn until_gone(what: &str, find: impl Fn() -> Vec<i32>) -> Result<()> {
    until(&format!("{what} to be gone"), Duration::from_secs(20), || {
        Ok(find().is_empty().then_some(()))
    })
}

#[test]
fn the_exit_status_decides() -> Result<()> {
    let mut scene = Scene::new("command-checks: {user: nobody}\n")?;
    let picky = scene.script("picky", PICKY, 0o755)?;
    scene.define(&health(&picky, ""))?;
    scene.node.agent.start()?;
    scene.until("10.0.0.1:8080", "healthy", "command checks pass")?;
    scene.until(
        "10.0.0.2:8080",
        "unhealthy",
        "command checks fail: exit status 3: b is not \\u{1b}[31mwell",
    )?;
    let seen = check::histogram(&scene.node, VIP, 50)?;
    ensure!(seen.keys().eq(["a"]), "{seen:?}");
    check::balanced(&mut scene.node, &["a"], |node| check::who(node, VIP))
}

#[test]
fn what_hangs_is_ended_with_all_that_it_started() -> Result<()> {
    let mut scene = Scene::new("command-checks:\n")?;
    let mark = format!("left-behind-{}", std::process::id());
    let hanging = scene.script("hanging", &HANGING.replace("left-behind", &mark), 0o755)?;
    scene.define(&health(&hanging, ", timeout: 400ms"))?;
    scene.node.agent.start()?;
    scene.until("10.0.0.1:8080", "unhealthy", "no end within 400ms")?;
    ensure!(!processes(&mark).is_empty(), "the next check hangs too");
    // Many more memories than it may have, whatever is there.
    let greedy = scene.script("greedy", "exec python3 -c 'x = bytes(1 << 29)'", 0o755)?;
    scene.define(&health(&greedy, ", timeout: 500ms, fall: 2").replace("fall: 1, ", ""))?;
    scene.until("10.0.0.1:8080", "unhealthy", "MemoryError")?;
    until_gone("what the checks left behind", || processes(&mark))?;
    // One after another for a while: nothing adds up.
    let shy =
        scene.script("shy", &format!("setsid sh -c 'sleep 1000; :' {mark} & exit 0"), 0o755)?;
    scene.define(&health(&shy, ""))?;
    scene.until("10.0.0.1:8080", "healthy", "command checks pass")?;
    until_gone("what the checks left behind", || processes(&mark))?;

    scene.define(&health(&hanging, ", timeout: 500ms"))?;
    until("the hanging check", Duration::from_secs(20), || {
        Ok((!processes(&mark).is_empty()).then_some(()))
    })?;
    let (runner, keeper) = runner(&scene.node)?;
    scene.node.agent.kill()?;
    until_gone("what a killed agent's checks left behind", || processes(&mark))?;
    let is_there = |id: &i32| Path::new(&format!("/proc/{id}")).exists();
    until_gone("its runner", || [runner, keeper].into_iter().filter(is_there).collect())
}

#[test]
fn what_cannot_be_run_says_nothing_of_endpoints() -> Result<()> {
    let mut scene = Scene::new("command-checks: {user: nobody}\n")?;
    let secret = scene.script("secret", "exit 0", 0o700)?;
    scene.define(&health(&secret, ""))?;
    scene.node.agent.start()?;
    scene.until_reason("health checks cannot be made of app: ")?;
    scene.until_reason("cannot be run: Permission denied")?;
    scene.until("10.0.0.1:8080", "unknown", "not checked yet")?;
    fs::set_permissions(&secret, PermissionsExt::from_mode(0o755))?;
    scene.until("10.0.0.1:8080", "healthy", "command checks pass")?;
    until("the trouble to be over", Duration::from_secs(30), || {
        Ok(scene.node.agent.status()?.reasons.is_empty().then_some(()))
    })?;
    check::balanced(&mut scene.node, &["a", "b"], |node| check::who(node, VIP))
}

/// Whoever has the same user can end the one who runs commands: that does not last, and nothing of it stays.
#[test]
fn an_ended_runner_comes_back() -> Result<()> {
    let mut scene = Scene::new("command-checks: {user: nobody}\n")?;
    let mark = format!("orphan-{}", std::process::id());
    let hanging = scene.script("hanging", &HANGING.replace("left-behind", &mark), 0o755)?;
    scene.define(&health(&hanging, ", timeout: 500ms"))?;
    scene.node.agent.start()?;
    until("the hanging check", Duration::from_secs(20), || {
        Ok((!processes(&mark).is_empty()).then_some(()))
    })?;
    let (before, keeper) = runner(&scene.node)?;
    let well = scene.script("well", "exit 0", 0o755)?;
    scene.define(&health(&well, ""))?;
    kill(before)?;
    scene.until("10.0.0.1:8080", "healthy", "command checks pass")?;
    until_gone("what its runner left behind", || processes(&mark))?;
    let (after, same) = runner(&scene.node)?;
    ensure!(after != before && same == keeper, "{before} {after}, {keeper} {same}");
    until("the trouble to be over", Duration::from_secs(30), || {
        Ok(scene.node.agent.status()?.reasons.is_empty().then_some(()))
    })?;
    // Without its keeper there is none: that is said, and nobody is unhealthy for it.
    kill(keeper)?;
    kill(after)?;
    scene.until_reason("the process that has commands run has ended")?;
    scene.until("10.0.0.1:8080", "healthy", "command checks pass")?;
    check::balanced(&mut scene.node, &["a", "b"], |node| check::who(node, VIP))
}

/// However many commands hang, those of other services run, and other checks are made.
#[test]
fn what_hangs_holds_up_nobody_else() -> Result<()> {
    let mut scene = Scene::new("command-checks: {user: nobody}\n")?;
    let hanging = scene.script("hanging", "sleep 1000", 0o755)?;
    // Not those of other tests.
    let path = hanging.to_string_lossy().into_owned();
    let well = scene.script("well", "exit 0", 0o755)?;
    let service = |name: &str, address: &str, health: &str| {
        Service::new(name).address(address).port(80, 8080).key(health)
    };
    let slow = health(&hanging, ", timeout: 10s").replace("500ms", "10s");
    let many = service("many", "10.96.0.20", &slow);
    let many = (1..=64).fold(many, |many, n| many.endpoint(&format!("10.0.9.{n}")));
    let other = service("other", "10.96.0.21", &health(&well, "")).endpoint("10.0.0.1");
    let tcp = service("tcp", "10.96.0.22", "health: {tcp: {}, probe: always}").endpoint("10.0.0.1");
    scene.node.agent.write_services("test.yaml", &Service::file(&[many]))?;
    scene.node.agent.start()?;
    until("so many commands as may run", Duration::from_secs(20), || {
        Ok((processes(&path).len() >= 8).then_some(()))
    })?;
    scene.node.agent.write_services("more.yaml", &Service::file(&[other, tcp]))?;
    for name in ["other", "tcp"] {
        scene
            .node
            .agent
            .until_backends(name, |all| all.iter().all(|one| one.state == "healthy"))?;
    }
    // Before any of those has come to its end.
    let hanging = scene.node.agent.backends("many")?;
    ensure!(hanging.iter().all(|one| one.state == "unknown"), "{hanging:?}");
    let running = processes(&path).len();
    ensure!(running <= 8, "{running} of one service");
    let seen = check::ask(&scene.node, "blocking", "10.96.0.21:80")?;
    ensure!(seen.backend.as_deref() == Some("a"), "{seen:?}");
    scene.node.agent.stop()
}

/// A command that is paused with the agent has its time afterwards. One that does not end is found all the same.
#[test]
fn a_pause_is_not_held_against_a_command() -> Result<()> {
    let mut scene = Scene::new("command-checks: {user: nobody}\n")?;
    let steps = "for n in 1 2 3 4 5 6 7 8; do sleep 0.05; done";
    let slow = scene.script("slow", steps, 0o755)?;
    scene.define(&health(&slow, ", timeout: 700ms").replace("500ms", "700ms"))?;
    scene.node.agent.start()?;
    scene.until("10.0.0.1:8080", "healthy", "command checks pass")?;
    let inside = scene.node.cgroup().child("agent")?;
    let (runner, keeper) = runner(&scene.node)?;
    for id in [i32::try_from(scene.node.agent.id()?)?, keeper, runner] {
        fs::write(inside.join("cgroup.procs"), id.to_string())?;
    }
    // Commands that were started before are elsewhere, and end.
    sleep(Duration::from_millis(700));
    for _ in 0..4 {
        fs::write(inside.join("cgroup.freeze"), "1")?;
        sleep(Duration::from_millis(1_500));
        fs::write(inside.join("cgroup.freeze"), "0")?;
        sleep(Duration::from_millis(700));
        let backends = scene.node.agent.backends("app")?;
        ensure!(backends.iter().all(|one| one.state == "healthy"), "{backends:?}");
    }
    let events: Vec<Value> = scene.node.agent.json(&["events"])?;
    let ill = events.iter().filter(|one| one["kind"] == "unhealthy").collect::<Vec<_>>();
    ensure!(ill.is_empty(), "{ill:?}");
    let hanging = scene.script("hanging", "sleep 1000", 0o755)?;
    scene.define(&health(&hanging, ", timeout: 500ms"))?;
    scene.until("10.0.0.1:8080", "unhealthy", "no end within 500ms")?;
    scene.node.agent.stop()
}

/// Nobody runs anything whom the administrator has not allowed to.
#[test]
fn nothing_runs_unless_allowed() -> Result<()> {
    let mut scene = Scene::new("")?;
    let trace = scene.scripts.join("trace");
    let script = scene.script("script", &format!("touch {}", trace.display()), 0o755)?;
    scene.define(&health(&script, ""))?;
    scene.node.agent.start()?;
    scene.until_reason("name who they run as by `command-checks: {user: nobody}`")?;
    scene.until("10.0.0.1:8080", "unknown", "no health check")?;
    ensure!(runner(&scene.node).is_err(), "a process that would run commands");
    check::balanced(&mut scene.node, &["a", "b"], |node| check::who(node, VIP))?;
    ensure!(!trace.exists());
    Ok(())
}
