//! One agent follows another while the endpoint of a service changes all the time: how long a change waits.
//!
//! Each change names another endpoint, and never one that was before, so that who answers says which of the
//! changes is in force.

use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use mesh_tests::process::{LIMIT, stdout, until};
use mesh_tests::sys::socket::monotonic_nanos;
use mesh_tests::{Agent, Node, Service};

use super::report::{Next, Succession, Wait};
use super::{end, ensure_taken_over, start};
use crate::prober::{Given, Prober};
use crate::scene::{self, BACKENDS};

/// The service that changes.
const CHANGING: u32 = 50_000;
/// From one change to the next.
const INTERVAL: Duration = Duration::from_millis(10);
/// Changes before the first agent ends, which show how long one waits otherwise.
const BEFORE: usize = 300;
/// Changes after each agent that has come.
const BETWEEN: usize = 50;
/// Addresses of endpoints: the n-th change names the n-th.
const ENDPOINTS: (Ipv4Addr, u8) = (Ipv4Addr::new(10, 200, 0, 0), 16);
/// Of those; the last one is not for hosts.
const MOST: u32 = 65_000;

/// When each change was written: `CLOCK_MONOTONIC` in nanoseconds, before the call that did it.
#[derive(Default)]
struct Written {
    at: Mutex<Vec<u64>>,
    enough: AtomicBool,
}

/// An agent that follows another.
struct Followed {
    next: Next,
    /// Before the one that ends was told so.
    began: u64,
    /// The one that follows was ready.
    ready: u64,
}

/// Has agents follow one another so many times for each build, beside so many services.
///
/// # Errors
///
/// A connect fails, what was replaced comes back, or an agent does not do what it should.
pub fn measure(
    services: u32,
    times: u32,
    say: &mut impl FnMut(&str) -> Result<()>,
) -> Result<Vec<Succession>> {
    let node = scene::node()?;
    let (network, bits) = ENDPOINTS;
    let mut ip = node.outside("ip");
    // On this interface all of the network is the namespace's own.
    ip.args(["address", "add", &format!("{network}/{bits}"), "dev", "lo"]);
    stdout(ip)?;
    let mut agent = scene::agent(&node, node.cgroup().path(), "agent")?;
    agent.stays = true;
    for (name, text) in scene::files(services, |number| scene::service(number, BACKENDS)) {
        agent.write_services(&name, &text)?;
    }
    let directory = agent.services_directory();
    let written = Written::default();
    written.change(&directory)?;
    start(&node, &mut agent)?;
    scene::until_services(&agent, services as usize + 1)?;
    let mut prober = Prober::start(&node)?;
    prober.watch(CHANGING)?;
    let followed = thread::scope(|scope| {
        let writer = scope.spawn(|| written.go_on(&directory));
        let followed = follow(&node, &mut agent, &written, services, times, say);
        written.enough.store(true, Ordering::Relaxed);
        // Why nothing is written any more, before that it is not.
        writer.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        followed
    })?;
    let written = written.at.into_inner().unwrap_or_else(PoisonError::into_inner);
    let last = endpoint(written.len() - 1)?;
    agent.until_places(&format!("s{CHANGING}"), &[&format!("{last}:{}", scene::TARGET_PORT)])?;
    let given = prober.watched()?;
    end(&node, agent, CHANGING)?;
    summarise(services, &written, &seen(&given, &written)?, &followed)
}

fn follow(
    node: &Node,
    agent: &mut Agent,
    written: &Written,
    services: u32,
    times: u32,
    say: &mut impl FnMut(&str) -> Result<()>,
) -> Result<Vec<Followed>> {
    written.until_more(BEFORE)?;
    let mut followed = Vec::new();
    for _ in 0..times {
        say(&format!("an agent after another, beside {services} services"))?;
        // Programs that log refusals are others than those that do not, and are never taken over themselves.
        let logs: [(Next, &[&str]); 3] =
            [(Next::Same, &[]), (Next::Other, &["--log-refusals"]), (Next::Other, &[])];
        for (next, arguments) in logs {
            agent.arguments = arguments.to_vec();
            let began = monotonic_nanos();
            agent.stop()?;
            start(node, agent)?;
            let ready = monotonic_nanos();
            ensure_taken_over(agent, next == Next::Same)?;
            written.until_more(BETWEEN)?;
            followed.push(Followed { next, began, ready });
        }
    }
    Ok(followed)
}

/// For each change, when a connect had ended that was given its endpoint, or that of a later one.
fn seen(given: &[Given], written: &[u64]) -> Result<Vec<u64>> {
    let mut seen = Vec::new();
    for Given { backend, at } in given {
        let number = number(*backend)?;
        ensure!(number >= seen.len(), "change {number} is in force again after {}", seen.len() - 1);
        let wrote = written.get(number).with_context(|| format!("nobody wrote change {number}"))?;
        ensure!(at > wrote, "change {number} was seen before it was written");
        seen.resize(number + 1, *at);
    }
    ensure!(seen.len() == written.len(), "{} of {} changes were seen", seen.len(), written.len());
    Ok(seen)
}

/// What waited for which agent: a change that was seen after one had been told to end, and before the next
/// one was.
fn summarise(
    services: u32,
    written: &[u64],
    seen: &[u64],
    followed: &[Followed],
) -> Result<Vec<Succession>> {
    let longest = |from: u64, to: u64| {
        // The first one was in force before anybody looked.
        let changes = written.iter().zip(seen).skip(1);
        let there = changes.filter(|(_, seen)| (from..to).contains(*seen));
        let longest = there.map(|(written, seen)| seen - written).max();
        longest.map(millis).context("no change was seen for so long")
    };
    let ends = followed.iter().skip(1).map(|next| next.began).chain([u64::MAX]);
    let waits = followed.iter().zip(ends).map(|(Followed { next, began, ready }, end)| {
        let (waited_ms, ready_ms) = (longest(*began, end)?, millis(ready - began));
        Ok((*next, Wait { waited_ms, ready_ms }))
    });
    let waits = waits.collect::<Result<Vec<_>>>()?;
    let first = followed.first().map_or(u64::MAX, |first| first.began);
    let undisturbed_ms = longest(0, first)?;
    let of = |next| {
        let waits = waits.iter().filter(|(of, _)| *of == next).map(|(_, wait)| *wait).collect();
        Succession::new(services, next, undisturbed_ms, waits)
    };
    Ok(vec![of(Next::Same), of(Next::Other)])
}

// === impl Written ===

impl Written {
    /// Changes the service without pause.
    fn go_on(&self, directory: &Path) -> Result<()> {
        while !self.enough.load(Ordering::Relaxed) {
            thread::sleep(INTERVAL);
            self.change(directory)?;
        }
        Ok(())
    }

    /// The next change, in one step.
    fn change(&self, directory: &Path) -> Result<()> {
        let endpoint = endpoint(self.len())?.to_string();
        let file = Service::file(&[scene::service(CHANGING, [&*endpoint])]);
        let new = directory.join(".changing.new");
        std::fs::write(&new, file)?;
        let at = monotonic_nanos();
        // Before it can be seen.
        self.at.lock().unwrap_or_else(PoisonError::into_inner).push(at);
        Ok(std::fs::rename(new, directory.join("changing.yaml"))?)
    }

    fn len(&self) -> usize {
        self.at.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    fn until_more(&self, count: usize) -> Result<()> {
        let wanted = self.len() + count;
        until("more changes", LIMIT, || Ok((self.len() >= wanted).then_some(())))
    }
}

// === functions ===

/// The endpoint of a change; they are counted from 0.
fn endpoint(number: usize) -> Result<Ipv4Addr> {
    let number = u32::try_from(number)?;
    ensure!(number < MOST, "there are no more addresses: fewer upgrades, please");
    Ok(Ipv4Addr::from_bits(ENDPOINTS.0.to_bits() + 1 + number))
}

/// The change of an endpoint.
fn number(endpoint: IpAddr) -> Result<usize> {
    let IpAddr::V4(endpoint) = endpoint else { anyhow::bail!("{endpoint} is of no change") };
    let number = endpoint.to_bits().checked_sub(ENDPOINTS.0.to_bits() + 1);
    let number = number.filter(|&number| number < MOST);
    Ok(number.with_context(|| format!("{endpoint} is of no change"))? as usize)
}

fn millis(nanos: u64) -> f64 {
    Duration::from_nanos(nanos).as_secs_f64() * 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    fn given(number: usize, at: u64) -> Given {
        Given { backend: endpoint(number).expect("an endpoint").into(), at }
    }

    #[test]
    fn a_change_is_seen_with_a_later_one() {
        let written = [10, 20, 30, 40];
        let all = [given(0, 12), given(2, 35), given(3, 41)];
        assert_eq!(seen(&all, &written).expect("in order"), [12, 35, 35, 41]);
        let wrong: [&[Given]; 4] = [
            // What was replaced comes back.
            &[given(0, 12), given(2, 35), given(1, 36), given(3, 41)],
            // The last one does not come.
            &all[..2],
            // One comes too early, one from nowhere.
            &[given(0, 9), given(3, 41)],
            &[given(3, 41), given(4, 50)],
        ];
        for wrong in wrong {
            assert!(seen(wrong, &written).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn a_change_waits_for_the_agent_that_was_last_told_to_end() {
        const MS: u64 = 1_000_000;
        // The first one was there before anybody looked.
        let written: Vec<_> = [0, 10, 20, 30, 40, 50, 60].map(|at| at * MS).into();
        let seen: Vec<_> = [9, 11, 35, 35, 41, 58, 61].map(|at| at * MS).into();
        let followed = [(Next::Same, 22, 33), (Next::Other, 45, 57)]
            .map(|(next, began, ready)| Followed { next, began: began * MS, ready: ready * MS });
        let found = summarise(1, &written, &seen, &followed).expect("a change for each");
        let shown = |n: usize| {
            let Succession { undisturbed_ms, waits, .. } = &found[n];
            (*undisturbed_ms, waits[0].waited_ms, waits[0].ready_ms)
        };
        assert_eq!((shown(0), shown(1)), ((1.0, 15.0, 11.0), (1.0, 8.0, 12.0)));
    }
}
