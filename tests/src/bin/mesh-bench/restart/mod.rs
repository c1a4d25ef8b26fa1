//! Agents that follow one another: how long it takes until one that was killed is back with all that it
//! had, and how long a change of endpoints waits while one follows another.

mod report;
mod succession;

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use mesh_tests::process::until;
use mesh_tests::sys::netns;
use mesh_tests::{Agent, Node, check};
use serde_json::Value;

use self::report::{Report, Restart};
use crate::machine::Machine;
use crate::output::{Output, Progress};
use crate::prober::Prober;
use crate::scene::{self, PORT};

/// What people choose.
#[derive(clap::Args)]
pub struct Options {
    /// How often an agent of many services is killed and started again.
    #[arg(long, default_value_t = 12, value_parser = clap::value_parser!(u32).range(1..))]
    restarts: u32,
    /// How often an agent is followed by one of the same build, and twice as often by one of another,
    /// beside each number of services.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=25))]
    upgrades: u32,
}

/// Services of the agent that is killed, with ten endpoints each.
const MANY: u32 = 10_000;
/// How many services are loaded beside the one that changes.
const BESIDE: [u32; 2] = [1, 10_000];
/// Where an agent is asked whether it is ready, by default.
const METRICS: &str = "127.0.0.1:9464";
/// An agent that is not ready by then will not be.
const PATIENCE: Duration = Duration::from_secs(120);

/// Measures, and shows it.
///
/// # Errors
///
/// Something is missing on this machine, or is not as it should be.
pub fn run(options: &Options, output: Output) -> Result<()> {
    let machine = Machine::with([])?;
    let pairs = BESIDE.len() * options.upgrades as usize;
    let progress = Progress::of(1 + options.restarts as usize + pairs, output);
    let mut step = 0;
    let mut say = |what: &str| {
        step += 1;
        progress.say(step - 1, what)
    };
    let (first_ms, restarts) = restarts(options.restarts, &mut say)?;
    let mut successions = Vec::new();
    for services in BESIDE {
        successions.extend(succession::measure(services, options.upgrades, &mut say)?);
    }
    progress.end();
    output.publish("restart", &Report::new(machine, first_ms, restarts, successions), Report::print)
}

/// An agent of many services that is killed again and again. Gives how long the first one took, which
/// found nothing, and each that followed.
fn restarts(times: u32, say: &mut impl FnMut(&str) -> Result<()>) -> Result<(f64, Vec<Restart>)> {
    say(&format!("{MANY} services from nothing"))?;
    let node = scene::node()?;
    for ip in scene::ten() {
        node.add_address(ip.parse()?)?;
    }
    let mut agent = scene::agent(&node, node.cgroup().path(), "many")?;
    agent.stays = true;
    for (name, text) in scene::files(MANY, |number| scene::service(number, scene::ten())) {
        agent.write_services(&name, &text)?;
    }
    let mut prober = Prober::start(&node)?;
    let first_ms = start(&node, &mut agent)?;
    let mut restarts = Vec::new();
    for _ in 0..times {
        say(&format!("{MANY} services, killed"))?;
        agent.kill()?;
        // Nobody misses it.
        prober.all(MANY)?;
        let ready_ms = start(&node, &mut agent)?;
        ensure_taken_over(&agent, true)?;
        let status: Value = agent.get("/v1/status")?;
        let map_writes = status["counters"]["map_writes"].as_u64().context("no map_writes")?;
        scene::until_services(&agent, MANY as usize)?;
        restarts.push(Restart { ready_ms, map_writes });
    }
    prober.all(MANY)?;
    end(&node, agent, 0)?;
    Ok((first_ms, restarts))
}

/// Starts an agent, and gives after how many milliseconds it was ready.
fn start(node: &Node, agent: &mut Agent) -> Result<f64> {
    let started = Instant::now();
    agent.launch()?;
    let waited = until("an agent to be ready", PATIENCE, || Ok(is_ready(node)?.then_some(())));
    let took = started.elapsed();
    waited.with_context(|| agent.log().map(mesh_tests::process::Log::tail).unwrap_or_default())?;
    Ok(took.as_secs_f64() * 1e3)
}

/// Whether `/readyz` says so; while nobody answers there, it does not.
fn is_ready(node: &Node) -> Result<bool> {
    let ask = || {
        let mut stream = TcpStream::connect(METRICS)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(b"GET /readyz HTTP/1.0\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok::<_, std::io::Error>(answer)
    };
    let answer = netns::inside(node.netns(), ask)?;
    Ok(answer.is_ok_and(|answer| answer.split(' ').nth(1) == Some("200")))
}

/// The agent goes on from what the one before it left, with its programs or others.
fn ensure_taken_over(agent: &Agent, same_programs: bool) -> Result<()> {
    let programs = if same_programs { "its programs stay" } else { "its programs are replaced" };
    let log = agent.log()?;
    ensure!(log.has(&["taken over", programs]), "not taken over as it should be: {}", log.tail());
    Ok(())
}

/// Ends an agent and all that it has done. The control: it was the programs that led to backends.
fn end(node: &Node, mut agent: Agent, service: u32) -> Result<()> {
    agent.stop()?;
    let place = format!("{}:{PORT}", scene::address(service));
    let cleaned = agent.mesh(&["cleanup", "--config", &agent.file().to_string_lossy()])?;
    ensure!(cleaned.status.success(), "{cleaned:?}");
    let after = check::ask(node, "blocking", &place)?;
    ensure!(after.error.as_deref() == Some("connect: ENETUNREACH"), "control: {after:?}");
    Ok(())
}
