//! What it costs to check many endpoints, and how late checks begin.

use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use mesh_tests::Node;
use mesh_tests::process::{run as run_program, until};
use mesh_tests::sys::netns;
use serde::Serialize;
use serde_json::Value;

use crate::machine::Machine;
use crate::output::{Output, Progress};
use crate::scene::{self, TARGET_PORT};

/// What people choose.
#[derive(clap::Args)]
pub struct Options {
    /// For how many seconds, after the first checks of all.
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u32).range(10..))]
    seconds: u32,
}

/// Services, and endpoints of each.
const SERVICES: u32 = 1_000;
const ENDPOINTS: u32 = 10;
/// From one check of an endpoint to the next, in seconds.
const INTERVAL: u32 = 2;
/// Where all endpoints are; one server listens at all of its addresses.
const RANGE: &str = "10.100.0.0/16";
/// How often memory is looked at.
const LOOKS: u32 = 10;

/// Share of a processor, in per cent, that the checks may take.
const AIM_CPU: f64 = 15.0;
/// How late a check may begin, in milliseconds.
const AIM_DELAY: f64 = 100.0;

/// All of it.
#[derive(Debug, Serialize)]
struct Report {
    machine: Machine,
    endpoints: u32,
    interval_s: u32,
    seconds: f64,
    /// Checks made meanwhile, as the agent counts them, and as the server's kernel does.
    checks: u64,
    connections: u64,
    failed: u64,
    /// Time of processors that the agent took, in per cent of one: all, and in user mode.
    cpu_percent: f64,
    user_percent: f64,
    cpu_aim_percent: f64,
    /// The same while it had the services, and checked none of them.
    idle_percent: f64,
    late: u64,
    longest_delay_ms: f64,
    delay_aim_ms: f64,
    /// Anonymous memory of the agent, in KiB: at each look.
    memory_kib: Vec<u64>,
}

/// Measures, and shows it.
///
/// # Errors
///
/// Something is missing on this machine, or is not as it should be.
pub fn run(options: &Options, output: Output) -> Result<()> {
    let machine = Machine::with([])?;
    let progress = Progress::of(2 + LOOKS as usize, output);
    let node = scene::node()?;
    let mut route = node.outside("ip");
    route.args(["route", "add", "local", RANGE, "dev", "lo"]);
    let routed = run_program(route)?;
    ensure!(routed.status.success(), "{routed:?}");
    let accepted = serve(&node)?;

    let mut agent = scene::agent(&node, node.cgroup().path(), "many")?;
    progress.say(0, "services that are not checked")?;
    write(&agent, "off")?;
    agent.start()?;
    scene::until_services(&agent, SERVICES as usize)?;
    let pid = agent.id()?;
    let settle = Duration::from_secs(2);
    thread::sleep(settle);
    let (begin, before) = (Instant::now(), cpu(pid)?);
    thread::sleep(Duration::from_secs(5));
    let idle_percent = (cpu(pid)?.0 - before.0) / begin.elapsed().as_secs_f64() * 100.0;

    progress.say(1, "first checks")?;
    write(&agent, &format!("{{tcp: {{}}, probe: always, interval: {INTERVAL}s, timeout: 1s}}"))?;
    until("all endpoints to be checked", Duration::from_secs(60), || {
        let passed = checks(&agent)?["passed"].as_u64().context("passed")?;
        Ok((passed >= u64::from(SERVICES * ENDPOINTS)).then_some(()))
    })?;
    thread::sleep(settle);

    let (first, begin, before) = (checks(&agent)?, Instant::now(), cpu(pid)?);
    let connections = seen(&node, &accepted)?;
    let mut memory_kib = Vec::new();
    for look in 0..LOOKS {
        progress.say(2 + look as usize, "checks")?;
        memory_kib.push(anonymous(pid)?);
        thread::sleep(Duration::from_secs(options.seconds.into()) / LOOKS);
    }
    let (after, last) = (cpu(pid)?, checks(&agent)?);
    let seconds = begin.elapsed().as_secs_f64();
    let connections = seen(&node, &accepted)? - connections;
    progress.end();
    let of = |status: &Value, what: &str| status[what].as_u64().context("a number of checks");
    let since = |what: &str| Ok::<_, anyhow::Error>(of(&last, what)? - of(&first, what)?);
    let report = Report {
        machine,
        endpoints: SERVICES * ENDPOINTS,
        interval_s: INTERVAL,
        seconds,
        checks: since("passed")?,
        connections,
        failed: since("failed")? + since("unmade")?,
        cpu_percent: (after.0 - before.0) / seconds * 100.0,
        user_percent: (after.1 - before.1) / seconds * 100.0,
        cpu_aim_percent: AIM_CPU,
        idle_percent,
        late: since("late")?,
        longest_delay_ms: {
            #[expect(clippy::cast_precision_loss, reason = "some milliseconds")]
            let microseconds = of(&last, "longest_delay_us")? as f64;
            microseconds / 1e3
        },
        delay_aim_ms: AIM_DELAY,
        memory_kib,
    };
    agent.stop()?;
    output.publish("checks", &report, Report::print)
}

/// Accepts whoever comes to any of the endpoints, and counts.
fn serve(node: &Node) -> Result<Arc<AtomicU64>> {
    let place = SocketAddr::from(([0, 0, 0, 0], TARGET_PORT));
    let listener = netns::inside(node.netns(), || TcpListener::bind(place))??;
    let accepted = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&accepted);
    thread::spawn(move || {
        while listener.accept().is_ok() {
            count.fetch_add(1, Ordering::Relaxed);
        }
    });
    Ok(accepted)
}

/// How many connects the other end has seen: those that were accepted, and those that it had answered when they
/// were reset, as its kernel counts them (`TcpExtEmbryonicRsts`).
fn seen(node: &Node, accepted: &AtomicU64) -> Result<u64> {
    let read = || fs::read_to_string("/proc/thread-self/net/netstat");
    let netstat = netns::inside(node.netns(), read)??;
    let mut lines = netstat.lines().filter_map(|line| line.strip_prefix("TcpExt: "));
    let (names, values) = lines.next().zip(lines.next()).context("TcpExt")?;
    let mut counters = names.split(' ').zip(values.split(' '));
    let reset = counters.find(|(name, _)| *name == "EmbryonicRsts").context("EmbryonicRsts")?;
    Ok(reset.1.parse::<u64>()? + accepted.load(Ordering::Relaxed))
}

/// All services, with this `health`.
fn write(agent: &mesh_tests::Agent, health: &str) -> Result<()> {
    let service = |number: u32| {
        let endpoints = (0..ENDPOINTS).map(|endpoint| {
            let place = number * ENDPOINTS + endpoint;
            format!("10.100.{}.{}", place / 250, place % 250 + 1)
        });
        let endpoints: Vec<_> = endpoints.collect();
        let service = scene::service(number, endpoints.iter().map(String::as_str));
        service.key(&format!("health: {health}"))
    };
    for (name, text) in scene::files(SERVICES, service) {
        agent.write_services(&name, &text)?;
    }
    Ok(())
}

fn checks(agent: &mesh_tests::Agent) -> Result<Value> {
    Ok(agent.get::<Value>("/v1/status")?["checks"].take())
}

/// The time of processors that a process took, all and in user mode, in seconds (proc_pid_stat(5)).
fn cpu(pid: u32) -> Result<(f64, f64)> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let fields = stat.rsplit(')').next().context("the fields")?;
    let ticks = |at: usize| {
        let field = fields.split_ascii_whitespace().nth(at).context("a field")?;
        Ok::<_, anyhow::Error>(field.parse::<f64>()? / HERTZ)
    };
    // Counted from the state, the third.
    let (user, system) = (ticks(11)?, ticks(12)?);
    Ok((user + system, user))
}

/// `USER_HZ`, on every machine that there is.
const HERTZ: f64 = 100.0;

fn anonymous(pid: u32) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).context("RssAnon")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}

impl Report {
    /// For people.
    fn print(&self) {
        println!(
            "{} endpoints, each connected to every {} s, for {:.0} s",
            self.endpoints, self.interval_s, self.seconds
        );
        println!("{}", self.machine);
        println!();
        println!("{:<34}{:>12}{:>10}", "", "MEASURED", "AIM");
        let line =
            |what: &str, value: String, aim: String| println!("{what:<34}{value:>12}{aim:>10}");
        #[expect(clippy::cast_precision_loss, reason = "some thousands")]
        let rate = self.checks as f64 / self.seconds;
        let aim = f64::from(self.endpoints) / f64::from(self.interval_s);
        line("checks per second", format!("{rate:.0}"), format!("{aim:.0}"));
        line("that failed, or were not made", self.failed.to_string(), "0".to_owned());
        let cpu = format!("{:.1} %", self.cpu_percent);
        line("agent's processor time, of one", cpu, format!("< {:.0} %", self.cpu_aim_percent));
        line("  in user mode", format!("{:.1} %", self.user_percent), String::new());
        line("  without checks", format!("{:.1} %", self.idle_percent), String::new());
        let delay = format!("{:.1} ms", self.longest_delay_ms);
        line("longest delay, since the start", delay, format!("< {:.0} ms", self.delay_aim_ms));
        line("late by more than 100 ms", self.late.to_string(), "0".to_owned());
        let memory = self.memory_kib.iter().map(|kib| format!("{:.1}", *kib as f64 / 1_024.0));
        println!("memory of the agent, in MiB         {}", memory.collect::<Vec<_>>().join(" "));
        println!();
        println!(
            "The server that answers is another process; what the kernel does for both ends of a connection\n\
             over loopback counts as the agent's. Its kernel counted {} connects.",
            self.connections
        );
    }
}
