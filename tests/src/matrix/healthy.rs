//! Nothing is wrong, and clients do what they can: then nothing is held against any endpoint.
//!
//! Connects that are aborted in all sorts of ways, over both families, and processes that are killed with what
//! they have open; a client behind a firewall of its own, that sees every endpoint fail; and beside them an
//! honest one, which notices nothing.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use super::course::TCP;
use super::damage::is_failure;
use super::ears::{Ears, Event};
use super::figure::{Bound, Figure, Of, Value};
use crate::mortal::lan::firewalled;
use crate::mortal::mixture::{Done, Mixture};
use crate::mortal::scene::{Scene, Standing, ip};
use crate::mortal::storm::Trial;
use crate::mortal::{Clients, Pace};
use crate::node::Namespace;

/// The cgroup of the client that harms only itself.
const HOSTILE: &str = "hostile";

/// 50 connects a second, each of which fails: what is told of them is less than the most that is told in a
/// second, so that nothing is missed.
const TIRELESS: Pace = Pace { threads: 1, pause: 20_000, ..Pace::BRISK };

/// Clients end after a while by themselves: others go on before.
const SHIFT: Duration = Duration::from_secs(20);

/// The clients beside those that abort.
struct Others<'s> {
    scene: &'s Scene,
    behind: &'s Namespace,
    running: Option<(Instant, Clients, Clients)>,
    honest: u64,
    failed: u64,
    slow: u64,
    refused: u64,
}

impl Others<'_> {
    fn begin(&mut self) -> Result<()> {
        let node = self.scene.node.namespace();
        let honest = self.scene.storm_in(&node, "honest", Pace::STEADY)?;
        let hostile = self.scene.storm_in(self.behind, HOSTILE, TIRELESS)?;
        self.running = Some((Instant::now(), honest, hostile));
        Ok(())
    }

    fn end(&mut self) -> Result<()> {
        let Some((_, honest, hostile)) = self.running.take() else { return Ok(()) };
        let (honest, hostile) = (honest.finish()?, hostile.finish()?);
        let refused = |trial: &&Trial| trial.error.as_deref() == Some("connect: ECONNREFUSED");
        let other = hostile.iter().find(|trial| !refused(trial));
        ensure!(other.is_none(), "its firewall let it through: {other:?}");
        self.refused += hostile.len() as u64;
        self.honest += honest.len() as u64;
        self.failed += honest.iter().filter(|trial| trial.error.is_some()).count() as u64;
        self.slow += honest.iter().filter(|trial| is_failure(trial)).count() as u64;
        Ok(())
    }

    fn go_on(&mut self) -> Result<()> {
        match &self.running {
            Some((begin, ..)) if begin.elapsed() < SHIFT => Ok(()),
            _ => {
                self.end()?;
                self.begin()
            }
        }
    }
}

/// Measures it, with so many connects.
///
/// # Errors
///
/// Something else than what is measured goes wrong.
pub fn run(connects: u64) -> Result<Vec<Figure>> {
    let mixture = Mixture::start(&[TCP])?;
    let scene = &mixture.scene;
    scene.node.agent.until_backends("app", |all| all.iter().all(|one| one.state == "healthy"))?;
    let ears = Ears::start(&scene.node)?;
    let behind = firewalled(&scene.node, 1, "10.9.0.0/24")?;
    ip(&behind, "route add 10.9.0.0/24 via 10.8.1.1")?;
    let mut others =
        Others { scene, behind: &behind, running: None, honest: 0, failed: 0, slow: 0, refused: 0 };
    others.begin()?;
    let Done { tally, killed } = mixture.run(connects, || others.go_on())?;
    others.end()?;
    let Others { honest, failed, slow, refused, .. } = others;
    ensure!(honest > 100 && refused > 100, "{honest} honest and {refused} hostile connects");

    let heard = ears.heard()?;
    let of_hostile = |event: &&Event| {
        let by_it = event.client.as_deref().is_some_and(|client| client.ends_with(HOSTILE));
        by_it && !["ejected", "unhealthy"].contains(&&*event.kind)
    };
    let accused = heard.iter().filter(|event| event.accuses() && !of_hostile(event)).count();
    ensure!(heard.iter().any(|event| of_hostile(&event)), "nobody noticed the hostile client");
    let (shown, nowhere) =
        (scene.standings()?, scene.node.agent.json::<Vec<Standing>>(&["backends", "nowhere"])?);
    let all = || shown.iter().chain(&nowhere);
    let wrong = |shown: &&Standing| {
        shown.state == "ejected" || (shown.state != "healthy" && !nowhere.contains(shown))
    };
    let wrong = all().filter(wrong).count();
    // Of what the hostile one saw some may not be counted (`crate::withheld`); more would be others'.
    let counted: u64 = all().map(|shown| shown.failed).sum();
    let opened: u64 = all().map(|shown| shown.opened).sum();
    let figures = vec![
        Figure::count(Of::Failed, failed, 0),
        Figure::count(Of::False, (accused + wrong) as u64, 0),
        Figure {
            of: Of::Other("connects"),
            value: Value::Count(opened),
            bound: Bound::Least(Value::Count(connects)),
        },
        Figure::count(
            Of::Other("failures that are not the hostile client's"),
            counted.saturating_sub(refused),
            0,
        ),
        Figure::told("failures of the hostile client", Value::Count(refused)),
        Figure::told("connects that were aborted or answered", Value::Count(tally.values().sum())),
        Figure::told("processes killed", Value::Count(killed)),
        Figure::told("connects of the honest client", Value::Count(honest)),
        Figure::told("of these, answered after more than a second", Value::Count(slow - failed)),
    ];
    drop(ears);
    mixture.scene.control()?;
    Ok(figures)
}
