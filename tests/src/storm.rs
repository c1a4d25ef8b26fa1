//! A client that reconnects without pause, and remembers when it started each connect.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, Read, Write};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::client::ask_fast;
use crate::sys::socket::monotonic_nanos;

/// What came of a storm.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Report {
    /// Connects tried.
    pub connects: u64,
    /// Those that failed, by the step and the error's name.
    pub failed: BTreeMap<String, u64>,
    /// Those that a backend answered.
    pub by_backend: BTreeMap<String, u64>,
}

/// A connect that was answered.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Connect {
    /// When it started, `CLOCK_MONOTONIC` in nanoseconds.
    pub start: u64,
    /// When the answer was there, the same.
    pub end: u64,
    /// Who answered.
    pub backend: String,
}

/// Connects in `threads` threads until standard input ends or `bound` is over. What was answered is
/// written to `record`, one line for each: start, end and name.
///
/// # Errors
///
/// The record cannot be written. A connect that fails is no error, it is counted.
pub fn run(address: SocketAddr, threads: usize, bound: Duration, record: &Path) -> Result<Report> {
    let stop = AtomicBool::new(false);
    let deadline = Instant::now() + bound;
    let mut report = Report::default();
    let mut out = BufWriter::new(File::create(record).context("cannot create the record")?);
    thread::scope(|scope| {
        let storm = || {
            let mut results = Vec::new();
            while !stop.load(Ordering::Relaxed) && Instant::now() < deadline {
                let start = monotonic_nanos();
                let result = ask_fast(address);
                results.push((start, monotonic_nanos(), result));
            }
            results
        };
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(storm)).collect();
        // Only the end counts, not what is read. At the deadline the input may still be open: the
        // thread that waits for it must not be waited for.
        let (sender, ended) = std::sync::mpsc::channel();
        thread::spawn(move || {
            let _ = std::io::stdin().read_to_end(&mut Vec::new());
            let _ = sender.send(());
        });
        let _ = ended.recv_timeout(bound);
        stop.store(true, Ordering::Relaxed);
        for worker in workers {
            let results = worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            for (start, end, result) in results {
                report.connects += 1;
                match result {
                    Ok(backend) => {
                        writeln!(out, "{start} {end} {backend}")?;
                        *report.by_backend.entry(backend).or_default() += 1;
                    }
                    Err(failure) => *report.failed.entry(failure.to_string()).or_default() += 1,
                }
            }
        }
        out.flush()?;
        Ok(report)
    })
}

/// Reads what a storm has recorded, in the order of the starts.
///
/// # Errors
///
/// It cannot be read, or is not what [`run`] writes.
pub fn read(record: &Path) -> Result<Vec<Connect>> {
    let text = std::fs::read_to_string(record)
        .with_context(|| format!("cannot read {}", record.display()))?;
    let mut connects = Vec::new();
    for line in text.lines() {
        let parts: Vec<_> = line.split(' ').collect();
        let [start, end, backend] = parts[..] else { bail!("not a record: {line}") };
        let backend = backend.to_owned();
        connects.push(Connect { start: start.parse()?, end: end.parse()?, backend });
    }
    connects.sort_by_key(|connect| connect.start);
    Ok(connects)
}
