//! Restarts of agents under load, and what clients noticed of them: `cargo xtask soak restarts`.

use std::io::IsTerminal;
use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;
use mesh_tests::restarts::{self, Plan, Report};

/// Ends and starts agents while clients connect without pause and connections are in use.
#[derive(Parser)]
struct Restarts {
    /// How many agents.
    #[arg(long, default_value_t = 200)]
    times: u32,
    /// Connections that are kept.
    #[arg(long, default_value_t = 600)]
    tcp: usize,
    /// Datagram sockets that are connected, and as many that are not.
    #[arg(long, default_value_t = 200)]
    udp: usize,
    /// As JSON.
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    match run(&Restarts::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mesh-restarts: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Restarts) -> Result<()> {
    let Restarts { times, tcp, udp, json } = *arguments;
    let shows = std::io::stderr().is_terminal();
    let report = restarts::run(Plan { times, tcp, udp }, |number| {
        if shows {
            eprint!("\r{number} of {times} agents");
        }
    })?;
    if shows {
        eprintln!();
    }
    if json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print(&report);
    }
    report.ensure_unnoticed()
}

fn print(report: &Report) {
    let Report { killed, terminated, other_build, other_layout, storm, long, .. } = report;
    println!("agents killed at any moment     {killed:>10}");
    println!("agents told to end              {terminated:>10}");
    println!("of these, of another build      {other_build:>10}");
    println!("of these, of another layout     {other_layout:>10}");
    println!("ready, with the same programs   {}", times(&report.ready_same));
    println!("ready, with others              {}", times(&report.ready_other));
    println!("connects meanwhile              {:>10}", storm.connects);
    println!("of these, failed                {:>10}", storm.failed.values().sum::<u64>());
    println!("connections kept                {:>10}", long.made);
    println!("of these, broken                {:>10}", long.broken.values().sum::<u64>());
    println!("words exchanged on them         {:>10}", long.exchanges);
    println!("connects counted by the kernel  {:>10} of {}", report.counted, report.expected);
    println!("records left, and released late {:>10} {}", report.records, report.released);
}

/// Median and longest.
fn times(times: &[u64]) -> String {
    let mut sorted = times.to_vec();
    sorted.sort_unstable();
    match (sorted.get(sorted.len() / 2), sorted.last()) {
        (Some(median), Some(longest)) => {
            format!("{median:>10} ms median, {longest} ms at most, of {}", sorted.len())
        }
        _ => "         -".to_owned(),
    }
}
