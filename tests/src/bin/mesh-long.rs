//! Connections that are kept and used all the time: whoever serves them echoes what comes with its name
//! before it, and the client says which of them broke, and whether one was ever answered by another.
//!
//! `mesh-long serve NAME ADDRESS:PORT…` and `mesh-long exchange ADDRESS:PORT --tcp N --udp N`, until its
//! standard input ends.

use std::collections::BTreeMap;
use std::io::Read;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use serde::Serialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::task::JoinSet;

/// What is said and echoed.
const WORD: usize = 8;

/// A name is filled up to this.
const NAME: usize = 8;

/// Nobody answers: a machine that is busy is slower than anybody's patience for a data path.
const PATIENCE: Duration = Duration::from_secs(20);

#[derive(Parser)]
enum Command {
    /// Echoes.
    Serve {
        /// Its name.
        name: String,
        /// Where it listens.
        #[arg(required = true)]
        addresses: Vec<SocketAddr>,
    },
    /// Keeps connections and uses them.
    Exchange {
        /// With whom.
        address: SocketAddr,
        /// How many connections.
        #[arg(long, default_value_t = 0)]
        tcp: usize,
        /// How many datagram sockets that are connected, and as many that are not.
        #[arg(long, default_value_t = 0)]
        udp: usize,
        /// Milliseconds between two words on each.
        #[arg(long, default_value_t = 20)]
        pause: u64,
    },
}

/// What came of it.
#[derive(Default, Serialize)]
struct Report {
    /// Connections that were made.
    made: usize,
    /// Words that were echoed.
    exchanges: u64,
    /// Those that broke, by why.
    broken: BTreeMap<String, u64>,
    /// By who answered them all the time.
    by_backend: BTreeMap<String, u64>,
}

#[tokio::main]
async fn main() -> Result<()> {
    match Command::parse() {
        Command::Serve { name, addresses } => serve(&name, addresses).await,
        Command::Exchange { address, tcp, udp, pause } => {
            let report = exchange(address, tcp, udp, Duration::from_millis(pause)).await;
            println!("{}", serde_json::to_string(&report)?);
            Ok(())
        }
    }
}

// === server ===

async fn serve(name: &str, addresses: Vec<SocketAddr>) -> Result<()> {
    ensure!(name.len() <= NAME, "a name has at most {NAME} bytes");
    let mut filled = [b' '; NAME];
    filled[..name.len()].copy_from_slice(name.as_bytes());
    let mut tasks = JoinSet::new();
    for address in addresses {
        let failed = || format!("{name} cannot listen on {address}");
        let datagrams = UdpSocket::bind(address).await.with_context(failed)?;
        tasks.spawn(async move {
            let mut word = [0; WORD];
            // What is told of a client that is gone comes as an error.
            loop {
                if let Ok((_, from)) = datagrams.recv_from(&mut word).await {
                    let _ = datagrams.send_to(&[filled, word].concat(), from).await;
                }
            }
        });
        let listener = TcpListener::bind(address).await.with_context(failed)?;
        tasks.spawn(async move {
            loop {
                if let Ok((stream, _)) = listener.accept().await {
                    tokio::spawn(echo(stream, filled));
                }
            }
        });
    }
    while tasks.join_next().await.is_some() {}
    Ok(())
}

async fn echo(mut stream: TcpStream, name: [u8; NAME]) {
    let mut word = [0; WORD];
    while stream.read_exact(&mut word).await.is_ok() {
        if stream.write_all(&[name, word].concat()).await.is_err() {
            return;
        }
    }
}

// === client ===

/// One of the connections.
enum Line {
    Tcp(TcpStream),
    Connected(UdpSocket),
    Sending(UdpSocket, SocketAddr),
}

async fn exchange(address: SocketAddr, tcp: usize, udp: usize, pause: Duration) -> Report {
    let (stop, exchanges) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let mut lines = JoinSet::new();
    for number in 0..tcp + 2 * udp {
        let kind = if number < tcp { 0 } else { 1 + number % 2 };
        let (stop, exchanges) = (Arc::clone(&stop), Arc::clone(&exchanges));
        lines.spawn(async move {
            let mut line = open(kind, address).await.map_err(|error| format!("{error:#}"))?;
            keep(&mut line, &stop, &exchanges, pause).await.map_err(|error| format!("{error:#}"))
        });
    }
    // A thread, so that the end of the runtime does not wait for it.
    let told = Arc::clone(&stop);
    std::thread::spawn(move || {
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        told.store(true, Ordering::Relaxed);
    });
    let mut report = Report { made: lines.len(), ..Report::default() };
    while let Some(ended) = lines.join_next().await {
        let (into, what) = match ended {
            Ok(Ok(name)) => (&mut report.by_backend, name),
            Ok(Err(error)) => (&mut report.broken, error),
            Err(error) => (&mut report.broken, error.to_string()),
        };
        *into.entry(what).or_default() += 1;
    }
    report.exchanges = exchanges.load(Ordering::Relaxed);
    report
}

async fn open(kind: usize, address: SocketAddr) -> Result<Line> {
    let any = if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    Ok(match kind {
        0 => Line::Tcp(TcpStream::connect(address).await.context("connect")?),
        1 => {
            let socket = UdpSocket::bind(any).await?;
            socket.connect(address).await.context("connect")?;
            Line::Connected(socket)
        }
        _ => Line::Sending(UdpSocket::bind(any).await?, address),
    })
}

/// Uses it until it is told to stop. Gives who answered, always the same.
async fn keep(
    line: &mut Line,
    stop: &AtomicBool,
    exchanges: &AtomicU64,
    pause: Duration,
) -> Result<String> {
    let mut who: Option<String> = None;
    let mut count = 0u64;
    while !stop.load(Ordering::Relaxed) || who.is_none() {
        count += 1;
        let answer = tokio::time::timeout(PATIENCE, ask(line, count)).await;
        let name = answer.context("no answer")??;
        let first = who.get_or_insert_with(|| name.clone());
        ensure!(*first == name, "answered by {name} after {first}");
        exchanges.fetch_add(1, Ordering::Relaxed);
        tokio::time::sleep(pause).await;
    }
    Ok(who.unwrap_or_default())
}

async fn ask(line: &mut Line, count: u64) -> Result<String> {
    let word = count.to_be_bytes();
    let mut answer = [0; NAME + WORD];
    match line {
        Line::Tcp(stream) => {
            stream.write_all(&word).await.context("write")?;
            stream.read_exact(&mut answer).await.context("read")?;
        }
        Line::Connected(socket) => {
            socket.send(&word).await.context("send")?;
            socket.recv(&mut answer).await.context("recv")?;
        }
        Line::Sending(socket, address) => {
            socket.send_to(&word, *address).await.context("sendto")?;
            let (_, from) = socket.recv_from(&mut answer).await.context("recvfrom")?;
            ensure!(from == *address, "answered from {from}");
        }
    }
    ensure!(answer[NAME..] == word, "another word was echoed");
    Ok(String::from_utf8_lossy(&answer[..NAME]).trim_end().to_owned())
}
