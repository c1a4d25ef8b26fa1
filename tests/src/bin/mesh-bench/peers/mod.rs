//! What others do for the same purpose: each in a network namespace of its own, with the services
//! and the backends that the agent has.

mod envoy;
mod haproxy;
mod nftables;

use std::net::TcpStream;
use std::process::Command;

use anyhow::{Result, bail};
use mesh_tests::Node;
use mesh_tests::process::{Echo, LIMIT, Process, until};
use mesh_tests::sys::netns;

use crate::scene::{self, PORT, address};

/// Who else brings connections to backends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// The kernel's address translation, with so many services, written as kube-proxy does.
    Nftables(u32),
    /// A proxy, in TCP mode.
    Haproxy,
    /// A proxy, with its TCP filter.
    Envoy,
}

/// One of them, at work. Its first service is at the address of the first service of [`scene`], and
/// leads to the same backends.
///
/// The order of the fields is the order in which they end.
pub struct Peer {
    _proxy: Option<Process>,
    /// Where it is.
    pub node: Node,
}

// === impl Kind ===

impl Kind {
    /// Starts it. Nothing listens on the backends' ports yet.
    ///
    /// # Errors
    ///
    /// It is not installed, or does not start.
    pub fn start(self) -> Result<Peer> {
        let node = scene::node()?;
        let proxy = match self {
            Self::Nftables(services) => {
                nftables::load(&node, services)?;
                None
            }
            Self::Haproxy => Some(proxy(&node, "haproxy", haproxy::command(&node)?)?),
            Self::Envoy => Some(proxy(&node, "envoy", envoy::command(&node)?)?),
        };
        Ok(Peer { _proxy: proxy, node })
    }

    /// Which version is installed.
    ///
    /// # Errors
    ///
    /// It is not.
    pub fn version(self) -> Result<String> {
        match self {
            Self::Nftables(_) => nftables::version(),
            Self::Haproxy => haproxy::version(),
            Self::Envoy => envoy::version(),
        }
    }
}

// === functions ===

/// Starts a proxy, and waits until it accepts connections.
fn proxy(node: &Node, name: &str, command: Command) -> Result<Process> {
    // It connects to a backend for each of its clients: their ports must not run out.
    node.sysctl("net/ipv4/ip_local_port_range", "10000 65000")?;
    node.sysctl("net/ipv4/tcp_tw_reuse", "1")?;
    let mut process = Process::spawn(name, command, Echo::Off)?;
    until(&format!("{name} to accept connections"), LIMIT, || {
        if process.ended()?.is_some() {
            // Then all that it printed is in its log.
            let status = process.wait(LIMIT)?;
            bail!("{name} ended ({status}) instead of serving:\n{}", process.log().tail());
        }
        let place = format!("{}:{PORT}", address(0));
        Ok(netns::inside(node.netns(), || TcpStream::connect(place))?.ok())
    })?;
    Ok(process)
}
