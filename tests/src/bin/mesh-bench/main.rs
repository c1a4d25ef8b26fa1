//! What a connect costs through a service, against a direct one, and what each kernel program has
//! to do with it.
//!
//! Everything is measured in one run, in short blocks that alternate between agents and none
//! ([`plan`]), so that whatever the machine does meanwhile happens to all variants.

mod plan;
mod programs;
mod report;
mod setup;
mod timeline;
mod worker;

use std::io::{self, IsTerminal as _, Write as _};
use std::process::ExitCode;

use anyhow::{Result, ensure};
use clap::{Parser, Subcommand};

use plan::{Block, Table};
use report::{Conditions, Report};
use setup::Setup;
use timeline::Timeline;

/// Benchmarks of the data plane.
#[derive(Parser)]
struct Bench {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// connect(2) through a service, with 1 and with 10,000 services loaded, against a direct one.
    ///
    /// With 1 and 2 threads, with a fresh and a full table of records; and every kernel program over
    /// a whole connection. Direct connects are measured while no agent runs, so agents are stopped
    /// and started many times. No other agent should run on the machine.
    Connect {
        /// One JSON object instead of tables.
        #[arg(long)]
        json: bool,
        /// Rounds, in blocks of 4; in each, every variant connects 500 times in each thread.
        #[arg(long, default_value_t = 40, value_parser = clap::value_parser!(u32).range(1..))]
        runs: u32,
    },
    /// What the benchmark runs to connect.
    #[command(hide = true)]
    Worker(worker::Arguments),
}

/// What says on a terminal how far it has come.
struct Progress {
    shown: bool,
    steps: usize,
}

fn main() -> ExitCode {
    let result = match Bench::parse().command {
        Command::Connect { json, runs } => connect(json, runs),
        Command::Worker(arguments) => worker::serve(&arguments),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mesh-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn connect(json: bool, runs: u32) -> Result<()> {
    let blocks = plan::blocks(runs);
    let progress = Progress { shown: !json && io::stderr().is_terminal(), steps: blocks.len() + 1 };
    let mut setup = Setup::make()?;
    let mut timeline = Timeline::default();
    let (mut full, mut collided, mut disturbed) = (0, 0, 0);
    for (number, &block) in blocks.iter().enumerate() {
        progress.say(number, &block.describe())?;
        setup.enter(block)?;
        let before = block.services.map(|_| setup.status()).transpose()?;
        measure(&mut setup, &mut timeline, number, block)?;
        if block.services.is_none() && programs::other_agents()? {
            disturbed += 1;
        }
        if let Some(before) = before {
            let (before, after) = (before.counters, setup.status()?.counters);
            let balanced = after.balanced - before.balanced;
            ensure!(balanced > 0, "nothing was balanced with {}", block.describe());
            if block.table == Table::Full {
                full += balanced;
                collided += after.collisions - before.collisions;
            }
        }
    }
    progress.say(blocks.len(), "each program")?;
    let costs = programs::measure(&mut setup)?;
    progress.end();
    let rounds = runs.next_multiple_of(plan::ROUNDS) as usize;
    let conditions = Conditions {
        rounds,
        disturbed_blocks: disturbed,
        full_table_collisions: collided as f64 / full.max(1) as f64,
    };
    let report = Report::new(&timeline, conditions, costs);
    if json {
        println!("{}", report.json()?);
    } else {
        report.print();
    }
    Ok(())
}

/// The rounds of a block. The first is not counted: caches, and the first use of everything.
fn measure(setup: &mut Setup, timeline: &mut Timeline, number: usize, block: Block) -> Result<()> {
    let mut subjects: Vec<_> = block.subjects().map(|subject| (subject, Vec::new())).collect();
    for round in 0..=plan::ROUNDS {
        fastrand::shuffle(&mut subjects);
        for (subject, times) in &mut subjects {
            let measured = setup.round(*subject)?;
            if round > 0 {
                times.extend(measured);
            }
        }
    }
    for (subject, times) in subjects {
        timeline.add(number, subject, times);
    }
    Ok(())
}

// === impl Progress ===

impl Progress {
    fn say(&self, step: usize, what: &str) -> Result<()> {
        if self.shown {
            // To the end of the line: what was said before may be longer.
            eprint!("\r\x1b[K{} of {}: {what}", step + 1, self.steps);
            io::stderr().flush()?;
        }
        Ok(())
    }

    fn end(&self) {
        if self.shown {
            eprint!("\r\x1b[K");
        }
    }
}
