//! The rules of a service: how many may be out, what counts as a failure, and how many it takes.

use anyhow::{Context, Result, ensure};
use mesh_tests::mortal::Pace;
use mesh_tests::mortal::server::Manner;
use mesh_tests::mortal::storm::Trial;
use mesh_tests::sys::socket::monotonic_nanos;

use crate::scene::{Scene, Standing, wait};

fn by<'t>(trials: &'t [Trial], name: &'t str) -> impl Iterator<Item = &'t Trial> {
    trials.iter().filter(move |trial| trial.backend.as_deref() == Some(name))
}

fn ensure_refused(trial: &Trial) -> Result<()> {
    ensure!(trial.error.as_deref() == Some("connect: ECONNREFUSED"), "{trial:?}");
    Ok(())
}

const HALF: &str = "{failures: 1, base: 300ms, max: 300ms, share: 50%}";

/// Three of four are dead, and half may be out.
fn at_most_a_share_is_out(clients: &[&str]) -> Result<Scene> {
    let mut scene = Scene::local(&["a", "b", "c", "d"], HALF)?;
    let node = scene.node.namespace();
    let storms = clients.iter().map(|client| scene.storm_in(&node, client, Pace::BRISK));
    let storms = storms.collect::<Result<Vec<_>>>()?;
    wait(300);
    for name in ["a", "b", "c"] {
        scene.backend(name)?.close()?;
    }
    let (mut most, end) = (0, monotonic_nanos() + 2_000_000_000);
    while monotonic_nanos() < end {
        let shown = scene.standings()?;
        // What is out for one client alone need not be out for another.
        let out = |shown: &&Standing| match clients.len() {
            1 => shown.is_out(),
            _ => shown.state == "ejected",
        };
        let out = shown.iter().filter(out).count();
        ensure!(out <= 2, "{out} are out: {shown:?}");
        most = most.max(out);
    }
    ensure!(most > 0, "none was out");
    for storm in storms {
        let trials = storm.finish()?;
        let failed = trials.iter().filter(|trial| trial.error.is_some()).count();
        println!("{failed} of {} failed; {most} were out", trials.len());
        ensure!(by(&trials, "d").count() > 100, "d was not used");
        ensure!(failed > 100, "only {failed} failed: more than two were out for this client");
    }
    Ok(scene)
}

#[test]
fn at_most_a_share_is_out_for_one_client() -> Result<()> {
    let scene = at_most_a_share_is_out(&["one"])?;
    ensure!(scene.counter("share_reached")? > 0, "the share was never reached");
    scene.control()
}

#[test]
fn at_most_a_share_is_out_for_all() -> Result<()> {
    at_most_a_share_is_out(&["one", "two"])?.control()
}

/// The same for each client: what is out for it alone and what is out for all are its share
/// together. So some of its connects must go to the third dead backend, and fail, all the time.
#[test]
fn at_most_a_share_is_out_for_each_of_two() -> Result<()> {
    const WINDOW: u64 = 100_000_000;
    let mut scene = Scene::local(&["a", "b", "c", "d"], "{base: 60s, max: 60s, share: 50%}")?;
    let node = scene.node.namespace();
    let storms =
        [scene.storm_in(&node, "one", Pace::BRISK)?, scene.storm_in(&node, "two", Pace::BRISK)?];
    wait(300);
    for name in ["a", "b", "c"] {
        scene.backend(name)?.close()?;
    }
    let closed = monotonic_nanos();
    wait(1_500);
    let end = monotonic_nanos();
    let shown = scene.standings()?;
    for storm in storms {
        let trials = storm.finish()?;
        let mut start = closed;
        while start + WINDOW < end {
            let inside = trials.iter().filter(|t| (start..start + WINDOW).contains(&t.start));
            let (all, failed) =
                (inside.clone().count(), inside.filter(|trial| trial.error.is_some()).count());
            ensure!(
                all < 40 || failed > 0,
                "none of {all} connects failed {} ms after three of four died: {shown:?}",
                (start - closed) / 1_000_000
            );
            start += WINDOW;
        }
    }
    scene.control()
}

/// All are dead, and all may be out: then all are used, and it is the peers who refuse.
#[test]
fn all_out_is_all_used() -> Result<()> {
    let mut scene = Scene::local(&["a", "b", "c", "d"], "{base: 300ms, max: 600ms, share: 100%}")?;
    let storm = scene.storm(Pace::BRISK)?;
    wait(300);
    for name in ["a", "b", "c", "d"] {
        scene.backend(name)?.close()?;
    }
    let closed = monotonic_nanos();
    wait(1_500);
    let shown = scene.standings()?;
    ensure!(shown.iter().all(Standing::is_out), "{shown:?}");
    let before = scene.counter("all_ejected")?;
    wait(100);
    let between = scene.counter("all_ejected")? - before;
    ensure!(between > 20, "all ejected: only {between} more");
    let opened = monotonic_nanos();
    scene.backend("c")?.open()?;
    let open = monotonic_nanos();
    wait(1_500);
    let trials = storm.finish()?;
    // Those that were accepted before are reset, or answered.
    let dead = trials.iter().filter(|t| t.start > closed && t.end < opened);
    dead.clone().try_for_each(ensure_refused)?;
    let sources: std::collections::BTreeSet<_> = dead.map(|trial| trial.source).collect();
    ensure!(sources.len() == 4, "not all were used: {sources:?}");
    let refused = scene.node.agent.refused_by_reason()?;
    ensure!(refused.values().all(|&count| count == 0), "the programs refused: {refused:?}");

    let found = by(&trials, "c").find(|trial| trial.end > opened).context("never found")?;
    ensure!(found.end < open + 100_000_000, "found after {} ns", found.end - open);
    // It is in again after its next try, and then takes all but the tries of others.
    let later: Vec<_> = trials.iter().filter(|trial| trial.start > open + 900_000_000).collect();
    let failed = later.iter().filter(|trial| trial.error.is_some()).count();
    ensure!(later.len() > 100 && failed < 20, "{failed} of {} failed", later.len());
    scene.control()
}

/// A connection that is reset before a byte came is a failure; after an answer it is none.
#[test]
fn reset_before_the_first_byte() -> Result<()> {
    let named = [("a", Manner::Plain), ("b", Manner::Reset), ("c", Manner::AnswerReset)];
    let scene = Scene::with(&named, "{base: 10s, share: 50%}")?;
    let storm = scene.storm(Pace::BRISK)?;
    wait(1_500);
    let trials = storm.finish()?;
    let shown = scene.standings()?;
    let b = &shown[1];
    ensure!(b.is_out() && b.failed_by("reset") == b.failed && (1..=4).contains(&b.failed), "{b:?}");
    let failed: Vec<_> = trials.iter().filter(|trial| trial.error.is_some()).collect();
    ensure!(failed.len() as u64 == b.failed, "{failed:?}");
    for other in [&shown[0], &shown[2]] {
        ensure!(other.failed == 0 && !other.is_out(), "{other:?}");
    }
    let c = by(&trials, "c").count();
    ensure!(c * 3 > trials.len(), "c answered {c} of {}", trials.len());
    scene.control()
}

/// Failures count in a row.
#[test]
fn three_in_a_row() -> Result<()> {
    let mut scene = Scene::local(&["a"], "{failures: 3, base: 30s, share: 100%}")?;
    let place = "10.0.0.1:8080";
    for _ in 0..2 {
        scene.backend("a")?.close()?;
        for _ in 0..2 {
            ensure_refused(&scene.once()?)?;
        }
        let shown = scene.standing(place)?;
        ensure!(!shown.is_out(), "after two: {shown:?}");
        scene.backend("a")?.open()?;
        let trial = scene.once()?;
        ensure!(trial.backend.as_deref() == Some("a"), "{trial:?}");
    }
    ensure!(scene.counter("all_ejected")? == 0, "it was out");
    scene.backend("a")?.close()?;
    for _ in 0..3 {
        ensure_refused(&scene.once()?)?;
    }
    let shown = scene.standing(place)?;
    ensure!(shown.is_out() && shown.failed_by("refused") == 7, "after three: {shown:?}");
    ensure_refused(&scene.once()?)?;
    ensure!(scene.counter("all_ejected")? == 1, "it was not out");
    scene.control()
}

/// The control of all that is about ejection: without it, the dead are used like others.
#[test]
fn off_is_never() -> Result<()> {
    let mut scene = Scene::local(&["a", "b", "c"], "off")?;
    scene.backend("b")?.close()?;
    let pace = Pace { times: 150, pause: 0, ..Pace::BRISK };
    let trials = scene.storm(pace)?.wait()?;
    let failed: Vec<_> = trials.iter().filter(|trial| trial.error.is_some()).collect();
    failed.iter().try_for_each(|trial| ensure_refused(trial))?;
    ensure!(trials.len() == 600 && (130..270).contains(&failed.len()), "{} failed", failed.len());
    let shown = scene.standings()?;
    ensure!(shown.iter().all(|shown| !shown.is_out()), "{shown:?}");
    ensure!(shown[1].failed_by("refused") == failed.len() as u64, "{shown:?}");
    scene.control()
}
