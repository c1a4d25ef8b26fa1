//! The kinds of connections in which other processes have a part.

use std::fs::File;
use std::io::{self, BufRead, BufReader, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};

use super::client::{Worker, raise_limits};
use super::dial::{Link, any_answer};
use super::plan::Target;
use super::server;
use super::tally::Tally;
use crate::process::{self, until};
use crate::sys;

/// No process is waited for longer.
const LIMIT: Duration = Duration::from_secs(20);

/// How long the receiver keeps descriptors.
const KEPT: Timespec = Timespec { tv_sec: 0, tv_nsec: 50_000_000 };

/// Sockets of a process that is killed.
const VICTIM_SOCKETS: u32 = 16;

/// A process that closes the descriptors it is sent.
#[derive(Debug)]
pub struct Receiver(Child);

// === impl Receiver ===

impl Receiver {
    /// Starts it; gives where to send to.
    ///
    /// # Errors
    ///
    /// It has not been built, or cannot be started.
    pub fn start() -> Result<(Self, OwnedFd)> {
        let (ours, its) = pair()?;
        let mut command = Command::new(process::binary("mesh-ugly")?);
        command.arg("receive").stdin(Stdio::from(its));
        Ok((Self(command.spawn().context("cannot start the receiver")?), ours))
    }

    /// Waits for its end, which follows when nobody can send to it any more.
    ///
    /// # Errors
    ///
    /// It does not end, or it failed.
    pub fn finish(mut self) -> Result<()> {
        let ended = until("the end of the receiver", LIMIT, || Ok(self.0.try_wait()?));
        if ended.is_err() {
            self.0.kill()?;
            self.0.wait()?;
        }
        ensure!(ended?.success(), "the receiver failed");
        Ok(())
    }
}

/// What the receiver does: takes descriptors from standard input, keeps some of them for a moment,
/// and closes them.
///
/// # Errors
///
/// Those of recvmsg(2).
pub fn receive() -> Result<()> {
    raise_limits()?;
    let mut random = fastrand::Rng::with_seed(1);
    let mut kept = Vec::new();
    loop {
        // Kept for a moment only: what still connects would time out.
        if !readable(KEPT)? {
            kept.clear();
            continue;
        }
        let mut byte = [0];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut buffers = [IoSliceMut::new(&mut byte)];
        let flags = RecvFlags::CMSG_CLOEXEC;
        if recvmsg(io::stdin(), &mut buffers, &mut control, flags)?.bytes == 0 {
            return Ok(());
        }
        for message in control.drain() {
            if let rustix::net::RecvAncillaryMessage::ScmRights(descriptors) = message {
                kept.extend(descriptors);
            }
        }
        if kept.len() > 8 || random.bool() {
            kept.clear();
        }
    }
}

/// What a process does that is going to be killed: it connects, tells what it has, and waits.
///
/// # Errors
///
/// It could not connect as it must.
pub fn victim(seed: u64, alone: bool, multipath: bool) -> Result<()> {
    if alone {
        // In a namespace of its own it is its own server.
        server::start()?;
    }
    let mut random = fastrand::Rng::with_seed(seed);
    let (mut tally, mut links) = (Tally::default(), Vec::new());
    for _ in 0..VICTIM_SOCKETS {
        let link = Link::draw(&mut random, multipath)?;
        match random.u8(0..4) {
            0 => {
                link.connect_for_long();
                link.start(&mut tally, Target::Hang)?;
            }
            1 => {
                let target = any_answer(&mut random);
                link.reach(&mut tally, target, &mut random)?;
            }
            _ => {
                let target = any_answer(&mut random);
                link.reach(&mut tally, target, &mut random)
                    .with_context(|| format!("{target:?}, {link:?}"))?;
                link.ask(&mut tally, target, b'a')?;
            }
        }
        links.push(link);
    }
    println!("{}", serde_json::to_string(&tally)?);
    // Killed before.
    sleep(LIMIT);
    drop(links);
    Ok(())
}

/// Whether something can be read from standard input within this time.
fn readable(limit: Timespec) -> io::Result<bool> {
    let input = io::stdin();
    let mut entries = [PollFd::new(&input, PollFlags::IN)];
    Ok(poll(&mut entries, Some(&limit))? > 0)
}

fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    // Messages with ends, so that threads can share it.
    let kind = SocketType::SEQPACKET;
    Ok(socketpair(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None)?)
}

fn send(to: impl AsFd, link: &Link) -> io::Result<()> {
    let descriptors = [link.socket.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    control.push(SendAncillaryMessage::ScmRights(&descriptors));
    sendmsg(to, &[IoSlice::new(&[1])], &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// Makes a new network namespace one in which the backends can be.
fn furnish(netns: &Arc<OwnedFd>, links: &Path, firewall: &Path) -> Result<()> {
    let mut ip = Command::new("ip");
    ip.arg("-batch").arg(links);
    let mut nft = Command::new("nft");
    nft.arg("-f").arg(firewall);
    for mut command in [ip, nft] {
        sys::process::confine(&mut command, netns, None);
        process::stdout(command)?;
    }
    Ok(())
}

impl Worker<'_> {
    /// A socket that is connected and was asked or not, or still connects.
    fn any_state(&mut self) -> Result<Link> {
        if self.random.u8(0..3) == 0 {
            let link = self.link()?;
            self.hang(&link)?;
            return Ok(link);
        }
        let (link, target) = self.connected()?;
        if self.random.bool() {
            link.ask(&mut self.tally, target, b'a')?;
        }
        Ok(link)
    }

    pub(super) fn forked(&mut self) -> Result<()> {
        let link = self.any_state()?;
        let lifetime = Duration::from_micros(self.random.u64(0..3_000));
        let first = self.random.bool().then(|| link.socket.as_fd());
        let copy = sys::fork::copy_for(lifetime, first).context("fork")?;
        if self.random.bool() {
            drop(link);
            return copy.wait().context("wait");
        }
        copy.wait().context("wait")
    }

    pub(super) fn passed(&mut self) -> Result<()> {
        let link = self.any_state()?;
        send(&self.shared.receiver, &link).context("send a descriptor")
    }

    pub(super) fn abandoned(&mut self) -> Result<()> {
        let link = self.any_state()?;
        let (one, other) = pair()?;
        send(&one, &link).context("send a descriptor")?;
        drop(link);
        if self.random.bool() {
            drop(one);
        }
        drop(other);
        Ok(())
    }

    pub(super) fn killed(&mut self, alone: bool) -> Result<()> {
        let mut command = Command::new(process::binary("mesh-ugly")?);
        command.args(["victim", "--seed", &self.random.u32(..).to_string()]);
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        if !self.shared.options.no_multipath {
            command.arg("--multipath");
        }
        let netns = if alone {
            command.arg("--alone");
            Arc::new(sys::netns::create().context("a namespace")?)
        } else {
            Arc::new(File::open("/proc/thread-self/ns/net")?.into())
        };
        if alone {
            furnish(&netns, &self.shared.options.links, &self.shared.options.firewall)?;
        }
        sys::process::confine(&mut command, &netns, None);
        let mut child = command.spawn().context("cannot start a victim")?;
        // Its process is what keeps the namespace.
        drop((command, netns));
        let mut line = String::new();
        // It ends by itself when it takes too long, and its output with it.
        let read = child.stdout.take().map(|out| BufReader::new(out).read_line(&mut line));
        sleep(Duration::from_micros(self.random.u64(0..3_000)));
        child.kill()?;
        child.wait()?;
        read.context("no output")??;
        let tally = serde_json::from_str(&line).with_context(|| format!("a victim said {line}"))?;
        self.tally.add(&tally);
        Ok(())
    }
}
