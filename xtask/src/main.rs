//! Tasks a person runs from a checkout: `cargo xtask --help`.

mod ci;
mod cpio;
mod dist;
mod ebpf;
mod elf;
mod fuzz;
mod guest;
mod host;
mod kernels;
mod leftovers;
mod nextest;
mod nightly;
mod process;
mod sanitizer;
mod setup;
mod steps;
mod test;
mod tidy;
mod toolchain;
mod workspace;

use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::{Parser, Subcommand};

use crate::host::Linkage;
use crate::setup::Group;
use crate::workspace::{Profile, Workspace};

/// Everything that is done from a checkout: set up, build, test, show, measure.
///
/// Each task installs what it needs and this machine does not have (Debian and Ubuntu, as root);
/// elsewhere it says what is missing. Nothing but packages is put outside the target directory.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
#[command(after_help = "A new checkout:\n  cargo xtask demo    \
    see three backends balanced, one of them failing and coming back\n  cargo xtask test    \
    run every test (root)\n")]
struct Cli {
    /// Install missing packages without asking. Without a terminal it does not ask either.
    #[arg(long, global = true)]
    yes: bool,
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Install what the other tasks need and this machine does not have.
    ///
    /// That is a compiler for the kernel programs, LLVM for their linker, the linker itself (into
    /// the target directory), and the programs that the tests run. Says what it will install and
    /// why. Does nothing when nothing is missing.
    Setup,
    /// Build the kernel programs, check the object, and build the agent with it inside.
    Build {
        /// Optimised.
        #[arg(long)]
        release: bool,
        /// Without any library of this machine: runs in an empty container.
        #[arg(long = "static")]
        linked_statically: bool,
    },
    /// Make what is released: a static binary, and a tarball with the unit, manual pages, completions and
    /// example files.
    Dist,
    /// Run every test, the ones with the real agent and kernel included. Needs root.
    ///
    /// Works in network namespaces and cgroups of its own, and fails when one of them is left
    /// behind.
    Test {
        #[command(flatten)]
        selection: test::Selection,
    },
    /// Look for tables and events for which the selection logic is wrong, and for maps that an agent cannot
    /// take over.
    Fuzz {
        /// Only this one.
        #[arg(value_name = "PROGRAM", value_parser = fuzz::PROGRAMS)]
        program: Option<String>,
        /// For how long each, in seconds.
        #[arg(long, default_value_t = 60)]
        seconds: u64,
    },
    /// Run the unit tests of those who have unsafe code under the address sanitizer.
    Sanitize,
    /// Boot older kernels in an emulator and see the agent balance there.
    Kernels {
        /// Only this series.
        #[arg(long, value_name = "SERIES", value_parser = kernels::SERIES)]
        kernel: Option<String>,
    },
    /// Boot a Debian with systemd in a container, and run the end-to-end tests there, beside an agent that runs as
    /// a service. Needs root.
    Guest {
        /// Only these test programs.
        #[arg(value_name = "PROGRAM")]
        programs: Vec<String>,
    },
    /// Check the project's conventions: module comments, sizes, unsafe code, licences.
    Tidy,
    /// Show the main job: three backends, one fails, traffic moves, it returns. Needs root.
    Demo {
        /// For the demo.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Measure, against direct connections, nftables, HAProxy and Envoy. Needs root.
    ///
    /// Envoy comes from PyPI, into the target directory. What was measured is kept there too, as
    /// JSON.
    Bench {
        /// What to measure, and its options: `connect`, `traffic`, `update`, `restart` or `checks`, each `[--json]`.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
        arguments: Vec<String>,
    },
    /// Let endpoints fail in every way, and show what clients see of it beside what they may see. Needs root.
    ///
    /// With more connects, and each row several times, what the test `matrix` does. Fails when a bound
    /// does not hold.
    Matrix {
        /// Which rows (without any, all), and `[--short] [--times N] [--connects N] [--json]`; `--list` names them.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Run for long what the tests run for short. Needs root.
    Soak {
        /// What, and its options: `records [--connects 1000000] [--seed N]`, or `restarts [--times 200]`:
        /// agents that end and come back while clients connect without pause.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
        arguments: Vec<String>,
    },
    /// Try what `docs` tells of and the agent does not do. Needs root.
    Lab {
        /// What, and its options: `redial [--leave] [--running]`, connects that wait for a silent backend and
        /// are led to another one.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
        arguments: Vec<String>,
    },
    /// Everything that must hold before a change goes in. Needs root.
    Ci {
        /// What takes too long for every change instead: long fuzzing and soaks, the whole failure matrix, the
        /// release, and the dependencies.
        #[arg(long)]
        nightly: bool,
    },
}

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> Result<()> {
    let workspace = &Workspace::find()?;
    let yes = cli.yes;
    match cli.task {
        Task::Setup => {
            let compiler = setup::ensure(workspace, &Group::ALL, yes)?;
            eprintln!("The kernel programs are compiled by {compiler}.");
            eprintln!("Nothing is missing.");
            Ok(())
        }
        Task::Build { release, linked_statically } => {
            let profile = if release { Profile::Release } else { Profile::Dev };
            let linkage = if linked_statically { Linkage::Static } else { Linkage::Dynamic };
            let compiler = setup::ensure(workspace, &[Group::Build], yes)?;
            let agent = host::build_agent(workspace, &compiler, profile, linkage)?;
            println!("{}", agent.display());
            Ok(())
        }
        Task::Dist => {
            println!("{}", dist::run(workspace, yes)?.display());
            Ok(())
        }
        Task::Test { selection } => test::run(workspace, &selection, yes),
        Task::Fuzz { program, seconds } => fuzz::run(workspace, program.as_deref(), seconds),
        Task::Sanitize => sanitizer::run(workspace),
        Task::Kernels { kernel } => kernels::run(workspace, kernel.as_deref(), yes),
        Task::Guest { programs } => guest::run(workspace, &programs, yes),
        Task::Tidy => tidy::check(workspace),
        Task::Demo { arguments } => {
            // The build is most of what somebody who is curious waits for.
            let profile = Profile::Dev;
            process::exec(&mut test::program(workspace, "mesh-demo", profile, &arguments, yes)?)
        }
        Task::Bench { arguments } => {
            let profile = Profile::Release;
            let program = test::BENCHMARKS;
            process::exec(&mut test::program(workspace, program, profile, &arguments, yes)?)
        }
        Task::Matrix { arguments } => {
            let profile = Profile::Release;
            let program = test::MATRIX;
            process::exec(&mut test::program(workspace, program, profile, &arguments, yes)?)
        }
        Task::Soak { arguments } => {
            let profile = Profile::Release;
            let (program, arguments) = match arguments.split_first() {
                Some((first, rest)) if first == "restarts" => (test::RESTARTS, rest),
                _ => (test::RECORDS, &arguments[..]),
            };
            process::exec(&mut test::program(workspace, program, profile, arguments, yes)?)
        }
        Task::Lab { arguments } => {
            let Some(("redial", rest)) =
                arguments.split_first().map(|(first, rest)| (first.as_str(), rest))
            else {
                bail!("there is only `redial`");
            };
            let program = "mesh-redial";
            process::exec(&mut test::program(workspace, program, Profile::Dev, rest, yes)?)
        }
        Task::Ci { nightly: false } => ci::run(workspace, yes),
        Task::Ci { nightly: true } => nightly::run(workspace, yes),
    }
}
