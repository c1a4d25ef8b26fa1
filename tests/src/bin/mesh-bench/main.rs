//! Benchmarks of the data plane: `cargo xtask bench`.
//!
//! What is compared is measured in one run, in turns, so that whatever the machine does meanwhile
//! happens to all of it; and only neighbours are compared ([`timeline`]).

mod checks;
mod connect;
mod machine;
mod output;
mod peers;
mod prober;
mod remote;
mod restart;
mod scene;
mod timeline;
mod traffic;
mod update;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use output::Output;

/// Benchmarks of the data plane.
#[derive(Parser)]
struct Bench {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// connect(2) through a service, with 1, 10,000 and 60,000 services loaded, against a direct
    /// one, and against address translation by nftables, HAProxy and Envoy; datagrams too.
    ///
    /// With 1 and 2 threads, with a fresh and a full table of records; and every kernel program over
    /// a whole connection. Direct connects are measured while no agent runs, so agents are stopped
    /// and started many times. No other agent should run on the machine.
    Connect {
        #[command(flatten)]
        options: connect::Options,
        #[command(flatten)]
        output: Output,
    },
    /// Requests on 1, 16 and 256 connections, connections of one request, and bulk, through a service,
    /// against a direct connection, nftables, HAProxy and Envoy.
    Traffic {
        #[command(flatten)]
        options: traffic::Options,
        #[command(flatten)]
        output: Output,
    },
    /// How long it takes until a change of services is in force, until 10,000 services are loaded,
    /// and how much memory the agent has then.
    Update {
        #[command(flatten)]
        options: update::Options,
        #[command(flatten)]
        output: Output,
    },
    /// How long an agent that was killed takes until it is ready again, with 10,000 services; and how
    /// long a change of endpoints waits while one agent follows another, of the same build or of another.
    Restart {
        #[command(flatten)]
        options: restart::Options,
        #[command(flatten)]
        output: Output,
    },
    /// What it costs to check 10,000 endpoints every 2 s, and how late checks begin.
    Checks {
        #[command(flatten)]
        options: checks::Options,
        #[command(flatten)]
        output: Output,
    },
    /// What `traffic` runs to answer.
    #[command(hide = true)]
    Backend,
    /// What `traffic` runs to ask.
    #[command(hide = true)]
    Client(traffic::ClientArguments),
    /// What `update` and `restart` run to notice a change.
    #[command(hide = true)]
    Prober,
    /// What `connect` runs to connect.
    #[command(hide = true)]
    Worker(connect::WorkerArguments),
}

fn main() -> ExitCode {
    let result = match Bench::parse().command {
        Command::Connect { options, output } => connect::run(&options, output),
        Command::Traffic { options, output } => traffic::run(&options, output),
        Command::Backend => traffic::serve_backends(),
        Command::Client(arguments) => traffic::serve_client(&arguments),
        Command::Update { options, output } => update::run(&options, output),
        Command::Restart { options, output } => restart::run(&options, output),
        Command::Checks { options, output } => checks::run(&options, output),
        Command::Prober => prober::serve(),
        Command::Worker(arguments) => connect::serve(&arguments),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mesh-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}
