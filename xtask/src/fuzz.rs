//! Looks for data for which the selection logic is wrong, guided by what the code does with it (libFuzzer),
//! under the address sanitizer.

use std::fs;

use anyhow::{Context, Result};

use crate::workspace::{Workspace, host_target};
use crate::{process, sanitizer};

/// The package, and its program.
const PACKAGE: &str = "mesh-fuzz";
const PROGRAM: &str = "selection";

/// What libFuzzer needs to see: which edges are taken, and what is compared. And what it is to find besides
/// what the sanitizer does: arithmetic that overflows.
const FLAGS: [&str; 9] = [
    "--cfg=fuzzing",
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "-Ccodegen-units=1",
    "-Cdebug-assertions",
    "-Coverflow-checks",
];

/// The longest data; a decision that looks at as many slots as may be takes less.
const MAX_LEN: &str = "-max_len=8192";

/// Looks for so many seconds. What was found worth keeping is kept in the target directory, and begun with
/// the next time.
///
/// # Errors
///
/// When data was found: then its file is named, and how to look at it. When it does not build, or is not
/// instrumented.
pub(crate) fn run(workspace: &Workspace, seconds: u64) -> Result<()> {
    let directory = workspace.target.join("fuzz");
    let (corpus, found) = (directory.join("corpus"), directory.join("found"));
    fs::create_dir_all(&corpus).and_then(|()| fs::create_dir_all(&found))?;
    let mut cargo = sanitizer::cargo(workspace, "build", &directory, &FLAGS);
    cargo.args(["--release", "--package", PACKAGE, "--bin", PROGRAM]);
    process::step("building the fuzzer", || process::run(&mut cargo))?;

    let program = directory.join(host_target()).join("release").join(PROGRAM);
    let mut fuzzer = std::process::Command::new(program);
    fuzzer.arg(&corpus).args([MAX_LEN, "-len_control=0", "-timeout=10", "-print_final_stats=1"]);
    fuzzer.arg(format!("-max_total_time={seconds}"));
    fuzzer.arg(format!("-artifact_prefix={}/", found.display()));
    process::step("fuzzing the selection logic", || process::run(&mut fuzzer)).with_context(|| {
        format!(
            "if data was found, it is in {}: `cargo run -p {PACKAGE} -- FILE` runs it",
            found.display()
        )
    })
}
