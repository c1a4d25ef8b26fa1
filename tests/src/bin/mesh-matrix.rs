//! What happens when something fails, measured: `cargo xtask matrix`.

use std::process::ExitCode;

use anyhow::{Result, bail, ensure};
use clap::Parser;
use mesh_tests::matrix::rows::{ROWS, Row};
use mesh_tests::matrix::{self, Report, Size, Told, table};

/// Lets endpoints fail in every way, and compares what their clients see with what it may be.
#[derive(Parser)]
struct Matrix {
    /// Only these rows; without any, all.
    rows: Vec<String>,
    /// As the tests do: each row once, several at a time, and the healthy run with 20,000 connects.
    #[arg(long)]
    short: bool,
    /// How often each row is run; the worst counts.
    #[arg(long)]
    times: Option<u32>,
    /// Connects of the healthy run.
    #[arg(long)]
    connects: Option<u64>,
    /// Names the rows, and ends.
    #[arg(long)]
    list: bool,
    /// As JSON.
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    match run(&Matrix::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mesh-matrix: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Matrix) -> Result<()> {
    if arguments.list {
        ROWS.iter().for_each(|row| println!("{:20} {}", row.name, row.what));
        return Ok(());
    }
    let usual = if arguments.short { Size::SHORT } else { Size::FULL };
    let size = Size {
        connects: arguments.connects.unwrap_or(usual.connects),
        times: arguments.times.unwrap_or(usual.times),
        ..usual
    };
    ensure!(size.connects > 0 && size.times > 0, "nothing to measure");
    let reports = matrix::run(&chosen(&arguments.rows)?, size, &tell);
    if arguments.json {
        println!("{}", serde_json::to_string_pretty(&reports)?);
    } else {
        print!("{}", table::of(&reports));
    }
    let broken: Vec<&str> =
        reports.iter().filter(|report| !report.holds()).map(|report| report.name).collect();
    ensure!(broken.is_empty(), "not as it must be: {}", broken.join(", "));
    Ok(())
}

fn chosen(names: &[String]) -> Result<Vec<Row>> {
    if let Some(name) = names.iter().find(|name| ROWS.iter().all(|row| row.name != **name)) {
        let all: Vec<&str> = ROWS.iter().map(|row| row.name).collect();
        bail!("there is no row {name}; there are {}", all.join(", "));
    }
    let is_chosen = |row: &&Row| names.is_empty() || names.iter().any(|name| name == row.name);
    Ok(ROWS.iter().filter(is_chosen).copied().collect())
}

fn tell(told: Told<'_>) {
    match told {
        Told::Begins(row) => eprintln!("{:20} {} …", row.name, row.what),
        Told::Ends(report) => {
            let Report { name, seconds, error, .. } = report;
            let verdict = if report.holds() { "holds" } else { "DOES NOT HOLD" };
            let error = error.as_ref().map_or(String::new(), |error| format!(": {error}"));
            eprintln!("{name:20} {verdict} ({seconds:.0} s){error}");
        }
    }
}
