//! One health check: what is asked, and what the answer says.
//!
//! Whoever answers may be anybody, and may send anything for as long as it likes: a check reads a bounded
//! part of it, for a bounded time, and leaves nothing behind.

mod dial;
mod grpc;
mod http;
mod http2;
mod tls;

use std::error::Error;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::AsyncReadExt as _;
use tokio::net::TcpStream;

use crate::commands::Commands;
use crate::model::{CommandCheck, GrpcCheck, HealthCheck, HttpCheck, ServiceName};
use crate::patience::Patience;
use crate::text;
use tls::Connector;

/// Why a check did not pass, for people.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Failure {
    /// The endpoint did not answer as it should.
    Endpoint(String),
    /// The check could not be made: that says nothing about the endpoint.
    Local(String),
    /// It failed, for this reason, but this process did not run all the time meanwhile: that may be why.
    Paused(String),
}

/// Errors of `connect(2)` and `socket(2)` that this process or this machine has with itself, and not
/// with where it connects to: no file descriptor, no memory.
const LOCAL: [i32; 4] = [libc::EMFILE, libc::ENFILE, libc::ENOBUFS, libc::ENOMEM];

/// How much is read from an endpoint in all, in bytes: what certificates, heads and the part of a body that
/// is read can have together.
const MOST: u64 = 64 * 1024;

/// So many checks in a row are made again at once that failed while this process did not run all the time. Those
/// that follow are judged: where that is always so, an endpoint that is dead is to be found all the same.
pub(super) const UNJUDGED: u32 = 3;

/// How much is kept of what an endpoint says of itself, in characters.
const WORDS: usize = 200;

/// A check with all that it needs, made once for all endpoints of a service.
#[derive(Clone, Debug)]
pub enum Probe {
    /// Connects, and closes at once.
    Tcp,
    /// Asks for a page.
    Http(Arc<HttpCheck>, Option<Connector>),
    /// Asks the gRPC health service.
    Grpc(Arc<GrpcCheck>, Option<Connector>),
    /// Has a program run for the service of this name.
    Command(Arc<CommandCheck>, ServiceName, Commands),
}

impl Probe {
    /// What the heaviest conversation counts for.
    pub const HEAVIEST: usize = 16;

    /// For how many it counts among the conversations that are held at a time, by the memory that an
    /// endpoint can have it take: 4 KiB each. Nothing, if nothing is said.
    #[must_use]
    pub const fn weight(&self) -> Option<u32> {
        match self {
            Self::Tcp | Self::Command(..) => None,
            Self::Http(_, None) | Self::Grpc(_, None) => Some(8),
            Self::Http(_, Some(_)) | Self::Grpc(_, Some(_)) => Some(16),
        }
    }

    /// Whether it has a program run.
    #[must_use]
    pub const fn is_command(&self) -> bool {
        matches!(self, Self::Command(..))
    }

    /// For such checks of a service; `commands` has them run that are programs.
    #[must_use]
    pub fn new(check: &HealthCheck, service: &ServiceName, commands: &Commands) -> Self {
        match check {
            HealthCheck::Tcp => Self::Tcp,
            HealthCheck::Http(check) => {
                let protocol: &[u8] = if check.http2 { b"h2" } else { b"http/1.1" };
                let tls = check.tls.as_ref();
                let tls = tls.map(|tls| Connector::new(tls, check.host.as_ref(), protocol));
                Self::Http(Arc::clone(check), tls)
            }
            HealthCheck::Grpc(check) => {
                let tls = check.tls.as_ref();
                let tls = tls.map(|tls| Connector::new(tls, check.host.as_ref(), b"h2"));
                Self::Grpc(Arc::clone(check), tls)
            }
            HealthCheck::Command(check) => {
                Self::Command(Arc::clone(check), service.clone(), commands.clone())
            }
        }
    }

    /// Checks an endpoint once. Before anything is said, `turn` is waited for, which does not count as the
    /// endpoint's time.
    ///
    /// # Errors
    ///
    /// Why it did not pass.
    pub async fn run<T>(
        &self,
        address: SocketAddr,
        timeout: Duration,
        turn: impl Future<Output = T>,
    ) -> Result<(), Failure> {
        let slow = || {
            let timeout = humantime::format_duration(timeout);
            Failure::Endpoint(format!("no answer within {timeout}"))
        };
        if let Self::Command(check, service, commands) = self {
            return commands.check(check, service.as_str(), address, timeout).await;
        }
        let mut patience = Patience::new(timeout);
        let connection =
            match patience.wait(dial::connect(address, matches!(self, Self::Tcp))).await {
                Some(Ok(connection)) => connection,
                // Nobody listens, whenever that is heard.
                Some(Err(error)) if error.kind() == io::ErrorKind::ConnectionRefused => {
                    return Err(error.into());
                }
                Some(Err(error)) => return Err(Failure::from(error).unless(&patience)),
                None => return Err(slow().unless(&patience)),
            };
        if matches!(self, Self::Tcp) {
            connection.end(address);
            return Ok(());
        }
        let _turn = turn.await;
        // The states of this are large, and most checks have none of them.
        let asked = Box::pin(self.ask(connection.stream()?, address));
        let answer = patience.wait(asked).await.unwrap_or_else(|| Err(slow()));
        answer.map_err(|failure| failure.unless(&patience))
    }

    /// [`Probe::run`] for who asks once and has no schedule: what could not be judged is asked again, and judged in
    /// the end.
    ///
    /// # Errors
    ///
    /// As [`Probe::run`].
    pub async fn insist(&self, address: SocketAddr, timeout: Duration) -> Result<(), Failure> {
        let mut asked = 0;
        loop {
            let result = self.run(address, timeout, async {}).await;
            asked += 1;
            match result {
                Err(Failure::Paused(_)) if asked <= UNJUDGED => {}
                result => return result.map_err(Failure::judged),
            }
        }
    }

    /// Asks over a connection, and judges the answer. Whatever is sent, so much is read of it.
    async fn ask(&self, stream: TcpStream, address: SocketAddr) -> Result<(), Failure> {
        let (reader, writer) = tokio::io::split(stream);
        let stream = tokio::io::join(reader.take(MOST), writer);
        match self {
            Self::Tcp | Self::Command(..) => Ok(()),
            Self::Http(check, None) => http::ask(check, stream, address).await,
            Self::Http(check, Some(tls)) => {
                http::ask(check, tls.secure(stream, address).await?, address).await
            }
            Self::Grpc(check, None) => grpc::ask(check, stream, address).await,
            Self::Grpc(check, Some(tls)) => {
                grpc::ask(check, tls.secure(stream, address).await?, address).await
            }
        }
    }
}

/// What is kept of what is said.
fn kept(text: &str) -> String {
    let mut kept: String = text.chars().take(WORDS).collect();
    if kept.len() < text.len() {
        kept.push('…');
    }
    kept
}

// === impl Failure ===

impl Failure {
    /// What is said of the endpoint, perhaps by itself.
    pub(crate) fn said(text: &str) -> Self {
        Self::Endpoint(kept(text))
    }

    /// The same, while this process did not run all the time.
    pub(crate) fn paused(text: &str) -> Self {
        Self::Paused(kept(text))
    }

    /// What failed while this process did not run says nothing about the endpoint: it may have hung up on who did not
    /// go on.
    fn unless(self, patience: &Patience) -> Self {
        match self {
            Self::Endpoint(failure) if patience.lost().is_some() => Self::Paused(failure),
            failure => failure,
        }
    }

    /// It has failed as often as is forgiven: what failed is the endpoint's, for all that is known.
    pub(super) fn judged(self) -> Self {
        match self {
            Self::Paused(failure) => Self::Endpoint(format!(
                "{failure}, also when it was checked {UNJUDGED} more times at once, since the agent did not run all the \
                 time: see that the agent has the processor that it needs"
            )),
            failure => failure,
        }
    }

    /// What a library says of it.
    fn of(what: &str, error: &(dyn Error + 'static)) -> Self {
        Self::said(&format!("{what}: {}", text::chain(error)))
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        match error.raw_os_error() {
            Some(number) if LOCAL.contains(&number) => Self::Local(format!(
                "{error}; look at the limits of this process (`ulimit -n`) and of the node"
            )),
            _ => Self::Endpoint(error.to_string()),
        }
    }
}

#[cfg(test)]
mod tests;
