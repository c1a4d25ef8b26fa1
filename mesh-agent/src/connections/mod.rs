//! The connections that are open: what the records of sockets say, with what the kernel and `/proc` know
//! of each socket.
//!
//! Nothing of this is kept while nobody asks: the record names the socket by its cookie, the kernel's
//! list of sockets gives the state and the inode for it, and the processes' descriptors tell who holds
//! that inode now, which need not be who connected.

mod holders;

use std::collections::HashSet;
use std::io;

pub use holders::Holder;

use crate::audit::{self, Found, Record};

/// An open connection.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Connection {
    /// Its record.
    pub record: Record,
    /// What its socket does.
    pub state: &'static str,
    /// Who holds it, if it is held.
    pub holder: Option<Holder>,
}

/// What is known of the connections of these records. Takes 10 ms for each network namespace, and more
/// if there are many sockets.
///
/// # Errors
///
/// No thread can be started, or there is no `/proc`.
pub async fn describe(records: Vec<Record>) -> io::Result<Vec<Connection>> {
    let found = audit::find(&records).await?;
    let inodes: HashSet<u32> = found
        .values()
        .flat_map(|found| found.sockets.values())
        .map(|socket| socket.inode)
        .collect();
    let holders = tokio::task::spawn_blocking(move || holders::find(&inodes)).await??;
    let connection = |record: Record| {
        let found = found.get(&record.netns());
        let socket = found.and_then(|found| found.sockets.get(&record.cookie));
        let holder = socket.and_then(|socket| holders.get(&socket.inode));
        let state = match (socket, found) {
            (Some(socket), _) if record.is_datagram() => of_datagrams(socket.state),
            (Some(socket), _) => of_tcp(socket.state),
            // The kernel does not list a socket that has lost its port.
            (None, Some(Found { incomplete, .. })) if incomplete.is_empty() => "closed",
            (None, _) => "unknown",
        };
        Connection { record, state, holder: holder.cloned() }
    };
    Ok(records.into_iter().map(connection).collect())
}

/// The name of a state in `include/net/tcp_states.h`, as ss(8) has it.
const fn of_tcp(state: u8) -> &'static str {
    match state {
        1 => "established",
        2 => "syn-sent",
        3 | 12 => "syn-recv",
        4 => "fin-wait-1",
        5 => "fin-wait-2",
        7 => "closed",
        8 => "close-wait",
        9 => "last-ack",
        11 => "closing",
        _ => "unknown",
    }
}

/// The same for a datagram socket.
const fn of_datagrams(state: u8) -> &'static str {
    match state {
        1 => "connected",
        7 => "unconnected",
        _ => "unknown",
    }
}
