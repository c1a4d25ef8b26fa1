//! The client's account against the kernel's: a node with all services of the [`plan`], the client,
//! endpoints that change all the while, and the comparison.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use serde_json::Value;

use super::plan::{self, POOL, Target};
use super::tally::{Counts, Tally};
use crate::process::{self, Echo, Process, until};
use crate::sys::bpf;
use crate::{Node, Service, Withheld};

/// TCP may take its time to end what applications have closed, and the agent to look.
const SETTLED: Duration = Duration::from_secs(20);

/// Between two changes of endpoints.
const CHANGE: Duration = Duration::from_millis(40);

/// Each so many changes the figures are looked at too.
const LOOK: u32 = 8;

/// Connects of the control.
const CONTROL: u64 = 200;

/// A run.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// How many connects at least.
    #[arg(long, default_value_t = 1_000_000)]
    pub connects: u64,
    /// What all that is random follows from; drawn when it is not given.
    #[arg(long)]
    pub seed: Option<u64>,
    /// The client's threads.
    #[arg(long, default_value_t = 8)]
    pub threads: u64,
    /// The longest time for the connects, in seconds.
    #[arg(long, default_value_t = 3_600)]
    pub bound: u64,
    /// Let backends of the mixed service be ejected for their failures.
    #[arg(long)]
    pub ejection: bool,
    /// Only sockets of plain TCP, none of MPTCP.
    #[arg(long)]
    pub no_multipath: bool,
    /// Do not say how far it is.
    #[arg(long)]
    pub quiet: bool,
}

/// What `backends -o json` says of a backend.
#[derive(Clone, Debug, Deserialize)]
struct Account {
    service: String,
    address: String,
    opened: u64,
    active: u64,
    failed: u64,
    failures: Failures,
}

/// Its failed connections by reason.
#[derive(Clone, Copy, Debug, Deserialize)]
struct Failures {
    refused: u64,
    timeout: u64,
    unreachable: u64,
    reset: u64,
}

/// How often each kernel program did not run because it was running on that CPU already.
type Misses = BTreeMap<String, u64>;

/// The client process. Dropped, it is killed and reaped.
struct Client {
    child: Child,
    input: Option<ChildStdin>,
    lines: Receiver<String>,
}

/// Makes the connects, compares, and says what was found.
///
/// # Errors
///
/// A figure is not exact, a connection went otherwise than it must, or the node cannot be made.
pub fn run(options: &Options) -> Result<String> {
    let seed = options.seed.unwrap_or_else(|| fastrand::u64(..));
    // First, so that a run that does not end can be repeated too.
    eprintln!("seed {seed}");
    run_with(options, seed).with_context(|| format!("with --seed {seed}"))
}

fn run_with(options: &Options, seed: u64) -> Result<String> {
    let withheld = Withheld::watch()?;
    let (mut node, _server) = node(options.ejection)?;
    let started = Instant::now();
    let mut client = Client::start(&node, options, options.connects, seed)?;
    let mut random = fastrand::Rng::with_seed(seed);
    let mut changes = 0;
    let limit = Duration::from_secs(options.bound) + SETTLED;
    let tally = loop {
        if let Some(line) = client.line(CHANGE)? {
            break serde_json::from_str::<Tally>(&line)?;
        }
        ensure!(started.elapsed() < limit, "the client does not come to an end");
        change(&node, changes, &mut random)?;
        changes += 1;
        if changes % LOOK == 0 {
            plausible(&node, options.connects)?;
            withheld.count()?;
        }
    };
    let took = started.elapsed();
    ensure!(tally.unexpected.is_empty(), "not as it must: {:#?}", tally.unexpected);

    // From here on endpoints do not change, and those of the changing service are new.
    let settled = plan::settled();
    write_changing(&node, settled.iter().copied())?;
    let places: Vec<_> = settled.iter().map(ToString::to_string).collect();
    node.agent
        .until_places(&Target::Changing.name(), &places.iter().map(|p| &**p).collect::<Vec<_>>())?;
    client.tell("hold")?;
    let mut tally: Tally = serde_json::from_str(&client.answer()?)?;
    ensure!(tally.unexpected.is_empty(), "not as it must: {:#?}", tally.unexpected);
    exact(&node, &tally, &withheld).context("while connections are held")?;
    let held = tally.total().held;
    let audit = audited(&node, &tally, &withheld)?;

    client.tell("close")?;
    client.answer()?;
    for counts in tally.accounts.values_mut() {
        counts.held = 0;
    }
    exact(&node, &tally, &withheld).context("after all is closed")?;
    audited(&node, &tally, &withheld)?;
    client.finish()?;
    summed(&node)?;
    let status = healthy(&node)?;
    let seconds = took.as_secs_f64();
    let mut text = report(&tally, &status, &audit, &misses(&node)?);
    // Writing to a string cannot fail.
    let _ = write!(
        text,
        "events that the machine's kernel withheld: {}\nheld {held}; endpoints changed {changes} \
         times; {seconds:.1} s",
        withheld.count()?
    );

    node.agent.stop()?;
    control(&node, options, seed).context("control: with the agent stopped")?;
    Ok(text)
}

/// A node with all services and backends.
fn node(ejection: bool) -> Result<(Node, Process)> {
    let mut builder = Node::builder();
    for target in Target::all().filter(|target| *target != Target::Changing) {
        let off = !(ejection && target == Target::Mixed);
        let service = target.service();
        builder = builder.service(if off { service.key("ejection: off") } else { service });
    }
    let mut node = builder.start_without_agent()?;
    for (name, value) in [
        ("net/ipv4/tcp_syn_retries", "1"),
        // Ports of closed connections are needed again soon.
        ("net/ipv4/tcp_tw_reuse", "1"),
        ("net/ipv4/ip_local_port_range", plan::PORTS),
        ("net/ipv4/tcp_fastopen", "3"),
        ("net/ipv4/tcp_orphan_retries", "1"),
        ("net/mptcp/enabled", "1"),
    ] {
        node.sysctl(name, value)?;
    }
    for (name, text) in [("ugly.ip", plan::links()), ("ugly.nft", plan::firewall())] {
        fs::write(node.directory().join(name), text)?;
    }
    let mut ip = node.outside("ip");
    ip.arg("-batch").arg(node.directory().join("ugly.ip"));
    process::stdout(ip)?;
    let mut nft = node.outside("nft");
    nft.arg("-f").arg(node.directory().join("ugly.nft"));
    process::stdout(nft)?;

    let mut command = node.outside(process::binary("mesh-ugly")?);
    command.arg("serve");
    let mut server = Process::spawn("the backends", command, Echo::On)?;
    until("the backends to serve", SETTLED, || {
        if let Some(status) = server.ended()? {
            bail!("the backends ended ({status}):\n{}", server.log().tail());
        }
        Ok(server.log().has(&["ready"]).then_some(()))
    })?;
    write_changing(&node, (0..POOL).map(|number| plan::pooled(number, number % 4 < 2)))?;
    node.agent.start()?;
    Ok((node, server))
}

fn write_changing(node: &Node, places: impl Iterator<Item = std::net::SocketAddr>) -> Result<()> {
    let service = Target::Changing.service().key("ejection: off");
    let service = places.fold(service, |service, place| service.endpoint(&place.to_string()));
    node.agent.write_services("changing.yaml", &Service::file(&[service]))
}

/// Gives the changing service other endpoints, some of which differ from former ones in the port
/// only, and from time to time makes and removes services beside it.
fn change(node: &Node, number: u32, random: &mut fastrand::Rng) -> Result<()> {
    let mut places = BTreeSet::new();
    for six in [false, true] {
        places.insert(plan::pooled(random.u16(0..POOL), six));
        let more = (0..random.u16(0..POOL)).map(|_| random.u16(0..POOL)).collect::<Vec<_>>();
        places.extend(more.into_iter().map(|place| plan::pooled(place, six)));
    }
    write_changing(node, places.into_iter())?;
    if number.is_multiple_of(10) {
        // Their records, slots and backends are reused.
        let others = (0..random.u8(0..20)).map(|n| {
            let other = Service::new(&format!("other-{n}")).address(&format!("10.97.0.{n}"));
            other.port(80, 8080).endpoint("10.0.0.1").endpoint("10.0.0.2")
        });
        node.agent.write_services("others.yaml", &Service::file(&others.collect::<Vec<_>>()))?;
    }
    Ok(())
}

/// No figure is what a counter that went below zero, or belongs to somebody else, would be.
fn plausible(node: &Node, connects: u64) -> Result<()> {
    for account in accounts(node)? {
        let Account { active, failed, .. } = account;
        // The client makes a few more than it was asked for.
        ensure!(account.opened <= connects * 2 + 10_000, "too large: {account:?}");
        ensure!(active <= account.opened && failed <= account.opened, "too large: {account:?}");
    }
    Ok(())
}

/// Waits until the kernel's account is the client's, in every figure. What the machine's kernel
/// withheld from the programs may have changed as many figures by one ([`Withheld`]).
fn exact(node: &Node, tally: &Tally, withheld: &Withheld) -> Result<()> {
    let (mut last, mut off) = (Vec::new(), 0);
    let waited = until("the accounts to agree", SETTLED, || {
        (last, off) = differences(&accounts(node)?, tally);
        Ok(last.is_empty().then_some(()))
    });
    let allowed = withheld.allowance(tally.total().opened)?;
    match waited {
        Err(_) if off > 0 && off <= allowed => {
            eprintln!("{allowed} events were withheld: {last:#?}");
            Ok(())
        }
        other => other.with_context(|| {
            let (all, more) = (last.join("\n"), clues(node));
            format!("the kernel's account and the client's, {allowed} withheld:\n{all}\n{more:?}")
        }),
    }
}

/// What helps to find out why accounts differ.
fn clues(node: &Node) -> Result<String> {
    let (misses, audit) = (misses(node)?, node.agent.json::<Value>(&["audit"])?);
    let status: Value = node.agent.json(&["status"])?;
    Ok(format!("not run because it ran: {misses:?}; {audit}; {}", status["counters"]))
}

fn misses(node: &Node) -> Result<Misses> {
    let status: Value = node.agent.json(&["status"])?;
    let ids = status["programs"].as_array().into_iter().flatten().filter_map(|p| p["id"].as_u64());
    let programs =
        ids.map(|id| Ok(bpf::program(u32::try_from(id)?)?)).collect::<Result<Vec<_>>>()?;
    Ok(programs.into_iter().map(|program| (program.name, program.misses)).collect())
}

fn accounts(node: &Node) -> Result<Vec<Account>> {
    let mut all: Vec<Account> = node.agent.json(&["backends"])?;
    all.retain(|account| !account.service.starts_with("other-"));
    Ok(all)
}

/// Where the two accounts differ, one line for each backend, and how many unseen events that would
/// take.
fn differences(accounts: &[Account], tally: &Tally) -> (Vec<String>, u64) {
    let mut missing: BTreeSet<_> =
        tally.accounts.keys().filter(|name| name.contains(' ')).collect();
    let (mut found, mut off) = (Vec::new(), 0);
    for account in accounts {
        let name = format!("{} {}", account.service, account.address);
        missing.remove(&name);
        let wanted = tally.accounts.get(&name).copied().unwrap_or_default();
        let Account { opened, active: held, failed, failures, .. } = *account;
        let Failures { refused, timeout, unreachable, reset } = failures;
        let kernel = Counts { opened, refused, timeout, unreachable, reset, held };
        if kernel != wanted {
            found.push(format!("{name}: kernel {kernel:?}, client {wanted:?}"));
            off += kernel.unseen(&wanted).unwrap_or(u64::MAX / 2);
        } else if failed != wanted.failed() {
            found.push(format!("{name}: failed {failed} is not the sum of its reasons"));
            off = u64::MAX / 2;
        }
    }
    for name in missing {
        found.push(format!("{name}: the kernel has no account of it"));
        off = u64::MAX / 2;
    }
    (found, off)
}

/// The audit finds a socket for each record, and a record for each of the `held` connections; it has
/// never had to release one but those whose end was withheld.
fn audited(node: &Node, tally: &Tally, withheld: &Withheld) -> Result<Value> {
    let Counts { held, opened, .. } = tally.total();
    let audit: Value = node.agent.json(&["audit"])?;
    let allowed = withheld.allowance(opened)?;
    let is_within = |name: &str, least: u64| {
        let figure = audit[name].as_u64().unwrap_or(u64::MAX);
        ensure!((least..=least + allowed).contains(&figure), "{name}: {held} are held: {audit:#}");
        Ok(())
    };
    is_within("records", held)?;
    ensure!(audit["seen"] == held, "{held} are held: {audit:#}");
    for name in ["unseen", "released_ever"] {
        is_within(name, 0)?;
    }
    for name in ["undecided", "in_unknown_namespaces"] {
        ensure!(audit[name] == 0, "{name}: {audit:#}");
    }
    Ok(audit)
}

/// What is told of a service is the sum of what is told of its backends.
fn summed(node: &Node) -> Result<()> {
    let services: Vec<Value> = node.agent.json(&["services"])?;
    let accounts = accounts(node)?;
    for service in services {
        let mut sum = Counts::default();
        for account in accounts.iter().filter(|account| service["name"] == account.service) {
            let Failures { refused, timeout, unreachable, reset } = account.failures;
            let Account { opened, active: held, .. } = *account;
            sum.add(&Counts { opened, refused, timeout, unreachable, reset, held });
        }
        let told = &service["failures"];
        let is_sum = [
            (&service["opened"], sum.opened),
            (&service["active"], sum.held),
            (&service["failed"], sum.failed()),
            (&told["refused"], sum.refused),
            (&told["timeout"], sum.timeout),
            (&told["unreachable"], sum.unreachable),
            (&told["reset"], sum.reset),
        ];
        let is_other = service["name"].as_str().is_some_and(|name| name.starts_with("other-"));
        ensure!(is_other || is_sum.iter().all(|(told, sum)| *told == sum), "{sum:?}: {service:#}");
    }
    Ok(())
}

/// Nothing went past the records, and nothing was refused.
fn healthy(node: &Node) -> Result<Value> {
    let status: Value = node.agent.json(&["status"])?;
    ensure!(status["counters"]["no_flow_record"] == 0, "without a record: {status:#}");
    let refused = node.agent.refused_by_reason()?;
    ensure!(refused.values().all(|count| *count == 0), "refused: {refused:?}");
    Ok(status)
}

/// The same client without the programs: nobody answers at the address of any service.
fn control(node: &Node, options: &Options, seed: u64) -> Result<()> {
    let options = Options { quiet: true, bound: 30, ..options.clone() };
    let mut client = Client::start(node, &options, CONTROL, seed)?;
    let tally: Tally = serde_json::from_str(&client.answer()?)?;
    ensure!(tally.answered == 0, "{} connections were answered all the same", tally.answered);
    ensure!(!tally.unexpected.is_empty(), "nothing was tried: {tally:?}");
    client.finish()
}

fn report(tally: &Tally, status: &Value, audit: &Value, misses: &Misses) -> String {
    let mut text = String::new();
    let total = tally.total();
    // Writing to a string cannot fail.
    let _ = writeln!(
        text,
        "{} connects were given a backend; refused {}, timed out {}, unreachable {}, reset {}",
        total.opened, total.refused, total.timeout, total.unreachable, total.reset
    );
    let kinds: Vec<_> = tally.kinds.iter().map(|(kind, count)| format!("{kind} {count}")).collect();
    let _ = writeln!(text, "kinds: {}", kinds.join(", "));
    let _ = writeln!(text, "counters: {}", status["counters"]);
    let _ = writeln!(text, "audit while they were held: {audit}");
    let _ = writeln!(text, "programs that were not run because they were running: {misses:?}");
    text
}

// === impl Client ===

impl Client {
    fn start(node: &Node, options: &Options, connects: u64, seed: u64) -> Result<Self> {
        let mut command: Command = node.command(process::binary("mesh-ugly")?);
        command.arg("client");
        for (name, value) in [
            ("--connects", connects),
            ("--threads", options.threads),
            ("--seed", seed),
            ("--bound", options.bound),
        ] {
            command.arg(name).arg(value.to_string());
        }
        command.arg("--links").arg(node.directory().join("ugly.ip"));
        command.arg("--firewall").arg(node.directory().join("ugly.nft"));
        if options.no_multipath {
            command.arg("--no-multipath");
        }
        if !options.quiet {
            command.arg("--progress");
        }
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().context("cannot start the client")?;
        let (sender, lines) = channel();
        let output = child.stdout.take();
        thread::spawn(move || {
            let lines = output.into_iter().flat_map(|output| BufReader::new(output).lines());
            for line in lines.map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        Ok(Self { input: child.stdin.take(), child, lines })
    }

    /// What it says within `limit`, if anything.
    fn line(&mut self, limit: Duration) -> Result<Option<String>> {
        match self.lines.recv_timeout(limit) {
            Ok(line) => Ok(Some(line)),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => {
                bail!("the client ended: {}", self.child.wait()?)
            }
        }
    }

    /// What it says, which cannot take long.
    fn answer(&mut self) -> Result<String> {
        self.line(Duration::from_secs(60))?.context("the client does not answer")
    }

    fn tell(&mut self, what: &str) -> Result<()> {
        let input = self.input.as_mut().context("the client was told to end")?;
        Ok(writeln!(input, "{what}")?)
    }

    /// Waits for its end, which must be a good one.
    fn finish(mut self) -> Result<()> {
        drop(self.input.take());
        let status = until("the client's end", SETTLED, || Ok(self.child.try_wait()?))?;
        ensure!(status.success(), "the client: {status}");
        Ok(())
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}
