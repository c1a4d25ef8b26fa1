//! Connections of an endpoint whose checks fail, of a service that wants them ended: those that wait for what
//! does not come, or all; of that endpoint, and of no other.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use mesh_tests::process::{Echo, Process, run, until};
use mesh_tests::{Node, Service, check};
use serde_json::Value;

/// Tells its name to whoever comes, and then sends back what it is sent.
const SERVER: &str = r#"
import socketserver, sys
class Echo(socketserver.BaseRequestHandler):
    def handle(self):
        self.request.sendall(sys.argv[1].encode())
        while data := self.request.recv(100):
            self.request.sendall(data)
class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address, daemon_threads, request_queue_size = True, True, 64
Server((sys.argv[2], 8080), Echo).serve_forever()
"#;

/// Connects; says where it is; `busy` sends something twice a second and waits for it to come back, `idle`
/// waits; says with which error that ends.
const CLIENT: &str = r#"
import errno, socket, sys, time
s = socket.create_connection(("10.96.0.10", 80))
print("at", s.recv(1).decode(), flush=True)
try:
    while True:
        if sys.argv[1] == "busy":
            s.sendall(b"x")
        if not s.recv(100):
            print("closed", flush=True)
            break
        time.sleep(0.5)
except OSError as error:
    print("ended", errno.errorcode[error.errno], flush=True)
time.sleep(1000)
"#;

/// Nobody hears from b any more, nor b from anybody.
const UNPLUGGED: &str = "add table inet t; \
                         add chain inet t in { type filter hook input priority 0; }; \
                         add rule inet t in ip daddr 10.0.0.2 drop; \
                         add rule inet t in ip saddr 10.0.0.2 drop";

struct Scene {
    node: Node,
    _servers: Vec<Process>,
}

fn app(health: &str) -> Service {
    let app = Service::new("app").address("10.96.0.10").port(80, 8080).key("balance: round-robin");
    app.key(&format!("health: {health}")).endpoint("10.0.0.1").endpoint("10.0.0.2")
}

/// A service whose endpoints are well as long as they are there.
fn scene(ending: &str) -> Result<Scene> {
    scene_of(&health(ending), "healthy")
}

fn health(ending: &str) -> String {
    format!("{{tcp: {{}}, interval: 200ms, fall: 2{ending}}}")
}

/// Two endpoints that come to this state.
fn scene_of(health: &str, state: &str) -> Result<Scene> {
    scene_with(&[app(health)], "app", state)
}

/// The two endpoints of one of these services.
fn scene_with(services: &[Service], name: &str, state: &str) -> Result<Scene> {
    let node = services.iter().cloned().fold(Node::builder(), mesh_tests::Builder::service);
    let mut node = node.start_without_agent()?;
    let script = node.directory().join("server.py");
    fs::write(&script, SERVER)?;
    let mut servers = Vec::new();
    for (name, ip) in [("a", "10.0.0.1"), ("b", "10.0.0.2")] {
        node.add_address(ip.parse()?)?;
        let mut command = node.outside("python3");
        command.arg(&script).args([name, ip]);
        servers.push(Process::spawn(name, command, Echo::On)?);
    }
    node.agent.start()?;
    node.agent.until_backends(name, |all| all.iter().all(|one| one.state == state))?;
    Ok(Scene { node, _servers: servers })
}

/// Two clients of this kind, at a and at b.
fn clients(scene: &Scene, kind: &str) -> Result<[Process; 2]> {
    let mut by_name: [Option<Process>; 2] = [None, None];
    for _ in 0..100 {
        let mut command = scene.node.command("python3");
        command.args(["-c", CLIENT, kind]);
        let mut client = Process::spawn(kind, command, Echo::Off)?;
        let at = until("a connection", Duration::from_secs(20), || {
            let log = client.log();
            Ok(["at a", "at b"].iter().position(|name| log.has(&[name])))
        })?;
        match &mut by_name[at] {
            place @ None => *place = Some(client),
            Some(_) => drop(client.kill()?),
        }
        if let [Some(_), Some(_)] = &by_name {
            break;
        }
    }
    let [a, b] = by_name;
    Ok([a.context("none is at a")?, b.context("none is at b")?])
}

fn unplug(node: &Node) -> Result<()> {
    let mut nft = node.outside("nft");
    nft.arg(UNPLUGGED);
    let output = run(nft)?;
    ensure!(output.status.success(), "{output:?}");
    node.agent.until_backends("app", |all| {
        all.iter().any(|one| one.address == "10.0.0.2:8080" && one.state == "unhealthy")
    })
}

fn until_ended(client: &Process, limit: Duration) -> Result<Duration> {
    let begin = Instant::now();
    // What `SOCK_DESTROY` gives (`tcp_abort`).
    until("the connection to be ended", limit, || {
        Ok(client.log().has(&["ended ECONNABORTED"]).then_some(()))
    })?;
    Ok(begin.elapsed())
}

fn ensure_goes_on(clients: &[&Process]) -> Result<()> {
    for client in clients {
        let log = client.log();
        ensure!(!log.has(&["ended"]) && !log.has(&["closed"]), "{}", log.tail());
    }
    Ok(())
}

#[test]
fn those_that_wait_are_ended() -> Result<()> {
    let mut scene = scene(", end-connections: silent, end-after: 2s")?;
    let [busy_a, busy_b] = clients(&scene, "busy")?;
    let [idle_a, idle_b] = clients(&scene, "idle")?;
    unplug(&scene.node)?;
    let took = until_ended(&busy_b, Duration::from_secs(20))?;
    println!("ended {took:?} after its endpoint was unhealthy");
    ensure_goes_on(&[&busy_a, &idle_a, &idle_b])?;
    let told = |one: &Value| {
        one["kind"] == "ended"
            && one["backend"] == "10.0.0.2:8080"
            && one["detail"].as_str().is_some_and(|text| text.starts_with("1 connections"))
    };
    until("it to be told", Duration::from_secs(20), || {
        let events: Vec<Value> = scene.node.agent.json(&["events", "--service", "app"])?;
        Ok(events.iter().any(told).then_some(()))
    })?;
    check::balanced(&mut scene.node, &["a"], first_byte)
}

#[test]
fn all_are_ended() -> Result<()> {
    let scene = scene(", end-connections: all, end-after: 1s")?;
    let [busy_a, busy_b] = clients(&scene, "busy")?;
    let [idle_a, idle_b] = clients(&scene, "idle")?;
    unplug(&scene.node)?;
    for client in [&busy_b, &idle_b] {
        until_ended(client, Duration::from_secs(20))?;
    }
    ensure_goes_on(&[&busy_a, &idle_a])
}

/// A service that falls back to another one says itself what becomes of its connections there, and when.
#[test]
fn who_falls_back_says_so_itself() -> Result<()> {
    let other = Service::new("other").address("10.96.0.20").port(80, 8080);
    let other = other.key(&format!("health: {}", health(", end-connections: all, end-after: 1h")));
    let other = other.endpoint("10.0.0.1").endpoint("10.0.0.2");
    let app = Service::new("app").address("10.96.0.10").port(80, 8080).endpoint("10.0.0.9");
    let app = app.key("fallback: {service: other}");
    let app = app.key(&format!("health: {}", health(", end-connections: silent, end-after: 2s")));
    let scene = scene_with(&[other, app], "other", "healthy")?;
    scene.node.agent.until_backends("app", |all| {
        all.iter().any(|one| one.address == "10.0.0.9:8080" && one.state == "unhealthy")
    })?;
    let [busy_a, busy_b] = clients(&scene, "busy")?;
    let [idle_a, idle_b] = clients(&scene, "idle")?;
    unplug(&scene.node)?;
    until_ended(&busy_b, Duration::from_secs(30))?;
    ensure_goes_on(&[&busy_a, &idle_a, &idle_b])
}

/// When the checks of all fail, all are used, since it may be the checks: then nothing is ended.
#[test]
fn what_is_used_for_want_of_better_goes_on() -> Result<()> {
    let health = "{http: {}, port: 1, interval: 200ms, fall: 2, probe: always, end-connections: all, \
                  end-after: 1s}";
    let scene = scene_of(health, "unhealthy")?;
    let [busy_a, busy_b] = clients(&scene, "busy")?;
    // Longer than the others need.
    std::thread::sleep(Duration::from_secs(4));
    ensure_goes_on(&[&busy_a, &busy_b])
}

/// What a definition does not want any more is not done, though its endpoint was unhealthy before.
#[test]
fn a_definition_can_take_it_back() -> Result<()> {
    let scene = scene(", end-connections: all, end-after: 4s")?;
    let [busy_a, busy_b] = clients(&scene, "busy")?;
    unplug(&scene.node)?;
    scene.node.agent.write_services("test.yaml", &Service::file(&[app(&health(""))]))?;
    std::thread::sleep(Duration::from_secs(7));
    ensure_goes_on(&[&busy_a, &busy_b])
}

/// The control: nothing is ended unless the service says so.
#[test]
fn none_is_ended_otherwise() -> Result<()> {
    let scene = scene("")?;
    let [busy_a, busy_b] = clients(&scene, "busy")?;
    unplug(&scene.node)?;
    // Longer than the others need.
    std::thread::sleep(Duration::from_secs(6));
    ensure_goes_on(&[&busy_a, &busy_b])
}

/// Who answers first.
fn first_byte(node: &Node) -> Result<String> {
    let mut command = node.command("python3");
    command.args([
        "-c",
        "import socket; print(socket.create_connection((\"10.96.0.10\", 80), 5).recv(1).decode())",
    ]);
    Ok(mesh_tests::process::stdout(command)?.trim().to_owned())
}
