//! Everything that must hold before a change goes in, in the order in which it fails fastest.

use anyhow::Result;

use crate::setup::{self, Group};
use crate::steps::Times;
use crate::toolchain::Compiler;
use crate::workspace::{BPF_TARGET, Profile, Workspace};
use crate::{dist, ebpf, fuzz, kernels, process, sanitizer, test, tidy};

/// For a longer look there is `cargo xtask fuzz`.
const FUZZ_SECONDS: u64 = 20;

/// Runs every step, and says how long each took.
///
/// # Errors
///
/// The first step that fails.
pub(crate) fn run(workspace: &Workspace, yes: bool) -> Result<()> {
    Times::of(|times| steps(workspace, yes, times))
}

fn steps(workspace: &Workspace, yes: bool, times: &mut Times) -> Result<()> {
    process::require_root("`cargo xtask ci`")?;
    times.step("format", || format(workspace))?;
    times.step("tidy", || tidy::check(workspace))?;
    let compiler = times.step("setup", || setup::ensure(workspace, &Group::ALL, yes))?;
    times.step("clippy", || clippy_host(workspace))?;
    times.step("clippy, kernel programs", || clippy_bpf(workspace, &compiler))?;
    times.step("test", || test::run(workspace, &test::Selection::default(), yes))?;
    times.step("sanitize", || sanitizer::run(workspace))?;
    times.step("fuzz", || fuzz::run(workspace, None, FUZZ_SECONDS))?;
    times.step("kernels", || kernels::run(workspace, None, yes))?;
    times.step("dist", || dist::draft(workspace, yes).map(drop))?;
    times.step("demo", || {
        process::run(&mut test::program(workspace, "mesh-demo", Profile::Dev, &[], yes)?)
    })
}

fn format(workspace: &Workspace) -> Result<()> {
    process::run(process::cargo().current_dir(&workspace.root).args(["fmt", "--all", "--check"]))
}

/// Without the object, as an editor does it.
fn clippy_host(workspace: &Workspace) -> Result<()> {
    let mut cargo = process::cargo();
    cargo.current_dir(&workspace.root);
    cargo.args(["clippy", "--workspace", "--all-targets", "--locked", "--", "-Dwarnings"]);
    process::run(&mut cargo)
}

/// For their own target: on the host most of their code is left out.
fn clippy_bpf(workspace: &Workspace, compiler: &Compiler) -> Result<()> {
    let mut cargo = ebpf::command(workspace, compiler)?;
    match compiler {
        // What `cargo clippy` does, with the driver that belongs to this compiler.
        Compiler::Prebuilt { rustc, .. } => {
            cargo
                .args(["check"])
                .env("RUSTC_WORKSPACE_WRAPPER", rustc.with_file_name("clippy-driver"));
            cargo.env("CLIPPY_ARGS", "-Dwarnings__CLIPPY_HACKERY__");
        }
        Compiler::Nightly { .. } => {
            cargo.args(["clippy", "-Zbuild-std=core"]).env("CLIPPY_ARGS", "-Dwarnings");
        }
    }
    cargo.args(["--package=mesh-ebpf", "--release", "--target", BPF_TARGET]);
    cargo.arg("--target-dir").arg(workspace.ebpf());
    process::run(&mut cargo)
}
