//! The client: threads that make connections of kinds drawn at random, and its conversation with
//! the test.
//!
//! It writes a line of JSON, its [`Tally`], when the mixture is made; what it holds is open then.
//! It reads lines: `hold` makes it hold connections to the service whose endpoints no longer
//! change, and write its tally again; `close` makes it close all and say so; the end of its input
//! ends it.

use std::io::{self, BufRead, Write};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::dial::Link;
use super::kind::Kind;
use super::others::Receiver;
use super::plan::Target;
use super::tally::Tally;
use crate::sys;

/// Connects of one thread that are left to themselves at a time.
const PENDING: usize = 64;

/// Connections that are held at a time.
const HELD: u64 = 3_000;

/// Connections to the changing service that `hold` asks for.
const HOLD: usize = 60;

/// After how many kinds a thread looks after its pending connects.
const LOOK: u64 = 64;

/// What the client is to do.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// How many connects at least.
    #[arg(long)]
    pub connects: u64,
    /// Threads.
    #[arg(long, default_value_t = 8)]
    pub threads: u64,
    /// What all that is random follows from.
    #[arg(long)]
    pub seed: u64,
    /// The longest time for the mixture, in seconds.
    #[arg(long)]
    pub bound: u64,
    /// Commands for `ip -batch` that make a network namespace.
    #[arg(long)]
    pub links: PathBuf,
    /// Rules for `nft -f` in that namespace.
    #[arg(long)]
    pub firewall: PathBuf,
    /// Only sockets of plain TCP.
    #[arg(long)]
    pub no_multipath: bool,
    /// Say how far it is, on standard error.
    #[arg(long)]
    pub progress: bool,
}

/// What the threads share.
pub(super) struct Shared {
    pub(super) options: Options,
    /// Where descriptors go that another process closes.
    pub(super) receiver: OwnedFd,
    done: AtomicU64,
    held: AtomicU64,
}

/// A connect that is left to itself.
#[derive(Debug)]
pub struct Pending {
    /// Its socket.
    pub link: Link,
    /// What was dialled.
    pub target: Target,
    /// When it must have ended.
    pub until: Instant,
}

/// One thread.
pub struct Worker<'s> {
    pub(super) shared: &'s Shared,
    pub(super) random: fastrand::Rng,
    pub(super) tally: Tally,
    pending: Vec<Pending>,
    held: Vec<Link>,
}

/// Makes the mixture, and does what it is told then.
///
/// # Errors
///
/// Something other than a connection goes wrong. What goes wrong with a connection is in the tally.
pub fn run(options: Options) -> Result<()> {
    raise_limits()?;
    let (receiver, sender) = Receiver::start()?;
    let shared =
        Shared { options, receiver: sender, done: AtomicU64::new(0), held: AtomicU64::new(0) };
    let (mut tally, mut held) = mixture(&shared);
    drop(shared);
    receiver.finish()?;
    say(&tally)?;

    for line in io::stdin().lock().lines() {
        match &*line? {
            "hold" => {
                let mut random = fastrand::Rng::with_seed(0);
                for _ in 0..HOLD {
                    let link = Link::draw_plain(&mut random)?;
                    match hold_changing(&link, &mut tally) {
                        Ok(()) => held.push(link),
                        Err(error) => note(&mut tally, &format!("hold: {error:#}")),
                    }
                }
                say(&tally)?;
            }
            "close" => {
                held.clear();
                say(&"closed")?;
            }
            other => bail!("not a command: {other}"),
        }
    }
    Ok(())
}

/// All threads; gives their tallies added up, and what is held.
fn mixture(shared: &Shared) -> (Tally, Vec<Link>) {
    let deadline = Instant::now() + Duration::from_secs(shared.options.bound);
    thread::scope(|scope| {
        let seeds = (0..shared.options.threads).map(|n| shared.options.seed.wrapping_add(n));
        let workers: Vec<_> = seeds
            .map(|seed| {
                scope.spawn(move || {
                    let mut worker = Worker::new(shared, seed);
                    worker.work(deadline);
                    (worker.tally, worker.held)
                })
            })
            .collect();
        if shared.options.progress {
            scope.spawn(|| progress(shared, deadline));
        }
        let (mut tally, mut held) = (Tally::default(), Vec::new());
        for worker in workers {
            let (more, links) =
                worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            tally.add(&more);
            held.extend(links);
        }
        (tally, held)
    })
}

fn progress(shared: &Shared, deadline: Instant) {
    let (wanted, started) = (shared.options.connects, Instant::now());
    let mut told = started;
    loop {
        thread::sleep(Duration::from_millis(200));
        let done = shared.done.load(Ordering::Relaxed);
        if done >= wanted || Instant::now() >= deadline {
            return;
        }
        if told.elapsed() >= Duration::from_secs(5) {
            told = Instant::now();
            let held = shared.held.load(Ordering::Relaxed);
            let seconds = started.elapsed().as_secs();
            eprintln!("{done} of {wanted} connects after {seconds} s, {held} held");
        }
    }
}

fn hold_changing(link: &Link, tally: &mut Tally) -> Result<()> {
    let dialled = link.form(Target::Changing.dialled(link.six));
    link.socket.connect(&dialled).context("connect")?;
    link.request(b'a').context("send")?;
    let who = link.answer().context("receive")?;
    let account = tally.account(Target::Changing.account(who));
    account.opened += 1;
    account.held += 1;
    Ok(())
}

fn note(tally: &mut Tally, what: &str) {
    *tally.unexpected.entry(what.to_owned()).or_default() += 1;
}

fn say(what: &impl serde::Serialize) -> Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{}", serde_json::to_string(what)?)?;
    Ok(out.flush()?)
}

/// Allows as many descriptors as this process may have.
///
/// # Errors
///
/// Those of setrlimit(2).
pub fn raise_limits() -> Result<()> {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    let current = Some(maximum.map_or(65_536, |maximum| maximum.min(65_536)));
    setrlimit(Resource::Nofile, Rlimit { current, maximum }).context("RLIMIT_NOFILE")
}

// === impl Worker ===

impl<'s> Worker<'s> {
    fn new(shared: &'s Shared, seed: u64) -> Self {
        Self {
            shared,
            random: fastrand::Rng::with_seed(seed),
            tally: Tally::default(),
            pending: Vec::new(),
            held: Vec::new(),
        }
    }

    fn work(&mut self, deadline: Instant) {
        let mut opened = 0;
        for turn in 1.. {
            if self.shared.done.load(Ordering::Relaxed) >= self.shared.options.connects {
                break;
            }
            if Instant::now() >= deadline {
                note(&mut self.tally, "the time was over");
                break;
            }
            let kind = Kind::draw(&mut self.random);
            *self.tally.kinds.entry(format!("{kind:?}")).or_default() += 1;
            if let Err(error) = self.attempt(kind) {
                note(&mut self.tally, &format!("{kind:?}: {error:#}"));
            }
            if turn % LOOK == 0 {
                self.look();
                let now = self.tally.total().opened;
                self.shared.done.fetch_add(now - opened, Ordering::Relaxed);
                opened = now;
            }
        }
        while !self.pending.is_empty() {
            thread::sleep(Duration::from_millis(10));
            self.look();
        }
    }

    /// Notes which pending connects have ended.
    fn look(&mut self) {
        for pending in std::mem::take(&mut self.pending) {
            let result = match sys::socket::hung_up(&pending.link.socket) {
                Ok(true) => self.ended(&pending),
                Ok(false) if Instant::now() < pending.until => {
                    self.pending.push(pending);
                    continue;
                }
                Ok(false) => Err(anyhow!("does not end")),
                Err(error) => Err(error.into()),
            };
            if let Err(error) = result {
                note(&mut self.tally, &format!("pending: {error:#}"));
            }
        }
    }

    /// A socket of any kind.
    pub(super) fn link(&mut self) -> Result<Link> {
        Link::draw(&mut self.random, !self.shared.options.no_multipath)
    }

    /// Whether one more connect can be left to itself.
    pub(super) fn has_room(&self) -> bool {
        self.pending.len() < PENDING
    }

    /// Looks after a connect from time to time.
    pub(super) fn wait_for(&mut self, pending: Pending) {
        self.pending.push(pending);
    }

    /// Whether one more connection may be held.
    pub(super) fn may_hold(&self) -> bool {
        self.shared.held.load(Ordering::Relaxed) < HELD
    }

    /// Holds a connection to the end.
    pub(super) fn hold(&mut self, account: String, link: Link) {
        self.shared.held.fetch_add(1, Ordering::Relaxed);
        self.tally.account(account).held += 1;
        self.held.push(link);
    }
}
