//! What takes too long for every change: `cargo xtask ci --nightly`.

use std::process::Command;

use anyhow::{Context as _, Result};

use crate::setup::{self, Group, Tool};
use crate::steps::Times;
use crate::workspace::{Profile, Workspace};
use crate::{dist, fuzz, guest, host, process, test};

/// How long each fuzzer runs.
const FUZZ_SECONDS: u64 = 300;

/// How often agents are ended and started again.
const RESTARTS: &str = "200";

/// Runs every step, whatever became of the others, and says how long each took.
///
/// # Errors
///
/// Which steps failed.
pub(crate) fn run(workspace: &Workspace, yes: bool) -> Result<()> {
    Times::of(|times| steps(workspace, yes, times))
}

fn steps(workspace: &Workspace, yes: bool, times: &mut Times) -> Result<()> {
    process::require_root("`cargo xtask ci --nightly`")?;
    times.step("setup", || setup::ensure(workspace, &Group::ALL, yes).map(drop))?;
    times.apart("dependencies", || dependencies(workspace));
    times.apart("documentation", || documentation(workspace));
    times.apart("release", || dist::run(workspace, yes).map(drop));
    times.apart("a machine that systemd booted", || guest::run(workspace, &[], yes));
    times.apart("failure matrix", || program(workspace, test::MATRIX, &[], yes));
    times.apart("soak, restarts", || {
        program(workspace, test::RESTARTS, &["--times", RESTARTS], yes)
    });
    times.apart("soak, records", || program(workspace, test::RECORDS, &["records"], yes));
    times.apart("fuzz", || fuzz::run(workspace, None, FUZZ_SECONDS));
    Ok(())
}

/// Every link in it leads somewhere. Those to what is private are links too: nobody else reads it.
fn documentation(workspace: &Workspace) -> Result<()> {
    let mut cargo = process::cargo();
    cargo
        .current_dir(&workspace.root)
        .env("RUSTDOCFLAGS", "-Dwarnings -Arustdoc::private_intra_doc_links");
    cargo.args(["doc", "--quiet", "--locked", "--no-deps", "--document-private-items"]);
    process::run(cargo.args(host::SELECTION))
}

/// Runs one of the programs that people also run, optimised.
fn program(workspace: &Workspace, name: &str, arguments: &[&str], yes: bool) -> Result<()> {
    let arguments: Vec<String> = arguments.iter().map(|&argument| argument.to_owned()).collect();
    process::run(&mut test::program(workspace, name, Profile::Release, &arguments, yes)?)
}

/// Checks licences, sources, duplicates and bans of all dependencies by `deny.toml`; and what is known of
/// their vulnerabilities, where the list of these can be fetched.
fn dependencies(workspace: &Workspace) -> Result<()> {
    let deny = Tool::DENY.ensure(workspace)?;
    let check = |what: &[&str]| {
        let mut command = Command::new(&deny);
        command.current_dir(&workspace.root).args(["--workspace", "check"]).args(what);
        process::run(&mut command)
    };
    check(&["licenses", "bans", "sources"])?;
    let mut fetch = Command::new(&deny);
    fetch.current_dir(&workspace.root).args(["fetch", "db"]);
    match process::output(&mut fetch) {
        Ok(_) => check(&["advisories"]).context("a dependency has a known vulnerability"),
        Err(error) => {
            eprintln!(
                "NOT CHECKED: known vulnerabilities, because the list cannot be fetched: {error:#}"
            );
            Ok(())
        }
    }
}
