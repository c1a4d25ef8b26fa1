//! A slow path: two devices in two network namespaces, and what is sent into one comes out of the other
//! after a while.

use std::fs::File;
use std::io::{Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::node::Namespace;
use crate::sys::tun;
use crate::{Node, process};

/// How long a thread waits for a packet before it looks whether it should end.
const PATIENCE: Timespec = Timespec { tv_sec: 0, tv_nsec: 50_000_000 };

/// The path. Dropped, it ends, and its devices go.
#[derive(Debug)]
pub struct Relay {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
    machine: Namespace,
}

impl Relay {
    /// Between the node, at 10.8.0.1, and a new machine, at 10.8.0.2, with this delay each way.
    ///
    /// # Errors
    ///
    /// Those of making devices.
    pub fn new(node: &Node, delay: Duration) -> Result<Self> {
        let machine = Namespace::create()?;
        let stop = Arc::new(AtomicBool::new(false));
        let mut relay = Self { stop, threads: Vec::new(), machine };
        let mut ends = Vec::new();
        for (namespace, address) in
            [(node.namespace(), "10.8.0.1/24"), (relay.machine.clone(), "10.8.0.2/24")]
        {
            let device = tun::create(namespace.netns(), "slow0").context("/dev/net/tun")?;
            ends.push(device);
            for arguments in [
                &["link", "set", "lo", "up"][..],
                &["address", "add", address, "dev", "slow0"],
                &["link", "set", "slow0", "up"],
            ] {
                let mut ip = namespace.outside("ip");
                ip.args(arguments);
                process::stdout(ip)?;
            }
        }
        let [near, far] = &ends[..] else { unreachable!("two ends") };
        for (from, to) in [(near, far), (far, near)] {
            relay.forward(from.try_clone()?, to.try_clone()?, delay);
        }
        Ok(relay)
    }

    /// The machine at the other end.
    #[must_use]
    pub fn machine(&self) -> Namespace {
        self.machine.clone()
    }

    fn forward(&mut self, mut from: File, mut to: File, delay: Duration) {
        let (packets, late): (_, Receiver<(Instant, Vec<u8>)>) = mpsc::channel();
        let stop = Arc::clone(&self.stop);
        self.threads.push(thread::spawn(move || {
            let mut buffer = [0; 2048];
            while !stop.load(Ordering::Relaxed) {
                let mut poll_fd = [PollFd::new(&from, PollFlags::IN)];
                if !poll(&mut poll_fd, Some(&PATIENCE)).is_ok_and(|ready| ready > 0) {
                    continue;
                }
                let Ok(length) = from.read(&mut buffer) else { break };
                let due = Instant::now() + delay;
                if packets.send((due, buffer[..length].to_vec())).is_err() {
                    break;
                }
            }
        }));
        self.threads.push(thread::spawn(move || {
            for (due, packet) in late {
                thread::sleep(due.saturating_duration_since(Instant::now()));
                // A device that is down loses packets.
                let _ = to.write_all(&packet);
            }
        }));
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}
