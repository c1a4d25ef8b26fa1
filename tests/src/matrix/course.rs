//! The course of most rows: clients connect, endpoints fail, stay so for a while, and work again.

use std::thread::sleep;
use std::time::Duration;

use anyhow::{Result, ensure};

use super::bounds::{LATE, RECOVERY, share, silence, tries, unhealthy};
use super::damage::{Damage, Leaves, Victim};
use super::figure::{Figure, Of, Value};
use super::stage::{Fault, Stage, name};
use crate::mortal::Pace;
use crate::mortal::server::Manner;
use crate::mortal::storm::Trial;

/// Checks by default.
pub const TCP: &str = "health: {tcp: {}}";

/// Checks that ask for a page.
pub const HTTP: &str = "health: {http: {}}";

/// What happens.
#[derive(Clone, Copy, Debug)]
pub struct Course {
    /// The `health` of the service; nothing for none.
    pub health: &'static str,
    /// Its `ejection`; nothing for the default.
    pub ejection: &'static str,
    /// How endpoints fail.
    pub fault: Fault,
    /// Which, by number.
    pub victims: &'static [u8],
    /// How long they are out of order.
    pub down: Duration,
    /// When clients are through with them.
    pub leaves: Leaves,
    /// Whether the agent is killed before.
    pub alone: bool,
}

/// Longer than checks need to find it, on a busy machine too.
const LONG: Duration = Duration::from_millis(4_500);

/// Longer than two connects take, one after the other, to find that nobody answers: so that also where nothing
/// is checked, an ejection that is in force when it is over lasts no longer than [`RECOVERY`].
const LONGER: Duration = Duration::from_millis(5_500);

/// So long that an ejection that is in force when it is over lasts for [`RECOVERY`] at the most, also
/// where nothing is checked: tries after 1 s and 3 s.
const SHORT: Duration = Duration::from_millis(2_500);

impl Course {
    /// One of four refuses connections, and is checked.
    pub const CHECKED: Self = Self {
        health: TCP,
        ejection: "",
        fault: Fault::Killed,
        victims: &[2],
        down: LONG,
        leaves: Leaves::AtOnce,
        alone: false,
    };

    /// One of four answers nothing, and is checked.
    pub const SILENT: Self =
        Self { fault: Fault::Dropped, leaves: Leaves::WhenSilent, down: LONGER, ..Self::CHECKED };

    /// One of four refuses connections, and is not checked.
    pub const PASSIVE: Self = Self { health: "", down: SHORT, ..Self::CHECKED };

    /// Lets it happen.
    ///
    /// # Errors
    ///
    /// Something else than what is measured goes wrong.
    pub fn run(&self) -> Result<Vec<Figure>> {
        let keys = [self.health, self.ejection].into_iter().filter(|key| !key.is_empty());
        let keys: Vec<&str> = keys.collect();
        let state = if self.health.is_empty() { "unknown" } else { "healthy" };
        let mut stage = match self.fault {
            Fault::Gone => Stage::machines(&keys)?,
            _ => Stage::local(&keys, Manner::Plain)?,
        };
        stage.scene.node.agent.stays = self.alone;
        stage.run(state)?;
        if self.alone {
            stage.scene.node.agent.kill()?;
        }
        stage.connect(Pace::STEADY)?;
        let mut victims = Vec::new();
        for &n in self.victims {
            let from = stage.fail(n, self.fault)?;
            victims.push(Victim { name: name(n), source: stage.source(n), from, back: 0 });
        }
        sleep(self.down);
        for (&n, victim) in self.victims.iter().zip(&mut victims) {
            victim.back = stage.repair(n, self.fault)?;
        }
        sleep(RECOVERY + LATE);
        let seen = stage.seen()?;
        if self.alone {
            // What the kernel has counted meanwhile, the next agent shows.
            stage.run("unknown")?;
        }
        if self.leaves == Leaves::Never {
            ensure_nobody_answered(&victims, &seen)?;
        }
        let mut damage = Damage::default();
        for &victim in &victims {
            damage = damage.and(&Damage::of(victim, self.leaves, &seen)?);
        }
        let others = seen.iter().flatten().filter(|trial| trial.error.is_some());
        let others = others.filter(|trial| victims.iter().all(|v| trial.source != Some(v.source)));
        let others = others.count() as u64;
        let left = stage.left_out(state, RECOVERY)?;
        let mut figures = self.figures(&damage);
        figures.push(Figure::count(Of::False, stage.innocents(self.victims)?, 0));
        figures.push(Figure::count(Of::Other("failed connects to others"), others, 0));
        figures.push(Figure::count(Of::Other("left out in the end"), left, 0));
        let connects = seen.iter().map(Vec::len).sum::<usize>() as u64;
        ensure!(connects > 500, "only {connects} connects");
        figures.push(Figure::told("connects", Value::Count(connects)));
        if self.alone {
            stage.scene.node.agent.stop()?;
            stage.scene.node.agent.stays = false;
            stage.scene.node.agent.start()?;
        }
        stage.control()?;
        Ok(figures)
    }

    fn figures(&self, damage: &Damage) -> Vec<Figure> {
        let checked = !self.health.is_empty() && !self.alone;
        // For how long connects go there that are no tries.
        let met = match self.leaves {
            Leaves::AtOnce => LATE,
            Leaves::WhenSilent => silence() + LATE,
            Leaves::WhenChecked => unhealthy() + LATE,
            Leaves::Never => self.down + LATE,
        };
        // For how long it is tried.
        let until = if checked { unhealthy() + LATE } else { self.down };
        let tried = match self.leaves {
            Leaves::AtOnce => tries(until),
            Leaves::WhenSilent => tries(until.saturating_sub(silence())),
            Leaves::WhenChecked | Leaves::Never => 0,
        };
        let endpoints = self.victims.len();
        let tried = tried * endpoints as u64;
        let failed = share(endpoints, met) + tried;
        let most = damage.failed.iter().copied().max().unwrap_or_default();
        let sum: u64 = damage.failed.iter().sum();
        let mean = sum as f64 / damage.failed.len().max(1) as f64;
        let mut figures = vec![
            Figure::count(Of::Failed, most, failed),
            Figure::told("failed connects of a client, mean", Value::Mean(mean)),
            Figure::time(Of::Back, damage.back, RECOVERY),
        ];
        if self.leaves != Leaves::Never {
            figures.push(Figure::time(Of::Last, damage.last, met));
            let name = "failed connects when it worked again";
            figures.push(Figure::count(Of::Other(name), damage.relapses, 0));
        }
        if matches!(self.leaves, Leaves::AtOnce | Leaves::WhenSilent) {
            figures.push(Figure::count(Of::Tries, damage.tries, tried));
            let name = "connects there though it was out";
            figures.push(Figure::count(Of::Other(name), damage.leaks, 0));
        }
        figures
    }
}

/// While all are out of order, nobody answers: who did would be none of them.
fn ensure_nobody_answered(victims: &[Victim], seen: &[Vec<Trial>]) -> Result<()> {
    let from = victims.iter().map(|victim| victim.from).max().unwrap_or_default();
    let back = victims.iter().map(|victim| victim.back).min().unwrap_or_default();
    let repaired = back.saturating_sub(u64::try_from(LATE.as_nanos())?);
    let meanwhile = |trial: &&Trial| trial.start > from && trial.end < repaired;
    let mut meanwhile = seen.iter().flatten().filter(meanwhile).peekable();
    ensure!(meanwhile.peek().is_some(), "nobody connected while all were out of order");
    let answered = meanwhile.find(|trial| trial.error.is_none());
    ensure!(answered.is_none(), "somebody answered: {answered:?}");
    Ok(())
}
