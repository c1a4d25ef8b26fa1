//! One health check.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::net::TcpStream;

use crate::model::HealthCheck;

/// Checks an endpoint once. An error says, for people, what was seen.
///
/// The check dials the endpoint itself. The kernel programs do not touch that, also when the agent
/// runs inside the balanced cgroup, unless the endpoint is some service's frontend: the catalog warns
/// of those, because clients would not get any further there.
pub async fn probe(
    check: HealthCheck,
    address: SocketAddr,
    timeout: Duration,
) -> Result<(), String> {
    let HealthCheck::Tcp = check;
    match tokio::time::timeout(timeout, TcpStream::connect(address)).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err(format!("no answer within {}", humantime::format_duration(timeout))),
    }
}
