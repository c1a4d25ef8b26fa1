//! The clock of the machine is set an hour ahead, and back: nothing that the agent does depends on it.
//!
//! Only for the agent's process, by libfaketime: the machine's own clock is never touched. The kernel's
//! programs know no other clock than `CLOCK_MONOTONIC`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, ensure};

use super::bounds::{LATE, RECOVERY, share};
use super::course::{Course, TCP};
use super::damage::{Damage, Leaves, Victim};
use super::ears::journal;
use super::figure::{Bound, Figure, Of, Value};
use super::stage::{Fault, PORT, Stage, name};
use crate::check;
use crate::mortal::Pace;
use crate::mortal::server::Manner;
use crate::process::stdout;
use crate::service::Service;

/// Where Debian has the library, for programs with threads.
const LIBRARY: &str = if cfg!(target_arch = "aarch64") {
    "/usr/lib/aarch64-linux-gnu/faketime/libfaketimeMT.so.1"
} else {
    "/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1"
};

/// How far it is set.
const STEP: Duration = Duration::from_secs(3_600);

/// Longer than it takes to notice: every check is made, and events are read many times.
const LOOK: Duration = Duration::from_millis(1_500);

/// What keeps its endpoint for less than [`STEP`].
const STICKY: &str = "10.96.0.20:80";

/// Which of its endpoints is drained.
const DRAINED: u8 = 4;

/// Those that fail after the first and after the second step.
const VICTIMS: [u8; 2] = [2, 3];

/// Measures it.
///
/// # Errors
///
/// Something else than what is measured goes wrong, or the clock was not set.
pub fn run() -> Result<Vec<Figure>> {
    let mut stage = Stage::local(&[TCP], Manner::Plain)?;
    let file = stage.scene.node.directory().join("clock");
    fs::write(&file, "+0\n")?;
    stage.scene.node.agent.environment = environment(&file)?;
    stage.scene.node.agent.write_services("sticky.yaml", &Service::file(&[sticky()]))?;
    stage.run("healthy")?;
    let place = format!("{}", stage.place(DRAINED));
    let drained = stage.scene.node.agent.mesh(&["drain", "sticky", &place])?;
    ensure!(drained.status.success(), "{drained:?}");
    let kept = check::who(&stage.scene.node, STICKY)?;
    stage.connect(Pace::STEADY)?;

    let (mut victims, mut accused, mut told) = (Vec::new(), 0, Vec::new());
    for (offset, n) in [STEP, Duration::ZERO].into_iter().zip(VICTIMS) {
        fs::write(&file, format!("+{}\n", offset.as_secs()))?;
        sleep(LOOK);
        let known: Vec<u8> = VICTIMS.into_iter().filter(|&other| other < n).collect();
        accused += stage.innocents(&known)?;
        accused += stage.left_out("healthy", Duration::ZERO)?;
        ensure_kept(&stage, &kept, &place)?;
        let from = stage.fail(n, Fault::Killed)?;
        sleep(Course::CHECKED.down);
        told.push(ahead(&stage, n)?);
        let back = stage.repair(n, Fault::Killed)?;
        victims.push(Victim { name: name(n), source: stage.source(n), from, back });
        sleep(RECOVERY + LATE);
    }
    let seen = stage.seen()?;
    let mut damage = Damage::default();
    for victim in victims {
        damage = damage.and(&Damage::of(victim, Leaves::AtOnce, &seen)?);
    }
    accused += stage.innocents(&VICTIMS)?;
    let tried = 2 * super::bounds::tries(super::bounds::unhealthy() + LATE);
    let most = damage.failed.iter().copied().max().unwrap_or_default();
    let figures = vec![
        Figure::count(Of::Failed, most, 2 * share(1, LATE) + tried),
        Figure::time(Of::Last, damage.last, LATE),
        Figure::count(Of::Tries, damage.tries, tried),
        Figure::time(Of::Back, damage.back, RECOVERY),
        Figure::count(Of::False, accused, 0),
        Figure::count(Of::Other("connects there though it was out"), damage.leaks, 0),
        Figure::count(Of::Other("left out in the end"), stage.left_out("healthy", RECOVERY)?, 0),
        Figure {
            of: Of::Other("clock ahead after the step, as events tell"),
            value: Value::Seconds(told[0]),
            bound: Bound::Least(Value::Seconds(STEP.as_secs_f64() - 60.0)),
        },
        Figure::most(
            Of::Other("clock ahead after the step back"),
            Value::Seconds(told[1].abs()),
            Value::Seconds(60.0),
        ),
    ];
    stage.control()?;
    Ok(figures)
}

/// A service whose clients keep their endpoint, for less than the clock is set ahead.
fn sticky() -> Service {
    let sticky = Service::new("sticky").address("10.96.0.20").port(80, PORT);
    let sticky = sticky.key("affinity: {by: client, timeout: 10m}");
    (1..=DRAINED)
        .filter(|n| !VICTIMS.contains(n))
        .fold(sticky, |sticky, n| sticky.endpoint(&format!("10.0.0.{n}")))
}

/// Has one process, and those that it starts, see another clock: what `file` says.
fn environment(file: &Path) -> Result<Vec<(&'static str, PathBuf)>> {
    ensure!(Path::new(LIBRARY).exists(), "{LIBRARY} is missing: `apt-get install libfaketime`");
    Ok(vec![
        ("LD_PRELOAD", LIBRARY.into()),
        ("FAKETIME_TIMESTAMP_FILE", file.to_owned()),
        ("FAKETIME_NO_CACHE", "1".into()),
        ("FAKETIME_DONT_FAKE_MONOTONIC", "1".into()),
    ])
}

/// That nothing has expired.
fn ensure_kept(stage: &Stage, kept: &str, drained: &str) -> Result<()> {
    for _ in 0..10 {
        let now = check::who(&stage.scene.node, STICKY)?;
        ensure!(now == kept, "the client kept {kept}, and got {now}");
    }
    let all = stage.scene.node.agent.backends("sticky")?;
    let one = all.iter().find(|backend| backend.address == drained).context("it is gone")?;
    ensure!(one.state == "draining", "not drained any more: {one:?}");
    Ok(())
}

/// How many seconds the agent's clock is ahead of the machine's, by what it says of an endpoint that has
/// failed just now.
fn ahead(stage: &Stage, n: u8) -> Result<f64> {
    let place = stage.place(n).to_string();
    let heard = journal(&stage.scene.node)?;
    let event = heard.iter().rfind(|event| {
        event.kind == "unhealthy" && event.backend.as_deref() == Some(place.as_str())
    });
    let event = event.with_context(|| format!("{place} is not unhealthy: {heard:?}"))?;
    let mut date = Command::new("date");
    date.args(["--date", &event.time, "+%s"]);
    let told: f64 = stdout(date)?.parse().context("a time")?;
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_secs_f64();
    Ok(told - now)
}
