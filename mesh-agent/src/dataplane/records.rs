//! The records of sockets, as the agent looks at them: to audit them against the sockets that
//! exist, and to end those whose socket is gone.

use std::collections::HashSet;

use aya::Ebpf;
use aya::maps::{HashMap, MapData};
use mesh_common::ejection::ticks;
use mesh_common::flow::release_seen;
use mesh_common::layout::counter;
use mesh_common::{BackendStats, Elsewhere, Flow, Given, Held, Token, Word};

use super::clock;
use super::kernel::{OpenError, mapped, typed};
use super::sys::Mapped;
use crate::audit::{Place, Record};

/// Words of a record.
const WORDS: usize = size_of::<Flow>() / 8;

/// All records.
pub struct Records {
    flows: Mapped<[Word; WORDS]>,
    overflow: HashMap<MapData, Elsewhere, [u64; WORDS]>,
    stats: Mapped<BackendStats>,
    counters: Mapped<Word>,
}

impl Records {
    /// Takes the maps out of a loaded object.
    ///
    /// # Errors
    ///
    /// When a map is missing or has another layout.
    pub fn open(ebpf: &mut Ebpf) -> Result<Self, OpenError> {
        Ok(Self {
            flows: mapped(ebpf, "FLOWS")?,
            stats: mapped(ebpf, "BACKEND_STATS")?,
            counters: mapped(ebpf, "COUNTERS")?,
            overflow: typed(ebpf, "OVERFLOW", HashMap::try_from)?,
        })
    }

    /// How many records the first array holds.
    #[must_use]
    pub fn capacity(&self) -> u32 {
        self.flows.capacity()
    }

    /// Every record in use, at some time during the call: a record is claimed and released while
    /// this looks.
    #[must_use]
    pub fn snapshot(&self) -> Vec<Record> {
        let mut records: Vec<Record> =
            (0..self.flows.capacity()).filter_map(|place| self.at(place)).collect();
        if self.elsewhere() != 0 {
            // An element that is deleted meanwhile makes the kernel begin again, or end early; what
            // was missed is seen the next time, and what comes twice counts once.
            let entries = self.overflow.iter().take(2 * self.flows.capacity() as usize);
            let mut seen = HashSet::new();
            records.extend(
                entries
                    .filter_map(Result::ok)
                    .filter(|(key, _)| seen.insert(*key))
                    .map(|(key, words)| record(Place::Elsewhere(key.index), key.cookie, words)),
            );
        }
        records
    }

    fn at(&self, place: u32) -> Option<Record> {
        let words = self.flows.get(place)?;
        let [held, ..] = words;
        if !Held(held.load()).is_used() {
            return None;
        }
        let words = words.each_ref().map(Word::load);
        let [held, ..] = words;
        let held = Held(held);
        held.is_used().then(|| record(Place::Array(place), held.cookie(place), words))
    }

    /// Whether this very reservation is still there.
    #[must_use]
    pub fn still(&self, record: &Record) -> bool {
        self.word(record) == Some(record.word)
    }

    fn word(&self, record: &Record) -> Option<u64> {
        match record.place {
            Place::Array(place) => self.flows.get(place).map(|[held, ..]| held.load()),
            Place::Elsewhere(index) => {
                let key = Elsewhere { cookie: record.cookie, index };
                self.overflow.get(&key, 0).ok().map(|[word, ..]| word)
            }
        }
    }

    /// Ends a reservation whose connection is over, and accounts for it. `false` when it has been
    /// released, or has become another one, meanwhile.
    pub fn end(&mut self, record: &Record) -> bool {
        // Before it is released: afterwards they may be another's.
        let words = match record.place {
            Place::Array(place) => {
                self.flows.get(place).map(|words| words.each_ref().map(Word::load))
            }
            Place::Elsewhere(index) => {
                self.overflow.get(&Elsewhere { cookie: record.cookie, index }, 0).ok()
            }
        };
        let Some(words) = words else { return false };
        // The same socket at the same backend, but another time.
        if given(words) != record.given {
            return false;
        }
        let seen = Held(record.word);
        let released = match record.place {
            Place::Array(place) => {
                self.flows.get(place).and_then(|[held, ..]| release_seen(held, seen))
            }
            // As in the kernel programs: whoever removes the entry has released it.
            Place::Elsewhere(index) => {
                let key = Elsewhere { cookie: record.cookie, index };
                (words.first() == Some(&record.word) && self.remove(&key)).then_some(seen)
            }
        };
        let Some(held) = released else { return false };
        let given = given(words);
        if let Some(stats) = self.stats.get(held.backend())
            && stats.is_life(given.generation)
        {
            let token = if held.has_token() { given.token } else { Token::NONE };
            stats.end(token, || ticks(clock::monotonic()));
        }
        true
    }

    fn remove(&mut self, key: &Elsewhere) -> bool {
        let removed = self.overflow.remove(key).is_ok();
        let which = if key.index == 0 { counter::OVERFLOWED } else { counter::FURTHER };
        if removed && let Some(records) = self.counters.get(which) {
            records.decrement();
        }
        removed
    }

    /// How many records do not lie at the place that their socket's cookie names.
    fn elsewhere(&self) -> u64 {
        let counts = [counter::OVERFLOWED, counter::FURTHER];
        counts.into_iter().filter_map(|index| self.counters.get(index)).map(Word::load).sum()
    }

    /// How many records are in use in each table: the array, and the one for those that found their
    /// place taken and for further ones of datagram sockets.
    #[must_use]
    pub fn used(&self) -> (u32, u32) {
        let in_use = |&place: &u32| {
            self.flows.get(place).is_some_and(|[held, ..]| Held(held.load()).is_used())
        };
        let used = (0..self.flows.capacity()).filter(in_use).count();
        let elsewhere = self.elsewhere();
        (u32::try_from(used).unwrap_or(u32::MAX), u32::try_from(elsewhere).unwrap_or(u32::MAX))
    }
}

fn record(place: Place, cookie: u64, words: [u64; WORDS]) -> Record {
    let [word, ..] = words;
    Record { place, cookie, word, given: given(words) }
}

fn given([_, words @ ..]: [u64; WORDS]) -> Given {
    Given::from_words(words)
}
