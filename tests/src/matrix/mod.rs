//! What happens when something fails: every kind of failure, measured with the defaults, each figure beside
//! what it may be at the most. For `cargo xtask matrix`, and in a shorter form for the tests.
//!
//! A [`rows::Row`] is one kind. Most are a [`course::Course`] on a [`stage::Stage`]: three clients connect
//! without pause, endpoints fail and work again, and out of what each client has recorded of each connect
//! follows what that has cost ([`damage`]). All [`bounds`] follow from the defaults.

pub mod bounds;
pub mod clock;
pub mod course;
pub mod damage;
pub mod ears;
pub mod figure;
pub mod flapping;
pub mod healthy;
pub mod rows;
pub mod slow;
pub mod stage;
pub mod table;
pub mod targets;

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde::Serialize;

use bounds::LATE;
use figure::{Figure, worst};
use rows::Row;

/// How much is done.
#[derive(Clone, Copy, Debug)]
pub struct Size {
    /// Connects of the healthy run.
    pub connects: u64,
    /// How often each of the other rows is run: the worst counts.
    pub times: u32,
    /// How many of these are run at a time, each on a node of its own.
    pub at_once: usize,
    /// How much longer recovery may take than is aimed at: when so many rows are run at a time, the machine is
    /// busy. All other times have this in their bounds.
    pub late: Duration,
}

/// What came of a row.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Its name.
    pub name: &'static str,
    /// What happened.
    pub what: &'static str,
    /// What was measured.
    pub figures: Vec<Figure>,
    /// Why it could not be measured, if so.
    pub error: Option<String>,
    /// How long that took.
    pub seconds: f64,
}

/// What is told while it runs.
#[derive(Clone, Copy, Debug)]
pub enum Told<'r> {
    /// A row begins.
    Begins(&'r Row),
    /// It has ended.
    Ends(&'r Report),
}

impl Size {
    /// With as many connects as make one in a million noticed.
    pub const FULL: Self = Self { connects: 1_000_000, times: 3, at_once: 3, late: Duration::ZERO };

    /// In little more than a minute. A row needs a quarter of a processor.
    pub const SHORT: Self = Self { connects: 20_000, times: 1, at_once: 6, late: LATE };
}

impl Report {
    fn of(row: &Row, size: Size) -> Self {
        let begin = Instant::now();
        let times = if row.alone { 1 } else { size.times };
        let runs: Result<Vec<_>, _> = (0..times).map(|_| (row.run)(size)).collect();
        let (figures, error) = match runs {
            Ok(runs) => {
                let allow = |figure: Figure| figure.late(size.late);
                (worst(runs).into_iter().map(allow).collect(), None)
            }
            Err(error) => (Vec::new(), Some(format!("{error:#}"))),
        };
        let seconds = begin.elapsed().as_secs_f64();
        Self { name: row.name, what: row.what, figures, error, seconds }
    }

    /// Whether it was measured, and every bound holds.
    #[must_use]
    pub fn holds(&self) -> bool {
        self.error.is_none() && self.figures.iter().all(Figure::holds)
    }
}

/// Runs these rows; gives what came of them, in their order.
#[must_use]
pub fn run(rows: &[Row], size: Size, told: &(impl Fn(Told<'_>) + Sync)) -> Vec<Report> {
    let reports = Mutex::new(Vec::new());
    let measure = |number: usize, row: &Row| {
        told(Told::Begins(row));
        let report = Report::of(row, size);
        told(Told::Ends(&report));
        let mut reports = reports.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        reports.push((number, report));
    };
    let all = || rows.iter().enumerate();
    // What loads the machine disturbs the others.
    all().filter(|(_, row)| row.alone).for_each(|(number, row)| measure(number, row));
    let others: Vec<_> = all().filter(|(_, row)| !row.alone).collect();
    let next = AtomicUsize::new(0);
    thread::scope(|scope| {
        for _ in 0..size.at_once {
            scope.spawn(|| {
                while let Some((number, row)) = others.get(next.fetch_add(1, Ordering::Relaxed)) {
                    measure(*number, row);
                }
            });
        }
    });
    let mut reports = reports.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    reports.sort_by_key(|(number, _)| *number);
    reports.into_iter().map(|(_, report)| report).collect()
}
