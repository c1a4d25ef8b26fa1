//! Building the kernel programs.

use std::env::consts::ARCH;
use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::host::copy_if_other;
use crate::toolchain::Compiler;
use crate::workspace::{BPF_TARGET, Workspace};
use crate::{elf, process};

/// Cargo takes several compiler flags from the environment when they are separated by this.
pub(crate) const SEPARATOR: &str = "\x1f";

/// Compiles the kernel programs, checks the object, and puts it at [`Workspace::ebpf_object`].
///
/// # Errors
///
/// When it does not compile, or the object is one that would not load ([`elf::check`]).
pub(crate) fn build_object(workspace: &Workspace, compiler: &Compiler) -> Result<PathBuf> {
    process::step(&format!("building the kernel programs with {compiler}"), || {
        process::run(&mut object_command(workspace, compiler)?)?;
        let (built, path) = (built_object(workspace), workspace.ebpf_object());
        let object = fs::read(&built)
            .with_context(|| format!("cannot read what was built, {}", built.display()))?;
        elf::check(&object).with_context(|| format!("the object {} is bad", built.display()))?;
        copy_if_other(&built, &path)?;
        Ok(path)
    })
}

/// Cargo, for the BPF target: the compiler, its flags, the linker.
pub(crate) fn command(workspace: &Workspace, compiler: &Compiler) -> Result<Command> {
    if !matches!(ARCH, "x86_64" | "aarch64") {
        bail!("the kernel programs are built for x86_64 and aarch64; this machine is {ARCH}");
    }
    let mut cargo = match compiler {
        Compiler::Prebuilt { rustc, .. } => {
            let mut cargo = process::cargo();
            cargo.env("RUSTC", rustc);
            cargo
        }
        Compiler::Nightly { .. } => {
            let mut rustup = Command::new("rustup");
            rustup.args(["run", "nightly", "cargo"]).env_remove("RUSTC").env_remove("CARGO");
            process::clean(&mut rustup);
            rustup
        }
    };
    // The layout of `pt_regs` differs between machines, so the bindings want to know which one.
    let arch = format!("--cfg=bpf_target_arch=\"{ARCH}\"");
    // v3: atomic instructions that fetch and compare, in every kernel since 5.12.
    let flags = [&arch, "-Cdebuginfo=2", "-Clink-arg=--btf", "-Ctarget-cpu=v3"];
    cargo
        .current_dir(&workspace.root)
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join(SEPARATOR))
        .env("CARGO_TARGET_BPFEL_UNKNOWN_NONE_LINKER", workspace.bpf_linker())
        // On this target the inline assembly of aya-ebpf is unstable, whatever the compiler.
        .env("RUSTC_BOOTSTRAP", "aya_ebpf,mesh_common,mesh_ebpf")
        .env_remove("RUSTFLAGS")
        .env_remove("RUSTC_WRAPPER")
        .env_remove("RUSTC_WORKSPACE_WRAPPER");
    Ok(cargo)
}

/// Compiles kernel programs whose records have their fields in other places, as a later version's could, and
/// returns where the object is.
///
/// # Errors
///
/// When it does not compile.
pub(crate) fn build_other_object(workspace: &Workspace, compiler: &Compiler) -> Result<PathBuf> {
    let object = workspace.ebpf().join("other-layout.o");
    process::step("building kernel programs of another map layout", || {
        let mut cargo = object_command(workspace, compiler)?;
        cargo.args(["--features", "other-layout"]);
        process::run(&mut cargo)?;
        copy_if_other(&built_object(workspace), &object)?;
        Ok(object)
    })
}

/// Cargo, to build the object.
fn object_command(workspace: &Workspace, compiler: &Compiler) -> Result<Command> {
    let mut cargo = command(workspace, compiler)?;
    cargo.args(["build", "--package=mesh-ebpf", "--release"]);
    if matches!(compiler, Compiler::Nightly { .. }) {
        cargo.arg("-Zbuild-std=core");
    }
    cargo.args(["--target", BPF_TARGET]).arg("--target-dir").arg(workspace.ebpf());
    Ok(cargo)
}

/// Where cargo puts it.
fn built_object(workspace: &Workspace) -> PathBuf {
    workspace.ebpf().join(BPF_TARGET).join("release/mesh-ebpf")
}
