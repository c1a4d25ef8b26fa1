//! A source that loses an endpoint and has it again: what the kernel knows of it stays.

use anyhow::{Result, ensure};
use mesh_tests::Service;
use mesh_tests::mortal::Pace;
use mesh_tests::mortal::storm::Trial;
use mesh_tests::process::{LIMIT, until};

use crate::scene::{Scene, app};

/// Long enough for the source to flap several times.
const STEADY: &str = "{failures: 1, base: 8s, max: 60s, share: 50%}";
const B: &str = "10.0.0.2:8080";

/// So many that one of three endpoints is met, if it is in: with 1 - 1e-13.
const CONNECTS: u64 = 75;

fn service(endpoints: &[u8]) -> Service {
    endpoints.iter().fold(app(STEADY), |app, n| app.endpoint(&format!("10.0.0.{n}")))
}

fn define(scene: &Scene, services: &[Service]) -> Result<()> {
    scene.node.agent.write_services("test.yaml", &Service::file(services))
}

/// Connects of a client that has not seen anything yet.
fn connects(scene: &Scene, client: &str) -> Result<Vec<Trial>> {
    let pace = Pace { threads: 1, pause: 500, times: CONNECTS, ..Pace::BRISK };
    scene.storm_in(&scene.node.namespace(), client, pace)?.wait()
}

fn failed(trials: &[Trial]) -> usize {
    trials.iter().filter(|trial| trial.error.is_some()).count()
}

#[test]
fn an_endpoint_that_comes_back_is_out_for_as_long_as_it_would_have_been() -> Result<()> {
    let mut scene = Scene::local(&["a", "b", "c"], STEADY)?;
    define(&scene, &[service(&[1, 2, 3])])?;
    scene.backend("b")?.close()?;
    ensure!(failed(&connects(&scene, "first")?) == 1, "b was not met once");
    until("b to be out for all", LIMIT, || {
        Ok((scene.standing(B)?.state == "ejected").then_some(()))
    })?;

    for (client, without) in [
        ("second", vec![service(&[1, 3])]),
        ("third", vec![service(&[1, 3])]),
        ("fourth", vec![]),
        // In another order.
        ("fifth", vec![service(&[3, 1])]),
    ] {
        define(&scene, &without)?;
        match without.is_empty() {
            true => scene.node.agent.until_gone("app")?,
            false => scene.node.agent.until_places("app", &["10.0.0.1:8080", "10.0.0.3:8080"])?,
        }
        define(&scene, &[service(&[1, 2, 3])])?;
        scene.node.agent.until_places("app", &["10.0.0.1:8080", B, "10.0.0.3:8080"])?;
        let trials = connects(&scene, client)?;
        let shown = scene.standing(B)?;
        ensure!(failed(&trials) == 0, "{client}: {} failed: {shown:?}", failed(&trials));
        // Of this life; and it is the same ejection that goes on.
        ensure!(shown.state == "ejected" && shown.opened == 0, "{client}: {shown:?}");
        ensure!(shown.reason.starts_with("a connect failed; out for "), "{client}: {shown:?}");
    }
    let events: Vec<serde_json::Value> = scene.node.agent.json(&["events"])?;
    let told = events.iter().filter(|event| event["kind"] == "ejected" && event["backend"] == B);
    let told: Vec<_> = told.filter_map(|event| event["detail"].as_str()).collect();
    let back = told.iter().filter(|detail| detail.starts_with("it came back")).count();
    ensure!(back == 4, "{told:?}");

    // When that is over it is tried once, fails, and is out for twice as long.
    until("b to be tried", LIMIT, || {
        scene.once()?;
        Ok((scene.standing(B)?.failed == 1).then_some(()))
    })?;
    let trials = connects(&scene, "sixth")?;
    ensure!(failed(&trials) == 0, "after the try: {} failed", failed(&trials));
    let shown = scene.standing(B)?;
    ensure!(shown.state == "ejected" && shown.failed == 1, "{shown:?}");
    let left = shown.reason.split("out for ").nth(1).and_then(|text| text.split(' ').next());
    let left: f64 = left.unwrap_or_default().parse()?;
    ensure!(left > 8.0 && left < 16.1, "the second of its ejections: {shown:?}");
    scene.control()
}
