//! What asks: a process that has so many connections, each with one request under way.

use std::io::BufRead as _;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use super::CLIENT_PROCESSOR;
use super::backend::{CHUNK, REQUEST};
use crate::scene::{BACKENDS, stay_on};

/// The length of an answer to a request, without the byte that says who answers.
const ANSWER: u64 = 1_023;

/// Requests on each connection that are not counted, so that all are open and warm.
const WARM_UP: usize = 20;

/// What the client is started with. Each line of its input is an order, and answered by
/// [`Answered`], as JSON in one line:
///
/// * `kept CONNECTIONS REQUESTS`: opens connections, and then makes so many requests on all of them
///   together.
/// * `short CONNECTIONS`: connect, request, answer, close; so often, one after the other.
/// * `bulk BYTES`: one long answer.
#[derive(clap::Args)]
pub struct Arguments {
    /// Where to connect: to any of these.
    #[arg(required = true)]
    addresses: Vec<SocketAddr>,
}

/// What came of an order.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Answered {
    /// How long all of it took, in nanoseconds.
    pub elapsed: u64,
    /// How long each request took, in nanoseconds.
    pub times: Vec<u32>,
    /// How often each backend answered.
    pub backends: [u64; BACKENDS.len()],
}

// === functions ===

/// Does what standard input says, until it ends.
///
/// # Errors
///
/// An order that is none, or a connection that fails.
pub fn serve(arguments: &Arguments) -> Result<()> {
    stay_on(CLIENT_PROCESSOR)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    let addresses = &arguments.addresses;
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        let answered = match line.split(' ').collect::<Vec<_>>()[..] {
            ["kept", connections, requests] => {
                runtime.block_on(kept(addresses, connections.parse()?, requests.parse()?))?
            }
            ["short", count] => runtime.block_on(short(addresses, count.parse()?))?,
            ["bulk", bytes] => runtime.block_on(bulk(addresses, bytes.parse()?))?,
            _ => bail!("{line:?} is no order"),
        };
        println!("{}", serde_json::to_string(&answered)?);
    }
    Ok(())
}

async fn kept(addresses: &[SocketAddr], connections: usize, requests: usize) -> Result<Answered> {
    let mut streams = Vec::new();
    for _ in 0..connections {
        let mut stream = connect(addresses).await?;
        for _ in 0..WARM_UP {
            ask(&mut stream, ANSWER).await?;
        }
        streams.push(stream);
    }
    let mut tasks = JoinSet::new();
    let started = Instant::now();
    for mut stream in streams {
        tasks.spawn(async move {
            let mut answered = Answered::default();
            for _ in 0..requests / connections {
                answered.add(Instant::now(), ask(&mut stream, ANSWER).await?)?;
            }
            Ok::<_, anyhow::Error>((answered, stream))
        });
    }
    let mut all = Answered::default();
    let done = tasks.join_all().await;
    all.elapsed = nanos(started.elapsed());
    for task in done {
        let (one, stream) = task?;
        all.times.extend(one.times);
        all.backends.iter_mut().zip(one.backends).for_each(|(all, one)| *all += one);
        close(stream)?;
    }
    Ok(all)
}

async fn short(addresses: &[SocketAddr], count: usize) -> Result<Answered> {
    let mut answered = Answered::default();
    let started = Instant::now();
    for _ in 0..count {
        let began = Instant::now();
        let mut stream = connect(addresses).await?;
        let backend = ask(&mut stream, ANSWER).await?;
        close(stream)?;
        answered.add(began, backend)?;
    }
    answered.elapsed = nanos(started.elapsed());
    Ok(answered)
}

async fn bulk(addresses: &[SocketAddr], bytes: u64) -> Result<Answered> {
    let mut answered = Answered::default();
    let mut stream = connect(addresses).await?;
    ask(&mut stream, ANSWER).await?;
    let began = Instant::now();
    answered.add(began, ask(&mut stream, bytes).await?)?;
    answered.elapsed = nanos(began.elapsed());
    close(stream)?;
    Ok(answered)
}

async fn connect(addresses: &[SocketAddr]) -> Result<TcpStream> {
    let address = addresses[fastrand::usize(..addresses.len())];
    let stream = TcpStream::connect(address).await.with_context(|| address.to_string())?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// One request; says which backend answered.
async fn ask(stream: &mut TcpStream, length: u64) -> Result<u8> {
    let mut request = [0; REQUEST];
    request[..8].copy_from_slice(&length.to_le_bytes());
    stream.write_all(&request).await?;
    let mut left = usize::try_from(length)? + 1;
    let mut buffer = vec![0; left.min(CHUNK)];
    let mut backend = None;
    while left > 0 {
        let end = left.min(CHUNK);
        let read = stream.read(&mut buffer[..end]).await?;
        ensure!(read > 0, "a connection was closed in the middle of an answer");
        backend = backend.or(buffer.first().copied());
        left -= read;
    }
    backend.context("an answer has at least a byte")
}

/// By a reset, so that no port is left in TIME_WAIT.
fn close(stream: TcpStream) -> Result<()> {
    socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
    drop(stream);
    Ok(())
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

// === impl Answered ===

impl Answered {
    /// Adds a request that began then, and was answered by this backend now.
    fn add(&mut self, began: Instant, backend: u8) -> Result<()> {
        self.times.push(u32::try_from(began.elapsed().as_nanos()).unwrap_or(u32::MAX));
        let count = self.backends.get_mut(usize::from(backend));
        *count.with_context(|| format!("{backend} answered, which is no backend"))? += 1;
        Ok(())
    }
}
