//! Connections of every ugly kind, and the run that compares the client's account of them with the
//! kernel's: `mesh-ugly records`. The other commands are parts of it.

use std::io::Write;
use std::thread::park;

use anyhow::Result;
use clap::Parser;
use mesh_tests::ugly::{client, exact, others, server};

/// Makes connections of every ugly kind.
#[derive(Parser)]
enum Ugly {
    /// Makes a node and the connections, and checks that the records are exact. Needs root.
    Records(exact::Options),
    /// The backends.
    #[command(hide = true)]
    Serve,
    /// The client.
    #[command(hide = true)]
    Client(client::Options),
    /// Closes what it is sent.
    #[command(hide = true)]
    Receive,
    /// Connects, and waits to be killed.
    #[command(hide = true)]
    Victim {
        #[arg(long)]
        seed: u64,
        #[arg(long)]
        alone: bool,
        #[arg(long)]
        multipath: bool,
    },
}

fn main() -> Result<()> {
    match Ugly::parse() {
        Ugly::Records(options) => {
            println!("{}", exact::run(&options)?);
            Ok(())
        }
        Ugly::Serve => {
            client::raise_limits()?;
            server::start()?;
            println!("ready");
            std::io::stdout().flush()?;
            loop {
                park();
            }
        }
        Ugly::Client(options) => client::run(options),
        Ugly::Receive => others::receive(),
        Ugly::Victim { seed, alone, multipath } => others::victim(seed, alone, multipath),
    }
}
