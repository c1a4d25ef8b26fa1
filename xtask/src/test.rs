//! Every test of the workspace, with everything it needs built before.

use std::fs;
use std::path::Path;
use std::process::Command;

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

/// The program that measures, which needs more than the others, and where it finds that.
pub(crate) const BENCHMARKS: &str = "mesh-bench";
/// The program that lets endpoints fail in every way, with the means of the tests.
pub(crate) const MATRIX: &str = "mesh-matrix";

/// The program that ends and starts agents, also of another map layout.
const RESTARTS: &str = "mesh-restarts";

const ENVOY_VARIABLE: &str = "MESH_ENVOY_BIN";
const MEASURED_VARIABLE: &str = "MESH_BENCH_DIR";

/// A client that the tests also run as a static binary: it is put beside the other programs under
/// the second name.
const CLIENT: (&str, &str) = ("mesh-client", "mesh-client-static");

/// The test program that runs every interleaving: built in a way of its own.
const MODELS: &str = "loom";

/// Which tests.
#[derive(Default, clap::Args)]
pub(crate) struct Selection {
    /// Only this test program: a name in tests/tests, for instance `churn`, or `loom` for the models.
    #[arg(long = "test", value_name = "PROGRAM")]
    program: Option<String>,
    /// Only tests whose name contains this.
    filter: Option<String>,
    /// For the test programs, for instance `-- --nocapture`.
    #[arg(last = true)]
    arguments: Vec<String>,
}

impl Selection {
    /// Whether the models are among them, and whether anything else is.
    fn kinds(&self) -> (bool, bool) {
        let program = self.program.as_deref();
        (program.is_none_or(|name| name == MODELS), program != Some(MODELS))
    }

    /// Adds the filter and the arguments to a `cargo test`.
    fn narrow(&self, cargo: &mut Command) {
        cargo.args(&self.filter);
        if !self.arguments.is_empty() {
            cargo.arg("--").args(&self.arguments);
        }
    }
}

/// Builds everything and runs the tests that are selected.
///
/// # Errors
///
/// When not root, when something does not build, when a test fails, or when the tests left
/// something on the machine.
pub(crate) fn run(workspace: &Workspace, selection: &Selection, yes: bool) -> Result<()> {
    let (models, others) = selection.kinds();
    if !others {
        return process::step("checking the models", || run_models(workspace, selection));
    }
    process::require_root("`cargo xtask test`")?;
    let compiler = setup::ensure(workspace, &[Group::Build, Group::Show, Group::Test], yes)?;
    let profile = Profile::Dev;
    ebpf::build_other(workspace, &compiler, profile, Linkage::Dynamic)?;
    let agent = ebpf::build_agent(workspace, &compiler, profile, Linkage::Dynamic)?;
    let binaries = ebpf::build_binaries(workspace, "mesh-tests", &[], profile, Linkage::Dynamic)?;
    let client =
        ebpf::build_binaries(workspace, "mesh-tests", &[CLIENT.0], profile, Linkage::Static)?;
    copy(&client.join(CLIENT.0), &binaries.join(CLIENT.1))?;

    let before = Leftovers::now(&workspace.target)?;
    let mut cargo = ebpf::host_cargo(workspace);
    cargo.args(["test", "--workspace", "--exclude", "mesh-ebpf", "--no-fail-fast"]);
    if let Some(program) = &selection.program {
        cargo.args(["--test", program]);
    }
    selection.narrow(&mut cargo);
    cargo.env(AGENT_VARIABLE, &agent).env(BINARIES_VARIABLE, &binaries);
    let tests = process::step("running the tests", || process::run(&mut cargo));
    let leftovers = before.assert_none_since();
    let ended = tests.and(leftovers);
    if !models {
        return ended;
    }
    ended.and(process::step("checking the models", || run_models(workspace, selection)))
}

/// Runs what `mesh-common` shares between programs under every interleaving.
///
/// In a target directory of its own: all that it is built from is compiled with loom's flag, and
/// cargo would otherwise build everything again at each change. Optimised, because it runs tens of
/// thousands of executions.
fn run_models(workspace: &Workspace, selection: &Selection) -> Result<()> {
    let mut cargo = process::cargo();
    cargo.current_dir(&workspace.root);
    cargo.args(["test", "--package", "mesh-common", "--release", "--test", MODELS]);
    cargo.arg("--target-dir").arg(workspace.target.join("loom"));
    selection.narrow(&mut cargo);
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
) -> Result<Command> {
    process::require_root("this")?;
    let mut groups = vec![Group::Build, Group::Show];
    groups.extend((name == BENCHMARKS).then_some(Group::Bench));
    groups.extend((name == MATRIX).then_some(Group::Test));
    let compiler = setup::ensure(workspace, &groups, yes)?;
    if name == RESTARTS {
        ebpf::build_other(workspace, &compiler, profile, Linkage::Dynamic)?;
    }
    let agent = ebpf::build_agent(workspace, &compiler, profile, Linkage::Dynamic)?;
    let binaries = ebpf::build_binaries(workspace, "mesh-tests", &[], profile, Linkage::Dynamic)?;
    let mut command = Command::new(binaries.join(name));
    command.env(ENVOY_VARIABLE, workspace.envoy()).env(MEASURED_VARIABLE, workspace.measured());
    command.args(arguments).env(AGENT_VARIABLE, agent).env(BINARIES_VARIABLE, binaries);
    process::clean(&mut command);
    Ok(command)
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::copy(from, to)
        .with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))?;
    Ok(())
}
