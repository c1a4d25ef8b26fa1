//! A backend that answers nothing: it is out long before the application gives up.

use std::net::{IpAddr, SocketAddr};
use std::process::{Child, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use mesh_tests::check;
use mesh_tests::mortal::server::Manner;
use mesh_tests::process::{Echo, Process, until};

use crate::scene::{Scene, VIP, app, local, nft};

/// Nobody is tried again while a test runs.
const ONCE: &str = "{base: 60s}";

/// The second retransmission of a SYN: after 2 s, or after 3 s before Linux 6.5
/// (`tcp_syn_linear_timeouts`).
const RETRANSMITTED: Duration = Duration::from_secs(3);

/// What a busy machine may be late.
const LATE: Duration = Duration::from_millis(700);

/// By then all are answered that are.
const ANSWERED: Duration = Duration::from_secs(3);

/// For how long clients come, one every [`PAUSE`].
const LONG: Duration = Duration::from_secs(6);
const PAUSE: Duration = Duration::from_millis(50);

const DROP: &str = "add table inet t; \
                    add chain inet t in { type filter hook input priority 0; }; \
                    add rule inet t in ip daddr 10.0.0.2 tcp dport 8080 drop";

/// Clients that wait for as long as the kernel does. Gives when those began that were still waiting in the
/// end, and when all of them did.
fn waiting(scene: &Scene) -> Result<(Vec<Duration>, Vec<Duration>)> {
    let begin = Instant::now();
    let mut clients: Vec<(Duration, Child)> = Vec::new();
    while begin.elapsed() < LONG {
        let mut client = check::mesh_client(&scene.node)?;
        client.args(["ask", "--way", "blocking", VIP]).stdout(Stdio::null());
        clients.push((begin.elapsed(), client.spawn()?));
        sleep(PAUSE);
    }
    // The last ones are given the time that they need to be answered on a busy machine.
    sleep(ANSWERED);
    let (mut left, all) = (Vec::new(), clients.iter().map(|(began, _)| *began).collect());
    for (began, client) in &mut clients {
        if client.try_wait()?.is_none() {
            client.kill()?;
            left.push(*began);
        }
        client.wait()?;
    }
    Ok((left, all))
}

fn silent(ejection: &str, stopped: bool) -> Result<(Vec<Duration>, Vec<Duration>)> {
    let mut scene = Scene::local(&["a", "b", "c"], ejection)?;
    nft(&scene.node.namespace(), DROP)?;
    if stopped {
        scene.node.agent.stays = true;
        scene.node.agent.kill()?;
    }
    let (left, all) = waiting(&scene)?;
    ensure!(!left.is_empty(), "none of {} met b", all.len());
    ensure!(all.len() > 50, "only {} clients", all.len());
    Ok((left, all))
}

fn ensure_left_in_time(stopped: bool) -> Result<()> {
    let (left, all) = silent(ONCE, stopped)?;
    let (first, last) = (*left.first().context("the first")?, *left.last().context("the last")?);
    ensure!(last < first + RETRANSMITTED + LATE, "met b: {left:?}");
    // Until then it had its share, a third. How many that are depends on how fast clients come.
    let came = all.iter().filter(|began| (first..=last).contains(*began)).count();
    ensure!(left.len() * 10 > came, "{} of {came} met b: {left:?}", left.len());
    println!("the last one met it {:?} after the first", last - first);
    Ok(())
}

#[test]
fn left_within_two_retransmissions() -> Result<()> {
    ensure_left_in_time(false)
}

#[test]
fn left_within_two_retransmissions_and_no_agent_runs() -> Result<()> {
    ensure_left_in_time(true)
}

/// The control: without ejection clients meet it to the end.
#[test]
fn met_to_the_end_without_ejection() -> Result<()> {
    let (left, _) = silent("off", false)?;
    let (first, last) = (*left.first().context("the first")?, *left.last().context("the last")?);
    ensure!(last > first + RETRANSMITTED + LATE, "met b: {left:?}");
    Ok(())
}

/// Who waits for it when it is found dead is told, if the service says so, and so are those whom the kernel
/// would let wait for two minutes.
#[test]
fn those_that_wait_are_told() -> Result<()> {
    let app = app(ONCE).key("end-waiting: true").endpoint("10.0.0.1").endpoint("10.0.0.2");
    let mut scene = Scene::bare(app)?;
    for (n, name) in [(1, "a"), (2, "b")] {
        scene.node.add_address(IpAddr::V4(local(n)))?;
        let place = SocketAddr::from((local(n), 8080));
        scene.start(&scene.node.namespace(), name, place, Manner::Plain)?;
    }
    scene.node.agent.start()?;
    nft(&scene.node.namespace(), DROP)?;
    let begin = Instant::now();
    let mut clients = Vec::new();
    for n in 0..24 {
        let mut client = check::mesh_client(&scene.node)?;
        client.args(["ask", "--way", "blocking", VIP]);
        clients.push(Process::spawn(&format!("client {n}"), client, Echo::Off)?);
    }
    let mut told = 0;
    for client in &mut clients {
        let log = client.log();
        // The kernel alone would take two minutes.
        until("a client to end", Duration::from_secs(30), || {
            Ok((log.has(&["ECONNABORTED"]) || log.has(&["\"a\""])).then_some(()))
        })?;
        told += u32::from(log.has(&["ECONNABORTED"]));
    }
    println!("{told} of {} were told, the last one after {:?}", clients.len(), begin.elapsed());
    ensure!(told > 3, "only {told} of {} met b", clients.len());
    scene.control()
}

/// A client that meets b, which drops its packets, and when it began.
fn hangs(scene: &Scene) -> Result<(Process, Instant)> {
    for n in 0..100 {
        let mut client = check::mesh_client(&scene.node)?;
        client.args(["ask", "--way", "blocking", VIP]);
        let begin = Instant::now();
        let mut client = Process::spawn(&format!("client {n}"), client, Echo::Off)?;
        while client.ended()?.is_none() {
            if begin.elapsed() > Duration::from_millis(400) {
                return Ok((client, begin));
            }
            sleep(Duration::from_millis(5));
        }
    }
    bail!("none of 100 clients met b")
}

/// The connect of a try has said what it says of its backend when its SYN is sent again the first time. When it is
/// sent again the second time, another try may have found the backend well.
#[test]
fn the_connect_of_a_try_blames_once() -> Result<()> {
    let scene = Scene::local(&["a", "b"], "{base: 200ms, max: 10s}")?;
    // Without the agent's own connects.
    scene.freeze(true)?;
    nft(&scene.node.namespace(), DROP)?;
    let (first, begin) = hangs(&scene)?;
    sleep((RETRANSMITTED + Duration::from_millis(300)).saturating_sub(begin.elapsed()));
    let (mut tries, begin) = hangs(&scene)?;
    sleep(Duration::from_millis(1_150).saturating_sub(begin.elapsed()));
    nft(&scene.node.namespace(), "delete table inet t")?;
    let is_b = || Ok(scene.once()?.backend.as_deref().filter(|name| *name == "b").map(drop));
    until("another try to be answered", Duration::from_secs(20), is_b)?;
    let status = tries.wait(Duration::from_secs(20))?;
    ensure!(status.success() && tries.log().has(&["\"b\""]), "{status}: {}", tries.log().tail());
    // Blamed once more it would be out for 800 ms.
    let used = (0..30).map(|_| is_b()).find_map(Result::transpose).transpose()?;
    ensure!(used.is_some(), "b is out again");
    drop(first);
    scene.freeze(false)?;
    scene.control()
}
