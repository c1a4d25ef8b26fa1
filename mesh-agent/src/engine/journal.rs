//! The last events, and those who follow them as they come.
//!
//! The engine writes, the API reads, and neither waits for the other: a write costs the same
//! whether nobody follows or everybody, and who reads too slowly is told how much was missed.

use std::collections::{VecDeque, vec_deque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, broadcast};

use crate::api::types::Event;

/// How many events are kept.
pub const KEPT: usize = 1_000;

/// How many may follow at a time.
pub const FOLLOWERS: usize = 16;

/// How many events a follower may be behind.
const BEHIND: usize = 1_024;

/// The journal; clones are the same one.
#[derive(Clone, Debug)]
pub struct Journal {
    kept: Arc<Mutex<Kept>>,
    places: Arc<Semaphore>,
}

#[derive(Debug)]
struct Kept {
    events: VecDeque<Arc<Event>>,
    /// The number of the last event.
    last: u64,
    live: broadcast::Sender<Arc<Event>>,
}

/// Somebody who reads the journal, and goes on with what comes. Dropped, the place is free.
#[derive(Debug)]
pub struct Follower {
    past: vec_deque::IntoIter<Arc<Event>>,
    live: broadcast::Receiver<Arc<Event>>,
    service: Option<String>,
    /// The number of the last event that was seen, whether or not it was passed on.
    last: u64,
    _place: OwnedSemaphorePermit,
}

// === impl Journal ===

impl Default for Journal {
    fn default() -> Self {
        let (live, _) = broadcast::channel(BEHIND);
        let kept = Kept { events: VecDeque::with_capacity(KEPT), last: 0, live };
        Self { kept: Arc::new(Mutex::new(kept)), places: Arc::new(Semaphore::new(FOLLOWERS)) }
    }
}

impl Journal {
    /// Writes an event, which gets its number here.
    pub fn push(&self, event: Event) {
        let mut kept = self.lock();
        kept.last += 1;
        let event = Arc::new(Event { seq: kept.last, ..event });
        if kept.events.len() == KEPT {
            kept.events.pop_front();
        }
        kept.events.push_back(Arc::clone(&event));
        // It fails when nobody follows.
        let _ = kept.live.send(event);
    }

    /// The events that are kept, the oldest first; of one service, or all.
    #[must_use]
    pub fn events(&self, service: Option<&str>) -> Vec<Arc<Event>> {
        let kept = self.lock();
        kept.events.iter().filter(|event| concerns(event, service)).cloned().collect()
    }

    /// Follows the events of one service, or all: those that are kept, then each that comes, without
    /// a gap. Nothing when [`FOLLOWERS`] do so already.
    #[must_use]
    pub fn follow(&self, service: Option<String>) -> Option<Follower> {
        let place = Arc::clone(&self.places).try_acquire_owned().ok()?;
        let kept = self.lock();
        let past: VecDeque<_> = kept
            .events
            .iter()
            .filter(|event| concerns(event, service.as_deref()))
            .cloned()
            .collect();
        Some(Follower {
            past: past.into_iter(),
            live: kept.live.subscribe(),
            service,
            last: kept.last,
            _place: place,
        })
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        // Nothing in here can panic halfway through a change.
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl Follower ===

impl Follower {
    /// What was kept when this began and has not been given yet; at once.
    pub fn past(&mut self) -> impl Iterator<Item = Arc<Event>> {
        self.past.by_ref()
    }

    /// The next event, when it comes. An event of kind `missed` says that there were more than this
    /// follower could take. May be given up at any time without losing one. Nothing when the
    /// journal is gone.
    pub async fn next(&mut self) -> Option<Arc<Event>> {
        if let Some(event) = self.past.next() {
            return Some(event);
        }
        loop {
            match self.live.recv().await {
                Ok(event) => {
                    self.last = event.seq;
                    if concerns(&event, self.service.as_deref()) {
                        return Some(event);
                    }
                }
                Err(RecvError::Lagged(count)) => {
                    self.last += count;
                    let words = "events, of whichever service, came faster than they were read";
                    return Some(Arc::new(Event { seq: self.last, ..missed(count, words) }));
                }
                Err(RecvError::Closed) => return None,
            }
        }
    }
}

// === events ===

/// What says that events were missed; `words` go on after the number.
#[must_use]
pub fn missed(count: u64, words: &str) -> Event {
    Event {
        missed: Some(count),
        detail: format!("{count} {words}"),
        ..event("missed", SystemTime::now())
    }
}

/// An event about nothing yet, without a number.
pub(super) fn event(kind: &str, time: SystemTime) -> Event {
    Event {
        seq: 0,
        // RFC 3339, in UTC, to the millisecond.
        time: humantime::format_rfc3339_millis(time).to_string(),
        kind: kind.to_owned(),
        service: None,
        frontend: None,
        backend: None,
        reason: None,
        client: None,
        detail: String::new(),
        missed: None,
    }
}

/// Whether it is to be shown to who asks for this service. That some were missed concerns
/// everybody.
fn concerns(event: &Event, service: Option<&str>) -> bool {
    service
        .is_none_or(|service| event.missed.is_some() || event.service.as_deref() == Some(service))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(service: &str) -> Event {
        Event { service: Some(service.to_owned()), ..event("refused", SystemTime::now()) }
    }

    fn numbers(events: impl IntoIterator<Item = Arc<Event>>) -> Vec<u64> {
        events.into_iter().map(|event| event.seq).collect()
    }

    #[test]
    fn the_last_ones_are_kept() {
        let journal = Journal::default();
        assert!(journal.events(None).is_empty());
        for _ in 0..KEPT + 5 {
            journal.push(of("app"));
        }
        journal.push(of("other"));
        let kept = numbers(journal.events(None));
        assert_eq!(kept, (7..=1_006).collect::<Vec<_>>());
        assert_eq!(numbers(journal.events(Some("other"))), [1_006]);
        assert!(journal.events(Some("nobody")).is_empty());
    }

    #[tokio::test]
    async fn a_follower_sees_the_past_and_what_comes_once_each() {
        let journal = Journal::default();
        journal.push(of("app"));
        journal.push(of("other"));
        let mut all = journal.follow(None).expect("a place");
        let mut app = journal.follow(Some("app".to_owned())).expect("a place");
        assert_eq!(numbers(all.past()), [1, 2]);
        journal.push(of("other"));
        journal.push(of("app"));
        for seq in [3, 4] {
            assert_eq!(all.next().await.expect("an event").seq, seq);
        }
        for seq in [1, 4] {
            assert_eq!(app.next().await.expect("an event").seq, seq);
        }
        drop(journal);
        assert_eq!(all.next().await, None);
    }

    #[tokio::test]
    async fn a_slow_follower_is_told_what_it_missed() {
        let journal = Journal::default();
        let mut slow = journal.follow(Some("app".to_owned())).expect("a place");
        let behind = u64::try_from(BEHIND).expect("a number");
        for _ in 0..behind + 10 {
            journal.push(of("other"));
        }
        journal.push(of("app"));
        let missed = slow.next().await.expect("an event");
        assert_eq!((missed.kind.as_str(), missed.missed), ("missed", Some(11)));
        assert_eq!(missed.seq, 11, "the number of the last one that was missed");
        assert_eq!(slow.next().await.expect("an event").seq, behind + 11);
    }

    #[test]
    fn places_are_few_and_come_back() {
        let journal = Journal::default();
        let mut all: Vec<_> = (0..FOLLOWERS).filter_map(|_| journal.follow(None)).collect();
        assert_eq!(all.len(), FOLLOWERS);
        assert!(journal.follow(None).is_none());
        all.pop();
        assert!(journal.follow(None).is_some());
    }
}
