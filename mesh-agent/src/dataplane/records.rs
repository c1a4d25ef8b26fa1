//! The records of sockets, as the agent looks at them: to audit them against the sockets that
//! exist, and to end those whose socket is gone.

use std::collections::HashSet;
use std::io;

use aya::maps::{HashMap, MapData};
use mesh_common::ejection::ticks;
use mesh_common::flow::release_seen;
use mesh_common::layout::counter;
use mesh_common::{
    BackendStats, Elsewhere, Flow, Given, Held, Limits, Places, Settings, Token, Word, chunk,
};

use super::chunks::Chunks;
use super::clock;
use super::kernel::OpenError;
use super::opened::Opened;
use super::sys::Mapped;
use crate::audit::{Place, Record};

/// Words of a record.
const WORDS: usize = size_of::<Flow>() / 8;

/// All records.
pub struct Records {
    flows: Chunks<[Word; WORDS]>,
    /// For how many records `OVERFLOW` was made.
    overflow_size: u32,
    overflow: HashMap<MapData, Elsewhere, [u64; WORDS]>,
    stats: Chunks<BackendStats>,
    counters: Mapped<Word>,
    settings: Mapped<Settings>,
}

/// The table grows when one in so many places was found taken.
const CROWDED: u32 = 64;

impl Records {
    /// Opens the maps.
    ///
    /// # Errors
    ///
    /// When a map is missing or has another layout.
    pub fn open(maps: &Opened, limits: Limits) -> Result<Self, OpenError> {
        let mut records = Self::look(maps, limits)?;
        let failed = |source| OpenError::Mapping { map: "FLOWS", source };
        records.flows.reach(1).map_err(failed)?;
        Ok(records)
    }

    /// The same for somebody who only looks.
    ///
    /// # Errors
    ///
    /// As [`Records::open`].
    pub fn look(maps: &Opened, limits: Limits) -> Result<Self, OpenError> {
        Ok(Self {
            flows: Chunks::found(maps, "FLOWS", chunk::FLOWS, limits.records)?,
            stats: Chunks::found(maps, "BACKEND_STATS", chunk::BACKENDS, limits.backends)?,
            counters: maps.mapped("COUNTERS")?,
            settings: maps.mapped("SETTINGS")?,
            overflow_size: maps.entries("OVERFLOW")?,
            overflow: maps.typed("OVERFLOW", HashMap::try_from)?,
        })
    }

    /// Goes on from what a former agent has told the programs, if there was one. To be called before any are
    /// attached where there are none, and after others were replaced, which may have been told something else.
    ///
    /// # Errors
    ///
    /// What the kernel says to more chunks.
    pub fn resume(&mut self) -> io::Result<()> {
        let (told, there) = (self.places(), self.flows.size());
        if !told.is_of(there) {
            // Nothing was told yet, or somebody else has written there.
            self.publish(Places::settled(1 << there.ilog2()));
        } else if told.records() != u64::from(there) {
            // It ended while the table grew.
            self.flows.reach(self.flows.limit())?;
            let former = u32::try_from(told.records()).unwrap_or(there);
            // The limit may be another one by now, and half of the chunks there.
            self.publish(Places::grown(former, 1 << self.flows.size().ilog2()));
        }
        Ok(())
    }

    /// Bytes of the array.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.flows.bytes()
    }

    /// Tells the programs where records are: one store, after the chunks that it speaks of.
    fn publish(&self, places: Places) {
        if let Some(settings) = self.settings.get(0) {
            settings.places.store(places.0);
        }
    }

    fn places(&self) -> Places {
        Places(self.settings.get(0).map_or(0, |settings| settings.places.load()))
    }

    /// Whether programs look for records at former places.
    #[must_use]
    pub fn has_former(&self) -> bool {
        self.places().has_former()
    }

    /// Whether the table should grow: it has not yet, and records found their place taken.
    #[must_use]
    pub fn is_crowded(&self) -> bool {
        // Programs of another build may be attached still, and may have tables of their own.
        let is_whole = self.settings.get(0).is_some_and(|settings| settings.programs.load() != 0);
        let overflowed = self.counters.get(counter::OVERFLOWED).map_or(0, Word::load);
        let size = self.flows.size();
        // Not while there are two places to look at already: the limit may have been raised since.
        is_whole
            && size < self.flows.limit()
            && !self.has_former()
            && overflowed > u64::from(size / CROWDED)
    }

    /// Makes the table as large as it may be: once, so that there are never more than two places to look
    /// at, however long a socket lives. Sockets that connect from then on have their records at new places,
    /// and programs look for the others at the former ones.
    ///
    /// # Errors
    ///
    /// What the kernel says to more chunks: then all is as before.
    pub fn grow(&mut self) -> io::Result<(u32, u32)> {
        let former = self.flows.size();
        let size = self.flows.limit();
        self.flows.reach(size)?;
        // Both are powers of two.
        self.publish(Places::grown(former, size));
        Ok((former, size))
    }

    /// Ends that programs look at former places, when no record is at one. The caller has waited for a
    /// grace period since the table grew: no program makes a record at a former place any more.
    pub fn settle(&self) {
        let places = self.places();
        if !places.has_former() {
            return;
        }
        let misplaced = |place: &u32| {
            self.flows.get(*place).is_some_and(|[held, ..]| {
                let held = Held(held.load());
                held.is_used() && places.of(held.cookie(*place)) != *place
            })
        };
        if !(0..self.flows.size()).any(|place| misplaced(&place)) {
            self.publish(Places::settled(self.flows.size()));
        }
    }

    /// Every record in use, at some time during the call: a record is claimed and released while
    /// this looks.
    #[must_use]
    pub fn snapshot(&self) -> Vec<Record> {
        let mut records: Vec<Record> =
            (0..self.flows.size()).filter_map(|place| self.at(place)).collect();
        if self.elsewhere() != 0 {
            // An element that is deleted meanwhile makes the kernel begin again, or end early; what
            // was missed is seen the next time, and what comes twice counts once.
            let entries = self.overflow.iter().take(2 * self.flows.limit() as usize);
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
        // Before it is released, too: afterwards its end has to be counted.
        if !self.stats.follow(seen.backend()) {
            return false;
        }
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
    pub fn used(&self) -> [Used; 2] {
        let size = self.flows.size();
        let in_use = |&place: &u32| {
            self.flows.get(place).is_some_and(|[held, ..]| Held(held.load()).is_used())
        };
        let number = |used| u32::try_from(used).unwrap_or(u32::MAX);
        let used = number((0..size).filter(in_use).count() as u64);
        let overflow = Used { used: number(self.elsewhere()), size: self.overflow_size };
        [Used { used, size }, overflow]
    }
}

/// How full a table of records is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Used {
    /// Records in use.
    pub used: u32,
    /// Records for which there is room now.
    pub size: u32,
}

fn record(place: Place, cookie: u64, words: [u64; WORDS]) -> Record {
    let [word, ..] = words;
    Record { place, cookie, word, given: given(words) }
}

fn given([_, words @ ..]: [u64; WORDS]) -> Given {
    Given::from_words(words)
}
