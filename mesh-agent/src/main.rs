//! The node agent binary.

use std::process::ExitCode;

fn main() -> ExitCode {
    mesh_agent::cli::main()
}
