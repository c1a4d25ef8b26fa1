//! What a connect costs through a service, against a direct one and against other ways to a backend,
//! and what each kernel program has to do with it.
//!
//! Everything is measured in one run, in short blocks that alternate between agents, peers and none
//! ([`plan`]), so that whatever the machine does meanwhile happens to all variants.

mod plan;
mod programs;
mod report;
mod setup;
mod worker;

use anyhow::{Result, ensure};

pub use self::worker::{Arguments as WorkerArguments, serve};

use self::plan::{Block, Table};
use self::report::{Conditions, Report};
use self::setup::Setup;
use crate::machine::Machine;
use crate::output::{Output, Progress};
use crate::timeline::Timeline;

/// What people choose.
#[derive(clap::Args)]
pub struct Options {
    /// Rounds, in blocks of 4; in each, every variant connects 500 times in each thread.
    #[arg(long, default_value_t = 40, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// Without nftables with 60,000 services, whose rules take minutes to load.
    #[arg(long)]
    quick: bool,
}

/// Measures, and shows it.
///
/// # Errors
///
/// Something is missing on this machine, or is not as it should be.
pub fn run(options: &Options, output: Output) -> Result<()> {
    let blocks = plan::blocks(options.runs, options.quick);
    let peers = plan::peers_of(&blocks);
    let machine = Machine::with(peers.iter().map(|peer| peer.kind()))?;
    let progress = Progress::of(blocks.len() + 2, output);
    let mut setup = Setup::make(&peers, |what| progress.say(0, what))?;
    let mut timeline = Timeline::new();
    let (mut full, mut collided, mut disturbed) = (0, 0, 0);
    for (number, &block) in blocks.iter().enumerate() {
        progress.say(number + 1, &block.describe())?;
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
    progress.say(blocks.len() + 1, "each program")?;
    let costs = programs::measure(&mut setup)?;
    progress.end();
    let conditions = Conditions {
        machine,
        rounds: options.runs.next_multiple_of(plan::ROUNDS) as usize,
        disturbed_blocks: disturbed,
        full_table_collisions: collided as f64 / full.max(1) as f64,
    };
    let report = Report::new(&timeline, &plan::subjects(&blocks), conditions, costs);
    output.publish("connect", &report, Report::print)
}

/// The rounds of a block. The first is not counted: caches, and the first use of everything.
fn measure(
    setup: &mut Setup,
    timeline: &mut Timeline<plan::Subject>,
    number: usize,
    block: Block,
) -> Result<()> {
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
