//! What one client sees says something about that client, until another sees it too.

use anyhow::{Context, Result, ensure};
use mesh_tests::mortal::Pace;
use mesh_tests::mortal::storm::Trial;
use mesh_tests::process::{LIMIT, until};

use crate::lan::firewalled;
use crate::scene::{Scene, wait};

/// Long enough to look around meanwhile.
const SLOW: &str = "{failures: 1, base: 4s, max: 4s, share: 50%}";

fn errors(trials: &[Trial]) -> usize {
    trials.iter().filter(|trial| trial.error.is_some()).count()
}

fn by(trials: &[Trial], name: &str) -> usize {
    trials.iter().filter(|trial| trial.backend.as_deref() == Some(name)).count()
}

/// Each of three backends has its third: a fair choice exceeds 45 with a probability below 1e-9
/// (chi-square, two degrees of freedom).
fn ensure_even(trials: &[Trial]) -> Result<()> {
    let expected = trials.len() as f64 / 3.0;
    let counts = ["a", "b", "c"].map(|name| by(trials, name));
    let statistic: f64 =
        counts.iter().map(|&count| (count as f64 - expected).powi(2) / expected).sum();
    ensure!(errors(trials) == 0, "{} failed", errors(trials));
    ensure!(trials.len() > 300, "only {} connects", trials.len());
    ensure!(statistic < 45.0, "{counts:?}: chi-square {statistic}");
    Ok(())
}

/// Ten thousand refusals that one client's own firewall made.
#[test]
fn a_hostile_client_harms_only_itself() -> Result<()> {
    let scene = Scene::local(&["a", "b", "c"], SLOW)?;
    let own = firewalled(&scene.node, 1, "10.0.0.0/24")?;
    let honest = scene.storm_in(&scene.node.namespace(), "honest", Pace::BRISK)?;
    wait(200);
    let pace = Pace { threads: 4, pause: 0, times: 2_500, ..Pace::BRISK };
    let hostile = scene.storm_in(&own, "hostile", pace)?.wait()?;
    ensure!(hostile.len() == 10_000, "{}", hostile.len());
    let refused = |trial: &&Trial| trial.error.as_deref() == Some("connect: ECONNREFUSED");
    let refused = hostile.iter().filter(refused).count();
    ensure!(refused == 10_000, "{refused} of its connects were refused");
    let shown = scene.standings()?;
    ensure!(shown.iter().all(|shown| shown.state != "ejected"), "{shown:?}");
    wait(300);
    let trials = honest.finish()?;
    println!("{} connects of the honest one", trials.len());
    ensure_even(&trials)?;
    let shown = scene.standings()?;
    let failed: u64 = shown.iter().map(|shown| shown.failed_by("refused")).sum();
    ensure!(failed == 10_000, "{shown:?}");
    ensure!(shown.iter().any(|shown| shown.reason.contains("alone")), "{shown:?}");
    scene.control()
}

/// A client that cannot get to one backend does without it; when a second client cannot either, all
/// do.
#[test]
fn two_clients_that_agree_eject_for_all() -> Result<()> {
    let scene = Scene::local(&["a", "b", "c"], SLOW)?;
    let node = scene.node.namespace();
    let times = |times| Pace { threads: 1, pause: 500, times, ..Pace::BRISK };

    let one = firewalled(&scene.node, 1, "10.0.0.2")?;
    let trials = scene.storm_in(&one, "one", times(400))?.wait()?;
    // The last connect of its own that it failed with took the backend out for it.
    ensure!(errors(&trials) == 1 && by(&trials, "b") == 0, "{} failed", errors(&trials));
    let shown = scene.standing("10.0.0.2:8080")?;
    ensure!(shown.state != "ejected" && shown.is_out(), "{shown:?}");
    ensure_even(&scene.storm_in(&node, "third", times(600))?.wait()?)?;

    let other = firewalled(&scene.node, 2, "10.0.0.2")?;
    let trials = scene.storm_in(&other, "other", times(100))?.wait()?;
    ensure!(errors(&trials) == 1 && by(&trials, "b") == 0, "{} failed", errors(&trials));
    let shown = scene.standing("10.0.0.2:8080")?;
    ensure!(shown.state == "ejected", "{shown:?}");
    let trials = scene.storm_in(&node, "third", times(300))?.wait()?;
    ensure!(errors(&trials) == 0 && by(&trials, "b") == 0, "{} to b", by(&trials, "b"));

    // Then somebody may try, and those who can get there do again.
    let storm = scene.storm_in(&node, "third", times(0))?;
    wait(4_500);
    let trials = storm.finish()?;
    let found = trials.iter().find(|trial| trial.backend.as_deref() == Some("b"));
    let found = found.context("never tried again")?.end;
    let later: Vec<_> =
        trials.into_iter().filter(|trial| trial.start > found + 50_000_000).collect();
    ensure_even(&later)?;
    scene.control()
}

/// What the kernel finds while no agent runs, the next one reads before its service files: it goes by the
/// rules that are in force, and lets nobody in again that is out for one client.
#[test]
fn the_next_agent_goes_by_the_rules_in_force() -> Result<()> {
    let steady = "{failures: 1, base: 60s, max: 60s, share: 50%}";
    let mut scene = Scene::local(&["a", "b", "c", "d"], steady)?;
    scene.node.agent.stop()?;
    scene.node.agent.stays = true;
    scene.node.agent.start()?;
    scene.node.agent.kill()?;
    let node = scene.node.namespace();
    let connect = |scene: &Scene, client: &str| -> Result<Vec<Trial>> {
        let pace = Pace { threads: 1, pause: 500, times: 200, ..Pace::BRISK };
        scene.storm_in(&node, client, pace)?.wait()
    };
    // Two clients agree about c, and one knows of b.
    scene.backend("c")?.close()?;
    for client in ["one", "other"] {
        ensure!(errors(&connect(&scene, client)?) == 1, "{client} of c");
    }
    scene.backend("b")?.close()?;
    ensure!(errors(&connect(&scene, "one")?) == 1, "one of b");

    scene.node.agent.start()?;
    until("both to be out for all", LIMIT, || {
        let out = |place| Ok::<_, anyhow::Error>(scene.standing(place)?.state == "ejected");
        Ok((out("10.0.0.2:8080")? && out("10.0.0.3:8080")?).then_some(()))
    })?;
    for client in ["one", "other"] {
        let trials = connect(&scene, client)?;
        ensure!(errors(&trials) == 0, "{client}: {} failed", errors(&trials));
    }
    scene.node.agent.stop()?;
    scene.node.agent.stays = false;
    scene.node.agent.start()?;
    scene.control()
}
