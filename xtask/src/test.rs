//! Every test of the workspace, with everything it needs built before.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;

use crate::host::{self, Parts};
use crate::leftovers::Leftovers;
use crate::nextest;
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
pub(crate) const RESTARTS: &str = "mesh-restarts";

/// The program that has clients end in every way, and compares what was counted with what they did.
pub(crate) const RECORDS: &str = "mesh-ugly";

const ENVOY_VARIABLE: &str = "MESH_ENVOY_BIN";
const MEASURED_VARIABLE: &str = "MESH_BENCH_DIR";

/// The test program that runs every interleaving: built in a way of its own.
const MODELS: &str = "loom";

/// What runs the tests on a host as systemd leaves it when it boots, with a BPF file system at the usual
/// place, and with nothing of this machine's network: neither its firewall nor its ports in use. Tests that
/// need a network or a place for pins make their own, whatever is there.
const HOST: &str = r#"
mount -t bpf bpf /sys/fs/bpf
ip link set lo up
exec "$@"
"#;

/// Which tests.
#[derive(Default, clap::Args)]
pub(crate) struct Selection {
    /// Only this test program: a name in tests/tests, for instance `churn`, or `loom` for the models.
    #[arg(long = "test", value_name = "PROGRAM")]
    program: Option<String>,
    /// Only tests whose name contains this.
    filter: Option<String>,
    /// For cargo-nextest, for instance `-- --no-capture`.
    #[arg(last = true)]
    arguments: Vec<String>,
}

impl Selection {
    /// Whether the models are among them, and whether anything else is.
    fn kinds(&self) -> (bool, bool) {
        let program = self.program.as_deref();
        (program.is_none_or(|name| name == MODELS), program != Some(MODELS))
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
    if others {
        process::require_root("`cargo xtask test`")?;
        let compiler = setup::ensure(workspace, &[Group::Build, Group::Show, Group::Test], yes)?;
        host::build_other(workspace, &compiler)?;
        let binaries = host::build(workspace, &compiler, Parts::Tests)?;
        host::build_static_client(workspace)?;
        let before = Leftovers::now(&workspace.target)?;
        let tests =
            process::step("running the tests", || run_others(workspace, selection, &binaries));
        tests.and(before.assert_none_since())?;
    }
    if models {
        process::step("checking the models", || run_models(workspace, selection))?;
    }
    Ok(())
}

fn run_others(workspace: &Workspace, selection: &Selection, binaries: &Path) -> Result<()> {
    let mut tests = Command::new("unshare");
    tests.args(["--mount", "--net", "--propagation", "private", "sh", "-euc", HOST, "sh"]);
    nextest::command(workspace, &mut tests);
    if let Some(program) = &selection.program {
        tests.args(["--test", program]);
    }
    tests.args(&selection.filter).args(&selection.arguments);
    tests.current_dir(&workspace.root);
    tests.env(host::OBJECT_VARIABLE, workspace.ebpf_object());
    tests.env(AGENT_VARIABLE, binaries.join("mesh-agent")).env(BINARIES_VARIABLE, binaries);
    process::clean(&mut tests);
    nextest::run(workspace, &mut tests)
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
    cargo.arg("--target-dir").arg(workspace.target.join("loom")).args(&selection.filter);
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
    let binaries: PathBuf = match profile {
        Profile::Dev => host::build(workspace, &compiler, Parts::Programs)?,
        Profile::Release => host::build_optimised(workspace, &compiler, name == RESTARTS)?,
    };
    let mut command = Command::new(binaries.join(name));
    command.env(ENVOY_VARIABLE, workspace.envoy()).env(MEASURED_VARIABLE, workspace.measured());
    command.args(arguments).env(AGENT_VARIABLE, binaries.join("mesh-agent"));
    command.env(BINARIES_VARIABLE, binaries);
    process::clean(&mut command);
    Ok(command)
}
