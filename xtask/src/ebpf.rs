//! Building the kernel programs and the agent that embeds them.

use std::env::consts::ARCH;
use std::fs;
use std::path::{Path, PathBuf};
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
    let (mut cargo, directory) = host_build(workspace, package, profile, linkage);
    for name in names {
        cargo.args(["--bin", name]);
    }
    if names.is_empty() {
        cargo.arg("--bins");
    }
    let linked = if linkage == Linkage::Static { ", static" } else { "" };
    process::step(&format!("building {package}{linked}"), || process::run(&mut cargo))?;
    Ok(directory)
}

/// Cargo, to build binaries of a package for the host, and where it puts them.
fn host_build(
    workspace: &Workspace,
    package: &str,
    profile: Profile,
    linkage: Linkage,
) -> (Command, PathBuf) {
    let mut cargo = host_cargo(workspace);
    cargo.args(["build", "--package", package, profile.flag()]);
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
    (cargo, directory)
}

/// The feature by which records have their fields in other places, and what the agent is called then.
const OTHER_LAYOUT: (&str, &str) = ("other-layout", "mesh-agent-other");

/// Builds an agent of another map layout, as a later version could have, and puts it beside the binaries.
/// Before the usual one is built: both have the same name where cargo puts them.
///
/// # Errors
///
/// When one does not build.
pub(crate) fn build_other(
    workspace: &Workspace,
    compiler: &Compiler,
    profile: Profile,
    linkage: Linkage,
) -> Result<PathBuf> {
    let (feature, name) = OTHER_LAYOUT;
    let object = workspace.ebpf().join(format!("{feature}.o"));
    process::step("building kernel programs of another map layout", || {
        let mut cargo = object_command(workspace, compiler)?;
        cargo.args(["--features", feature]);
        process::run(&mut cargo)?;
        copy_if_other(&built_object(workspace), &object)
    })?;
    let (mut cargo, directory) = host_build(workspace, "mesh-agent", profile, linkage);
    cargo.args(["--bin", "mesh-agent", "--features", feature]).env(OBJECT_VARIABLE, &object);
    process::step("building an agent of another map layout", || process::run(&mut cargo))?;
    let path = directory.join(name);
    copy_if_other(&directory.join("mesh-agent"), &path)?;
    Ok(path)
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

/// Copies a file; one that is the same is left alone, so that nothing is built again for it.
fn copy_if_other(from: &Path, to: &Path) -> Result<()> {
    let bytes = fs::read(from)
        .with_context(|| format!("cannot read what was built, {}", from.display()))?;
    if fs::read(to).ok().as_ref() != Some(&bytes) {
        // Not into the file itself, which may be running, or be the same.
        drop(fs::remove_file(to));
        fs::copy(from, to).with_context(|| format!("cannot write {}", to.display()))?;
    }
    Ok(())
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
