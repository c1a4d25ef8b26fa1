//! Tables of arbitrary bytes, of which each read is another one.

use std::cell::Cell;

use mesh_common::latency::Latency;
use mesh_common::translate::{ATTEMPTS, CENSUS, REDRAWS, SCAN, around, share_allows};
use mesh_common::{
    Addr, Algorithm, Caller, Client, Ejection, FrontendKey, FrontendValue, Half, Policy, Service,
    Slot, Table, Tables, Token, Verdict, Word, balance, maglev, translate,
};

use crate::script::{self, Script};

/// As [`crate::racing`] has it; nothing in here takes more.
const MOST_SLOTS: u32 = ATTEMPTS * (1 + REDRAWS + SCAN + 64);

/// How many slots and records there are to be read.
const KNOWN: usize = 8;

/// What is there instead of tables.
struct Damaged<'s> {
    script: &'s Script<'s>,
    slots: Vec<Slot>,
    services: Vec<Service>,
    looked_at: Cell<u32>,
}

/// In ticks: of a clock, not of the data; 64 bits of ticks do not pass.
fn time(script: &Script<'_>) -> u64 {
    script.long() >> 30
}

fn slot(script: &Script<'_>) -> Slot {
    Slot {
        addr: Addr::from_words([(); 4].map(|()| script.word())),
        port: script.half(),
        weight: script.half(),
        backend: script.word(),
        generation: script.word(),
        threshold: script.word(),
        alias: script.word(),
        end: script.word(),
    }
}

fn service(script: &Script<'_>) -> Service {
    Service {
        table: Word::new(script.long()),
        generation: Word::new(script.byte().into()),
        policy: Word::new(script.long()),
        key: FrontendKey::default(),
        rate: Half::new(script.word()),
        position: Word::new(script.long()),
        affinity: Word::new(script.long()),
    }
}

impl Tables for Damaged<'_> {
    fn frontend(&self, _: &FrontendKey) -> Option<FrontendValue> {
        let service = u32::from(self.script.byte());
        let generation = self.script.byte().into();
        (service < 200).then_some(FrontendValue { service, pad: 0, generation })
    }

    fn service(&self, _: u32) -> Option<&Service> {
        let service = self.services.get(usize::from(self.script.byte()) % (KNOWN + 1))?;
        service.table.store(self.script.long());
        Some(service)
    }

    fn slot(&self, _: u32) -> Option<&Slot> {
        self.looked_at.set(self.looked_at.get() + 1);
        assert!(self.looked_at.get() <= MOST_SLOTS, "it does not end");
        self.slots.get(usize::from(self.script.byte()) % (KNOWN + 1))
    }

    fn is_virtual(&self, _: &Addr) -> bool {
        self.script.byte() == 1
    }

    fn random(&self) -> u32 {
        self.script.word()
    }

    fn ejection(&self, _: u32) -> Ejection {
        match self.script.byte() {
            0..64 => Ejection(self.script.long()),
            known => script::ejection(known),
        }
    }

    fn active(&self, _: u32) -> u64 {
        self.script.long()
    }

    fn latency(&self, _: u32) -> u64 {
        Latency(self.script.long()).average(time(self.script), time(self.script))
    }

    fn position(&self, _: u32) -> u64 {
        self.script.long()
    }

    fn client(&self) -> Client {
        Client::from_tag(self.script.half())
    }

    fn now(&self) -> u64 {
        time(self.script)
    }
}

impl Caller for Damaged<'_> {
    fn chance(&self) -> u32 {
        self.script.word()
    }

    fn key(&self, _: Algorithm) -> u64 {
        self.script.long()
    }

    fn enter(&self, _: u32, _: Policy) -> Option<Token> {
        let token = self.script.long();
        (token != 1).then_some(Token(token))
    }
}

/// Calls everything that reads tables, once.
///
/// # Panics
///
/// When that panics, reads without end, or names a slot outside of its table where it says that it does not.
pub fn check<'s>(script: &'s Script<'s>) {
    let what = script.byte();
    let slots = (0..KNOWN).map(|_| slot(script)).collect();
    let services = (0..KNOWN).map(|_| service(script)).collect();
    let damaged = &Damaged { script, slots, services, looked_at: Cell::new(0) };
    let table = Table(script.long());
    let inside = |index: u32| index.wrapping_sub(table.base()) < table.len();
    match what % 8 {
        0 | 1 => {
            if let Verdict::Balance(choice) = translate(damaged, damaged, &FrontendKey::default()) {
                assert!(damaged.slots.contains(choice.slot), "a slot that nobody has written");
            }
        }
        // These two do not trust what they read.
        2 if !table.is_empty() => assert!(inside(balance::turn(damaged, 0, table)), "{table:?}"),
        3 if !table.is_empty() => {
            assert!(inside(maglev::look_up(damaged, table, script.long())), "{table:?}");
        }
        4 => {
            let chosen = balance::lighter(damaged, table, script.word());
            assert!(damaged.looked_at.get() <= 16, "{chosen}: more than two choices");
        }
        5 => {
            let _ = around(damaged, table, script.word());
            // One for each that is looked at, and one for each draw.
            let most = 1 + 2 * REDRAWS + SCAN;
            assert!(damaged.looked_at.get() <= most, "farther round than it should");
        }
        6 => {
            let (policy, client) = (Policy(script.long()), Client::from_tag(script.half()));
            let _ = share_allows(damaged, table, policy, client, script.byte() == 1);
            assert!(damaged.looked_at.get() <= CENSUS, "more slots than are counted");
        }
        _ => words(script),
    }
}

/// What a backend's words become, from whatever they are.
fn words(script: &Script<'_>) {
    let mut known = Ejection(script.long());
    let mut latency = Latency(script.long());
    let policy = Policy(script.long());
    for _ in 0..8 {
        let (client, now) = (Client::from_tag(script.half()), time(script));
        let _ = known.admits(client, now);
        known = match script.byte() % 4 {
            0 => known.take(now),
            1 => known.recover(policy, now),
            2 => known.fail(policy, client, Token(script.long()), now).unwrap_or(known),
            _ => known.known_to(client, now),
        };
        latency = latency.with(script.long(), now, time(script));
        let nearer = latency.average(now, time(script));
        assert!(nearer < 1 << 24, "more than is told apart: {latency:?}");
    }
}
