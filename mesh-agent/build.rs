//! Puts the eBPF object where the loader embeds it from: `OUT_DIR/mesh-ebpf.o`.
//!
//! `cargo xtask build` compiles the object and names it in `MESH_EBPF_OBJECT`. Without that
//! variable the file is empty, so that plain `cargo check`, `cargo clippy` and rust-analyzer need
//! no eBPF toolchain; an agent built that way refuses to load and says how to build a real one.

use std::path::PathBuf;
use std::process::ExitCode;
use std::{env, fs};

const VARIABLE: &str = "MESH_EBPF_OBJECT";

fn main() -> ExitCode {
    match embed() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("cargo::error={error}");
            ExitCode::FAILURE
        }
    }
}

fn embed() -> Result<(), String> {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed={VARIABLE}");
    let out = env::var_os("OUT_DIR").ok_or("OUT_DIR is not set: this runs under cargo only")?;
    let out = PathBuf::from(out).join("mesh-ebpf.o");
    let object = match env::var_os(VARIABLE).filter(|value| !value.is_empty()) {
        None => Vec::new(),
        Some(path) => {
            let path = PathBuf::from(path);
            println!("cargo::rerun-if-changed={}", path.display());
            fs::read(&path).map_err(|error| {
                format!(
                    "{VARIABLE} names {}, which cannot be read ({error}); \
                     `cargo xtask build` makes the object and sets the variable",
                    path.display()
                )
            })?
        }
    };
    fs::write(&out, object).map_err(|error| format!("cannot write {}: {error}", out.display()))
}
