//! Datagram sockets in whatever use, while endpoints come, go, drain and die: what they have been given is
//! counted exactly, and all of it ends with them.

use std::collections::BTreeMap;
use std::process::{Child, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use mesh_tests::process::{LIMIT, until};
use mesh_tests::server::Kind;
use mesh_tests::{Node, Service, check};
use serde_json::Value;

/// Seconds; `MESH_STORM_SECONDS` for more.
const SECONDS: u64 = 6;

const SERVICES: u32 = 12;

/// A service of some of four endpoints, by the bits of a number, of both families.
fn service(number: u32, endpoints: u32) -> Service {
    let balance = ["random", "round-robin", "least-connections", "consistent-hash"];
    let service = Service::new(&format!("s{number}"))
        .address(&format!("10.96.0.{number}"))
        .address(&format!("fd00:96::{number}"))
        .udp(53, 8080)
        .key(&format!("balance: {}", balance[number as usize % 4]));
    let service = match number % 3 {
        0 => service.key("affinity: {timeout: 1h}"),
        _ => service,
    };
    (0..4).filter(|bit| endpoints >> bit & 1 == 1).fold(service, |service, bit| {
        let place = bit + 1;
        service.endpoint(&format!("10.0.0.{place}")).endpoint(&format!("fd00::{place}"))
    })
}

fn services(random: &mut fastrand::Rng) -> String {
    let mut all = Vec::new();
    for number in 1..=SERVICES {
        // Now and then one is not there, or has nobody.
        if random.u8(..12) > 0 {
            all.push(service(number, random.u32(..16)));
        }
    }
    Service::file(&all)
}

/// Killed and reaped.
struct Spray(Child);

impl Drop for Spray {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn used(status: &Value, map: &str) -> u64 {
    let maps = status["maps"].as_array().into_iter().flatten();
    maps.filter(|found| found["name"] == map).filter_map(|found| found["used"].as_u64()).sum()
}

#[test]
fn all_of_it_ends() -> Result<()> {
    let seconds = match std::env::var("MESH_STORM_SECONDS") {
        Ok(seconds) => seconds.parse()?,
        Err(_) => SECONDS,
    };
    let mut random = fastrand::Rng::with_seed(4);
    let node = (1..=4).fold(Node::builder().virtual_ips("10.96.0.0/16").quiet(), |node, n| {
        let node = node.backend(&format!("b{n}"), &format!("10.0.0.{n}:8080"));
        node.backend(&format!("b{n}6"), &format!("[fd00::{n}]:8080"))
    });
    let mut node = (1..=SERVICES).fold(node, |node, n| node.service(service(n, 15))).start()?;
    let mut command = check::mesh_client(&node)?;
    // Longer than it will be let live.
    command.args(["spray", "--threads", "4", "--seconds", &(seconds + 120).to_string()]);
    for n in 1..=SERVICES {
        command.arg(format!("10.96.0.{n}:53")).arg(format!("[fd00:96::{n}]:53"));
    }
    // An endpoint itself, and what is no service.
    command.args(["10.0.0.1:8080", "10.96.9.9:53"]);
    let spray = Spray(command.stdout(Stdio::null()).spawn()?);
    let end = Instant::now() + Duration::from_secs(seconds);
    let mut changes = 0;
    while Instant::now() < end {
        node.agent.write_services("test.yaml", &services(&mut random))?;
        match random.u8(..8) {
            0 => {
                node.kill_server("b1")?;
                sleep(Duration::from_millis(30));
                node.start_server(Kind::Plain, "b1", "10.0.0.1:8080")?;
            }
            1 => drop(node.agent.mesh(&["drain", "s1", "10.0.0.2"])?),
            _ => sleep(Duration::from_millis(random.u64(1..40))),
        }
        changes += 1;
    }
    let all: Vec<_> = (1..=SERVICES).map(|n| service(n, 15)).collect();
    node.agent.write_services("test.yaml", &Service::file(&all))?;
    let busy: Value = node.agent.json(&["status"])?;
    ensure!(used(&busy, "FLOWS") > 0 && used(&busy, "OVERFLOW") > 0, "{}", busy["maps"]);
    drop(spray);
    let mut last = Value::Null;
    until("all records to end", LIMIT, || {
        last = node.agent.json(&["status"])?;
        Ok((used(&last, "FLOWS") == 0 && used(&last, "OVERFLOW") == 0).then_some(()))
    })
    .with_context(|| last["maps"].to_string())?;
    let audit: Value = node.agent.json(&["audit"])?;
    ensure!(audit["released_ever"] == 0 && audit["records"] == 0, "{audit}");
    let backends: Vec<Value> = node.agent.json(&["backends"])?;
    let active: BTreeMap<String, u64> = backends
        .iter()
        .filter_map(|backend| Some((backend["address"].to_string(), backend["active"].as_u64()?)))
        .filter(|(_, active)| *active > 0)
        .collect();
    ensure!(active.is_empty(), "open when all is closed: {active:?}");
    let counters = &last["counters"];
    ensure!(counters["balanced"].as_u64() > Some(1_000), "{counters}");
    ensure!(counters["no_flow_record"] == 0, "{counters}");
    let refused = node.agent.refused_by_reason()?;
    ensure!(refused["corrupt"] == 0 && refused["contended"] == 0, "{refused:?}");
    eprintln!("{changes} changes; {counters}");
    Ok(())
}
