//! The process that runs commands: a loop around `fork`, with bounds.
//!
//! A command has an end: at its timeout it is killed with its process group, and what it has left behind,
//! in whatever group or session, comes to this process as its subreaper (prctl(2)), and is killed too. It
//! cannot get more rights than its user has, whatever it executes (`PR_SET_NO_NEW_PRIVS`), and this process
//! sees to it that it has none itself.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{ExitStatus, Stdio};
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use futures_util::{SinkExt as _, StreamExt as _};
use rustix::process::{
    DumpableBehavior, Pid, Resource, Rlimit, Signal, geteuid, getgroups, getpid, getrlimit,
    kill_process, kill_process_group, prlimit, set_child_subreaper, set_dumpable_behavior,
    setrlimit,
};
use rustix::thread::{
    CapabilitySet, CapabilitySets, clear_ambient_capability_set, set_capabilities, set_no_new_privs,
};
use tokio::io::{AsyncRead, AsyncReadExt as _};
use tokio::process::Command;
use tokio::sync::mpsc;
use tokio::task::{JoinSet, LocalSet};
use tokio::time::MissedTickBehavior;
use tokio_util::codec::{FramedRead, FramedWrite, LinesCodec};

use super::children;
use super::wire::{Outcome, Reply, Request};
use crate::dataplane::sys::inherited;
use crate::patience::Patience;

/// Where programs are looked for by those that run.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What a command may take, each process of it.
const LIMITS: [(Resource, u64); 4] = [
    (Resource::Core, 0),
    (Resource::Fsize, 1 << 20),
    // Bytes that it writes to, and not what it only maps.
    (Resource::Data, 256 << 20),
    // Of all processes of its user.
    (Resource::Nproc, 1_024),
];

/// How many files each process of a command may open.
const FILES: u64 = 256;

/// How much is kept of what it says, in bytes.
const KEPT: usize = 1_024;

/// How long the last words may take once it has ended: they are in the pipe already.
const LAST_WORDS: Duration = Duration::from_millis(20);

/// How long one may take to end that was killed: one that waits for a device or a dead file system does not.
const ENDING: Duration = Duration::from_secs(1);

/// How many may be there at a time, with those.
const MOST: usize = 2 * super::MOST;

/// How often what was left behind is looked for while nothing ends.
const LOOK: Duration = Duration::from_secs(1);

/// What makes a command die before the agent, when memory is short.
const OOM: &str = "500";

/// Those that have not ended, by process id.
type Running = Rc<RefCell<BTreeSet<i32>>>;

/// Runs what standard input, a socket, asks for, until that ends.
///
/// # Errors
///
/// When something is missing that it needs, or the socket fails.
pub fn run() -> anyhow::Result<()> {
    // Nobody of the same user looks into this process, or speaks in its place.
    set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    set_no_new_privs(true)?;
    give_up_rights()?;
    set_child_subreaper(Some(getpid()))?;
    inherited::keep()?;
    children::all().context("looking for children (CONFIG_PROC_CHILDREN)")?;
    for (resource, most) in LIMITS {
        limit(None, resource, most)?;
    }
    let socket = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let running = Running::default();
    let result = runtime.block_on(LocalSet::new().run_until(serve(socket, Rc::clone(&running))));
    // Nobody waits for them any more.
    children::kill(children::END, |_| false);
    result.context("the socket of the agent")
}

/// Whoever started this may have left it some, also when it became another user.
fn give_up_rights() -> anyhow::Result<()> {
    clear_ambient_capability_set()?;
    let none = CapabilitySet::empty();
    set_capabilities(None, CapabilitySets { effective: none, permitted: none, inheritable: none })?;
    if geteuid().is_root() || !getgroups()?.is_empty() {
        bail!("commands do not run as root, nor in the groups of others; start the agent as root");
    }
    Ok(())
}

async fn serve(socket: UnixStream, running: Running) -> anyhow::Result<()> {
    socket.set_nonblocking(true)?;
    let (reader, writer) = tokio::net::UnixStream::from_std(socket)?.into_split();
    let mut requests = FramedRead::new(reader, LinesCodec::new());
    let mut replies = FramedWrite::new(writer, LinesCodec::new());
    let (tell, mut told) = mpsc::unbounded_channel();
    let mut commands = JoinSet::new();
    let mut look = tokio::time::interval(LOOK);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            request = requests.next() => {
                let Some(request) = request else { return Ok(()) };
                let request: Request = serde_json::from_str(&request?)?;
                let (tell, running) = (tell.clone(), Rc::clone(&running));
                commands.spawn_local(async move {
                    let id = request.id;
                    let outcome = command(&request, &running).await;
                    sweep(&running);
                    // Nobody listens once this ends.
                    let _ = tell.send(Reply { id, outcome });
                });
            }
            Some(reply) = told.recv() => replies.send(serde_json::to_string(&reply)?).await?,
            Some(_) = commands.join_next() => {}
            _ = look.tick() => sweep(&running),
        }
    }
}

async fn command(request: &Request, running: &Running) -> Outcome {
    let Request { run, service, address, port, timeout, .. } = request;
    let Some((program, arguments)) = run.split_first() else {
        return Outcome::Unmade("no program is named".into());
    };
    let mut command = Command::new(program);
    command.args(arguments).env_clear().env("PATH", PATH).current_dir("/").process_group(0);
    command.env("MESH_SERVICE", service).env("MESH_ADDRESS", address.to_string());
    command.env("MESH_PORT", port.to_string());
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    if running.borrow().len() >= MOST {
        return Outcome::Unmade("too many commands do not end, though they were killed".into());
    }
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(error) => return Outcome::Unmade(format!("{program} cannot be run: {error}")),
    };
    let raw = child.id().and_then(|id| i32::try_from(id).ok());
    let (Some(id), Some(stderr)) = (raw.and_then(Pid::from_raw), child.stderr.take()) else {
        return Outcome::Unmade(format!("{program}: it has no process id"));
    };
    running.borrow_mut().insert(id.as_raw_pid());
    confine(id, *timeout);

    let said = Rc::new(RefCell::new(Vec::new()));
    let listening = tokio::task::spawn_local(listen(stderr, Rc::clone(&said)));
    // A command that was stopped with this process has its time afterwards.
    let mut patience = Patience::new(*timeout);
    let outcome = match patience.wait(child.wait()).await {
        Some(Ok(status)) => {
            // What it has left behind may keep the pipe open.
            let _ = tokio::time::timeout(LAST_WORDS, listening).await;
            match status.success() {
                true => Outcome::Passed,
                false => failed(&patience, with_words(&describe(status), &said.borrow())),
            }
        }
        Some(Err(error)) => Outcome::Unmade(format!("{program}: {error}")),
        None => {
            listening.abort();
            // It has not been waited for, so the number is its own; its group may be another.
            let _ = kill_process_group(id, Signal::KILL);
            let _ = kill_process(id, Signal::KILL);
            if tokio::time::timeout(ENDING, child.wait()).await.is_err() {
                let running = Rc::clone(running);
                tokio::task::spawn_local(async move {
                    let _ = child.wait().await;
                    running.borrow_mut().remove(&id.as_raw_pid());
                });
                return Outcome::Unmade(format!("{program} does not end, though it was killed"));
            }
            let timeout = humantime::format_duration(*timeout);
            failed(&patience, with_words(&format!("no end within {timeout}"), &said.borrow()))
        }
    };
    running.borrow_mut().remove(&id.as_raw_pid());
    outcome
}

/// Bounds that this process does not have itself. They hold a moment after the start: for what runs longer.
fn confine(id: Pid, timeout: Duration) {
    // Whoever has ended already needs none.
    let _ = limit(Some(id), Resource::Cpu, timeout.as_secs() + 1);
    let _ = limit(Some(id), Resource::Nofile, FILES);
    let _ = fs::write(format!("/proc/{}/oom_score_adj", id.as_raw_pid()), OOM);
}

/// Lowers a limit, of this process or another. One that is lower already stays.
fn limit(of: Option<Pid>, resource: Resource, most: u64) -> io::Result<()> {
    // What this process has, those have that it starts.
    let most = getrlimit(resource).maximum.map_or(most, |there| there.min(most));
    let lowered = Rlimit { current: Some(most), maximum: Some(most) };
    match of {
        None => setrlimit(resource, lowered)?,
        Some(_) => drop(prlimit(of, resource, lowered)?),
    }
    Ok(())
}

/// Reads all that it says, so that it does not fail for want of a listener, and keeps the beginning.
async fn listen(mut stderr: impl AsyncRead + Unpin, said: Rc<RefCell<Vec<u8>>>) {
    let mut part = [0; KEPT];
    while let Ok(many @ 1..) = stderr.read(&mut part).await {
        let mut said = said.borrow_mut();
        let room = KEPT - said.len();
        said.extend(part.iter().take(many.min(room)));
    }
}

fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit status {code}"),
        (None, Some(signal)) => format!("killed by signal {signal}"),
        (None, None) => status.to_string(),
    }
}

/// It failed; whether the command is to blame shows how long this process did not run. It may have timeouts of its own.
fn failed(patience: &Patience, why: String) -> Outcome {
    if patience.lost().is_some() { Outcome::Paused(why) } else { Outcome::Failed(why) }
}

fn with_words(how: &str, said: &[u8]) -> String {
    match String::from_utf8_lossy(said).trim() {
        "" => how.to_owned(),
        words => format!("{how}: {words}"),
    }
}

/// Kills what ended commands have left behind, and not what belongs to the group of one that runs.
fn sweep(running: &Running) {
    children::kill(children::MOMENT, |id| running.borrow().contains(&id));
}
