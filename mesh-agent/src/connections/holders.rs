//! Which processes hold which sockets, from their descriptors in `/proc`.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::{fs, io};

const PROCESSES: &str = "/proc";

/// A process that holds a socket.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Holder {
    /// Its id.
    pub pid: u32,
    /// Its name, of up to 15 bytes, which it can choose.
    pub command: String,
}

/// Who holds the sockets with these inodes: of several processes, the oldest id. A process that ends
/// meanwhile holds nothing.
///
/// # Errors
///
/// There is no `/proc`.
pub(super) fn find(inodes: &HashSet<u32>) -> io::Result<HashMap<u32, Holder>> {
    let mut found = HashMap::new();
    if inodes.is_empty() {
        return Ok(found);
    }
    let name = |entry: io::Result<fs::DirEntry>| entry.ok()?.file_name().to_str()?.parse().ok();
    let mut pids: Vec<u32> = fs::read_dir(PROCESSES)?.filter_map(name).collect();
    pids.sort_unstable();
    for pid in pids {
        if found.len() == inodes.len() {
            break;
        }
        let directory = Path::new(PROCESSES).join(pid.to_string());
        let mut holder = None;
        for inode in sockets(&directory).filter(|inode| inodes.contains(inode)) {
            let holder = holder.get_or_insert_with(|| Holder { pid, command: command(&directory) });
            found.entry(inode).or_insert_with(|| holder.clone());
        }
    }
    Ok(found)
}

/// The inodes of the sockets that a process has descriptors for.
fn sockets(process: &Path) -> impl Iterator<Item = u32> {
    let inode = |target: PathBuf| {
        target.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
    };
    let links = fs::read_dir(process.join("fd")).into_iter().flatten().flatten();
    links.filter_map(move |entry| fs::read_link(entry.path()).ok().and_then(inode))
}

fn command(process: &Path) -> String {
    let name = fs::read(process.join("comm")).unwrap_or_default();
    String::from_utf8_lossy(&name).trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;
    use std::os::fd::AsFd as _;

    use super::*;

    #[test]
    fn a_socket_of_this_process_is_found() {
        let socket = UdpSocket::bind("127.0.0.1:0").expect("a socket");
        let inode = rustix::fs::fstat(socket.as_fd()).expect("its inode").st_ino;
        let inode = u32::try_from(inode).expect("small");
        let found = find(&HashSet::from([inode, u32::MAX])).expect("procfs");
        assert_eq!(found.len(), 1);
        assert_eq!(found[&inode].pid, std::process::id());
        assert!(!found[&inode].command.is_empty());
        assert!(find(&HashSet::new()).expect("nothing to look for").is_empty());
    }
}
