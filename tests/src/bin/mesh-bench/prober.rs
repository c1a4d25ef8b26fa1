//! What notices a change: a process in the balanced cgroup that connects without pause, and accepts
//! in the same thread, so that it knows which backend each connect was given.

use std::io::{BufRead as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use mesh_tests::Node;
use mesh_tests::sys::socket::monotonic_nanos;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::accept;
use serde::{Deserialize, Serialize};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use crate::remote::{DONE, Remote};
use crate::scene::{PORT, TARGET_PORT, address};

/// A change that nobody notices by then did not happen.
const PATIENCE: Duration = Duration::from_secs(120);

/// Between two connects of one that watches: others need the processor too.
pub const PAUSE: Duration = Duration::from_millis(1);

/// Such a process, as its parent has it. Its orders are lines:
///
/// * `until SERVICE BACKEND`: connects to the service until it is given this backend.
/// * `answer COUNT STEP`: connects to each STEP-th of the first COUNT services, until all have
///   answered.
///
/// * `all COUNT`: connects to each of the first COUNT services; answered by [`DONE`].
///
/// * `watch SERVICE`: connects to the service, [`PAUSE`] apart, until the next line, and once more.
///
/// The first two are answered twice: by [`DONE`] after a first connect, which must not find what is
/// waited for, and by [`Seen`]. So is the last one: by [`DONE`] after a first connect, and by a list of [`Given`].
pub struct Prober(Remote);

/// What was waited for has come.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Seen {
    /// When the connect that found it had ended: `CLOCK_MONOTONIC` in nanoseconds.
    pub at: u64,
    /// Connects until then.
    pub connects: u64,
}

/// A connect was given another backend than the one before.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Given {
    /// Which.
    pub backend: IpAddr,
    /// When the connect had ended, as in [`Seen`].
    pub at: u64,
}

/// How long a change took.
#[derive(Clone, Copy, Debug)]
pub struct Took {
    /// The call that made it, which may return before or after it was seen.
    pub call: Duration,
    /// From before that call until it was seen.
    pub seen: Duration,
}

// === impl Prober ===

impl Prober {
    /// Starts one in the node's cgroup.
    ///
    /// # Errors
    ///
    /// It cannot be started.
    pub fn start(node: &Node) -> Result<Self> {
        let mut command = node.command(std::env::current_exe()?);
        command.arg("prober");
        Ok(Self(Remote::start("the prober", command)?))
    }

    /// How long it takes, from before `change`, until a connect to the service is given the backend.
    ///
    /// # Errors
    ///
    /// It was given it before, or never is, or the change fails.
    pub fn until(
        &mut self,
        service: u32,
        backend: &str,
        change: impl FnOnce() -> Result<()>,
    ) -> Result<Took> {
        self.time(&format!("until {service} {backend}"), change)
    }

    /// How long it takes, from before `change`, until each `step`-th of the first so many services
    /// answers.
    ///
    /// # Errors
    ///
    /// One answered before, or never does, or the change fails.
    pub fn answer(
        &mut self,
        services: u32,
        step: u32,
        change: impl FnOnce() -> Result<()>,
    ) -> Result<Took> {
        self.time(&format!("answer {services} {step}"), change)
    }

    /// Has each of the first so many services answer.
    ///
    /// # Errors
    ///
    /// One does not.
    pub fn all(&mut self, services: u32) -> Result<()> {
        self.0.order(&format!("all {services}"))
    }

    /// Begins to look which backends a service leads to.
    ///
    /// # Errors
    ///
    /// A connect fails.
    pub fn watch(&mut self, service: u32) -> Result<()> {
        self.0.order(&format!("watch {service}"))
    }

    /// Ends that, after one more connect, and gives what was seen.
    ///
    /// # Errors
    ///
    /// A connect failed meanwhile.
    pub fn watched(&mut self) -> Result<Vec<Given>> {
        self.0.tell("enough")?;
        self.0.answer()
    }

    fn time(&mut self, order: &str, change: impl FnOnce() -> Result<()>) -> Result<Took> {
        self.0.order(order)?;
        let before = monotonic_nanos();
        change()?;
        let after = monotonic_nanos();
        let seen: Seen = self.0.answer()?;
        ensure!(seen.at > before, "{order} was done before the change");
        let [call, seen] = [after, seen.at].map(|end| Duration::from_nanos(end - before));
        Ok(Took { call, seen })
    }
}

// === functions ===

/// Does what standard input says, until it ends.
///
/// # Errors
///
/// An order that is none, or what is waited for was there before or does not come.
pub fn serve() -> Result<()> {
    let listener = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP))?;
    listener.bind(&SocketAddr::from((Ipv4Addr::UNSPECIFIED, TARGET_PORT)).into())?;
    listener.listen(64)?;
    let mut lines = std::io::stdin().lock().lines();
    while let Some(line) = lines.next() {
        let line = line?;
        let seen = match line.split(' ').collect::<Vec<_>>()[..] {
            ["until", service, backend] => until(&listener, service.parse()?, backend.parse()?)?,
            ["answer", count, step] => answer(&listener, count.parse()?, step.parse()?)?,
            ["all", count] => {
                all(&listener, count.parse()?)?;
                done()?;
                continue;
            }
            ["watch", service] => {
                let given = watch(&listener, service.parse()?)?;
                // What ended it.
                lines.next().transpose()?;
                println!("{}", serde_json::to_string(&given)?);
                continue;
            }
            _ => bail!("{line:?} is no order"),
        };
        println!("{}", serde_json::to_string(&seen)?);
    }
    Ok(())
}

fn until(listener: &Socket, service: u32, wanted: IpAddr) -> Result<Seen> {
    let place = place(service)?;
    // By chance, one in 65,536 is given the backend that is to be waited for.
    let before = (0..3).map(|_| connect(listener, &place)).collect::<Result<Vec<_>>>()?;
    let other = |given: &Result<_, _>| given.is_ok_and(|given| given != wanted);
    ensure!(before.iter().any(other), "before the change: {before:?}");
    done()?;
    let started = monotonic_nanos();
    for connects in 1.. {
        let given = connect(listener, &place)?;
        let at = monotonic_nanos();
        // Whatever changes, no connect fails.
        if given.ok().context("a connect failed during a change")? == wanted {
            return Ok(Seen { at, connects });
        }
        patient(started)?;
    }
    unreachable!("it goes on until it is done or out of patience")
}

fn answer(listener: &Socket, count: u32, step: usize) -> Result<Seen> {
    let mut silent: Vec<_> = (0..count).step_by(step).chain([count - 1]).collect();
    for &service in &silent {
        let before = connect(listener, &place(service)?)?;
        ensure!(before.is_err(), "service {service} answered before it was defined");
    }
    done()?;
    let (started, mut connects) = (monotonic_nanos(), 0);
    // From the last on: they come in about the order of their numbers.
    while let Some(&service) = silent.last() {
        connects += 1;
        if connect(listener, &place(service)?)?.is_ok() {
            silent.pop();
        }
        patient(started)?;
    }
    Ok(Seen { at: monotonic_nanos(), connects })
}

fn all(listener: &Socket, count: u32) -> Result<()> {
    for service in 0..count {
        let given = connect(listener, &place(service)?)?;
        ensure!(given.is_ok(), "service {service} does not answer when those around it do");
    }
    Ok(())
}

fn watch(listener: &Socket, service: u32) -> Result<Vec<Given>> {
    let place = place(service)?;
    let mut given: Vec<Given> = Vec::new();
    let mut connects = || -> Result<()> {
        let backend = connect(listener, &place)?.ok().context("a connect failed")?;
        let at = monotonic_nanos();
        if given.last().is_none_or(|last| last.backend != backend) {
            given.push(Given { backend, at });
        }
        Ok(())
    };
    connects()?;
    done()?;
    let pause = Timespec::try_from(PAUSE)?;
    let input = std::io::stdin();
    // Nothing of the next line has been read yet: it is sent only after the answer.
    while poll(&mut [PollFd::new(&input, PollFlags::IN)], Some(&pause))? == 0 {
        connects()?;
    }
    connects()?;
    Ok(given)
}

fn done() -> Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(&[DONE])?;
    Ok(out.flush()?)
}

fn patient(started: u64) -> Result<()> {
    let waited = Duration::from_nanos(monotonic_nanos() - started);
    ensure!(waited < PATIENCE, "waited {waited:?} in vain");
    Ok(())
}

fn place(service: u32) -> Result<SockAddr> {
    let place: SocketAddr = format!("{}:{PORT}", address(service)).parse()?;
    Ok(place.into())
}

/// Which backend a connect was given, or that it failed: there is no route to what is no service.
fn connect(listener: &Socket, place: &SockAddr) -> Result<Result<IpAddr, std::io::ErrorKind>> {
    let client = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP))?;
    if let Err(error) = client.connect(place) {
        return Ok(Err(error.kind()));
    }
    let server = Socket::from(accept(listener)?);
    let given = server.local_addr()?.as_socket().context("an address")?.ip();
    // The client resets when it closes, and first: no port is left in TIME_WAIT.
    client.set_linger(Some(Duration::ZERO))?;
    drop(client);
    Ok(Ok(given))
}
