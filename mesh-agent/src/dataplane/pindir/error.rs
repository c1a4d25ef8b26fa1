//! What can be wrong with a directory of pins.

use std::io;
use std::path::PathBuf;

use mesh_common::ABI_VERSION;

use super::STANDARD;

/// Why nothing can be pinned. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum PinError {
    /// It is on no BPF file system.
    #[error(
        "pin-dir {} is on {kind} and not on a BPF file system, so nothing can be pinned there; name one \
         below {STANDARD}, or mount one there: `mount -t bpf bpf DIRECTORY`",
        path.display()
    )]
    Elsewhere {
        /// The directory.
        path: PathBuf,
        /// What it is on.
        kind: String,
    },
    /// Somebody else could replace what is in it.
    #[error(
        "{} belongs to user {owner} with mode {mode:o}, so others could replace what is pinned there; name \
         another pin-dir, or `chown root {} && chmod go-w {}`",
        path.display(), path.display(), path.display()
    )]
    Foreign {
        /// The directory.
        path: PathBuf,
        /// Whose it is.
        owner: u32,
        /// Who may do what with it.
        mode: u32,
    },
    /// Pins of a version that this one does not understand.
    #[error(
        "{} holds what another version of the agent has pinned (map layout {version}, this one has \
         {ABI_VERSION}), and {why}: run that version, or remove it with `mesh-agent cleanup`, which ends \
         balancing until this one runs",
        path.display()
    )]
    OtherVersion {
        /// The directory.
        path: PathBuf,
        /// Version of the layout.
        version: u32,
        /// Why it cannot be taken over.
        why: String,
    },
    /// Another agent has it.
    #[error("another agent{} has pin-dir {}: stop it first, or name another", who(*pid), path.display())]
    Taken {
        /// The directory.
        path: PathBuf,
        /// Its process, if it can be seen from here.
        pid: Option<u32>,
    },
    /// A pin is not what its name says.
    #[error(
        "{} is {found} where this agent has {expected}: it is not this project's, or damaged; remove it, \
         or name another pin-dir",
        path.display()
    )]
    Wrong {
        /// The pin.
        path: PathBuf,
        /// What it is.
        found: String,
        /// What it should be.
        expected: String,
    },
    /// The system refuses.
    #[error("{}: {source}; {}", path.display(), advice(source))]
    Io {
        /// What was touched.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// What to do about it.
fn advice(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::ReadOnlyFilesystem => {
            "that file system is read-only: make it writable with `mount -o remount,rw`, or name another pin-dir"
        }
        _ => "run as root, and see `mesh-agent check`",
    }
}

fn who(pid: Option<u32>) -> String {
    pid.map_or_else(String::new, |pid| format!(" (process {pid})"))
}
