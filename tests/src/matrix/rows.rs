//! The rows: what fails, and how.

use anyhow::Result;

use super::course::{Course, HTTP};
use super::damage::Leaves;
use super::figure::Figure;
use super::stage::Fault;
use super::{Size, clock, flapping, healthy, slow, targets};
use crate::mortal::server::Manner;

/// A row.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    /// A name to ask for it.
    pub name: &'static str,
    /// What happens, for people.
    pub what: &'static str,
    /// Whether it needs the machine for itself, and is as long as its size says.
    pub alone: bool,
    /// Measures it.
    pub run: fn(Size) -> Result<Vec<Figure>>,
}

const fn row(name: &'static str, what: &'static str, run: fn(Size) -> Result<Vec<Figure>>) -> Row {
    Row { name, what, alone: false, run }
}

/// All of them. The long ones come first, so that none is waited for alone.
pub const ROWS: &[Row] = &[
    Row { alone: true, ..row("healthy", "nothing (control)", |size| healthy::run(size.connects)) },
    row("clock", "clock stepped by an hour", |_| clock::run()),
    row("flapping", "down and up every 2 s", |_| flapping::run()),
    row("targets", "odd answers to checks", |_| targets::run()),
    row("killed", "process killed", |_| Course::CHECKED.run()),
    row("killed-unchecked", "process killed, no checks", |_| Course::PASSIVE.run()),
    row("gone", "machine gone", |_| Course { fault: Fault::Gone, ..Course::SILENT }.run()),
    row("dropped", "packets dropped", |_| Course::SILENT.run()),
    row("dropped-unchecked", "packets dropped, no checks", |_| {
        Course { health: "", ..Course::SILENT }.run()
    }),
    row("closed", "port closed", |_| Course { fault: Fault::Closed, ..Course::CHECKED }.run()),
    row("silent", "accepts, never answers", |_| misbehaves(Manner::Hang).run()),
    row("broken", "answers 500", |_| misbehaves(Manner::Broken).run()),
    row("slow", "ten times slower", |_| slow::run("balance: least-connections")),
    row("slow-latency", "the same, by latency", |_| slow::run("balance: latency")),
    row("half", "half of them at once", |_| Course { victims: &[2, 3], ..Course::CHECKED }.run()),
    row("all", "all at once", |_| {
        Course { victims: &[1, 2, 3, 4], leaves: Leaves::Never, ..Course::CHECKED }.run()
    }),
    row("agent", "agent killed, then process", |_| Course { alone: true, ..Course::PASSIVE }.run()),
];

/// It accepts connections, and what comes of them is of no use.
const fn misbehaves(manner: Manner) -> Course {
    Course {
        health: HTTP,
        fault: Fault::Behaves(manner),
        leaves: Leaves::WhenChecked,
        ..Course::CHECKED
    }
}
