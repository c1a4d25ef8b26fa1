//! Health checks that are programs. They run in a process of their own, the *runner*, as a user who may
//! do nothing else here: the agent itself is root, starts nobody, and keeps no right to become another
//! user. So the runner is started before anything else, and asked over a socket.
//!
//! Whoever writes service files decides what runs on every node that reads them. That is why no command
//! runs unless the agent file names its user.

mod account;
mod runner;
mod wire;

pub use account::Account;
pub use runner::run;

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use futures_util::{SinkExt as _, StreamExt as _};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio_util::codec::{FramedRead, FramedWrite, LinesCodec};
use tokio_util::sync::CancellationToken;

use crate::health::probe::Failure;
use crate::model::CommandCheck;
use wire::{Outcome, Reply, Request};

/// The command of this program that is the runner.
pub const COMMAND: &str = "run-commands";

/// How many run at a time; others wait, and their time does not begin. A node that checks thousands of
/// endpoints by starting programs would do nothing else.
const MOST: usize = 32;

/// How much later than a command's own timeout an answer may come.
const LATE: Duration = Duration::from_secs(5);

/// What an answer that makes sense can have, in bytes.
const LONGEST: usize = 16 * 1024;

/// The runner, as it was started.
#[derive(Debug)]
pub struct Runner {
    child: Child,
    stream: UnixStream,
}

/// Has commands run. Clones are the same one.
#[derive(Clone, Debug)]
pub struct Commands {
    orders: Result<mpsc::Sender<Order>, Arc<str>>,
    places: Arc<Semaphore>,
}

/// A command that is to run.
#[derive(Debug)]
struct Order {
    request: Request,
    answer: oneshot::Sender<Outcome>,
    /// Given back when it has ended, whether or not anybody still waits for that.
    place: OwnedSemaphorePermit,
}

impl Runner {
    /// Starts it as a user. To be called while this process may become that user, and before there is
    /// anything that the user must not have.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn start(account: &Account) -> io::Result<Self> {
        let (stream, theirs) = UnixStream::pair()?;
        let mut command = Command::new("/proc/self/exe");
        command.arg0("mesh-agent").arg(COMMAND).env_clear().current_dir("/");
        // Without other groups: the standard library sees to that. Ctrl-C is for the agent, with which it ends.
        command.uid(account.uid).gid(account.gid).process_group(0);
        command.stdin(OwnedFd::from(theirs)).stdout(Stdio::null());
        Ok(Self { child: command.spawn()?, stream })
    }
}

impl Commands {
    /// Through a runner, or not at all, for this reason. The future is the talk with it, until `cancel`.
    pub fn new(
        runner: Result<Runner, String>,
        cancel: CancellationToken,
    ) -> (Self, impl Future<Output = ()> + Send) {
        let (sender, orders) = mpsc::channel(MOST);
        let (commands, runner) = match runner {
            Ok(runner) => (Self::through(Ok(sender)), Some(runner)),
            Err(why) => (Self::none(&why), None),
        };
        (commands, async move {
            if let Some(Runner { mut child, stream }) = runner {
                let talk = talk(stream, orders);
                if let Some(ended) = cancel.run_until_cancelled(talk).await {
                    let why = ended.err().map_or(String::new(), |error| format!(": {error}"));
                    tracing::error!("the process that runs commands has ended{why}");
                }
                // It ends when it is not listened to any more.
                let _ = tokio::task::spawn_blocking(move || child.wait()).await;
            }
            cancel.cancelled().await;
        })
    }

    /// Not at all, for this reason.
    #[must_use]
    pub fn none(why: &str) -> Self {
        Self::through(Err(why.into()))
    }

    fn through(orders: Result<mpsc::Sender<Order>, Arc<str>>) -> Self {
        Self { orders, places: Arc::new(Semaphore::new(MOST)) }
    }

    /// Runs a command for an endpoint of a service, and waits for its end.
    ///
    /// # Errors
    ///
    /// Why it did not end well, or could not be run.
    pub async fn check(
        &self,
        check: &CommandCheck,
        service: &str,
        address: SocketAddr,
        timeout: Duration,
    ) -> Result<(), Failure> {
        let gone = || {
            let text = "the process that runs commands has ended; start the agent again";
            Failure::Local(text.to_owned())
        };
        let orders = self.orders.as_ref().map_err(|why| Failure::Local(why.to_string()))?;
        // It is never closed.
        let place = Arc::clone(&self.places).acquire_owned().await.map_err(|_| gone())?;
        let request = Request::new(check, service, address, timeout);
        let (answer, answered) = oneshot::channel();
        orders.send(Order { request, answer, place }).await.map_err(|_| gone())?;
        match tokio::time::timeout(timeout + LATE, answered).await {
            Ok(Ok(Outcome::Passed)) => Ok(()),
            Ok(Ok(Outcome::Failed(why))) => Err(Failure::said(&wire::words(&why))),
            Ok(Ok(Outcome::Unmade(why))) => Err(Failure::Local(wire::words(&why))),
            Ok(Err(_)) => Err(gone()),
            Err(_) => Err(Failure::Local("the process that runs commands does not answer".into())),
        }
    }
}

/// Hands orders to the runner, and its answers to those who wait for them, until it ends.
async fn talk(stream: UnixStream, mut orders: mpsc::Receiver<Order>) -> anyhow::Result<()> {
    stream.set_nonblocking(true)?;
    let (reader, writer) = tokio::net::UnixStream::from_std(stream)?.into_split();
    let codec = || LinesCodec::new_with_max_length(LONGEST);
    let (mut replies, mut requests) =
        (FramedRead::new(reader, codec()), FramedWrite::new(writer, LinesCodec::new()));
    let mut waiting = HashMap::new();
    let mut last = 0;
    loop {
        tokio::select! {
            Some(Order { mut request, answer, place }) = orders.recv() => {
                last += 1;
                request.id = last;
                waiting.insert(last, (answer, place));
                requests.send(serde_json::to_string(&request)?).await?;
            }
            reply = replies.next() => {
                let Some(reply) = reply else { return Ok(()) };
                let Reply { id, outcome } = serde_json::from_str(&reply?)?;
                if let Some((answer, _place)) = waiting.remove(&id) {
                    // The endpoint may have been removed meanwhile.
                    let _ = answer.send(outcome);
                }
            }
        }
    }
}
