//! The node agent binary.

use std::process::ExitCode;

fn main() -> ExitCode {
    mesh_agent::cli::main(|_config| {
        anyhow::bail!("this build has no data plane: it can only check, ask and clean up")
    })
}
