//! One health check.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::net::TcpStream;

use crate::model::HealthCheck;

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

/// Checks an endpoint once.
///
/// The check dials the endpoint itself. The kernel programs do not touch that, also when the agent
/// runs inside the balanced cgroup, unless the endpoint is some service's frontend: the catalog warns
/// of those, because clients would not get any further there.
pub async fn probe(
    check: HealthCheck,
    address: SocketAddr,
    timeout: Duration,
) -> Result<(), Failure> {
    let HealthCheck::Tcp = check;
    match tokio::time::timeout(timeout, TcpStream::connect(address)).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(error)) => Err(failure(&error)),
        Err(_) => Err(Failure::Endpoint(format!(
            "no answer within {}",
            humantime::format_duration(timeout)
        ))),
    }
}

fn failure(error: &io::Error) -> Failure {
    match error.raw_os_error() {
        Some(number) if LOCAL.contains(&number) => Failure::Local(error.to_string()),
        _ => Failure::Endpoint(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_says_nothing_about_the_endpoint() {
        let local =
            |number| matches!(failure(&io::Error::from_raw_os_error(number)), Failure::Local(_));
        assert!(local(libc::EMFILE) && local(libc::ENOBUFS));
        // The node's clients cannot get there either.
        assert!(!local(libc::ECONNREFUSED) && !local(libc::ENETUNREACH) && !local(libc::EPERM));
        // No local port is left towards it, or no address of its family is here.
        assert!(!local(libc::EADDRNOTAVAIL));
    }
}
