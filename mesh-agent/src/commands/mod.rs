//! Health checks that are programs. They are started by a process of their own, the *runner*, as a user who
//! may do nothing else here, and asked for over a socket. The agent itself is root, and keeps no right to become
//! another user; so a third process, the *keeper*, is started before anything else, and keeps nothing but that
//! right: it starts the runner again when somebody, who may be a command of the same user, has ended it.
//!
//! Whoever writes service files decides what runs on every node that reads them. That is why no command
//! runs unless the agent file names its user.

mod account;
mod children;
mod keeper;
mod runner;
mod wire;

pub use account::Account;
pub use keeper::keep;
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

use anyhow::bail;
use futures_util::{SinkExt as _, StreamExt as _};
use rustix::thread::CapabilitySet;
use tokio::sync::{mpsc, oneshot};
use tokio_util::codec::{FramedRead, FramedWrite, LinesCodec};
use tokio_util::sync::CancellationToken;

use crate::health::probe::Failure;
use crate::model::CommandCheck;
use crate::patience::Patience;
use crate::privileges;
use wire::{Outcome, Reply, Request};

/// The command of this program that is the runner, and, with a user, the keeper.
const COMMAND: &str = "run-commands";

/// How many run at a time; others wait, and their time does not begin. A node that checks thousands of
/// endpoints by starting programs would do nothing else.
pub const MOST: usize = 32;

/// What it takes to become another user, and to end what runs as that.
const RIGHTS: CapabilitySet =
    CapabilitySet::SETUID.union(CapabilitySet::SETGID).union(CapabilitySet::KILL);

/// How much later than a command's own timeout an answer may come.
const LATE: Duration = Duration::from_secs(5);

/// What an answer that makes sense can have, in bytes.
const LONGEST: usize = 16 * 1024;

/// The keeper, as it was started.
#[derive(Debug)]
pub struct Runner {
    child: Child,
    stream: UnixStream,
}

/// Has commands run. Clones are the same one.
#[derive(Clone, Debug)]
pub struct Commands {
    orders: Result<mpsc::Sender<Order>, Arc<str>>,
}

/// A command that is to run.
#[derive(Debug)]
struct Order {
    request: Request,
    answer: oneshot::Sender<Outcome>,
}

impl Runner {
    /// Starts it for a user. To be called while this process may become that user, and before there is
    /// anything that the user must not have.
    ///
    /// # Errors
    ///
    /// `EPERM` when it may not, and what else the kernel says.
    pub fn start(account: &Account) -> io::Result<Self> {
        if !privileges::has(RIGHTS) {
            return Err(io::Error::from_raw_os_error(libc::EPERM));
        }
        let (stream, theirs) = UnixStream::pair()?;
        let mut command = Command::new("/proc/self/exe");
        command.arg0("mesh-agent").arg(COMMAND).env_clear().current_dir("/");
        command.arg(format!("--uid={}", account.uid)).arg(format!("--gid={}", account.gid));
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
            Ok(runner) => (Self { orders: Ok(sender) }, Some(runner)),
            Err(why) => (Self::none(&why), None),
        };
        (commands, async move {
            if let Some(Runner { mut child, stream }) = runner {
                let talk = talk(stream, orders);
                let ended = cancel.run_until_cancelled(talk).await;
                // It ends when it is not listened to any more.
                let status = tokio::task::spawn_blocking(move || child.wait()).await;
                if let Some(Err(error)) = ended {
                    let status = status.ok().and_then(Result::ok);
                    let status = status.map_or(String::new(), |status| format!(" ({status})"));
                    tracing::error!("the process that has commands run has ended{status}: {error}");
                }
            }
            cancel.cancelled().await;
        })
    }

    /// Not at all, for this reason.
    #[must_use]
    pub fn none(why: &str) -> Self {
        Self { orders: Err(why.into()) }
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
            let text = "the process that has commands run has ended; start the agent again";
            Failure::Local(text.to_owned())
        };
        let orders = self.orders.as_ref().map_err(|why| Failure::Local(why.to_string()))?;
        let request = Request::new(check, service, address, timeout);
        let (answer, answered) = oneshot::channel();
        let order = orders.send(Order { request, answer });
        // One that does not listen has stopped.
        let late = || Failure::Local("the process that runs commands does not answer".into());
        let sent = Patience::new(LATE).wait(order).await.ok_or_else(late)?;
        sent.map_err(|_| gone())?;
        match Patience::new(timeout + LATE).wait(answered).await {
            Some(Ok(Outcome::Passed)) => Ok(()),
            Some(Ok(Outcome::Failed(why))) => Err(Failure::said(&wire::words(&why))),
            Some(Ok(Outcome::Unmade(why))) => Err(Failure::Local(wire::words(&why))),
            Some(Ok(Outcome::Paused(why))) => Err(Failure::paused(&wire::words(&why))),
            Some(Err(_)) => Err(gone()),
            None => Err(late()),
        }
    }
}

/// Hands orders to the runner, and its answers to those who wait for them. Gives why that ends.
async fn talk(
    stream: UnixStream,
    mut orders: mpsc::Receiver<Order>,
) -> anyhow::Result<std::convert::Infallible> {
    stream.set_nonblocking(true)?;
    let (reader, writer) = tokio::net::UnixStream::from_std(stream)?.into_split();
    let codec = || LinesCodec::new_with_max_length(LONGEST);
    let (mut replies, mut requests) =
        (FramedRead::new(reader, codec()), FramedWrite::new(writer, LinesCodec::new()));
    let mut waiting = HashMap::new();
    let mut last = 0;
    loop {
        tokio::select! {
            Some(Order { mut request, answer }) = orders.recv() => {
                last += 1;
                request.id = last;
                // What a runner was asked that has ended since is not waited for any more.
                waiting.retain(|_, answer: &mut oneshot::Sender<_>| !answer.is_closed());
                waiting.insert(last, answer);
                requests.send(serde_json::to_string(&request)?).await?;
            }
            reply = replies.next() => {
                let Some(reply) = reply else { bail!("it was told to, or could not go on") };
                let Reply { id, outcome } = serde_json::from_str(&reply?)?;
                if let Some(answer) = waiting.remove(&id) {
                    // The endpoint may have been removed meanwhile.
                    let _ = answer.send(outcome);
                }
            }
        }
    }
}
