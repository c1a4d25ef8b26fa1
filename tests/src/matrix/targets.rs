//! Endpoints whose answers to checks never come, have no meaning, or never end: they are unhealthy, and cost
//! the checks of others nothing.

use std::fs;
use std::net::SocketAddr;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::Value as Json;

use super::bounds::{LATE, unhealthy};
use super::damage::is_failure;
use super::ears;
use super::figure::{Figure, Of, Value};
use super::stage::{Fault, Stage, name};
use crate::mortal::Pace;
use crate::mortal::server::Manner;
use crate::process::{LIMIT, until};
use crate::service::Service;

/// Where endpoints answer checks; clients connect elsewhere, and are always answered.
const CHECKS: u16 = 9090;

/// The one that is well until it fails, and those that are not, by number.
const WELL: u8 = 1;
const ODD: [(u8, Manner); 3] = [(2, Manner::Hang), (3, Manner::Garbage), (4, Manner::Head)];

/// Where pages of 1 GiB are.
const PAGES: u16 = 9091;

/// How many more endpoints each of them is: one endpoint would be checked once a second.
const CROWD: u16 = 30;

/// What the agent reads of an answer.
const ANSWER: f64 = 64.0 / 1024.0;

/// Memory that one check of each endpoint may take, and as much for what allocates it.
const MEMORY: f64 = 2.0 * ANSWER * (ODD.len() + 1) as f64 * (CROWD + 1) as f64;

/// How long it goes on.
const WHILE: Duration = Duration::from_secs(5);

/// Measures it.
///
/// # Errors
///
/// Something else than what is measured goes wrong.
pub fn run() -> Result<Vec<Figure>> {
    let health = format!("health: {{http: {{}}, port: {CHECKS}}}");
    let mut stage = Stage::local(&[&health], Manner::Plain)?;
    let node = stage.scene.node.namespace();
    let mut check = |n: u8, port: u16, manner: Manner| {
        let place = SocketAddr::new(stage.source(n), port);
        stage.scene.start(&node, &format!("{}-{port}", name(n)), place, manner)
    };
    check(WELL, CHECKS, Manner::Plain)?;
    check(WELL, PAGES, Manner::Body)?;
    for (n, manner) in ODD {
        check(n, CHECKS, manner)?;
    }
    let files = [crowd(), pages()];
    stage.scene.node.agent.write_services("crowd.yaml", &Service::file(&files))?;
    stage.scene.node.agent.start()?;
    let (begun, before) = (Instant::now(), resident(&stage)?);
    stage.scene.node.agent.until_backends("app", |all| {
        all.iter()
            .all(|one| (one.state == "unhealthy") == (one.address != stage.place(WELL).to_string()))
    })?;
    let found = begun.elapsed();
    stage
        .scene
        .node
        .agent
        .until_backends("crowd", |all| all.iter().all(|one| one.state == "unhealthy"))?;
    stage.connect(Pace::STEADY)?;
    sleep(WHILE);
    let seen = stage.seen()?;
    let failed = seen.iter().flatten().filter(|trial| is_failure(trial)).count() as u64;
    let odd: Vec<u8> = ODD.iter().map(|(n, _)| *n).collect();
    let accused = stage.innocents(&odd)?;
    // Nobody goes to those that are unhealthy.
    let astray = seen.iter().flatten().filter(|t| t.backend.as_deref() != Some(name(WELL))).count();

    // The others' checks are made meanwhile.
    stage.scene.kill(&format!("{}-{CHECKS}", name(WELL)))?;
    stage.fail(WELL, Fault::Killed)?;
    let died = Instant::now();
    let place = stage.place(WELL).to_string();
    until("the well one to be unhealthy", LIMIT, || {
        let all = stage.scene.node.agent.backends("app")?;
        let one = all.iter().find(|one| one.address == place).context("it is gone")?;
        Ok((one.state == "unhealthy").then_some(()))
    })?;
    let verdict = died.elapsed();
    let status: Json = stage.scene.node.agent.get("/v1/status")?;
    let delay = status["checks"]["longest_delay_us"].as_u64().context("longest_delay_us")?;
    let made = ["passed", "failed"].map(|kind| status["checks"][kind].as_u64().unwrap_or_default());
    let pages = stage.scene.node.agent.backends("pages")?;
    let pages = pages.iter().filter(|one| one.state != "healthy").count() as u64;
    let figures = vec![
        Figure::count(Of::Failed, failed, 0),
        Figure::count(Of::False, accused, 0),
        Figure::time(
            Of::Other("odd ones unhealthy, from the agent's start"),
            found,
            unhealthy() + LATE,
        ),
        Figure::time(Of::Other("another one, from its failure"), verdict, unhealthy() + LATE),
        Figure::time(Of::Other("longest delay of a check"), Duration::from_micros(delay), LATE),
        Figure::most(
            Of::Other("memory that the agent has taken"),
            Value::Mebibytes(resident(&stage)? - before),
            Value::Mebibytes(MEMORY),
        ),
        Figure::count(Of::Other("connects to unhealthy ones"), astray as u64, 0),
        Figure::count(Of::Other("unhealthy though their status is 200, for 1 GiB"), pages, 0),
        Figure::told("checks that passed", Value::Count(made[0])),
        Figure::told("checks that failed", Value::Count(made[1])),
    ];
    ears::journal(&stage.scene.node)?;
    stage.control()?;
    Ok(figures)
}

/// Many more endpoints that are checked at the same odd places.
fn crowd() -> Service {
    let crowd = Service::new("crowd").address("10.96.0.21").port(80, 8080);
    let crowd = crowd.key(&format!("health: {{http: {{}}, port: {CHECKS}, probe: always}}"));
    let places = ODD.iter().flat_map(|(n, _)| (0..CROWD).map(move |one| (*n, 8100 + one)));
    places.fold(crowd, |crowd, (n, port)| crowd.endpoint(&format!("10.0.0.{n}:{port}")))
}

/// Endpoints whose status is an answer, and whose page is 1 GiB.
fn pages() -> Service {
    let pages = Service::new("pages").address("10.96.0.22").port(80, 8080);
    let pages = pages.key(&format!("health: {{http: {{}}, port: {PAGES}, probe: always}}"));
    (0..CROWD).fold(pages, |pages, one| pages.endpoint(&format!("10.0.0.{WELL}:{}", 8100 + one)))
}

/// The memory of the agent's process, without what is mapped from files and maps, in MiB.
fn resident(stage: &Stage) -> Result<f64> {
    let path = format!("/proc/{}/status", stage.scene.node.agent.id()?);
    let text = fs::read_to_string(&path)?;
    let line = text.lines().find_map(|line| line.strip_prefix("RssAnon:")).context("RssAnon")?;
    let kibibytes: f64 = line.trim().trim_end_matches(" kB").parse().context("a number")?;
    Ok(kibibytes / 1024.0)
}
