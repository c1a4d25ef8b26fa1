//! Hearing of changes: inotify(7).

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use futures_util::StreamExt as _;
use futures_util::stream::ReadyChunks;
use inotify::{EventMask, EventOwned, EventStream, Inotify, WatchMask};

use super::directory::{is_born_whole, is_service_file};

/// What was heard. Never that a file is being written: half of it would be read.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Signal {
    /// A service file was closed by its writer, renamed into place or linked: read it now.
    Whole(Arc<str>),
    /// A service file was removed or renamed away.
    Removed(Arc<str>),
    /// The link `..data`, through which all files of a mounted Kubernetes volume lead, was
    /// exchanged.
    Swapped,
    /// Events were lost.
    Overflow,
    /// The directory was removed, renamed or unmounted.
    Gone,
}

/// A watch of one directory (not of what its path may mean later), not yet listened to.
pub(super) struct Watch {
    inotify: Inotify,
    directory: PathBuf,
}

/// A watch that is listened to.
pub(super) struct Ear {
    /// What is there at once comes together, so that the changes of one moment are one change.
    events: ReadyChunks<EventStream<Vec<u8>>>,
    directory: PathBuf,
}

/// Room for at least 15 events with the longest names, and for hundreds of ordinary ones.
const BUFFER: usize = 4096;

/// How many events come together at most.
const TOGETHER: usize = 1024;

// === impl Watch ===

impl Watch {
    /// Begins to watch. Looks up a path, so it may block.
    pub(super) fn new(directory: &Path) -> io::Result<Self> {
        let inotify = Inotify::init()?;
        let mask = WatchMask::CLOSE_WRITE
            | WatchMask::MOVE
            | WatchMask::CREATE
            | WatchMask::DELETE
            | WatchMask::DELETE_SELF
            | WatchMask::MOVE_SELF
            | WatchMask::ONLYDIR;
        inotify.watches().add(directory, mask)?;
        Ok(Self { inotify, directory: directory.to_owned() })
    }

    /// Begins to listen, with the current runtime. What was heard since the beginning is kept.
    pub(super) fn listen(self) -> io::Result<Ear> {
        let events = self.inotify.into_event_stream(vec![0; BUFFER])?.ready_chunks(TOGETHER);
        Ok(Ear { events, directory: self.directory })
    }
}

// === impl Ear ===

impl Ear {
    /// Waits for something to be heard. Nothing is lost when the future is dropped.
    pub(super) async fn next(&mut self) -> io::Result<Vec<Signal>> {
        while let Some(events) = self.events.next().await {
            let mut signals = Vec::new();
            for event in events {
                signals.extend(signal(&self.directory, &event?));
            }
            if !signals.is_empty() {
                return Ok(signals);
            }
        }
        Err(io::ErrorKind::UnexpectedEof.into())
    }
}

fn signal(directory: &Path, event: &EventOwned) -> Option<Signal> {
    let mask = event.mask;
    if mask.contains(EventMask::Q_OVERFLOW) {
        return Some(Signal::Overflow);
    }
    let gone =
        EventMask::DELETE_SELF | EventMask::MOVE_SELF | EventMask::UNMOUNT | EventMask::IGNORED;
    if mask.intersects(gone) {
        return Some(Signal::Gone);
    }
    let name = event.name.as_deref()?;
    if name == "..data" && mask.intersects(EventMask::MOVED_TO | EventMask::CREATE) {
        return Some(Signal::Swapped);
    }
    if !is_service_file(name) {
        return None;
    }
    // A name that is not UTF-8 is reported by the listings.
    let text = Arc::from(name.to_str()?);
    if mask.intersects(EventMask::DELETE | EventMask::MOVED_FROM) {
        return Some(Signal::Removed(text));
    }
    let whole = mask.intersects(EventMask::CLOSE_WRITE | EventMask::MOVED_TO)
        || (mask.contains(EventMask::CREATE) && is_born_whole(&directory.join(name)));
    whole.then_some(Signal::Whole(text))
}
