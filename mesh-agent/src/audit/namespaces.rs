//! The network namespaces that can be entered, and what the kernel programs call them.
//!
//! The kernel has no list of its namespaces. Found are the agent's own, those of processes, and
//! those that `ip netns` has given a name. One that nothing but a descriptor, a socket or a single
//! thread of a process holds is not found: the audit says nothing about its sockets.

use std::collections::{HashMap, HashSet};
use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::dataplane::sys::netns;

/// The namespace of the agent, whatever thread asks.
const OWN: &str = "/proc/self/ns/net";

/// Where processes are.
const PROCESSES: &str = "/proc";

/// Where `ip netns` mounts the namespaces that it names.
const NAMED: &str = "/run/netns";

/// A network namespace, which this descriptor keeps alive.
#[derive(Debug)]
pub struct Namespace(File);

impl Namespace {
    /// Moves the calling thread into the namespace, for good.
    ///
    /// To be called on a thread that ends afterwards: never on one of a runtime or a pool, whose
    /// next task would run in the wrong namespace.
    ///
    /// # Errors
    ///
    /// Those of setns(2): `EPERM` without `CAP_SYS_ADMIN`.
    pub fn enter(&self) -> io::Result<()> {
        Ok(move_into_link_name_space(self.0.as_fd(), Some(LinkNameSpaceType::Network))?)
    }
}

/// The namespaces with one of these cookies, as far as they are found. Others are not kept open,
/// so there are never more descriptors than `wanted`, and one.
///
/// To learn its cookie, **the calling thread enters every namespace there is**, for some
/// microseconds each, and stays in the last one: see [`Namespace::enter`].
///
/// # Errors
///
/// The agent's own namespace cannot be opened: there is no `/proc`. Whatever fails for another
/// means that it has ended, or cannot be entered.
pub fn find(wanted: &HashSet<u64>) -> io::Result<HashMap<u64, Namespace>> {
    // All namespaces are files of this one file system, and nothing else is.
    let own = fs::metadata(OWN)?;
    let mut visited = HashSet::new();
    let mut found = HashMap::new();
    for path in places() {
        if found.len() == wanted.len() {
            break;
        }
        let Some(namespace) = open(&path, own.dev(), &mut visited) else { continue };
        if let Ok(cookie) = cookie(&namespace)
            && wanted.contains(&cookie)
        {
            found.insert(cookie, namespace);
        }
    }
    Ok(found)
}

/// The cookie of the namespace that the calling thread is in.
///
/// # Errors
///
/// Those of socket(2), and those of [`netns::cookie`].
pub fn current() -> io::Result<u64> {
    netns::cookie(&UnixDatagram::unbound()?)
}

/// The cookie of the namespace that a file names. A thread of its own enters it.
///
/// # Errors
///
/// It cannot be opened, is no network namespace, or no thread can be started.
pub fn cookie_of(path: &Path) -> io::Result<u64> {
    let namespace = Namespace(File::open(path)?);
    let looks = move || cookie(&namespace);
    let thread = std::thread::Builder::new().name("mesh-namespace".to_owned()).spawn(looks)?;
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

fn cookie(namespace: &Namespace) -> io::Result<u64> {
    namespace.enter()?;
    current()
}

/// Where namespaces may be found. Directories are read while this goes on, so processes may have
/// ended, and others begun.
fn places() -> impl Iterator<Item = PathBuf> {
    let processes = entries(PROCESSES)
        .filter(|name| name.to_str().is_some_and(|name| name.parse::<u32>().is_ok()))
        .map(|name| Path::new(PROCESSES).join(name).join("ns/net"));
    let named = entries(NAMED).map(|name| Path::new(NAMED).join(name));
    std::iter::once(PathBuf::from(OWN)).chain(named).chain(processes)
}

/// The names in a directory; none if there is no such directory.
fn entries(directory: &str) -> impl Iterator<Item = std::ffi::OsString> {
    fs::read_dir(directory).into_iter().flatten().filter_map(|entry| Some(entry.ok()?.file_name()))
}

/// Opens a namespace that was not visited yet.
///
/// A number is used again when a namespace has ended, so a new one can be taken for one that was
/// visited: it is found the next time.
fn open(path: &Path, file_system: u64, visited: &mut HashSet<u64>) -> Option<Namespace> {
    // Looked at before it is opened: most processes share a few namespaces, and a stranger's file
    // in the directory of names could be one that blocks.
    let there = fs::metadata(path).ok()?;
    if there.dev() != file_system || visited.contains(&there.ino()) {
        return None;
    }
    let file = File::open(path).ok()?;
    let opened = file.metadata().ok()?;
    (opened.dev() == file_system && visited.insert(opened.ino())).then(|| Namespace(file))
}
