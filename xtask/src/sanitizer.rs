//! Builds under the address sanitizer, which sees reads and writes of memory that is not what they are for.
//!
//! Miri would see more (values of no type, aliases, memory that nobody has written), but runs neither system
//! calls nor without its own standard library, which comes with rustup's nightly alone. The sanitizer's
//! runtime comes with every toolchain of this target, and runs what there is: the unit tests of those who
//! have unsafe code, mapped memory of the kernel's included.
//!
//! The fuzzers are built together with these tests, with the same flags: most of what both are made of is the
//! same, and is compiled once.

use std::process::Command;

use anyhow::Result;

use crate::ebpf::SEPARATOR;
use crate::process;
use crate::workspace::{Workspace, host_target};

/// The sanitizer; and what libFuzzer needs to see: which edges are taken, and what is compared. And what both are
/// to find besides: arithmetic that overflows.
const FLAGS: [&str; 9] = [
    "-Zsanitizer=address",
    "--cfg=fuzzing",
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "-Cdebug-assertions",
    "-Coverflow-checks",
];

/// How it is optimised.
pub(crate) const PROFILE: &str = "fuzz";

/// Whose unit tests run under it, and the fuzzers.
const PACKAGES: [&str; 3] = ["mesh-common", "mesh-agent", "mesh-fuzz"];

/// The test program of the fuzzers: cargo builds them with it.
const FUZZERS_TEST: &str = "programs";

/// Cargo, to build or run the tests, with the fuzzers.
fn cargo(workspace: &Workspace) -> Command {
    let mut cargo = process::cargo();
    cargo.current_dir(&workspace.root).args(["test", "--locked", "--quiet", "--profile", PROFILE]);
    // With a target, what runs at build time is not instrumented.
    cargo.args(["--target", &host_target(), "--target-dir"]).arg(workspace.fuzz());
    cargo.env("CARGO_ENCODED_RUSTFLAGS", FLAGS.join(SEPARATOR)).env("RUSTC_BOOTSTRAP", "1");
    cargo.args(PACKAGES.iter().flat_map(|package| ["--package", package]));
    cargo.args(["--lib", "--test", FUZZERS_TEST]);
    cargo
}

/// Builds the tests and the fuzzers.
///
/// # Errors
///
/// When something does not build.
pub(crate) fn build(workspace: &Workspace) -> Result<()> {
    process::step("building under the address sanitizer", || {
        process::run(cargo(workspace).arg("--no-run"))
    })
}

/// Builds and runs the unit tests, and runs each fuzzer once.
///
/// # Errors
///
/// When one fails, or touches what it must not.
pub(crate) fn run(workspace: &Workspace) -> Result<()> {
    build(workspace)?;
    process::step("unit tests under the address sanitizer", || {
        process::run(cargo(workspace).arg("--no-fail-fast"))
    })
}
