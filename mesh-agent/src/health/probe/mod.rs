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

use tokio::net::TcpStream;

use crate::model::{GrpcCheck, HealthCheck, HttpCheck};
use crate::text;
use tls::Connector;

/// Why a check did not pass, for people.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Failure {
    /// The endpoint did not answer as it should.
    Endpoint(String),
    /// The check could not be made: that says nothing about the endpoint.
    Local(String),
}

/// Errors of `connect(2)` and `socket(2)` that this process or this machine has with itself, and not
/// with where it connects to: no file descriptor, no memory.
const LOCAL: [i32; 4] = [libc::EMFILE, libc::ENFILE, libc::ENOBUFS, libc::ENOMEM];

/// A check with all that it needs, made once for all endpoints of a service.
#[derive(Clone, Debug)]
pub enum Probe {
    /// Connects, and closes at once.
    Tcp,
    /// Asks for a page.
    Http(Arc<HttpCheck>, Option<Connector>),
    /// Asks the gRPC health service.
    Grpc(Arc<GrpcCheck>, Option<Connector>),
}

impl Probe {
    /// What the heaviest check counts for.
    pub const HEAVIEST: usize = 16;

    /// For how many it counts among those that run at a time, by the memory that an endpoint can have it
    /// take: 4 KiB each.
    #[must_use]
    pub const fn weight(&self) -> u32 {
        match self {
            Self::Tcp => 1,
            Self::Http(_, None) | Self::Grpc(_, None) => 8,
            Self::Http(_, Some(_)) | Self::Grpc(_, Some(_)) => 16,
        }
    }

    /// For such checks.
    #[must_use]
    pub fn new(check: &HealthCheck) -> Self {
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
        }
    }

    /// Checks an endpoint once.
    ///
    /// # Errors
    ///
    /// Why it did not pass.
    pub async fn run(&self, address: SocketAddr, timeout: Duration) -> Result<(), Failure> {
        let check = async {
            let connection = dial::connect(address).await?;
            match self {
                Self::Tcp => Ok(()),
                // The others' states are large, and most checks have none of them.
                _ => Box::pin(self.ask(connection.stream()?, address)).await,
            }
        };
        match tokio::time::timeout(timeout, check).await {
            Ok(result) => result,
            Err(_) => Err(Failure::Endpoint(format!(
                "no answer within {}",
                humantime::format_duration(timeout)
            ))),
        }
    }

    /// Asks over a connection, and judges the answer.
    async fn ask(&self, stream: TcpStream, address: SocketAddr) -> Result<(), Failure> {
        match self {
            Self::Tcp => Ok(()),
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

// === impl Failure ===

impl Failure {
    /// What a library says of the endpoint.
    fn of(what: &str, error: &(dyn Error + 'static)) -> Self {
        Self::Endpoint(format!("{what}: {}", text::chain(error)))
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        match error.raw_os_error() {
            Some(number) if LOCAL.contains(&number) => Self::Local(error.to_string()),
            _ => Self::Endpoint(error.to_string()),
        }
    }
}

#[cfg(test)]
mod tests;
