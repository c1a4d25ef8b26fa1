//! The kernel's records of connections of every ugly kind against the account of the client that
//! made them. `cargo xtask soak records` does the same with a million.

use anyhow::Result;
use mesh_tests::ugly::exact::{self, Options};

fn options() -> Options {
    Options {
        connects: 20_000,
        seed: None,
        threads: 8,
        bound: 40,
        ejection: false,
        no_multipath: false,
        quiet: true,
    }
}

#[test]
fn every_counter_is_exact() -> Result<()> {
    println!("{}", exact::run(&options())?);
    Ok(())
}

/// Where failures move traffic, the counters are exact all the same.
#[test]
fn with_ejection_too() -> Result<()> {
    let options = Options { connects: 5_000, ejection: true, ..options() };
    println!("{}", exact::run(&options)?);
    Ok(())
}
