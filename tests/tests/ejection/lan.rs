//! Machines of their own: each a network namespace, all on one bridge, so that the node's routes
//! stay whatever happens to them.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::AsRawFd as _;

use anyhow::{Context, Result};
use mesh_tests::Node;
use mesh_tests::node::Namespace;

use crate::scene::ip;

/// The bridge, and what is plugged into it.
pub struct Lan {
    switch: Namespace,
    machines: BTreeMap<u8, Namespace>,
}

impl Lan {
    /// Plugs in the node, as `eth0`, and `count` machines, which are 10.9.0.n and fd00:9::n, from 1
    /// on. Connects to the n-th leave the node from 10.9.1.n.
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
            ip(&machine, "route add 10.9.1.0/24 via 10.9.0.254")?;
            node.add_address(IpAddr::V4(Ipv4Addr::new(10, 9, 1, n)))?;
            ip(&node.namespace(), &format!("route add 10.9.0.{n}/32 dev eth0 src 10.9.1.{n}"))?;
            lan.machines.insert(n, machine);
        }
        Ok(lan)
    }

    /// A machine.
    pub fn machine(&self, n: u8) -> Result<Namespace> {
        self.machines.get(&n).cloned().with_context(|| format!("there is no machine {n}"))
    }

    /// Pulls a machine's cable out of the bridge, or puts it back.
    pub fn pull(&self, n: u8, out: bool) -> Result<()> {
        let state = if out { "nomaster" } else { "master br0" };
        ip(&self.switch, &format!("link set port{n} {state}"))
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
