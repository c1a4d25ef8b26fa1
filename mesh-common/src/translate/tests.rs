//! Decisions while the tables change, and while backends are out.

mod ejected;

use core::cell::Cell;
use core::net::Ipv4Addr;

use proptest::prelude::*;

use super::*;
use crate::{Half, Protocol, Table, Word};

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
    /// Another connect takes the token of backend 1's try, or notes that it was answered.
    Enter,
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
    /// By backend.
    ejections: [Cell<Ejection>; 4],
    /// How often all backends were out.
    all_ejected: Cell<u32>,
}

/// The time, in ticks.
const NOW: u64 = 1000;

const POLICY: Policy = Policy::new(1, 10, 60, 100);

fn client(n: u64) -> Client {
    Client::of_cgroup(n)
}

/// Out for all since then, for ten ticks.
fn ejected(since: u64) -> Ejection {
    let suspected = Ejection::NONE.fail(POLICY, client(1), Token::NONE, since);
    suspected.and_then(|word| word.fail(POLICY, client(2), Token::NONE, since)).expect("ejected")
}

/// What `enter` in mesh-ebpf/src/maps.rs does: the next word, and what it answers.
fn enters(known: Ejection, client: Client) -> Option<(Ejection, Token)> {
    let next = match known.admits(client, NOW) {
        Admission::In => return Some((known, Token::NONE)),
        Admission::Try => known.take(NOW),
        Admission::Answered => known.recover(POLICY, NOW),
        Admission::Out => return None,
    };
    Some((next, next.token()))
}

fn value(service: u32, generation: u64) -> FrontendValue {
    FrontendValue { service, pad: 0, generation }
}

impl Racing {
    fn new(event: Event, before: u32) -> Self {
        let service = |n, generation, base| Service {
            table: Word::new(Table::slots(base, 1).0),
            generation: Word::new(generation),
            policy: Word::new(POLICY.0),
            key: key(n),
            rate: Half::default(),
            position: Word::new(0),
            affinity: Word::new(0),
        };
        Self {
            event,
            before,
            reads: Cell::new(0),
            first: Cell::new(Some(value(0, 7))),
            glitch: Cell::new(None),
            services: [service(1, 7, 1), service(2, 8, 3), service(1, 9, 2)],
            slots: [slot(0), slot(1), slot(2), slot(3)],
            ejections: Default::default(),
            all_ejected: Cell::new(0),
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
                Event::Enter => {
                    let [_, ejection, ..] = &self.ejections;
                    let (next, _) = enters(ejection.get(), client(1)).expect("the first");
                    ejection.set(next);
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

    fn ejection(&self, backend: u32) -> Ejection {
        self.tick();
        self.ejections[backend as usize].get()
    }

    fn active(&self, _: u32) -> u64 {
        0
    }

    fn position(&self, _: u32) -> u64 {
        0
    }

    fn client(&self) -> Client {
        client(1)
    }

    fn now(&self) -> u64 {
        NOW
    }

    fn all_ejected(&self) {
        self.all_ejected.set(self.all_ejected.get() + 1);
    }
}

impl Caller for Racing {
    fn chance(&self) -> u32 {
        self.random()
    }

    fn key(&self, _: Algorithm) -> u64 {
        self.chance().into()
    }

    fn enter(&self, backend: u32, policy: Policy) -> Option<Token> {
        // What happens to the tables from here on comes too late for this connect.
        if matches!(self.event, Event::Enter) {
            self.tick();
        }
        assert_eq!(policy, POLICY);
        let ejection = &self.ejections[backend as usize];
        let (next, token) = enters(ejection.get(), self.client())?;
        ejection.set(next);
        Some(token)
    }
}

fn backend(verdict: Verdict<'_>) -> Option<u32> {
    match verdict {
        Verdict::Balance(choice) => Some(choice.slot.backend),
        Verdict::Pass => None,
        Verdict::Refuse(reason, _) => panic!("refused: {reason:?}"),
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
            let answer = backend(translate(&racing, &racing, &key(1)));
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

/// The same where each backend is to be tried, or has been: the token is that of the backend that
/// is used, and nothing of any other is changed.
#[test]
fn every_interleaving_of_a_try() {
    let to_try = ejected(NOW - 10);
    for known in [to_try, ejected(NOW - 500).take(NOW - 400)] {
        for (event, after) in [
            (Event::Switch, Some(2)),
            (Event::Remove, None),
            (Event::Replace, Some(2)),
            (Event::Reuse, None),
            (Event::Enter, Some(1)),
        ] {
            let mut late = 0;
            for before in 0..16 {
                let racing = Racing::new(event, before);
                racing.ejections.iter().for_each(|ejection| ejection.set(known));
                let verdict = translate(&racing, &racing, &key(1));
                let token = match verdict {
                    Verdict::Balance(choice) => choice.token,
                    _ => Token::NONE,
                };
                let answer = backend(verdict);
                let in_time = racing.reads.get() > before;
                late += u32::from(!in_time);
                let faster = matches!(event, Event::Enter) && in_time;
                assert_eq!(answer, if in_time { after } else { Some(1) }, "{event:?} at {before}");
                // The other one tries it: it is out. The other one noted that it is in: it is.
                let tries = known == to_try;
                let takes = tries && answer.is_some() && !faster;
                assert_eq!(token.is_some(), takes, "{event:?} at {before}");
                assert_eq!(racing.all_ejected.get() > 0, tries && faster, "{event:?} at {before}");
                for (id, ejection) in (0..).zip(&racing.ejections) {
                    let entered = answer == Some(id);
                    let (next, expected) = enters(known, client(1)).expect("may enter");
                    assert_eq!(ejection.get(), if entered { next } else { known }, "{id}");
                    assert!(!(entered && takes) || token == expected, "{event:?} at {before}");
                }
            }
            assert!((1..16).contains(&late), "{event:?} was not tried before and after");
        }
    }
}

/// An element that was reused for an address alone, half of which was read: it names the record as before,
/// and the generation that a retired one has.
#[test]
fn a_retired_record_is_nobodys() {
    let racing = Racing::new(Event::Remove, u32::MAX);
    racing.first.set(None);
    racing.services[0].generation.store(0);
    racing.glitch.set(Some(value(0, 0)));
    assert_eq!(backend(translate(&racing, &racing, &key(1))), None);
}

#[test]
fn gives_up_in_bounded_time() {
    let racing = Racing::new(Event::Remove, u32::MAX);
    racing.services[0].generation.store(0);
    assert_eq!(translate(&racing, &racing, &key(1)), Verdict::Refuse(Reason::Contended, u32::MAX));
}

proptest! {
    /// A hash element that was reused, or is half overwritten, names any record with any
    /// generation. The connect never ends up at another frontend's backend.
    #[test]
    fn a_reused_element_never_misleads(service in 0u32..5, generation in 0u64..12) {
        let racing = Racing::new(Event::Remove, u32::MAX);
        racing.glitch.set(Some(value(service, generation)));
        prop_assert!(matches!(backend(translate(&racing, &racing, &key(1))), Some(1 | 2)));
    }
}

/// Of what is refused, only a datagram socket's connect to a service without that port goes on.
#[test]
fn only_a_service_without_that_port_is_probed() {
    for reason in Reason::ALL {
        for (protocol, probes) in
            [(Protocol::Udp, reason == Reason::NoPort), (Protocol::Tcp, false)]
        {
            let key = FrontendKey::new(key(1).addr, 0, protocol);
            assert_eq!(is_probe(&key, reason), probes, "{reason:?} {protocol:?}");
        }
    }
}
