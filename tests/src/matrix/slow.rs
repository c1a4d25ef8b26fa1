//! An endpoint whose application takes ten times as long as the others: it is asked less, and that is all.

use std::thread::sleep;
use std::time::Duration;

use anyhow::{Result, ensure};

use super::bounds::ENDPOINTS;
use super::course::TCP;
use super::damage::is_failure;
use super::figure::{Figure, Of, Value};
use super::stage::{Stage, name};
use crate::mortal::Pace;
use crate::mortal::server::Manner;
use crate::mortal::storm::Trial;
use crate::sys::socket::monotonic_nanos;

/// Which one is slow.
const SLOW: u8 = 2;

/// As many connects that many are open at a time, which is what tells the slow one from others.
const PACE: Pace = Pace { pause: 400_000, ..Pace::STEADY };

/// How long it is looked at.
const WHILE: Duration = Duration::from_secs(4);

/// What is open when it becomes slow has ended, many times over.
const SETTLING: Duration = Duration::from_secs(1);

/// Of two that are drawn, the one with fewer open connections is taken. The slow one, which has more, is
/// taken only when it is drawn twice: one of sixteen. As long as connections are few, it has sometimes no more
/// than others. So it has no more than half of the quarter that chance would give it.
const MOST: f64 = 0.5 / ENDPOINTS as f64;

/// By an algorithm.
///
/// # Errors
///
/// Something else than what is measured goes wrong.
pub fn run(balance: &str) -> Result<Vec<Figure>> {
    let mut stage = Stage::local(&[TCP, balance], Manner::Think)?;
    stage.run("healthy")?;
    stage.connect(PACE)?;
    let begun = monotonic_nanos();
    sleep(WHILE / 2);
    let slow = monotonic_nanos();
    stage.scene.backend(name(SLOW))?.behave(Manner::Ponder)?;
    sleep(SETTLING);
    let settled = monotonic_nanos();
    sleep(WHILE);
    let ended = monotonic_nanos();
    let seen = stage.seen()?;
    let all: Vec<&Trial> = seen.iter().flatten().collect();
    let share = |from: u64, to: u64| {
        let within = || all.iter().filter(|trial| (from..to).contains(&trial.start));
        let there = within().filter(|trial| trial.backend.as_deref() == Some(name(SLOW)));
        (there.count() as f64 / within().count().max(1) as f64, within().count())
    };
    let ((before, _), (after, connects)) = (share(begun, slow), share(settled, ended));
    ensure!(connects > 1_000, "only {connects} connects");
    ensure!(after > 0.0, "it is not used at all");
    let failed = all.iter().filter(|trial| is_failure(trial)).count() as u64;
    let mut figures = vec![
        Figure::count(Of::Failed, failed, 0),
        // The slow one is as innocent as the others.
        Figure::count(Of::False, stage.innocents(&[])?, 0),
        Figure::most(Of::Other("its share of connects"), Value::Share(after), Value::Share(MOST)),
        Figure::told("its share before", Value::Share(before)),
        Figure::told("connects", Value::Count(all.len() as u64)),
    ];
    let left = stage.left_out("healthy", Duration::ZERO)?;
    figures.push(Figure::count(Of::Other("left out in the end"), left, 0));
    stage.control()?;
    Ok(figures)
}
