//! Looks for data for which the selection logic is wrong, or an agent that takes over maps, guided by what the
//! code does with it (libFuzzer), under the address sanitizer.

use std::fs;
use std::process::Command;

use anyhow::{Context, Result};

use crate::workspace::{Workspace, host_target};
use crate::{process, sanitizer};

/// The package, and its programs.
const PACKAGE: &str = "mesh-fuzz";
pub(crate) const PROGRAMS: [&str; 2] = ["selection", "adoption"];

/// The longest data; a decision that looks at as many slots as may be takes less.
const MAX_LEN: &str = "-max_len=8192";

/// Looks for so many seconds with one program, or with each. What was found worth keeping is kept in the target
/// directory, and begun with the next time.
///
/// # Errors
///
/// When data was found: then its file is named, and how to look at it. When one does not build, or is not
/// instrumented.
pub(crate) fn run(workspace: &Workspace, program: Option<&str>, seconds: u64) -> Result<()> {
    sanitizer::build(workspace)?;
    let chosen = PROGRAMS.into_iter().filter(|name| program.is_none_or(|only| only == *name));
    // Each keeps one processor busy.
    process::at_once(chosen, |name| fuzz(workspace, name, seconds))
}

fn fuzz(workspace: &Workspace, name: &str, seconds: u64) -> Result<()> {
    let directory = workspace.fuzz();
    let (corpus, found) = (directory.join("corpus").join(name), directory.join("found").join(name));
    fs::create_dir_all(&corpus).and_then(|()| fs::create_dir_all(&found))?;
    let program = directory.join(host_target()).join(sanitizer::PROFILE).join(name);
    let mut fuzzer = Command::new(program);
    fuzzer.arg(&corpus).args([MAX_LEN, "-len_control=0", "-timeout=10"]);
    fuzzer.args(["-print_final_stats=1", &format!("-max_total_time={seconds}")]);
    fuzzer.arg(format!("-artifact_prefix={}/", found.display()));
    process::step(&format!("fuzzing: {name}"), || process::run(&mut fuzzer)).with_context(|| {
        format!(
            "if data was found, it is in {}: `cargo run -p {PACKAGE} --bin {name} -- FILE` runs it",
            found.display()
        )
    })
}
