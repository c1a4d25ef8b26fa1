//! Building the kernel programs and the agent that embeds them.

use std::env::consts::ARCH;
use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::toolchain::Compiler;
use crate::workspace::{BPF_TARGET, Profile, Workspace, host_target};
use crate::{elf, process};

/// The variable that tells the agent's build script which object to embed.
const OBJECT_VARIABLE: &str = "MESH_EBPF_OBJECT";

/// Cargo takes several compiler flags from the environment when they are separated by this.
const SEPARATOR: &str = "\x1f";

/// Compiles the kernel programs, checks the object, and puts it at [`Workspace::ebpf_object`].
///
/// # Errors
///
/// When it does not compile, or the object is one that would not load ([`elf::check`]).
pub(crate) fn build_object(workspace: &Workspace, compiler: &Compiler) -> Result<PathBuf> {
    process::step(&format!("building the kernel programs with {compiler}"), || {
        let mut cargo = command(workspace, compiler)?;
        cargo.args(["build", "--package=mesh-ebpf", "--release"]);
        if matches!(compiler, Compiler::Nightly { .. }) {
            cargo.arg("-Zbuild-std=core");
        }
        cargo.args(["--target", BPF_TARGET]).arg("--target-dir").arg(workspace.ebpf());
        process::run(&mut cargo)?;

        let built = workspace.ebpf().join(BPF_TARGET).join("release/mesh-ebpf");
        let object = fs::read(&built)
            .with_context(|| format!("cannot read what was built, {}", built.display()))?;
        elf::check(&object).with_context(|| format!("the object {} is bad", built.display()))?;
        // Left alone when it is the same, so that the agent is not built again.
        let path = workspace.ebpf_object();
        if fs::read(&path).ok().as_ref() != Some(&object) {
            fs::write(&path, &object)
                .with_context(|| format!("cannot write {}", path.display()))?;
        }
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

/// Cargo, for the host, with the object to embed.
pub(crate) fn host_cargo(workspace: &Workspace) -> Command {
    let mut cargo = process::cargo();
    cargo.current_dir(&workspace.root).env(OBJECT_VARIABLE, workspace.ebpf_object());
    cargo
}

/// How binaries are linked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Linkage {
    /// Against the host's libraries.
    Dynamic,
    /// All in one file, for containers and initial ram disks.
    Static,
}

/// Builds binaries of a package for the host, and returns the directory they are in. No names
/// means all of them.
///
/// # Errors
///
/// When cargo fails.
pub(crate) fn build_binaries(
    workspace: &Workspace,
    package: &str,
    names: &[&str],
    profile: Profile,
    linkage: Linkage,
) -> Result<PathBuf> {
    let mut cargo = host_cargo(workspace);
    cargo.args(["build", "--package", package, profile.flag()]);
    for name in names {
        cargo.args(["--bin", name]);
    }
    if names.is_empty() {
        cargo.arg("--bins");
    }
    let directory = match linkage {
        Linkage::Dynamic => workspace.binaries(profile),
        Linkage::Static => {
            // With a target named, the flags do not reach build scripts and procedural macros.
            cargo.args(["--target", &host_target()]);
            let flags = ["-Ctarget-feature=+crt-static", "-Cstrip=debuginfo"];
            cargo.env("CARGO_ENCODED_RUSTFLAGS", flags.join(SEPARATOR));
            workspace.static_binaries(profile)
        }
    };
    let linked = if linkage == Linkage::Static { ", static" } else { "" };
    process::step(&format!("building {package}{linked}"), || process::run(&mut cargo))?;
    Ok(directory)
}

/// Builds the object and the agent, and returns the agent's path.
///
/// # Errors
///
/// Those of the parts.
pub(crate) fn build_agent(
    workspace: &Workspace,
    compiler: &Compiler,
    profile: Profile,
    linkage: Linkage,
) -> Result<PathBuf> {
    build_object(workspace, compiler)?;
    let directory = build_binaries(workspace, "mesh-agent", &["mesh-agent"], profile, linkage)?;
    Ok(directory.join("mesh-agent"))
}
