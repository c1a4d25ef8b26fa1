//! Machines of their own: each a network namespace, all on one bridge, so that the node's routes
//! stay whatever happens to them.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::AsRawFd as _;

use anyhow::{Context, Result};

use super::scene::{ip, nft};
use crate::Node;
use crate::node::Namespace;

/// From a machine to where connects of the node come from.
const ROUTE_BACK: &str = "route add 10.9.1.0/24 via 10.9.0.254";

/// The bridge, and what is plugged into it.
#[derive(Debug)]
pub struct Lan {
    switch: Namespace,
    machines: BTreeMap<u8, Namespace>,
}

impl Lan {
    /// Plugs in the node, as `eth0`, and `count` machines, which are 10.9.0.n and fd00:9::n, from 1
    /// on. Connects to the n-th leave the node from 10.9.1.n.
    ///
    /// # Errors
    ///
    /// Those of unshare(2) and ip(8).
    pub fn new(node: &Node, count: u8) -> Result<Self> {
        let switch = Namespace::create()?;
        ip(&switch, "link add br0 type bridge")?;
        ip(&switch, "link set br0 up")?;
        let mut lan = Self { switch, machines: BTreeMap::new() };
        lan.plug(&node.namespace(), "node")?;
        ip(&node.namespace(), "address add 10.9.0.254/24 dev eth0")?;
        ip(&node.namespace(), "address add fd00:9::fe/64 dev eth0 nodad")?;
        for n in 1..=count {
            let machine = Namespace::create()?;
            lan.plug(&machine, &format!("port{n}"))?;
            ip(&machine, &format!("address add 10.9.0.{n}/24 dev eth0"))?;
            ip(&machine, &format!("address add fd00:9::{n}/64 dev eth0 nodad"))?;
            ip(&machine, ROUTE_BACK)?;
            node.add_address(IpAddr::V4(Ipv4Addr::new(10, 9, 1, n)))?;
            ip(&node.namespace(), &format!("route add 10.9.0.{n}/32 dev eth0 src 10.9.1.{n}"))?;
            lan.machines.insert(n, machine);
        }
        Ok(lan)
    }

    /// A machine.
    ///
    /// # Errors
    ///
    /// There is none of this number.
    pub fn machine(&self, n: u8) -> Result<Namespace> {
        self.machines.get(&n).cloned().with_context(|| format!("there is no machine {n}"))
    }

    /// Pulls a machine's cable out of the bridge, or puts it back.
    ///
    /// # Errors
    ///
    /// Those of ip(8).
    pub fn pull(&self, n: u8, out: bool) -> Result<()> {
        let state = if out { "nomaster" } else { "master br0" };
        ip(&self.switch, &format!("link set port{n} {state}"))
    }

    /// Takes a machine's own link down, or up again.
    ///
    /// # Errors
    ///
    /// Those of ip(8).
    pub fn unplug(&self, n: u8, down: bool) -> Result<()> {
        let machine = self.machine(n)?;
        if down {
            return ip(&machine, "link set eth0 down");
        }
        ip(&machine, "link set eth0 up")?;
        // It went with the link.
        ip(&machine, ROUTE_BACK)
    }

    /// Deletes a machine. What runs there must have ended.
    pub fn delete(&mut self, n: u8) {
        self.machines.remove(&n);
    }

    fn plug(&self, namespace: &Namespace, port: &str) -> Result<()> {
        let descriptor = namespace.netns().as_raw_fd();
        let path = format!("/proc/{}/fd/{descriptor}", std::process::id());
        ip(&self.switch, &format!("link add {port} type veth peer name eth0 netns {path}"))?;
        ip(&self.switch, &format!("link set {port} master br0 up"))?;
        ip(namespace, "link set lo up")?;
        ip(namespace, "link set eth0 up")
    }
}

/// A namespace of a client's own, with a firewall of its own that rejects `backends`. `number` tells
/// it from others.
///
/// # Errors
///
/// Those of unshare(2), ip(8) and nft(8).
pub fn firewalled(node: &Node, number: u8, backends: &str) -> Result<Namespace> {
    let (own, node) = (Namespace::create()?, node.namespace());
    let path = format!("/proc/{}/fd/{}", std::process::id(), own.netns().as_raw_fd());
    ip(&node, &format!("link add client{number} type veth peer name eth0 netns {path}"))?;
    ip(&node, &format!("address add 10.8.{number}.1/24 dev client{number}"))?;
    ip(&node, &format!("link set client{number} up"))?;
    ip(&own, "link set lo up")?;
    ip(&own, &format!("address add 10.8.{number}.2/24 dev eth0"))?;
    ip(&own, "link set eth0 up")?;
    ip(&own, &format!("route add 10.0.0.0/24 via 10.8.{number}.1"))?;
    nft(
        &own,
        &format!(
            "add table inet t; add chain inet t out {{ type filter hook output priority 0; }}; \
             add rule inet t out ip daddr {backends} tcp dport 8080 reject with tcp reset"
        ),
    )?;
    Ok(own)
}
