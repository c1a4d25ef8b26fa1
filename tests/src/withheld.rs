//! Events that a kernel withholds from tracing programs.
//!
//! A micro VM may run a kernel that lets no BPF tracing program watch its init process. It does so by
//! not running these programs while one of init's threads is the current task, which is also the
//! case in every softirq that happens to interrupt one: the timers of all sockets that expire there
//! are unseen, without a trace in `recursion_misses`. Event tracing (tracefs) is not affected and
//! agrees to the event: of 88,591 error reports 2 were in init's context, and the programs ran for
//! 88,589. The busier the machine, the more there are.
//!
//! Nor does it run the programs of a cgroup there. That init process looks once a second through the open
//! files of all processes, and a socket that its own process closes in that moment ends in init's context:
//! one in some twenty million short-lived ones, of which `mesh_release` then sees nothing. Who makes that many
//! can tell (`crate::selections`): all those that were left had been held, in a run of init's thread.
//!
//! A test that demands exact figures therefore counts the events in init's context, and allows for
//! each of them one figure that is one off, up to one in a thousand; where there is none, nothing is
//! allowed. On a kernel that withholds nothing they happen too, and excuse as much.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result};
use rustix::fs::{Mode, OFlags, mkdirat, openat};
use rustix::io::Errno;
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsmount, fsopen};

/// What our tracing programs are attached to.
const EVENTS: [&str; 4] = [
    "sock/inet_sk_error_report",
    "tcp/tcp_destroy_sock",
    "tcp/tcp_receive_reset",
    "tcp/tcp_retransmit_skb",
];

/// Removes the buffer `$1` when the test's process ends, however it does. Its standard output is the
/// root of tracefs.
const JANITOR: &str = r#"
trap '' INT TERM HUP
read -r _
exec rmdir "/proc/self/fd/1/$1"
"#;

/// Counts events in the context of init's threads, in a trace buffer of its own. Dropped, it leaves
/// nothing behind.
#[derive(Debug)]
pub struct Withheld {
    /// `None` where the kernel has no event tracing.
    buffer: Option<Buffer>,
}

#[derive(Debug)]
struct Buffer {
    /// tracefs, mounted nowhere.
    root: OwnedFd,
    /// The directory of the buffer in it.
    place: String,
    /// Waits for the end of its input, as that of `crate::cgroup` does.
    janitor: Child,
}

// === impl Withheld ===

impl Withheld {
    /// Begins to count.
    ///
    /// # Errors
    ///
    /// tracefs cannot be used, although the kernel has it.
    pub fn watch() -> Result<Self> {
        let root = match tracefs() {
            Err(Errno::NODEV) => return Ok(Self { buffer: None }),
            other => other.context("tracefs")?,
        };
        let place = format!("instances/mesh-test-{}-{}", std::process::id(), fastrand::u32(..));
        // The janitor first: from here on nothing can be left behind.
        let janitor = Command::new("/bin/sh")
            .args(["-c", JANITOR, "mesh-test-janitor", &place])
            .stdin(Stdio::piped())
            .stdout(root.try_clone()?)
            // It has nothing to complain about but that the buffer was never made.
            .stderr(Stdio::null())
            // Out of the reach of a Ctrl-C at the terminal.
            .process_group(0)
            .spawn()
            .context("cannot start /bin/sh, which cleans up after a test")?;
        let buffer = Buffer { root, place, janitor };
        mkdirat(&buffer.root, &buffer.place, Mode::RWXU).with_context(|| buffer.place.clone())?;
        buffer.add_threads()?;
        for event in EVENTS {
            buffer.write(&format!("events/{event}/enable"), "1")?;
        }
        Ok(Self { buffer: Some(buffer) })
    }

    /// How many figures may be one off because of what was withheld, among so many: never more than
    /// one in a thousand, so that a kernel that withholds nothing, or an init process that is busy
    /// with TCP itself, does not excuse everything.
    ///
    /// # Errors
    ///
    /// As [`Withheld::count`].
    pub fn allowance(&self, of: u64) -> Result<u64> {
        Ok(self.count()?.min(of.div_ceil(1_000)))
    }

    /// How many events there were so far. Threads that init has started since the last call are
    /// watched from now on.
    ///
    /// # Errors
    ///
    /// tracefs cannot be read.
    pub fn count(&self) -> Result<u64> {
        let Some(buffer) = &self.buffer else { return Ok(0) };
        buffer.add_threads()?;
        let text = buffer.read("trace")?;
        let events = text.lines().filter(|line| !line.starts_with('#') && !line.is_empty());
        Ok(u64::try_from(events.count())?)
    }
}

// === impl Buffer ===

impl Buffer {
    /// Watches all threads that init has now.
    fn add_threads(&self) -> Result<()> {
        let known: BTreeSet<_> =
            self.read("set_event_pid")?.lines().map(ToOwned::to_owned).collect();
        for thread in fs::read_dir("/proc/1/task").context("/proc/1/task")? {
            let thread = thread?.file_name().to_string_lossy().into_owned();
            if !known.contains(&thread) {
                self.write("set_event_pid", &thread)?;
            }
        }
        Ok(())
    }

    fn open(&self, name: &str, flags: OFlags) -> Result<File> {
        let path = format!("{}/{name}", self.place);
        let file = openat(&self.root, &path, flags | OFlags::CLOEXEC, Mode::empty());
        Ok(file.with_context(|| format!("tracefs: {path}"))?.into())
    }

    fn write(&self, name: &str, text: &str) -> Result<()> {
        // Added to what the file says, not in place of it.
        let mut file = self.open(name, OFlags::WRONLY | OFlags::APPEND)?;
        file.write_all(text.as_bytes()).with_context(|| format!("tracefs: {text} to {name}"))
    }

    fn read(&self, name: &str) -> Result<String> {
        let mut text = String::new();
        self.open(name, OFlags::RDONLY)?.read_to_string(&mut text)?;
        Ok(text)
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        drop(self.janitor.stdin.take());
        match self.janitor.wait() {
            Ok(status) if status.success() => {}
            outcome => eprintln!("tracefs: {} is left behind (janitor: {outcome:?})", self.place),
        }
    }
}

// === functions ===

/// The trace file system, mounted nowhere.
fn tracefs() -> Result<OwnedFd, Errno> {
    let context = fsopen("tracefs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_create(&context)?;
    fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())
}
