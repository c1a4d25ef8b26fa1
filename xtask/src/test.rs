//! Every test of the workspace, with everything it needs built before.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use crate::ebpf::{self, Linkage};
use crate::leftovers::Leftovers;
use crate::process;
use crate::setup::{self, Group};
use crate::workspace::{Profile, Workspace};

/// Where the end-to-end tests find the agent.
const AGENT_VARIABLE: &str = "MESH_AGENT_BIN";

/// Where they find their own programs.
const BINARIES_VARIABLE: &str = "MESH_TEST_BIN_DIR";

/// A client that the tests also run as a static binary: it is put beside the other programs under
/// the second name.
const CLIENT: (&str, &str) = ("mesh-client", "mesh-client-static");

/// Builds everything and runs the tests whose name contains `filter`.
///
/// # Errors
///
/// When not root, when something does not build, when a test fails, or when the tests left
/// something on the machine.
pub(crate) fn run(
    workspace: &Workspace,
    filter: Option<&str>,
    arguments: &[String],
    yes: bool,
) -> Result<()> {
    process::require_root("`cargo xtask test`")?;
    let compiler = setup::ensure(workspace, &[Group::Build, Group::Show, Group::Test], yes)?;
    let profile = Profile::Dev;
    let agent = ebpf::build_agent(workspace, &compiler, profile, Linkage::Dynamic)?;
    let binaries = ebpf::build_binaries(workspace, "mesh-tests", &[], profile, Linkage::Dynamic)?;
    let client =
        ebpf::build_binaries(workspace, "mesh-tests", &[CLIENT.0], profile, Linkage::Static)?;
    copy(&client.join(CLIENT.0), &binaries.join(CLIENT.1))?;

    let before = Leftovers::now(&workspace.target)?;
    let mut cargo = ebpf::host_cargo(workspace);
    cargo.args(["test", "--workspace", "--exclude", "mesh-ebpf", "--no-fail-fast"]);
    cargo.args(filter);
    if !arguments.is_empty() {
        cargo.arg("--").args(arguments);
    }
    cargo.env(AGENT_VARIABLE, &agent).env(BINARIES_VARIABLE, &binaries);
    let tests = process::step("running the tests", || process::run(&mut cargo));
    let leftovers = before.assert_none_since();
    let models = process::step("checking the models", || models(workspace, filter, arguments));
    tests.and(leftovers).and(models)
}

/// Runs what `mesh-common` shares between programs under every interleaving.
///
/// In a target directory of its own: all that it is built from is compiled with loom's flag, and
/// cargo would otherwise build everything again at each change. Optimised, because it runs tens of
/// thousands of executions.
fn models(workspace: &Workspace, filter: Option<&str>, arguments: &[String]) -> Result<()> {
    let mut cargo = process::cargo();
    cargo.current_dir(&workspace.root);
    cargo.args(["test", "--package", "mesh-common", "--release", "--test", "loom"]);
    cargo.arg("--target-dir").arg(workspace.target.join("loom"));
    cargo.args(filter);
    if !arguments.is_empty() {
        cargo.arg("--").args(arguments);
    }
    cargo.env("CARGO_ENCODED_RUSTFLAGS", "--cfg=loom");
    process::run(&mut cargo)
}

/// Sets up and builds for one of the programs of the tests crate that people run, and returns the
/// command for it.
///
/// # Errors
///
/// When not root, or when something does not build.
pub(crate) fn program(
    workspace: &Workspace,
    name: &str,
    profile: Profile,
    arguments: &[String],
    yes: bool,
) -> Result<std::process::Command> {
    process::require_root("this")?;
    let compiler = setup::ensure(workspace, &[Group::Build, Group::Show], yes)?;
    let agent = ebpf::build_agent(workspace, &compiler, profile, Linkage::Dynamic)?;
    let binaries = ebpf::build_binaries(workspace, "mesh-tests", &[], profile, Linkage::Dynamic)?;
    let mut command = std::process::Command::new(binaries.join(name));
    command.args(arguments).env(AGENT_VARIABLE, agent).env(BINARIES_VARIABLE, binaries);
    process::clean(&mut command);
    Ok(command)
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::copy(from, to)
        .with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))?;
    Ok(())
}
