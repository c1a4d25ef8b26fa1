//! Clients for the tests: each prints what came of it as one line of JSON.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::path::PathBuf;
use std::time::Duration;
use std::{fs, io};

use anyhow::{Context as _, Result};
use clap::Parser;
use mesh_tests::client::{self, Way};
use mesh_tests::{datagram, selections, storm};
use rustix::process::{Resource, Rlimit};

/// Connects, asks who answers, and prints what came of it as JSON.
#[derive(Parser)]
enum Client {
    /// One connection.
    Ask {
        /// How to connect.
        #[arg(long, value_enum, default_value = "blocking")]
        way: Way,
        /// Where to.
        address: SocketAddr,
    },
    /// One socket, connected to one place and then to another.
    Reconnect {
        /// Where to first.
        first: SocketAddr,
        /// Where to then.
        second: SocketAddr,
    },
    /// One socket that begins to connect to one place and then to another, and is closed.
    Abandon {
        /// Where to first.
        first: SocketAddr,
        /// Where to then.
        second: SocketAddr,
    },
    /// One connection of a socket that is made at once, of which it tells by a line. It is connected
    /// after a line of input, which may name the `cgroup.procs` of a cgroup to go to before, and
    /// closed when the input ends.
    Later {
        /// Where to.
        address: SocketAddr,
    },
    /// So many connections, made and held until the input ends, of which it tells by a line.
    Hold {
        /// Where to.
        address: SocketAddr,
        /// How many.
        count: usize,
        /// Of datagrams, from this address: its ports last for so many.
        #[arg(long)]
        datagrams_from: Option<IpAddr>,
    },
    /// How often each backend answers, or each error comes.
    Histogram {
        /// How to connect.
        #[arg(long, value_enum, default_value = "blocking")]
        way: Way,
        /// Where to.
        address: SocketAddr,
        /// How often.
        times: u32,
    },
    /// How often each address is chosen for datagram sockets that are connected, or each error comes.
    Select {
        /// Where to.
        address: SocketAddr,
        /// How often.
        times: u32,
    },
    /// The same in a process for each cgroup right below a directory: which address, by the cgroup's id.
    SelectByCgroup {
        /// Where to.
        address: SocketAddr,
        /// The directory.
        directory: PathBuf,
        /// How often each.
        each: u32,
    },
    /// The same in so many processes: how many of them are given each address.
    SelectByProcess {
        /// Where to.
        address: SocketAddr,
        /// How many.
        processes: u32,
        /// How often each.
        each: u32,
    },
    /// A datagram to this backend, and what the socket says then, if anything.
    Provoke {
        /// Where to.
        address: SocketAddr,
        /// Which backend.
        backend: IpAddr,
    },
    /// Datagram sockets in random use, for so many seconds.
    Spray {
        /// Where to.
        #[arg(required = true)]
        addresses: Vec<SocketAddr>,
        /// Threads.
        #[arg(long, default_value_t = 4)]
        threads: u64,
        /// Seconds.
        #[arg(long, default_value_t = 5)]
        seconds: u64,
    },
    /// A datagram socket that does what the lines of its input say.
    Datagrams,
    /// Connects without pause until standard input ends.
    Storm {
        /// Where to.
        address: SocketAddr,
        /// Threads.
        #[arg(long, default_value_t = 2)]
        threads: usize,
        /// The longest time, in seconds.
        #[arg(long, default_value_t = 120)]
        bound: u64,
        /// Where to write when each connect started and who answered it.
        #[arg(long)]
        record: PathBuf,
    },
}

fn main() -> Result<()> {
    let text =
        match Client::parse() {
            Client::Ask { way, address } => serde_json::to_string(&client::ask(way, address)),
            Client::Reconnect { first, second } => {
                serde_json::to_string(&client::reconnect(first, second))
            }
            Client::Abandon { first, second } => {
                serde_json::to_string(&client::abandon(first, second))
            }
            Client::Later { address } => return later(address),
            Client::Hold { address, count, datagrams_from: None } => {
                return hold(count, || TcpStream::connect(address));
            }
            Client::Hold { address, count, datagrams_from: Some(from) } => {
                return hold(count, || {
                    let socket = UdpSocket::bind((from, 0))?;
                    socket.connect(address)?;
                    Ok(socket)
                });
            }
            Client::Spray { addresses, threads, seconds } => serde_json::to_string(
                &datagram::spray(&addresses, threads, Duration::from_secs(seconds))?,
            ),
            Client::Datagrams => return datagram::obey(io::stdin().lock()),
            Client::Histogram { way, address, times } => {
                let mut histogram = BTreeMap::<_, u32>::new();
                for _ in 0..times {
                    let outcome = client::ask(way, address);
                    *histogram.entry(outcome.error.or(outcome.backend)).or_default() += 1;
                }
                let named: BTreeMap<_, _> =
                    histogram.into_iter().map(|(k, v)| (k.unwrap_or_default(), v)).collect();
                serde_json::to_string(&named)
            }
            Client::Select { address, times } => {
                serde_json::to_string(&selections::count(address, times)?)
            }
            Client::SelectByCgroup { address, directory, each } => {
                serde_json::to_string(&selections::by_cgroup(address, &directory, each)?)
            }
            Client::SelectByProcess { address, processes, each } => {
                serde_json::to_string(&selections::by_process(address, processes, each)?)
            }
            Client::Provoke { address, backend } => {
                serde_json::to_string(&selections::provoke(address, backend)?)
            }
            Client::Storm { address, threads, bound, record } => serde_json::to_string(
                &storm::run(address, threads, Duration::from_secs(bound), &record)?,
            ),
        };
    println!("{}", text?);
    Ok(())
}

fn hold<S>(count: usize, connect: impl Fn() -> io::Result<S>) -> Result<()> {
    // Beyond what a process has at first.
    let Rlimit { maximum, .. } = rustix::process::getrlimit(Resource::Nofile);
    let files = count as u64 + 100;
    let limit = Rlimit { current: Some(files), maximum: maximum.map(|most| most.max(files)) };
    rustix::process::setrlimit(Resource::Nofile, limit).context("the limit of open files")?;
    let held: Vec<_> = (0..count).map(|_| connect()).collect::<io::Result<_>>()?;
    println!("held");
    io::copy(&mut io::stdin(), &mut io::sink())?;
    drop(held);
    Ok(())
}

fn later(address: SocketAddr) -> Result<()> {
    println!("made");
    let before = || {
        let mut line = String::new();
        io::stdin().read_line(&mut line)?;
        match line.trim_end() {
            "" => Ok(()),
            // "0" is the writing process.
            procs => fs::write(procs, "0"),
        }
    };
    let mut told = Ok(());
    client::ask_between(address, before, |outcome| {
        told = serde_json::to_string(outcome).map_err(Into::into).and_then(|text| {
            println!("{text}");
            io::copy(&mut io::stdin(), &mut io::sink())?;
            Ok(())
        });
    });
    told
}
