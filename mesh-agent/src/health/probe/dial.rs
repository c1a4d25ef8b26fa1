//! The connections of checks.

use std::io;
use std::net::SocketAddr;

use tokio::net::{TcpSocket, TcpStream};

/// Connects. The connection is reset when it is dropped: nothing that was sent is waited for then, and it
/// does not stay in TIME_WAIT for a minute, of which 5,000 checks a second would have 300,000.
///
/// The check dials the endpoint itself. The kernel programs do not touch that, also when the agent
/// runs inside the balanced cgroup, unless the endpoint is some service's frontend: the catalog warns
/// of those, because clients would not get any further there.
pub(super) async fn connect(address: SocketAddr) -> io::Result<TcpStream> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    socket.set_zero_linger()?;
    // What is asked is one small write.
    socket.set_nodelay(true)?;
    socket.connect(address).await
}
