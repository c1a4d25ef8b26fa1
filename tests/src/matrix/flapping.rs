//! An endpoint that comes and goes: clients meet it ever less often.

use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::bounds::{CLIENTS, ENDPOINTS, tries};
use super::course::TCP;
use super::damage::{Damage, Leaves, Victim};
use super::figure::{Figure, Of, Value};
use super::stage::{Fault, Stage, name};
use crate::mortal::Pace;
use crate::mortal::server::Manner;
use crate::mortal::storm::Trial;

/// Which one.
const VICTIM: u8 = 2;

/// It is down for so long, and then up for as long.
const PHASE: Duration = Duration::from_secs(2);

/// How often it goes down.
const FLAPS: usize = 5;

/// The flaps at the end, which are compared with those at the beginning.
const LATER: usize = 2;

/// From the third ejection in a row on, one lasts for 4 s: at least as long as from flap to flap. So of the
/// time that it is up it is in rotation for no more than half.
const ROTATION: f64 = 0.5;

/// Measures it.
///
/// # Errors
///
/// Something else than what is measured goes wrong.
pub fn run() -> Result<Vec<Figure>> {
    let mut stage = Stage::local(&[TCP], Manner::Plain)?;
    stage.run("healthy")?;
    stage.connect(Pace::STEADY)?;
    let mut flaps = Vec::new();
    for _ in 0..FLAPS {
        let from = stage.fail(VICTIM, Fault::Closed)?;
        sleep(PHASE);
        let back = stage.repair(VICTIM, Fault::Closed)?;
        sleep(PHASE);
        let source = stage.source(VICTIM);
        flaps.push(Victim { name: name(VICTIM), source, from, back });
    }
    let seen = stage.seen()?;
    let cost: Vec<Damage> =
        flaps.iter().map(|&flap| Damage::meanwhile(flap, Leaves::AtOnce, &seen)).collect();
    let failed = |damage: &Damage| damage.failed.iter().sum::<u64>();
    let first = cost.first().map(&failed).context("a flap")?;
    ensure!(first > 0, "nobody noticed that it was down");
    let later = &cost[FLAPS - LATER..];
    let of_one = |client: usize| cost.iter().filter_map(|d| d.failed.get(client)).sum::<u64>();
    let most = (0..CLIENTS.len()).map(of_one).max().unwrap_or_default();
    let rotation = rotation(&flaps[FLAPS - LATER..], &seen);
    // Each time that it is met, each client sees it once, and that is at most once in a flap; while it is
    // out, it is tried.
    let tried = tries(PHASE);
    let met = FLAPS as u64 * (1 + tried);
    let all = LATER as u64 * (CLIENTS.len() as u64 + tried);
    let tries_of_one = cost.iter().map(|damage| damage.tries).max().unwrap_or_default();
    let leaks: u64 = cost.iter().map(|damage| damage.leaks).sum();
    let figures = vec![
        Figure::count(Of::Failed, most, met),
        Figure::count(Of::Tries, tries_of_one, tried),
        Figure::count(Of::False, stage.innocents(&[VICTIM])?, 0),
        Figure::count(Of::Other("connects there though it was out"), leaks, 0),
        Figure::told("failed connects of all in the first flap", Value::Count(first)),
        Figure::count(
            Of::Other("failed connects of all in the last two"),
            later.iter().map(failed).sum(),
            all,
        ),
        Figure::told(
            "in rotation while up, first flap",
            Value::Share(self::rotation(&flaps[..1], &seen)),
        ),
        Figure::most(
            Of::Other("in rotation while up, last two"),
            Value::Share(rotation),
            Value::Share(ROTATION),
        ),
    ];
    stage.control()?;
    Ok(figures)
}

/// What part of the connects it has answered that it would have if it were used whenever it is up.
fn rotation(flaps: &[Victim], seen: &[Vec<Trial>]) -> f64 {
    let phase = u64::try_from(PHASE.as_nanos()).unwrap_or(u64::MAX);
    let up = |trial: &&Trial| {
        flaps.iter().any(|flap| (flap.back..flap.back + phase).contains(&trial.start))
    };
    let all = || seen.iter().flatten().filter(up);
    let there = all().filter(|trial| trial.backend.as_deref() == Some(name(VICTIM)));
    there.count() as f64 * f64::from(ENDPOINTS) / all().count().max(1) as f64
}
