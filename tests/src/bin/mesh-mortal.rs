//! Servers and clients for the tests of ejection; see `mesh_tests::mortal`.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;
use clap::Parser;
use mesh_tests::mortal::server::Manner;
use mesh_tests::mortal::{Pace, aborts, server, storm};

/// Serves, or connects.
#[derive(Parser)]
enum Mortal {
    /// Answers with its name until standard input ends, where it can be told to `close` and `open`
    /// its port.
    Serve {
        /// How it treats connections.
        #[arg(long, value_enum, default_value = "plain")]
        manner: Manner,
        /// Its name.
        name: String,
        /// Where it listens.
        place: SocketAddr,
    },
    /// Connects until standard input ends, and records each connect.
    Storm {
        /// Where to.
        address: SocketAddr,
        /// Threads.
        #[arg(long, default_value_t = 4)]
        threads: usize,
        /// Between two connects of a thread, in microseconds.
        #[arg(long, default_value_t = 1000)]
        pause: u64,
        /// For how long connections stay open, in milliseconds.
        #[arg(long, default_value_t = 0)]
        hold: u64,
        /// Close connections by a reset.
        #[arg(long)]
        reset: bool,
        /// How many connects each thread makes; 0: no limit.
        #[arg(long, default_value_t = 0)]
        times: u64,
        /// The longest time, in seconds.
        #[arg(long, default_value_t = 60)]
        bound: u64,
        /// Where to write what came of each.
        #[arg(long)]
        record: PathBuf,
    },
    /// Connects, and aborts many of the connects in all sorts of ways; prints how often what came
    /// to which end.
    Aborts {
        /// A service over IPv4.
        four: SocketAddr,
        /// The same over IPv6.
        six: SocketAddr,
        /// A service that no route leads to.
        nowhere: SocketAddr,
        /// A local address.
        local: Ipv4Addr,
        /// How many.
        #[arg(long)]
        connects: u64,
        /// Threads.
        #[arg(long, default_value_t = 4)]
        threads: u64,
        /// What decides about the mixture.
        #[arg(long)]
        seed: u64,
    },
}

fn main() -> Result<()> {
    match Mortal::parse() {
        Mortal::Serve { manner, name, place } => server::run(&name, place, manner),
        Mortal::Storm { address, threads, pause, hold, reset, times, bound, record } => {
            let pace = Pace { threads, pause, hold, reset, times };
            storm::run(address, pace, Duration::from_secs(bound), &record)
        }
        Mortal::Aborts { four, six, nowhere, local, connects, threads, seed } => {
            let targets = aborts::Targets { four, six, nowhere, local };
            let tally = aborts::run(targets, connects, threads, seed);
            println!("{}", serde_json::to_string(&tally)?);
            Ok(())
        }
    }
}
