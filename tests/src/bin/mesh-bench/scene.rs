//! What all benchmarks have in common: where backends and services are, and who has them.

use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result};
use mesh_tests::process::{Echo, until};
use mesh_tests::{Agent, Node, Service};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// Where the backends of all services listen.
pub const BACKENDS: [&str; 3] = ["10.0.0.1", "10.0.0.2", "10.0.0.3"];
/// Addresses of endpoints besides the backends'.
const MORE: [&str; 7] =
    ["10.0.0.4", "10.0.0.5", "10.0.0.6", "10.0.0.7", "10.0.0.8", "10.0.0.9", "10.0.0.10"];
/// The port of all services.
pub const PORT: u16 = 80;
/// The port of the backends of services.
pub const TARGET_PORT: u16 = 8002;
/// Holds the addresses of all services, and none of backends.
pub const SERVICE_RANGE: &str = "10.96.0.0/16";
/// The most services of which each can have an address.
pub const MOST_SERVICES: u32 = 60_000;
/// Services in one file: files have a limit of their own.
const PER_FILE: u32 = 1_000;

/// A network namespace with the addresses of the backends and no route, and the cgroup that comes
/// with it.
///
/// # Errors
///
/// Something is missing on this machine.
pub fn node() -> Result<Node> {
    let node = Node::builder().quiet().start_without_agent()?;
    for ip in BACKENDS {
        node.add_address(ip.parse()?)?;
    }
    Ok(node)
}

/// Where a process finds the namespace of a node of this process.
pub fn namespace(node: &Node) -> PathBuf {
    let descriptor = node.netns().as_raw_fd();
    format!("/proc/{}/fd/{descriptor}", std::process::id()).into()
}

/// The address of a service, below [`MOST_SERVICES`].
pub fn address(number: u32) -> String {
    debug_assert!(number < MOST_SERVICES, "{SERVICE_RANGE} has no address for {number}");
    format!("10.96.{}.{}", number / 250, number % 250 + 1)
}

/// A service with these endpoints.
pub fn service<'a>(number: u32, endpoints: impl IntoIterator<Item = &'a str>) -> Service {
    let service =
        Service::new(&format!("s{number}")).address(&address(number)).port(PORT, TARGET_PORT);
    endpoints.into_iter().fold(service, Service::endpoint)
}

/// The addresses of ten endpoints.
pub fn ten() -> impl Iterator<Item = &'static str> {
    BACKENDS.into_iter().chain(MORE)
}

/// Service files of so many services, each with its name.
pub fn files(services: u32, service: impl Fn(u32) -> Service) -> Vec<(String, String)> {
    let file = |first: u32| {
        let numbers = first..services.min(first + PER_FILE);
        let services: Vec<_> = numbers.map(&service).collect();
        (format!("{first:05}.yaml"), Service::file(&services))
    };
    (0..services).step_by(PER_FILE as usize).map(file).collect()
}

/// An agent without services, not running.
///
/// # Errors
///
/// A file cannot be written.
pub fn agent(node: &Node, cgroup: &Path, name: &str) -> Result<Agent> {
    Agent::new(&node.directory().join(name), cgroup, node.namespace(), &[], Echo::Off)
}

/// Waits until the agent has so many services.
///
/// # Errors
///
/// It has not within a bounded time.
pub fn until_services(agent: &Agent, wanted: usize) -> Result<()> {
    until(&format!("{wanted} services"), Duration::from_secs(120), || {
        let found: usize = agent.status()?.sources.iter().map(|source| source.services).sum();
        Ok((found == wanted).then_some(()))
    })
}

/// Keeps this thread, and those that it starts, on one of the processors that this process may use,
/// counted around.
///
/// # Errors
///
/// Those of sched_setaffinity(2).
pub fn stay_on(number: usize) -> Result<()> {
    Ok(sched_setaffinity(None, &processor(number)?)?)
}

/// One of the processors that this process may use, counted around. Threads stay on theirs: the
/// scheduler would put both on the same one now and then.
///
/// # Errors
///
/// Those of sched_getaffinity(2).
pub fn processor(number: usize) -> Result<CpuSet> {
    let allowed = sched_getaffinity(None)?;
    let cpus: Vec<_> = (0..CpuSet::MAX_CPU).filter(|&cpu| allowed.is_set(cpu)).collect();
    let mut one = CpuSet::new();
    one.set(*cpus.get(number % cpus.len().max(1)).context("no processor")?);
    Ok(one)
}
