//! The decision of the connect hook: from the dialled address to a backend, a refusal, or nothing.
//!
//! Generic over where the tables live, so that the kernel programs run it on maps, `explain` on
//! the agent's view of the same maps, and the tests on tables that change between any two reads.

use crate::layout::{FrontendKey, FrontendValue, Reason, Service, Slot};
use crate::{Addr, alias};

/// How often a program looks again when the tables change under it. Each attempt can only fail
/// when another update lands in its window of well under a microsecond.
pub const ATTEMPTS: u32 = 8;

/// Where the tables are.
pub trait Tables {
    /// The entry of `FRONTENDS`. It may be another frontend's, or torn, when the element was
    /// reused while it was read: [`translate`] finds that out.
    fn frontend(&self, key: &FrontendKey) -> Option<FrontendValue>;
    /// A record of `SERVICES`.
    fn service(&self, index: u32) -> Option<&Service>;
    /// A record of `SLOTS`.
    fn slot(&self, index: u32) -> Option<&Slot>;
    /// Whether the address is inside `virtual-ips`.
    fn is_virtual(&self, addr: &Addr) -> bool;
    /// A random number, even over its 32 bits.
    fn random(&self) -> u32;
    /// Called for each attempt that found the tables changed.
    fn retried(&self) {}
}

/// What is to be done with a connect.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict<'t> {
    /// Not ours: do not touch it.
    Pass,
    /// Go to this backend. The slot stays as it is for as long as the program runs.
    Balance(&'t Slot),
    /// Fail with `ECONNREFUSED`, for this reason.
    Refuse(Reason),
}

/// Decides about a connect to `key`.
///
/// What it must be robust against, and why it is:
///
/// * The frontend's hash element is reused while it is read: then `value` names another frontend's
///   record or nonsense; the record's own key differs from `key`, and it looks again.
/// * The frontend is removed, and perhaps made again, after the first read: the record's
///   generation is 0 or another one at the last read, and it looks again.
/// * The table is switched after it was read: the word differs at the last read, and it looks
///   again, so no connect whose last read comes after the switch uses the old table.
/// * Slots are overwritten while they are read: they are not. An extent, a record and a backend id
///   are used again only after a grace period that waits for every running program.
#[inline(always)]
pub fn translate<'t, T: Tables>(tables: &'t T, key: &FrontendKey) -> Verdict<'t> {
    for _ in 0..ATTEMPTS {
        let Some(value) = tables.frontend(key) else { return unknown(tables, key) };
        // An index out of range can only come from a torn value.
        if let Some(service) = tables.service(value.service) {
            let table = service.table();
            let choice = choose(tables, table);
            if service.generation() == value.generation
                && service.key == *key
                && service.table() == table
            {
                return choice.verdict();
            }
        }
        tables.retried();
    }
    Verdict::Refuse(Reason::Contended)
}

/// What a table says. Both fields always have a value: the payload of an enum that is alive across
/// the end of a loop becomes a register that the verifier finds uninitialised.
struct Choice<'t> {
    slot: Option<&'t Slot>,
    /// Why there is no slot.
    reason: Reason,
}

impl<'t> Choice<'t> {
    #[inline(always)]
    fn verdict(self) -> Verdict<'t> {
        match self.slot {
            Some(slot) => Verdict::Balance(slot),
            None => Verdict::Refuse(self.reason),
        }
    }
}

#[inline(always)]
fn choose<T: Tables>(tables: &T, table: crate::Table) -> Choice<'_> {
    if table.is_empty() {
        return Choice { slot: None, reason: table.reason() };
    }
    let (column, position) = alias::column(tables.random(), table.len());
    let mut slot = tables.slot(table.base().wrapping_add(column));
    if let Some(own) = slot
        && position >= own.threshold
        && own.alias != column
    {
        slot = tables.slot(table.base().wrapping_add(own.alias));
    }
    Choice { slot, reason: Reason::Corrupt }
}

/// The address and port are no frontend.
#[inline(always)]
fn unknown<'t, T: Tables>(tables: &'t T, key: &FrontendKey) -> Verdict<'t> {
    if !tables.is_virtual(&key.addr) {
        return Verdict::Pass;
    }
    match tables.frontend(&FrontendKey::address_only(key.addr)) {
        Some(_) => Verdict::Refuse(Reason::NoPort),
        None => Verdict::Refuse(Reason::NoService),
    }
}

#[cfg(test)]
mod tests {
    use core::cell::Cell;
    use core::net::Ipv4Addr;

    use proptest::prelude::*;

    use super::*;
    use crate::{Protocol, Table, Word};

    fn key(n: u8) -> FrontendKey {
        FrontendKey::new(Ipv4Addr::new(10, 96, 0, n).into(), 80, Protocol::Tcp)
    }

    fn slot(backend: u32) -> Slot {
        Slot { backend, ..Slot::default() }
    }

    /// What another CPU does.
    #[derive(Clone, Copy, Debug)]
    enum Event {
        /// The frontend's table is switched from backend 1 to backend 2.
        Switch,
        /// The frontend is removed.
        Remove,
        /// It is removed and made again, at backend 2, in another record.
        Replace,
        /// Its record was retired and is another frontend's now, at backend 3.
        Reuse,
    }

    /// Two frontends, `key(1)` at backend 1 and `key(2)` at backend 3, and something that happens
    /// before the read of that number.
    struct Racing {
        event: Event,
        before: u32,
        reads: Cell<u32>,
        /// Whether the event has happened at the last read of `services`.
        first: Cell<Option<FrontendValue>>,
        /// What a look-up of the frontend gives once instead of its value.
        glitch: Cell<Option<FrontendValue>>,
        services: [Service; 3],
        slots: [Slot; 4],
    }

    fn value(service: u32, generation: u64) -> FrontendValue {
        FrontendValue { service, pad: 0, generation }
    }

    impl Racing {
        fn new(event: Event, before: u32) -> Self {
            let service = |n, generation, base| Service {
                table: Word::new(Table::slots(base, 1).0),
                generation: Word::new(generation),
                key: key(n),
                pad: 0,
            };
            Self {
                event,
                before,
                reads: Cell::new(0),
                first: Cell::new(Some(value(0, 7))),
                glitch: Cell::new(None),
                services: [service(1, 7, 1), service(2, 8, 3), service(1, 9, 2)],
                slots: [slot(0), slot(1), slot(2), slot(3)],
            }
        }

        fn tick(&self) {
            let reads = self.reads.get();
            self.reads.set(reads + 1);
            if reads == self.before {
                let [first, ..] = &self.services;
                match self.event {
                    Event::Switch => first.table.store(Table::slots(2, 1).0),
                    Event::Remove => {
                        self.first.set(None);
                        first.generation.store(0);
                    }
                    Event::Replace => {
                        self.first.set(Some(value(2, 9)));
                        first.generation.store(0);
                    }
                    Event::Reuse => {
                        self.first.set(None);
                        first.generation.store(10);
                        first.table.store(Table::slots(3, 1).0);
                    }
                }
            }
        }
    }

    impl Tables for Racing {
        fn frontend(&self, wanted: &FrontendKey) -> Option<FrontendValue> {
            self.tick();
            if let Some(glitch) = self.glitch.take() {
                return Some(glitch);
            }
            match *wanted {
                wanted if wanted == key(1) => self.first.get(),
                wanted if wanted == key(2) => Some(value(1, 8)),
                _ => None,
            }
        }

        fn service(&self, index: u32) -> Option<&Service> {
            self.tick();
            self.services.get(index as usize)
        }

        fn slot(&self, index: u32) -> Option<&Slot> {
            self.tick();
            self.slots.get(index as usize)
        }

        fn is_virtual(&self, _: &Addr) -> bool {
            false
        }

        fn random(&self) -> u32 {
            self.tick();
            0
        }
    }

    fn backend(verdict: Verdict<'_>) -> Option<u32> {
        match verdict {
            Verdict::Balance(slot) => Some(slot.backend),
            Verdict::Pass => None,
            Verdict::Refuse(reason) => panic!("refused: {reason:?}"),
        }
    }

    /// Every event before every read: the answer is that of before or of after, never a mixture,
    /// and what happened before the last read counts.
    #[test]
    fn every_interleaving() {
        for (event, after) in [
            (Event::Switch, Some(2)),
            (Event::Remove, None),
            (Event::Replace, Some(2)),
            (Event::Reuse, None),
        ] {
            let mut late = 0;
            for before in 0..8 {
                let racing = Racing::new(event, before);
                let answer = backend(translate(&racing, &key(1)));
                if racing.reads.get() > before {
                    assert_eq!(answer, after, "{event:?} before read {before}");
                } else {
                    assert_eq!(answer, Some(1), "{event:?} after the last read");
                    late += 1;
                }
            }
            assert!((1..8).contains(&late), "{event:?} was not tried before and after");
        }
    }

    #[test]
    fn gives_up_in_bounded_time() {
        let racing = Racing::new(Event::Remove, u32::MAX);
        racing.services[0].generation.store(0);
        assert_eq!(translate(&racing, &key(1)), Verdict::Refuse(Reason::Contended));
    }

    proptest! {
        /// A hash element that was reused, or is half overwritten, names any record with any
        /// generation. The connect never ends up at another frontend's backend.
        #[test]
        fn a_reused_element_never_misleads(service in 0u32..5, generation in 0u64..12) {
            let racing = Racing::new(Event::Remove, u32::MAX);
            racing.glitch.set(Some(value(service, generation)));
            prop_assert!(matches!(backend(translate(&racing, &key(1))), Some(1 | 2)));
        }
    }
}
