//! Tables as the agent writes them, and everything changes that may change between any two reads.

use std::cell::Cell;
use std::net::Ipv4Addr;

use mesh_common::translate::{ATTEMPTS, REDRAWS, SCAN};
use mesh_common::{
    Addr, Affinity, Algorithm, Caller, Client, Ejection, FrontendKey, FrontendValue, Half, Policy,
    Protocol, Reason, Service, Slot, Table, Tables, Token, Verdict, Word, alias, balance, maglev,
    translate,
};

use crate::script::{self, Script};

/// The most slots that a decision looks at: for each attempt, those on the way round a table and a few for
/// each draw and each step of a search.
const MOST_SLOTS: u32 = ATTEMPTS * (1 + REDRAWS + SCAN + 64);

/// Records: of what is dialled, of another frontend, and of what is dialled when it has been made again.
const RECORDS: usize = 3;

/// Whose tables: two of the first record, and one of each other.
const OWNERS: [usize; 4] = [0, 0, 1, 2];

/// The tables, and what happens to them.
struct Racing<'s> {
    script: &'s Script<'s>,
    services: [Service; RECORDS],
    tables: Vec<(Table, Vec<Slot>)>,
    /// Entries of consistent hashes, which may name anything.
    entries: Slot,
    /// By table, whether a record had it when somebody looked.
    read: [Cell<bool>; 4],
    looked_at: Cell<u32>,
    /// Whether any backend was said not to be in.
    any_out: Cell<bool>,
}

fn key(n: u8) -> FrontendKey {
    FrontendKey::new(Ipv4Addr::new(10, 96, 0, n).into(), 80, Protocol::Tcp)
}

/// Generations of the records, from the first on.
const GENERATION: u64 = 7;

/// The slots of a table of these weights, whose backends have these numbers.
fn slots(weights: &[u32], first: u32) -> Vec<Slot> {
    let mut columns = vec![alias::Column::default(); weights.len()];
    let mut scratch = vec![alias::Entry::default(); weights.len()];
    assert!(alias::build(weights, &mut columns, &mut scratch), "a weight");
    let mut ends = vec![0; weights.len()];
    balance::tickets(weights, &mut ends);
    let slot = |((backend, weight), (column, end)): ((u32, &u32), (&alias::Column, u32))| Slot {
        backend,
        weight: u16::try_from(*weight).unwrap_or(u16::MAX),
        threshold: column.threshold,
        alias: column.alias,
        end,
        ..Slot::default()
    };
    (first..).zip(weights).zip(columns.iter().zip(ends)).map(slot).collect()
}

impl<'s> Racing<'s> {
    fn new(script: &'s Script<'s>) -> Self {
        let mut base = script.word() & 0xff_ffff;
        let mut tables = Vec::new();
        for first in (0..).step_by(1_000).take(OWNERS.len()) {
            let mut weights: Vec<u32> =
                (0..1 + script.byte() % 20).map(|_| script.half().into()).collect();
            weights[0] = weights[0].max(1);
            let slots = slots(&weights, first);
            let algorithm = Algorithm::from_number(script.byte() % 8);
            let size = maglev::Size::from_number(script.byte() % 3);
            let len = u32::try_from(slots.len()).unwrap_or(u32::MAX);
            let table = Table::slots(base, len).sized(size).by(algorithm);
            // One behind the other, so that what is beyond one is another's.
            base += table.extent();
            tables.push((table, slots));
        }
        let entries = maglev::slot([(); 16].map(|()| script.half()));
        let service = |record: usize, n, table: usize| Service {
            table: Word::new(tables[table].0.0),
            generation: Word::new(GENERATION + record as u64),
            policy: Word::new(Policy::new(1, 10, 60, 50).0),
            key: key(n),
            rate: Half::default(),
            position: Word::new(0),
            affinity: Word::new(Affinity::OFF.0),
        };
        let services = [service(0, 1, 0), service(1, 2, 2), service(2, 1, 3)];
        let read = Default::default();
        let (looked_at, any_out) = (Cell::new(0), Cell::new(false));
        Self { script, services, tables, entries, read, looked_at, any_out }
    }

    /// What others do meanwhile.
    fn tick(&self) {
        let [first, _, again] = &self.services;
        match self.script.byte() {
            1 => first.table.store(self.tables[0].0.0),
            2 => first.table.store(self.tables[1].0.0),
            3 => first.table.store(Table::refuse(Reason::NoEndpoint).0),
            4 => first.generation.store(0),
            5 => first.generation.store(GENERATION),
            6 => again.table.store(Table::refuse(Reason::NoRoom).0),
            7 => again.table.store(self.tables[3].0.0),
            // The same slots, chosen from otherwise.
            8 => {
                let table = Table(first.table.load());
                if !table.is_empty() && !table.algorithm().is_hash() {
                    let by = [Algorithm::Random, Algorithm::RoundRobin, Algorithm::Latency];
                    first.table.store(table.by(by[usize::from(self.script.byte()) % 3]).0);
                }
            }
            _ => {}
        }
    }

    /// The table, of those whose slots these are.
    fn of(&self, table: Table) -> usize {
        let found = self
            .tables
            .iter()
            .position(|(known, _)| known.base() == table.base() && known.len() == table.len());
        found.expect("a table that nobody has written")
    }
}

impl Tables for Racing<'_> {
    fn frontend(&self, wanted: &FrontendKey) -> Option<FrontendValue> {
        self.tick();
        let value = |record: u32| FrontendValue {
            service: record,
            pad: 0,
            generation: GENERATION + u64::from(record),
        };
        match self.script.byte() {
            1 => None,
            2 => Some(value(2)),
            // The element was reused, or is half overwritten.
            3 => Some(value(1)),
            4 => Some(FrontendValue {
                service: self.script.word(),
                pad: 0,
                generation: u64::from(self.script.byte()),
            }),
            _ => (*wanted == key(1)).then(|| value(0)),
        }
    }

    fn service(&self, index: u32) -> Option<&Service> {
        self.tick();
        let service = self.services.get(index as usize)?;
        let table = service.table();
        if !table.is_empty() {
            self.read[self.of(table)].set(true);
            // It may be switched before its word is read.
            if index == 0 {
                self.read[0].set(true);
                self.read[1].set(true);
            }
        }
        Some(service)
    }

    fn slot(&self, index: u32) -> Option<&Slot> {
        self.tick();
        self.looked_at.set(self.looked_at.get() + 1);
        assert!(self.looked_at.get() <= MOST_SLOTS, "a decision does not end");
        for ((table, slots), read) in self.tables.iter().zip(&self.read) {
            let column = index.wrapping_sub(table.base());
            if read.get() && column < table.len() {
                return slots.get(column as usize);
            }
            if read.get() && column < table.extent() {
                return Some(&self.entries);
            }
        }
        panic!("slot {index} is of no table that was read");
    }

    fn is_virtual(&self, _: &Addr) -> bool {
        self.script.byte() == 1
    }

    fn random(&self) -> u32 {
        self.tick();
        self.script.word()
    }

    fn ejection(&self, _: u32) -> Ejection {
        self.tick();
        let known = match self.script.byte() {
            128..136 => Ejection(self.script.long()),
            known => script::ejection(known),
        };
        self.any_out.set(self.any_out.get() || !known.is_in());
        known
    }

    fn active(&self, _: u32) -> u64 {
        self.tick();
        self.script.long()
    }

    fn latency(&self, _: u32) -> u64 {
        self.tick();
        // As much as is told apart.
        (self.script.word() >> 8).into()
    }

    fn position(&self, service: u32) -> u64 {
        self.tick();
        assert!((service as usize) < RECORDS, "a turn of no record");
        self.script.long()
    }

    fn client(&self) -> Client {
        Client::from_tag(self.script.half())
    }

    fn now(&self) -> u64 {
        u64::from(self.script.word()) << 2
    }
}

impl Caller for Racing<'_> {
    fn chance(&self) -> u32 {
        self.random()
    }

    fn key(&self, _: Algorithm) -> u64 {
        self.tick();
        self.script.long()
    }

    fn enter(&self, backend: u32, _: Policy) -> Option<Token> {
        // What others do from here on comes too late for this connect.
        assert!(
            (backend / 1_000) < 4 && backend % 1_000 < 20,
            "no backend has the number {backend}"
        );
        let token = self.script.long();
        (token != 1).then_some(Token(token))
    }
}

/// Decides about a connect while all of that happens.
///
/// # Panics
///
/// When the decision is wrong, or looks at what it must not.
pub fn check<'s>(script: &'s Script<'s>) {
    let racing = Racing::new(script);
    match translate(&racing, &racing, &key(1)) {
        Verdict::Pass => {}
        Verdict::Refuse(reason, _) => {
            assert!(!matches!(reason, Reason::Corrupt), "what is in order was found damaged");
        }
        Verdict::Balance(choice) => {
            let table = (choice.slot.backend / 1_000) as usize;
            let (word, slots) = &racing.tables[table];
            assert_ne!(OWNERS[table], 1, "the connect goes to another frontend's backend");
            assert_eq!(OWNERS[table], choice.service as usize, "a record of another table");
            assert!(slots.contains(choice.slot), "a slot of no table");
            // Nothing changes after the last read.
            let [first, _, again] = &racing.services;
            let record = if table == 3 { again } else { first };
            let in_force = record.generation() != 0 && record.table().base() == word.base();
            assert!(in_force, "of a table that was replaced");
            let by_weight = !word.algorithm().is_hash() && !racing.any_out.get();
            assert!(choice.slot.weight > 0 || !by_weight, "without a weight: {:?}", choice.slot);
        }
    }
}
