//! Builds under the address sanitizer, which sees reads and writes of memory that is not what they are for.
//!
//! Miri would see more (values of no type, aliases, memory that nobody has written), but runs neither system
//! calls nor without its own standard library, which comes with rustup's nightly alone. The sanitizer's
//! runtime comes with every toolchain of this target, and runs what there is: the unit tests of those who
//! have unsafe code, mapped memory of the kernel's included.

use std::path::Path;
use std::process::Command;

use anyhow::Result;

use crate::process;
use crate::workspace::{Workspace, host_target};

const FLAG: &str = "-Zsanitizer=address";

/// Whose unit tests run under it.
const PACKAGES: [&str; 2] = ["mesh-common", "mesh-agent"];

/// A cargo that builds under the sanitizer and with more flags, in a directory of its own.
pub(crate) fn cargo(
    workspace: &Workspace,
    subcommand: &str,
    directory: &Path,
    more: &[&str],
) -> Command {
    let mut cargo = process::cargo();
    cargo.current_dir(&workspace.root).arg(subcommand).arg("--locked");
    // With a target, what runs at build time is not instrumented.
    cargo.args(["--target", &host_target(), "--target-dir"]).arg(directory);
    let flags = [&[FLAG], more].concat().join("\x1f");
    cargo.env("CARGO_ENCODED_RUSTFLAGS", flags).env("RUSTC_BOOTSTRAP", "1");
    cargo
}

/// Runs the unit tests.
///
/// # Errors
///
/// When one fails, or touches what it must not.
pub(crate) fn run(workspace: &Workspace) -> Result<()> {
    let mut cargo = cargo(workspace, "test", &workspace.target.join("sanitizer"), &[]);
    cargo.args(["--lib", "--no-fail-fast", "--quiet"]);
    cargo.args(PACKAGES.iter().flat_map(|package| ["--package", package]));
    process::step("unit tests under the address sanitizer", || process::run(&mut cargo))
}
