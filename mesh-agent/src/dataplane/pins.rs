//! What clients keep (`affinity`): the kernel programs make the entries, and the agent removes those whose
//! time is over.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use aya::maps::{HashMap, MapData};
use mesh_common::{Pin, PinKey};
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use super::clock;
use super::kernel::OpenError;
use super::opened::Opened;

/// How often. An entry that is over is not heeded in between; it only takes room.
const INTERVAL: Duration = Duration::from_secs(30);

/// Entries are removed so many seconds after they are over.
const MARGIN: u64 = 2;

/// Words of an entry.
const WORDS: usize = size_of::<Pin>() / 8;

/// Which of them says until when.
const UNTIL: usize = std::mem::offset_of!(Pin, until) / 8;

/// All entries.
pub struct Pins {
    map: HashMap<MapData, PinKey, [u64; WORDS]>,
    used: Arc<AtomicU32>,
}

impl Pins {
    /// Opens the map.
    ///
    /// # Errors
    ///
    /// When it is missing or has another layout.
    pub fn open(maps: &Opened) -> Result<Self, OpenError> {
        let map = maps.typed("AFFINITY", HashMap::try_from)?;
        Ok(Self { map, used: Arc::default() })
    }

    /// How many there were when it was last looked.
    #[must_use]
    pub fn used(&self) -> Arc<AtomicU32> {
        Arc::clone(&self.used)
    }

    /// Removes those whose time is over. One that is used again at this very moment may go too: its
    /// client is then balanced anew.
    fn sweep(&mut self) {
        // The clock of the programs may be ahead of this one, or behind.
        let before = clock::jiffies() - MARGIN * clock::hz(clock::tick());
        let (mut over, mut left) = (Vec::new(), 0);
        for (key, words) in self.map.iter().filter_map(Result::ok) {
            if Pin::deadline(words[UNTIL]) < before { over.push(key) } else { left += 1 }
        }
        for key in over {
            // Somebody else may have.
            let _ = self.map.remove(&key);
        }
        self.used.store(left, Ordering::Relaxed);
    }

    /// Removes what is over from time to time, until `cancel`.
    pub async fn tend(mut self, cancel: CancellationToken) {
        let mut tick = tokio::time::interval(INTERVAL);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        while cancel.run_until_cancelled(tick.tick()).await.is_some() {
            // Two calls of the kernel for each entry.
            let swept = tokio::task::spawn_blocking(move || {
                self.sweep();
                self
            });
            match swept.await {
                Ok(pins) => self = pins,
                Err(error) => std::panic::resume_unwind(error.into_panic()),
            }
        }
    }
}
