//! The agent's socket: one agent at a time, and nothing left of the last one.
//!
//! A file lock on `<socket>.lock` decides who is the agent. It ends with the process, however that
//! ends, so a socket file whose lock is free is stale. The lock file holds the process id of its
//! holder, for messages only.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions, Permissions, TryLockError};
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::os::unix::fs::{
    DirBuilderExt as _, FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _,
    PermissionsExt as _,
};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{Mode, OFlags};
use tokio::net::{UnixListener, UnixSocket, UnixStream};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until};

use crate::text;

/// Mode of the socket: its owner and its group may talk to the agent.
const MODE: u32 = 0o660;

/// How many clients may wait to be accepted.
const BACKLOG: u32 = 128;

/// The longest path of a socket, in bytes: `sun_path` less its final zero (`unix(7)`).
const MAX_PATH: usize = 107;

/// How long an agent that is there is given to end. One that was killed has its lock, and its
/// socket, until the kernel is done with it.
const ENDING: Duration = Duration::from_secs(1);

/// How often it is looked whether the socket is there.
const UPKEEP: Duration = Duration::from_secs(1);

/// How often it is looked for meanwhile.
const PAUSE: Duration = Duration::from_millis(20);

/// The right to be the agent at a socket path. Held as long as this lives; dropping it removes the
/// lock file.
#[derive(Debug)]
pub struct Claim {
    socket: PathBuf,
    lock: PathBuf,
    /// The lock is this open file's.
    file: File,
}

/// A socket that listens, and is made again when somebody removes it. Dropping it removes the socket and the
/// lock file.
#[derive(Debug)]
pub struct Listener {
    listener: UnixListener,
    /// Device and inode of the socket.
    at: Option<(u64, u64)>,
    claim: Claim,
    /// When it is looked at next, however many clients come.
    look: Instant,
    /// Why nobody reaches it.
    wrong: watch::Sender<Option<String>>,
}

/// Why the socket cannot be had. Each is for people, and says what to do.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Another agent is there.
    #[error(
        "an agent already answers on {}{}: stop it first, with {} or systemctl stop mesh-agent",
        socket.display(),
        pid.map(|pid| format!(" (pid {pid})")).unwrap_or_default(),
        pid.map_or_else(|| "kill".into(), |pid| format!("kill {pid}"))
    )]
    Taken {
        /// Path of the socket.
        socket: PathBuf,
        /// Its process id, unless it is in another PID namespace.
        pid: Option<u32>,
    },
    /// Something else has this name.
    #[error("{} exists and is not a socket: move it away, or name another with --socket", .0.display())]
    NotASocket(PathBuf),
    /// No socket can have such a path.
    #[error("{0}; name another with --socket")]
    TooLong(TooLong),
    /// The system refuses.
    #[error("{}: {action}: {source}; {}", path.display(), advice(source))]
    Io {
        /// What was to be done.
        action: &'static str,
        /// With which file.
        path: PathBuf,
        /// What the kernel says.
        source: io::Error,
    },
}

/// A path that no socket can have.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error(
    "the path of a socket has at most {MAX_PATH} bytes, and this one has {}: {}",
    .0.as_os_str().len(),
    .0.display()
)]
pub struct TooLong(pub PathBuf);

/// Whether a socket can have this path.
pub(super) fn check_length(path: &Path) -> Result<(), TooLong> {
    if path.as_os_str().len() > MAX_PATH { Err(TooLong(path.to_path_buf())) } else { Ok(()) }
}

/// What to do about a file that cannot be made or used.
fn advice(error: &io::Error) -> &'static str {
    if let Some(advice) = text::open_files(error) {
        return advice;
    }
    if error.raw_os_error() == Some(libc::ELOOP) {
        return "a symbolic link is there: whoever may write the directory could have the agent write elsewhere; \
                remove it, or name another path with --socket";
    }
    match error.kind() {
        io::ErrorKind::PermissionDenied => "run as root, or name another path with --socket",
        io::ErrorKind::NotFound => "nothing can be made there: name another path with --socket",
        io::ErrorKind::AlreadyExists | io::ErrorKind::NotADirectory => {
            "a part of the path is a file and not a directory: name another path with --socket"
        }
        io::ErrorKind::IsADirectory => "move it away, or name another path with --socket",
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            "make room, or name another path with --socket"
        }
        _ => "name another path with --socket",
    }
}

// === impl Claim ===

impl Claim {
    /// Becomes the only agent at `socket`, or learns who is. What a dead agent left is removed;
    /// one that is ending is waited for, up to a second.
    ///
    /// # Errors
    ///
    /// [`SocketError::Taken`] when an agent is there, and whatever keeps the files from being made.
    pub async fn take(socket: &Path) -> Result<Self, SocketError> {
        check_length(socket).map_err(SocketError::TooLong)?;
        let deadline = Instant::now() + ENDING;
        loop {
            match Self::try_take(socket).await {
                Err(SocketError::Taken { .. }) if Instant::now() < deadline => sleep(PAUSE).await,
                result => return result,
            }
        }
    }

    async fn try_take(socket: &Path) -> Result<Self, SocketError> {
        let lock = Self::lock_path(socket);
        let file = lock_file(socket, &lock)?;
        let claim = Self { socket: socket.to_path_buf(), lock, file };
        claim.remove_stale().await?;
        Ok(claim)
    }

    /// Where the lock file of a socket is.
    #[must_use]
    pub fn lock_path(socket: &Path) -> PathBuf {
        let mut name = OsString::from(socket);
        name.push(".lock");
        name.into()
    }

    /// The path of the socket.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Binds the socket and listens.
    ///
    /// # Errors
    ///
    /// What the system says: most often a missing right to write the directory.
    pub fn listen(self) -> Result<Listener, SocketError> {
        let (listener, at) = self.bind()?;
        let (look, wrong) = (Instant::now() + UPKEEP, watch::Sender::new(None));
        Ok(Listener { listener, at, claim: self, look, wrong })
    }

    fn bind(&self) -> Result<(UnixListener, Option<(u64, u64)>), SocketError> {
        let listener = bind(&self.socket).map_err(failed("cannot listen", &self.socket))?;
        Ok((listener, number(&self.socket)))
    }

    /// Whether the lock is that of the file which is there now.
    fn is_held(&self) -> bool {
        let held = self.file.metadata().map(|held| (held.dev(), held.ino()));
        held.is_ok_and(|held| number(&self.lock) == Some(held))
    }

    /// Removes the socket of an agent that is gone.
    async fn remove_stale(&self) -> Result<(), SocketError> {
        let socket = &self.socket;
        match fs::symlink_metadata(socket) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(failed("cannot be looked at", socket)(error)),
            Ok(metadata) if !metadata.file_type().is_socket() => {
                return Err(SocketError::NotASocket(socket.clone()));
            }
            Ok(_) => {}
        }
        // Whoever answers without having the lock is not of this version, but is an agent all the
        // same.
        match UnixStream::connect(socket).await {
            Ok(stream) => Err(SocketError::Taken { socket: socket.clone(), pid: peer(&stream) }),
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                fs::remove_file(socket).map_err(failed("cannot remove the stale socket", socket))
            }
            Err(error) => Err(failed("cannot ask who is there", socket)(error)),
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        // Still under the lock, which ends with the file. That it is already gone is as good; another's stays.
        if self.is_held() {
            let _ = fs::remove_file(&self.lock);
        }
    }
}

// === impl Listener ===

impl Listener {
    /// Why nobody can reach this socket, whenever that is another.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<Option<String>> {
        self.wrong.subscribe()
    }

    /// The next client. Meanwhile the socket is made again if it is removed.
    ///
    /// # Errors
    ///
    /// Those of accept(2).
    pub(super) async fn accept(&mut self) -> io::Result<UnixStream> {
        loop {
            tokio::select! {
                accepted = self.listener.accept() => return accepted.map(|(stream, _)| stream),
                () = sleep_until(self.look) => self.look_after().await,
            }
        }
    }

    async fn look_after(&mut self) {
        self.look = Instant::now() + UPKEEP;
        let wrong = self.restore().await.err().map(|error| {
            format!("commands do not reach this agent by {}: {error}", self.path().display())
        });
        let is_new = |told: &mut Option<String>| {
            let is_new = *told != wrong;
            told.clone_from(&wrong);
            is_new
        };
        if self.wrong.send_if_modified(is_new)
            && let Some(wrong) = &wrong
        {
            tracing::error!("{wrong}");
        }
    }

    /// Makes again what somebody has removed: the lock first, as at the start.
    async fn restore(&mut self) -> Result<(), SocketError> {
        let is_there = self.at.is_some() && number(self.path()) == self.at;
        if is_there && self.claim.is_held() {
            return Ok(());
        }
        if !self.claim.is_held() {
            self.claim.file = lock_file(&self.claim.socket, &self.claim.lock)?;
        }
        if !is_there {
            self.claim.remove_stale().await?;
            (self.listener, self.at) = self.claim.bind()?;
        }
        let socket = self.path().display();
        tracing::warn!(%socket, "the socket, or its lock, was removed by somebody else, and is made again");
        Ok(())
    }

    /// The path of the socket.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.claim.socket()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // Before the claim is dropped, so only somebody without a claim can have made another of this name.
        if number(self.path()) == self.at {
            let _ = fs::remove_file(self.path());
        }
    }
}

/// Device and inode of what is at a path.
fn number(path: &Path) -> Option<(u64, u64)> {
    let found = fs::symlink_metadata(path).ok()?;
    Some((found.dev(), found.ino()))
}

/// The process at the other end, unless it is in another PID namespace.
fn peer(stream: &UnixStream) -> Option<u32> {
    let pid = stream.peer_cred().ok()?.pid()?;
    u32::try_from(pid).ok().filter(|&pid| pid != 0)
}

fn failed<'a>(
    action: &'static str,
    path: &'a Path,
) -> impl Fn(io::Error) -> SocketError + Copy + use<'a> {
    move |source| SocketError::Io { action, path: path.to_path_buf(), source }
}

/// Opens and locks the lock file, and writes this process's id into it.
fn lock_file(socket: &Path, lock: &Path) -> Result<File, SocketError> {
    let fail = failed("cannot lock", lock);
    if let Some(directory) = lock.parent() {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(directory)
            .map_err(failed("cannot make the directory", directory))?;
    }
    loop {
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o644)
            .custom_flags(libc::O_NOFOLLOW)
            .open(lock)
            .map_err(fail)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut text = String::new();
                let pid =
                    file.read_to_string(&mut text).ok().and_then(|_| text.trim().parse().ok());
                return Err(SocketError::Taken { socket: socket.to_path_buf(), pid });
            }
            Err(TryLockError::Error(error)) => return Err(fail(error)),
        }
        // The former holder removes the file before it lets go of the lock: then this is a lock on
        // a file without a name, which keeps nobody out.
        let same = |named: &fs::Metadata, held: &fs::Metadata| {
            (named.dev(), named.ino()) == (held.dev(), held.ino())
        };
        let held = file.metadata().map_err(fail)?;
        if fs::metadata(lock).is_ok_and(|named| same(&named, &held)) {
            file.set_len(0)
                .and_then(|()| writeln!(file, "{}", std::process::id()))
                .map_err(fail)?;
            return Ok(file);
        }
    }
}

fn bind(path: &Path) -> io::Result<UnixListener> {
    let socket = UnixSocket::new_stream()?;
    // The mode that bind gives the file is that of the socket's own inode less the umask
    // (`unix_bind`), so set here it is never wider than it should be, not even for a moment.
    File::from(socket.as_fd().try_clone_to_owned()?)
        .set_permissions(Permissions::from_mode(MODE))?;
    socket.bind(path)?;
    widen(path)?;
    socket.listen(BACKLOG)
}

/// Gives the socket its mode, less no umask. What somebody has put there meanwhile keeps its own.
fn widen(path: &Path) -> io::Result<()> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = File::from(rustix::fs::open(path, flags, Mode::empty())?);
    if !file.metadata()?.file_type().is_socket() {
        return Err(io::Error::other("something else has been put there"));
    }
    // Of a file that is open like this, only its name here can be given a mode.
    let name = format!("/proc/self/fd/{}", file.as_raw_fd());
    fs::set_permissions(name, Permissions::from_mode(MODE))
}
