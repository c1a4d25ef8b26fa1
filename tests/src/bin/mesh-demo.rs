//! The main job, shown: three HTTP servers, the agent, curl, and a server that stops and comes back.
//!
//! Everything happens in a network namespace and a cgroup of its own, which are gone afterwards.

use std::collections::BTreeMap;
use std::io::{self, IsTerminal};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use mesh_tests::process::{stdout, until};
use mesh_tests::server::Kind;
use mesh_tests::{Node, Service};

/// Shows the main job: unmodified curl is balanced over three HTTP servers by the kernel.
#[derive(Parser)]
struct Demo {}

const ADDRESS: &str = "10.96.0.10";
const SERVERS: [(&str, &str); 3] =
    [("anna", "10.0.0.1:8080"), ("bert", "10.0.0.2:8080"), ("carl", "10.0.0.3:8080")];

/// With three servers, one is missed by chance with a probability of 4e-11.
const REQUESTS: u32 = 60;

fn main() -> ExitCode {
    let Demo {} = Demo::parse();
    let started = Instant::now();
    match show() {
        Ok(()) => {
            println!("\nAll of it was seen, in {:.1} s.", started.elapsed().as_secs_f32());
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("\nThe demo failed: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn show() -> Result<()> {
    let service = Service::new("hello")
        .address(ADDRESS)
        .port(80, 8080)
        .key("health: {tcp: {}, probe: always, interval: 200ms, timeout: 100ms, rise: 2, fall: 2}");
    let service = SERVERS.iter().fold(service, |service, (_, place)| service.endpoint(place));

    step(
        "A network namespace without any route, and in it three HTTP servers (python3 -m http.server)",
    );
    let builder = Node::builder().quiet();
    let builder =
        SERVERS.iter().fold(builder, |node, (name, place)| node.server(Kind::Python, name, place));
    let mut node = builder.service(service.clone()).start_without_agent()?;
    for (name, place) in SERVERS {
        println!("  {name} listens on {place}");
    }

    step("Without the agent, nobody is at the service's address");
    match curl(&node) {
        Ok(name) => bail!("{name} answered although no agent runs: this demo would prove nothing"),
        Err(error) => println!("  $ curl http://{ADDRESS}/\n  {}", last_line(&error)),
    }

    step("The agent, with this service file");
    for line in Service::file(&[service]).lines() {
        println!("  {line}");
    }
    node.agent.start()?;
    until_state(&node, SERVERS[1].1, "healthy")?;

    step(&format!("{REQUESTS} times curl http://{ADDRESS}/: the kernel picks a server for each"));
    let all = SERVERS.map(|(name, _)| name);
    requests(&node, &all)?;

    let (name, place) = SERVERS[1];
    step(&format!("{name} is killed; its health check finds out"));
    let killed = Instant::now();
    node.kill_server(name)?;
    until_state(&node, place, "unhealthy")?;
    println!("  unhealthy after {} ms", killed.elapsed().as_millis());
    backends(&node)?;

    step(&format!("{REQUESTS} times curl again: traffic has moved"));
    let others: Vec<_> = all.into_iter().filter(|other| *other != name).collect();
    requests(&node, &others)?;

    step(&format!("{name} comes back"));
    let back = Instant::now();
    node.start_server(Kind::Python, name, place)?;
    until_state(&node, place, "healthy")?;
    println!("  healthy after {} ms", back.elapsed().as_millis());

    step(&format!("{REQUESTS} times curl once more: {name} takes part again"));
    requests(&node, &all)?;

    step("The agent ends, and takes its programs along");
    node.agent.stop()?;
    let left = node.attached()?;
    ensure!(left.is_empty(), "programs are still attached: {left:?}");
    ensure!(curl(&node).is_err(), "the address still answers");
    println!("  no program is attached, and nobody is at {ADDRESS} any more");
    Ok(())
}

/// Asks again and again; exactly these servers must answer, and each request must be answered.
fn requests(node: &Node, expected: &[&str]) -> Result<()> {
    let mut seen = BTreeMap::<_, u32>::new();
    for _ in 0..REQUESTS {
        *seen.entry(curl(node)?).or_default() += 1;
    }
    for (name, count) in &seen {
        println!("  {name} answered {count:2}  {}", "#".repeat(*count as usize));
    }
    ensure!(
        seen.keys().eq(expected),
        "{expected:?} should have answered, and no other; these did: {:?}",
        seen.keys()
    );
    Ok(())
}

fn curl(node: &Node) -> Result<String> {
    let mut curl = node.command("curl");
    curl.args(["--silent", "--show-error", "--max-time", "5", &format!("http://{ADDRESS}/")]);
    stdout(curl)
}

fn until_state(node: &Node, place: &str, state: &str) -> Result<()> {
    until(&format!("{place} to be {state}"), Duration::from_secs(15), || {
        let backends = node.agent.backends("hello")?;
        Ok(backends.iter().any(|b| b.address == place && b.state == state).then_some(()))
    })
}

/// What the agent's own command says.
fn backends(node: &Node) -> Result<()> {
    println!("  $ mesh-agent backends hello");
    let table = stdout(node.agent.cli(&["backends", "hello"])?).context("mesh-agent backends")?;
    for line in table.lines() {
        println!("  {line}");
    }
    Ok(())
}

fn step(text: &str) {
    if io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none() {
        println!("\n\x1b[1m{text}\x1b[0m");
    } else {
        println!("\n{text}");
    }
}

fn last_line(error: &anyhow::Error) -> String {
    format!("{error:#}").rsplit(": ").next().unwrap_or_default().to_owned()
}
