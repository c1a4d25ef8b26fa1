//! Runs `mesh_fuzz::check_adoption`: built by `cargo xtask fuzz`, on whatever data libFuzzer finds; built otherwise,
//! on the files that are named, to look at what it has found.
#![cfg_attr(fuzzing, no_main)]

#[cfg(fuzzing)]
libfuzzer_sys::fuzz_target!(|data: &[u8]| mesh_fuzz::check_adoption(data));

#[cfg(not(fuzzing))]
fn main() -> std::io::Result<()> {
    for file in std::env::args_os().skip(1) {
        mesh_fuzz::check_adoption(&std::fs::read(file)?);
    }
    Ok(())
}
