//! Building what runs on the host: the agent, its tests, and the programs of the tests.
//!
//! For development there is one build, whatever it is wanted for: with one selection of packages cargo unifies
//! their features in one way, and compiles each dependency once. A selection of one package alone would
//! compile most of them again.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::ebpf::{self, SEPARATOR};
use crate::process;
use crate::toolchain::Compiler;
use crate::workspace::{Profile, Workspace, host_target};

/// The variable that tells the agent's build script which object to embed.
pub(crate) const OBJECT_VARIABLE: &str = "MESH_EBPF_OBJECT";

/// All packages that are built for the host.
pub(crate) const SELECTION: [&str; 3] = ["--workspace", "--exclude", "mesh-ebpf"];

/// The package of the agent, and its program.
const AGENT: &str = "mesh-agent";

/// A test program of the agent: cargo builds the package's program with it.
const AGENT_TEST: &str = "cli";

/// A test program of the tests: likewise.
const TESTS_TEST: &str = "sandbox";

/// The feature by which records have their fields in other places, and what the agent is called then.
const OTHER_LAYOUT: (&str, &str) = ("mesh-agent/other-layout", "mesh-agent-other");

/// The client that the tests also have as a static binary, and nothing else as that.
const STATIC_CLIENT: &str = "mesh-static-client";

/// Cargo, for the host, with an object to embed.
pub(crate) fn cargo(workspace: &Workspace, object: &Path) -> Command {
    let mut cargo = process::cargo();
    cargo.current_dir(&workspace.root).env(OBJECT_VARIABLE, object);
    cargo
}

/// What is built for development.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Parts {
    /// The agent.
    Agent,
    /// The agent, and the programs of the tests.
    Programs,
    /// All of that, and every test.
    Tests,
}

/// Builds the object and, not optimised and linked against the host's libraries, parts of the rest. Returns the
/// directory they are in.
///
/// # Errors
///
/// When something does not build.
pub(crate) fn build(workspace: &Workspace, compiler: &Compiler, parts: Parts) -> Result<PathBuf> {
    let object = ebpf::build_object(workspace, compiler)?;
    let mut cargo = cargo(workspace, &object);
    cargo.args(["test", "--no-run", "--quiet"]).args(SELECTION);
    match parts {
        Parts::Agent => cargo.args(["--test", AGENT_TEST]),
        Parts::Programs => cargo.args(["--test", AGENT_TEST, "--test", TESTS_TEST]),
        Parts::Tests => &mut cargo,
    };
    process::step("building for this machine", || process::run(&mut cargo))?;
    Ok(workspace.binaries(Profile::Dev))
}

/// The end-to-end test programs, by name, built before.
///
/// # Errors
///
/// When one does not build.
pub(crate) fn end_to_end_tests(workspace: &Workspace) -> Result<Vec<(String, PathBuf)>> {
    let mut cargo = cargo(workspace, &workspace.ebpf_object());
    cargo.args(["test", "--no-run", "--quiet", "--message-format=json"]).args(SELECTION);
    let messages = process::output(&mut cargo)?;
    let artifacts = messages.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let tests = artifacts.filter(|artifact| {
        artifact["target"]["kind"][0] == "test"
            && artifact["manifest_path"].as_str()
                == workspace.root.join("tests/Cargo.toml").to_str()
    });
    let named = tests.map(|test| {
        let name = test["target"]["name"].as_str()?.to_owned();
        Some((name, PathBuf::from(test["executable"].as_str()?)))
    });
    named.collect::<Option<_>>().context("cargo does not say where a test is")
}

/// Builds an agent of another map layout, as a later version could have, and puts it beside the others. Before
/// the usual one is built: both have the same name where cargo puts them.
///
/// # Errors
///
/// When something does not build.
pub(crate) fn build_other(workspace: &Workspace, compiler: &Compiler) -> Result<PathBuf> {
    let (feature, name) = OTHER_LAYOUT;
    let object = ebpf::build_other_object(workspace, compiler)?;
    let mut cargo = cargo(workspace, &object);
    cargo.args(["test", "--no-run", "--quiet"]).args(SELECTION);
    cargo.args(["--test", AGENT_TEST, "--features", feature]);
    process::step("building an agent of another map layout", || process::run(&mut cargo))?;
    put_beside(&workspace.binaries(Profile::Dev), name)
}

/// Builds the static client of the tests.
///
/// # Errors
///
/// When it does not build.
pub(crate) fn build_static_client(workspace: &Workspace) -> Result<()> {
    let mut cargo = process::cargo();
    cargo.current_dir(&workspace.root).args(["rustc", "--quiet", "--package", STATIC_CLIENT]);
    cargo.args(["--", "-Ctarget-feature=+crt-static"]);
    process::step("building a static client", || process::run(&mut cargo))
}

/// Builds the agent and the programs of the tests, optimised, for measurements; with an agent of another
/// map layout, if that is asked for. Returns the directory they are in.
///
/// # Errors
///
/// When something does not build.
pub(crate) fn build_optimised(
    workspace: &Workspace,
    compiler: &Compiler,
    other: bool,
) -> Result<PathBuf> {
    let programs = ["--package", AGENT, "--package", "mesh-tests", "--bins"];
    let directory = workspace.binaries(Profile::Release);
    if other {
        let (feature, name) = OTHER_LAYOUT;
        let object = ebpf::build_other_object(workspace, compiler)?;
        let mut cargo = cargo(workspace, &object);
        cargo.args(["build", "--release"]).args(programs).args(["--features", feature]);
        process::step("building an agent of another map layout", || process::run(&mut cargo))?;
        put_beside(&directory, name)?;
    }
    let object = ebpf::build_object(workspace, compiler)?;
    let mut cargo = cargo(workspace, &object);
    cargo.args(["build", "--release"]).args(programs);
    process::step("building, optimised", || process::run(&mut cargo))?;
    Ok(directory)
}

/// Builds the agent as it is released, or for people: all of it in one file, if that is asked for.
///
/// # Errors
///
/// When something does not build.
pub(crate) fn build_agent(
    workspace: &Workspace,
    compiler: &Compiler,
    profile: Profile,
    linkage: Linkage,
) -> Result<PathBuf> {
    if (profile, linkage) == (Profile::Dev, Linkage::Dynamic) {
        return Ok(build(workspace, compiler, Parts::Agent)?.join(AGENT));
    }
    let object = ebpf::build_object(workspace, compiler)?;
    let mut cargo = cargo(workspace, &object);
    cargo.args(["build", "--package", AGENT, "--bin", AGENT, profile.flag()]);
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
    process::step("building the agent", || process::run(&mut cargo))?;
    Ok(directory.join(AGENT))
}

/// How binaries are linked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Linkage {
    /// Against the host's libraries.
    Dynamic,
    /// All in one file, for containers.
    Static,
}

/// Puts the agent that was just built beside itself, by another name.
fn put_beside(directory: &Path, name: &str) -> Result<PathBuf> {
    let path = directory.join(name);
    copy_if_other(&directory.join(AGENT), &path)?;
    Ok(path)
}

/// Copies a file; one that is the same is left alone, so that nothing is built again for it.
pub(crate) fn copy_if_other(from: &Path, to: &Path) -> Result<()> {
    let bytes = fs::read(from)
        .with_context(|| format!("cannot read what was built, {}", from.display()))?;
    if fs::read(to).ok().as_ref() != Some(&bytes) {
        // Not into the file itself, which may be running, or be the same.
        drop(fs::remove_file(to));
        fs::copy(from, to).with_context(|| format!("cannot write {}", to.display()))?;
    }
    Ok(())
}
