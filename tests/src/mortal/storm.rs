//! Connects without pause, of each of which is known when it started, when it ended, where it went
//! (also when it failed), and what came of it.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, BufWriter, Read, Write};
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use socket2::{Domain, Protocol, Socket, Type};

use super::Pace;
use crate::client::{QUESTION, errno_name};
use crate::sys::socket::{monotonic_nanos, wait_writable};

/// No step of a connection takes longer. Longer than two SYNs wait for an answer.
const LIMIT: Duration = Duration::from_secs(6);

/// A backend that has accepted a connection answers within this.
const ANSWER: Duration = Duration::from_secs(2);

/// However few connections are closed, no more are held at a time.
const HELD: usize = 400;

/// A connect, and what came of it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Trial {
    /// When it started, `CLOCK_MONOTONIC` in nanoseconds.
    pub start: u64,
    /// When the answer was there, or the error.
    pub end: u64,
    /// The address it left from, which tells where it went: the namespace has another one for each
    /// backend. Also known when the connect failed, unless it failed before a route was found.
    pub source: Option<IpAddr>,
    /// Who answered.
    pub backend: Option<String>,
    /// The step that failed, and the error's name.
    pub error: Option<String>,
}

/// Connects until standard input ends, `bound` is over, or all is done. What came of it is written
/// to `record`.
///
/// # Errors
///
/// The record cannot be written. A connect that fails is no error.
pub fn run(address: SocketAddr, pace: Pace, bound: Duration, record: &Path) -> Result<()> {
    let stop = AtomicBool::new(false);
    let deadline = Instant::now() + bound;
    let mut out = BufWriter::new(File::create(record).context("cannot create the record")?);
    // Whether to stop now, or one thread has made all its connects.
    let (sender, ended) = mpsc::channel();
    let told = sender.clone();
    // Only the end counts, not what is read. It may never come, so nobody waits for this thread.
    thread::spawn(move || {
        let _ = io::stdin().read_to_end(&mut Vec::new());
        let _ = told.send(true);
    });
    let stop = &stop;
    thread::scope(|scope| {
        let workers: Vec<_> = (0..pace.threads)
            .map(|_| {
                let sender = sender.clone();
                scope.spawn(move || {
                    let trials = storm(address, pace, deadline, stop);
                    // Whoever listens may have heard of the end already.
                    let _ = sender.send(false);
                    trials
                })
            })
            .collect();
        for _ in 0..pace.threads {
            let left = deadline.saturating_duration_since(Instant::now());
            if ended.recv_timeout(left) != Ok(false) {
                break;
            }
        }
        stop.store(true, Ordering::Relaxed);
        for worker in workers {
            let trials = worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            for trial in trials {
                serde_json::to_writer(&mut out, &trial)?;
                out.write_all(b"\n")?;
            }
        }
        out.flush()?;
        Ok(())
    })
}

fn storm(address: SocketAddr, pace: Pace, deadline: Instant, stop: &AtomicBool) -> Vec<Trial> {
    let mut trials = Vec::new();
    let mut held: VecDeque<(Instant, Socket)> = VecDeque::new();
    // Those who have much time do not all come at once.
    thread::sleep(Duration::from_micros(fastrand::u64(0..=pace.pause)));
    let mut left = if pace.times == 0 { u64::MAX } else { pace.times };
    while left > 0 && !stop.load(Ordering::Relaxed) && Instant::now() < deadline {
        left -= 1;
        let (trial, socket) = attempt(address, pace);
        trials.push(trial);
        if let Some(socket) = socket
            && pace.hold > 0
        {
            held.push_back((Instant::now() + Duration::from_millis(pace.hold), socket));
        }
        while held.front().is_some_and(|(end, _)| *end <= Instant::now()) || held.len() > HELD {
            held.pop_front();
        }
        thread::sleep(Duration::from_micros(pace.pause));
    }
    trials
}

fn attempt(address: SocketAddr, pace: Pace) -> (Trial, Option<Socket>) {
    let start = monotonic_nanos();
    let mut source = None;
    let result = connect(address, pace, &mut source);
    let end = monotonic_nanos();
    match result {
        Ok((backend, socket)) => {
            (Trial { start, end, source, backend: Some(backend), error: None }, Some(socket))
        }
        Err((step, error)) => {
            let error = Some(format!("{step}: {}", errno_name(&error)));
            (Trial { start, end, source, backend: None, error }, None)
        }
    }
}

type Failure = (&'static str, io::Error);

fn connect(
    address: SocketAddr,
    pace: Pace,
    source: &mut Option<IpAddr>,
) -> Result<(String, Socket), Failure> {
    let at = |step| move |error| (step, error);
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))
        .map_err(at("socket"))?;
    socket.set_nonblocking(true).map_err(at("O_NONBLOCK"))?;
    let connected = socket.connect(&address.into());
    // A blocking connect that fails forgets where it went.
    let local = socket.local_addr().ok().and_then(|local| local.as_socket());
    *source = local.map(|local| local.ip()).filter(|ip| !ip.is_unspecified());
    match connected {
        Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => {}
        other => other.map_err(at("connect"))?,
    }
    wait_writable(&socket, LIMIT)
        .map_err(|error| ("connect", io::Error::other(format!("no end ({error})"))))?;
    if let Some(error) = socket.take_error().map_err(at("SO_ERROR"))? {
        return Err(("connect", error));
    }
    socket.set_nonblocking(false).map_err(at("O_NONBLOCK"))?;
    socket.set_read_timeout(Some(ANSWER)).map_err(at("SO_RCVTIMEO"))?;
    let backend = ask(&socket, pace.hold == 0 && !pace.reset)?;
    if pace.reset {
        socket.set_linger(Some(Duration::ZERO)).map_err(at("SO_LINGER"))?;
    }
    Ok((backend, socket))
}

/// Asks who is there; reads the answer, and with `to_end` also the end of the connection.
pub(super) fn ask(mut socket: &Socket, to_end: bool) -> Result<String, Failure> {
    socket.write_all(QUESTION).map_err(|error| ("send", error))?;
    let (mut answer, mut buffer) = (Vec::new(), [0; 64]);
    while to_end || !answer.ends_with(b"\n") {
        match socket.read(&mut buffer).map_err(|error| ("receive", error)) {
            Ok(0) => break,
            Ok(count) => answer.extend_from_slice(&buffer[..count]),
            // It was answered; that it is reset afterwards is another matter.
            Err(_) if answer.ends_with(b"\n") => break,
            Err(error) => return Err(error),
        }
    }
    if answer.is_empty() {
        return Err(("receive", io::ErrorKind::UnexpectedEof.into()));
    }
    Ok(String::from_utf8_lossy(&answer).trim_end().to_owned())
}
