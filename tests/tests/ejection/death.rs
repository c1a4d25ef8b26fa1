//! Backends that die while clients connect without pause.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use mesh_tests::mortal::Pace;
use mesh_tests::mortal::server::Manner;
use mesh_tests::mortal::storm::Trial;
use mesh_tests::sys::socket::monotonic_nanos;

use crate::lan::Lan;
use crate::scene::{Scene, Standing, app, local, nft, tells, wait};

/// Ejections of 200 ms at first, so that several fit into a test.
const QUICK: &str = "{failures: 1, base: 200ms, max: 800ms, share: 50%}";
const BASE: u64 = 200_000_000;
const MAX: u64 = 800_000_000;

/// The kernel counts time in ticks of 2^24 ns, and rounds down what time it is.
const TICK: u64 = 1 << 24;

/// After its first retransmission, a second after the start, a try counts as failed.
const SILENCE: u64 = 990_000_000;

/// What a busy machine may be late.
const LATE: u64 = 700_000_000;

/// A backend's death, as its clients have seen it.
struct Death<'t> {
    /// The connect whose failure was seen first.
    first: &'t Trial,
    /// Connects that went there and started later.
    tries: Vec<&'t Trial>,
    /// All that failed there.
    failed: u64,
    /// How often each error came there, also those that say nothing of it.
    errors: BTreeMap<&'t str, u32>,
}

impl<'t> Death<'t> {
    /// Of the backend that connects leave for from `source`, which died between `from` and `to`.
    /// Others must not have failed.
    fn of(trials: &'t [Trial], source: Ipv4Addr, from: u64, to: u64) -> Result<Self> {
        let there = |trial: &&Trial| trial.source == Some(IpAddr::V4(source));
        let others = trials.iter().find(|trial| !there(trial) && trial.error.is_some());
        ensure!(others.is_none(), "a connect to another backend failed: {others:?}");
        let early = trials.iter().find(|trial| trial.error.is_some() && trial.end < from);
        ensure!(early.is_none(), "a connect failed before: {early:?}");
        let mut errors = BTreeMap::new();
        for error in trials.iter().filter(there).filter_map(|trial| trial.error.as_deref()) {
            *errors.entry(error).or_default() += 1;
        }
        let failed: Vec<_> = trials.iter().filter(there).filter(|trial| tells(trial)).collect();
        let first = *failed.iter().min_by_key(|trial| trial.end).context("nobody saw it die")?;
        let tries = trials.iter().filter(there);
        let tries = tries.filter(|trial| trial.start > first.end && trial.start < to).collect();
        let failed = failed.len() as u64;
        Ok(Self { first, tries, failed, errors })
    }

    /// Between the starts of two tries is the time of an ejection, each twice as long as the one
    /// before, and `silence` for the try itself.
    fn ensure_apart(&self, base: u64, max: u64, silence: u64) -> Result<()> {
        let mut since = self.first.start;
        for (n, next) in self.tries.iter().enumerate() {
            let duration = (base << n.min(16)).min(max);
            let silence = if n > 0 { silence } else { self.first.end - self.first.start };
            let late = LATE + if n > 0 { 0 } else { silence };
            let (gap, first) = (next.start - since, self.first.start);
            let what = || {
                let starts: Vec<_> = self.tries.iter().map(|t| (t.start - first) / 1_000).collect();
                format!(
                    "try {n} after {gap} ns; the first failed in {silence} ns, tries: {starts:?} us"
                )
            };
            // The first failure may have been seen at any time of its connect.
            let least = if n > 0 { duration + silence } else { duration };
            ensure!(gap + TICK >= least, "too early: {}", what());
            ensure!(gap <= duration + silence + late, "too late: {}", what());
            since = next.start;
        }
        Ok(())
    }
}

/// After it came back at `back`, it is found within the longest time, and then used as before.
fn ensure_found(trials: &[Trial], name: &str, back: u64, max: u64) -> Result<()> {
    let by = |trial: &&Trial| trial.backend.as_deref() == Some(name);
    let found = trials.iter().filter(by).find(|trial| trial.end > back).context("never found")?;
    let after = found.end - back;
    ensure!(after <= max + LATE, "found only after {after} ns");
    let later: Vec<_> = trials.iter().filter(|t| t.start > found.end + BASE).collect();
    let share = later.iter().copied().filter(by).count();
    ensure!(later.len() > 100, "only {} connects afterwards", later.len());
    ensure!(share * 5 > later.len(), "afterwards {share} of {}", later.len());
    let failed = later.iter().find(|trial| trial.error.is_some());
    ensure!(failed.is_none(), "failed afterwards: {failed:?}");
    Ok(())
}

fn ensure_usual(trials: &[Trial], names: &[&str], until: u64) -> Result<()> {
    for name in names {
        let by = trials.iter().filter(|t| t.backend.as_deref() == Some(name) && t.end < until);
        ensure!(by.count() > 10, "{name} was not used before");
    }
    Ok(())
}

/// How a backend comes back.
type Revive<'r> = dyn Fn(&mut Scene) -> Result<()> + 'r;

/// Clients of a, b and c while b dies by `die`, stays dead for `dead` milliseconds, and comes back
/// by `revive`. Gives the failures of b, which `shown` by the agent must be.
struct Course {
    frozen: bool,
    dead: u64,
    silence: u64,
    source: Ipv4Addr,
    place: &'static str,
    pace: Pace,
    reasons: &'static [&'static str],
    least: usize,
}

impl Course {
    const LOCAL: Self = Self {
        frozen: false,
        dead: 2_500,
        silence: 0,
        source: Ipv4Addr::new(10, 0, 0, 2),
        place: "10.0.0.2:8080",
        pace: Pace::BRISK,
        reasons: &["refused", "reset"],
        least: 4,
    };

    fn run(
        &self,
        mut scene: Scene,
        die: impl FnOnce(&mut Scene) -> Result<()>,
        revive: Option<&Revive<'_>>,
    ) -> Result<()> {
        if self.frozen {
            scene.freeze(true)?;
        }
        let storm = scene.storm(self.pace)?;
        wait(400);
        let died = monotonic_nanos();
        die(&mut scene)?;
        wait(self.dead);
        let shown = if self.frozen { None } else { Some(scene.standing(self.place)?) };
        let end = monotonic_nanos();
        if let Some(revive) = revive {
            revive(&mut scene)?;
        }
        let back = monotonic_nanos();
        if revive.is_some() {
            wait((MAX + self.silence + LATE) / 1_000_000 + 700);
        }
        let trials = storm.finish()?;
        if self.frozen {
            scene.freeze(false)?;
        }
        ensure_usual(&trials, &["a", "b", "c"], died)?;
        let death = Death::of(&trials, self.source, died, end)?;
        println!(
            "{} connects; first failure {} ms after the death; {} failed; tries {:?} ms after it",
            trials.len(),
            (death.first.end - died) / 1_000_000,
            death.failed,
            death.tries.iter().map(|t| (t.start - died) / 1_000_000).collect::<Vec<_>>(),
        );
        ensure!(death.tries.len() >= self.least, "only {} tries", death.tries.len());
        death.ensure_apart(BASE, MAX, self.silence)?;
        if let Some(shown) = shown {
            ensure!(shown.is_out(), "not shown as out: {shown:?}");
        }
        if revive.is_some() {
            ensure_found(&trials, "b", back, MAX + self.silence)?;
        }
        let shown = scene.standing(self.place)?;
        self.ensure_counted(&shown, &death)?;
        scene.control()
    }

    fn ensure_counted(&self, shown: &Standing, death: &Death<'_>) -> Result<()> {
        let Death { failed, errors, .. } = death;
        let counted: u64 = self.reasons.iter().map(|reason| shown.failed_by(reason)).sum();
        ensure!(shown.failed_by(self.reasons[0]) > 0, "no {}: {shown:?}", self.reasons[0]);
        ensure!(counted == shown.failed, "other reasons than {:?}: {shown:?}", self.reasons);
        ensure!(counted == *failed, "clients saw {failed} failures of {errors:?}: {shown:?}");
        Ok(())
    }
}

fn close(scene: &mut Scene) -> Result<()> {
    scene.backend("b")?.close()
}

fn open(scene: &mut Scene) -> Result<()> {
    scene.backend("b")?.open()
}

#[test]
fn port_closed() -> Result<()> {
    let scene = Scene::local(&["a", "b", "c"], QUICK)?;
    Course::LOCAL.run(scene, close, Some(&open))
}

#[test]
fn port_closed_and_the_agent_stopped() -> Result<()> {
    let scene = Scene::local(&["a", "b", "c"], QUICK)?;
    let course = Course { frozen: true, dead: 1_200, least: 2, ..Course::LOCAL };
    course.run(scene, close, Some(&open))
}

#[test]
fn process_killed() -> Result<()> {
    let scene = Scene::local(&["a", "b", "c"], QUICK)?;
    let again = |scene: &mut Scene| {
        let place = SocketAddr::from((local(2), 8080));
        scene.start(&scene.node.namespace(), "b", place, Manner::Plain)
    };
    let course = Course { dead: 1_000, least: 2, ..Course::LOCAL };
    course.run(scene, |scene| scene.kill("b"), Some(&again))
}

/// Packets vanish on their way in.
const DROP: &str = "add table inet t; \
                    add chain inet t in { type filter hook input priority 0; }; \
                    add rule inet t in ip daddr 10.0.0.2 tcp dport 8080 drop";

fn packets_dropped(frozen: bool) -> Result<()> {
    let scene = Scene::local(&["a", "b", "c"], QUICK)?;
    scene.node.sysctl("net/ipv4/tcp_syn_retries", "1")?;
    let course = Course {
        frozen,
        // Three seconds until the first connect times out.
        dead: if frozen { 4_000 } else { 5_600 },
        silence: SILENCE,
        pace: Pace { threads: 8, ..Pace::BRISK },
        reasons: &["timeout"],
        least: if frozen { 1 } else { 2 },
        ..Course::LOCAL
    };
    let pass = |scene: &mut Scene| nft(&scene.node.namespace(), "delete table inet t");
    let drop = |scene: &mut Scene| nft(&scene.node.namespace(), DROP);
    course.run(scene, drop, if frozen { None } else { Some(&pass) })
}

#[test]
fn packets_dropped_silently() -> Result<()> {
    packets_dropped(false)
}

#[test]
fn packets_dropped_and_the_agent_stopped() -> Result<()> {
    packets_dropped(true)
}

/// a, b and c are machines 1, 2 and 3.
fn machines() -> Result<(Scene, Lan)> {
    let app = (1..=3).fold(app(QUICK), |app, n| app.endpoint(&format!("10.9.0.{n}")));
    let mut scene = Scene::bare(app)?;
    let lan = Lan::new(&scene.node, 3)?;
    for (n, name) in (1..).zip(["a", "b", "c"]) {
        let place = SocketAddr::from((Ipv4Addr::new(10, 9, 0, n), 8080));
        scene.start(&lan.machine(n)?, name, place, Manner::Plain)?;
    }
    scene.node.sysctl("net/ipv4/tcp_syn_retries", "1")?;
    // Quick to find out that nobody answers, so that it comes before the timeout.
    scene.node.sysctl("net/ipv4/neigh/eth0/retrans_time_ms", "50")?;
    scene.node.sysctl("net/ipv4/neigh/eth0/delay_first_probe_time", "0")?;
    scene.node.agent.start()?;
    Ok((scene, lan))
}

const REMOTE: Course = Course {
    pace: Pace { threads: 8, ..Pace::BRISK },
    source: Ipv4Addr::new(10, 9, 1, 2),
    place: "10.9.0.2:8080",
    ..Course::LOCAL
};

/// Nobody answers for its address any more, which the node knows at once.
#[test]
fn machine_unplugged() -> Result<()> {
    let (scene, lan) = machines()?;
    let course = Course { dead: 3_000, reasons: &["unreachable"], least: 2, ..REMOTE };
    let pull = |scene: &mut Scene| {
        lan.pull(2, true)?;
        crate::scene::ip(&scene.node.namespace(), "neighbor flush dev eth0")
    };
    course.run(scene, pull, Some(&|_: &mut Scene| lan.pull(2, false)))
}

/// Its namespace is deleted, and the node still believes to know where it is: silence at first.
#[test]
fn machine_deleted() -> Result<()> {
    let (scene, mut lan) = machines()?;
    // As long as nothing else is known, the address is where it was.
    scene.node.sysctl("net/ipv4/neigh/eth0/base_reachable_time_ms", "60000")?;
    let course = Course {
        dead: 5_000,
        reasons: &["timeout", "unreachable"],
        silence: SILENCE,
        least: 1,
        ..REMOTE
    };
    let delete = |scene: &mut Scene| {
        lan.pull(2, true)?;
        scene.kill("b")?;
        lan.delete(2);
        Ok(())
    };
    course.run(scene, delete, None)
}

/// A try whose connection stays open counts as answered when nothing bad was heard of it for 1.3
/// seconds; until then it is alone.
#[test]
fn found_by_a_connection_that_stays_open() -> Result<()> {
    let named = ["a", "b", "c"].map(|name| (name, Manner::Keep));
    let mut scene = Scene::with(&named, QUICK)?;
    let pace = Pace { threads: 2, pause: 10_000, hold: 4_000, ..Pace::BRISK };
    let storm = scene.storm(pace)?;
    wait(400);
    let died = monotonic_nanos();
    close(&mut scene)?;
    wait(500);
    open(&mut scene)?;
    let back = monotonic_nanos();
    wait(3_500);
    let trials = storm.finish()?;
    ensure_usual(&trials, &["a", "b", "c"], died)?;
    let mut there = trials.iter().filter(|t| t.end > back && t.backend.as_deref() == Some("b"));
    let (first, next) = (there.next().context("no try")?, there.next().context("never found")?);
    let alone = Duration::from_nanos(next.start - first.start);
    println!("the second {alone:?} after the first");
    ensure!(alone >= Duration::from_millis(1_270), "the second only {alone:?} after the first");
    ensure!(alone <= Duration::from_millis(2_000), "the second {alone:?} after the first");
    let later = trials.iter().filter(|trial| trial.start > next.end);
    let (all, b) = (later.clone().count(), there.count());
    ensure!(all > 50 && b * 6 > all, "afterwards {b} of {all}");
    scene.control()
}

/// Clients that close by a reset, which erases what the kernel's socket knows of the connection.
/// They stay for a while, so that one try at a time would be less than its share.
#[test]
fn found_by_clients_that_reset() -> Result<()> {
    let scene = Scene::local(&["a", "b", "c"], QUICK)?;
    let pace = Pace { reset: true, pause: 5_000, hold: 100, ..Pace::BRISK };
    let course = Course { dead: 1_000, least: 2, pace, ..Course::LOCAL };
    course.run(scene, close, Some(&open))
}
