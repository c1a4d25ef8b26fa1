//! The rows: what fails, and how.

use super::course::{Course, HTTP};
use super::damage::Leaves;
use super::figure::Figure;
use super::stage::Fault;
use super::{Size, clock, flapping, slow};
use crate::mortal::server::Manner;
use anyhow::Result;

/// A row.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    /// A name to ask for it.
    pub name: &'static str,
    /// What happens, for people.
    pub what: &'static str,
    /// Measures it.
    pub run: fn(&Size) -> Result<Vec<Figure>>,
}

/// All of them.
pub const ROWS: &[Row] = &[
    Row { name: "killed", what: "process killed", run: |_| Course::CHECKED.run() },
    Row {
        name: "killed-unchecked",
        what: "process killed, no checks",
        run: |_| Course::PASSIVE.run(),
    },
    Row {
        name: "gone",
        what: "machine gone",
        run: |_| Course { fault: Fault::Gone, leaves: Leaves::WhenSilent, ..Course::CHECKED }.run(),
    },
    Row {
        name: "dropped",
        what: "packets dropped",
        run: |_| {
            Course { fault: Fault::Dropped, leaves: Leaves::WhenSilent, ..Course::CHECKED }.run()
        },
    },
    Row {
        name: "dropped-unchecked",
        what: "packets dropped, no checks",
        run: |_| {
            Course {
                fault: Fault::Dropped,
                leaves: Leaves::WhenSilent,
                down: Course::CHECKED.down,
                ..Course::PASSIVE
            }
            .run()
        },
    },
    Row {
        name: "closed",
        what: "port closed",
        run: |_| Course { fault: Fault::Closed, ..Course::CHECKED }.run(),
    },
    Row {
        name: "silent",
        what: "accepts, never answers",
        run: |_| {
            Course {
                health: HTTP,
                fault: Fault::Behaves(Manner::Hang),
                leaves: Leaves::WhenChecked,
                ..Course::CHECKED
            }
            .run()
        },
    },
    Row {
        name: "broken",
        what: "answers 500",
        run: |_| {
            Course {
                health: HTTP,
                fault: Fault::Behaves(Manner::Broken),
                leaves: Leaves::WhenChecked,
                ..Course::CHECKED
            }
            .run()
        },
    },
    Row {
        name: "slow",
        what: "ten times slower",
        run: |_| slow::run("balance: least-connections"),
    },
    Row {
        name: "slow-latency",
        what: "the same, by latency",
        run: |_| slow::run("balance: latency"),
    },
    Row { name: "flapping", what: "down and up every 2 s", run: |_| flapping::run() },
    Row {
        name: "half",
        what: "half of them at once",
        run: |_| Course { victims: &[2, 3], ..Course::CHECKED }.run(),
    },
    Row {
        name: "all",
        what: "all at once",
        run: |_| Course { victims: &[1, 2, 3, 4], leaves: Leaves::Never, ..Course::CHECKED }.run(),
    },
    Row {
        name: "agent",
        what: "agent killed, then process",
        run: |_| Course { alone: true, ..Course::PASSIVE }.run(),
    },
    Row { name: "clock", what: "clock stepped by an hour", run: |_| clock::run() },
];
