//! What was known of failures of backends that were removed: an endpoint that comes back has it again.
//!
//! It is read when a service has let go of the backend, after its tables lead there no more, and is in the
//! counters of the next life before any table names that. A service's own: another one with the same endpoint
//! has found out for itself. It lasts until the agent ends.

use std::collections::{BTreeMap, HashMap, HashSet};

use mesh_common::ejection::{Phase, ticks};
use mesh_common::{Client, Ejection, Policy};

use super::{Held, LetGo, Reconciler};
use crate::compile::{BackendKey, Rows, TableKey, Tables};
use crate::dataplane::clock;
use crate::dataplane::maps::Maps;
use crate::model::ServiceName;

/// How many are remembered; of more, those that went first are forgotten.
const REMEMBERED: usize = 4_096;

/// What is known of one that is gone.
#[derive(Clone, Copy, Debug)]
struct Known {
    ejection: Ejection,
    /// By the rules of the time when it went.
    policy: Policy,
    /// Its place in the order in which they went.
    number: u64,
}

/// Backends that are gone, of which something is known.
#[derive(Debug, Default)]
pub(super) struct Absent {
    of: HashMap<ServiceName, BTreeMap<BackendKey, Known>>,
    order: BTreeMap<u64, (ServiceName, BackendKey)>,
    last: u64,
    /// Backends that are let go of in a moment, and whose place another one has taken already.
    replaced: HashSet<(ServiceName, BackendKey)>,
}

/// A backend that has come back, and would be out.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Returned {
    /// The service.
    pub service: ServiceName,
    /// Which of its backends.
    pub key: BackendKey,
    /// As it was when it went.
    pub ejection: Ejection,
    /// It is in all the same: as many as may be are out.
    pub is_spared: bool,
}

/// What a backend begins its life with.
#[derive(Clone, Copy, Debug)]
pub(super) struct Start {
    /// What is known of it.
    pub(super) ejection: Ejection,
    /// Where that was kept, if it was, and what it was there.
    from: Option<(BackendKey, Ejection)>,
}

/// How many backends of a table are out for all, and for anybody.
pub(super) type Outs = HashMap<TableKey, [u64; 2]>;

// === impl Absent ===

impl Absent {
    fn note(&mut self, gone: &LetGo, ejection: Ejection, policy: Policy, now: u64) {
        self.forget(&gone.service, &gone.key);
        if self.replaced.remove(&(gone.service.clone(), gone.key)) {
            return;
        }
        let ejection = ejection.leave(policy, now);
        if ejection.arrive(policy, now) == Ejection::NONE {
            return;
        }
        self.last += 1;
        let number = self.last;
        let known = Known { ejection, policy, number };
        self.of.entry(gone.service.clone()).or_default().insert(gone.key, known);
        self.order.insert(number, (gone.service.clone(), gone.key));
        while let Some((_, (name, key))) = self.order.first_key_value() {
            let is_over = self.get(name, key, now).is_none();
            if !is_over && self.order.len() <= REMEMBERED {
                return;
            }
            let (name, key) = (name.clone(), *key);
            self.forget(&name, &key);
        }
    }

    fn get(&self, name: &ServiceName, key: &BackendKey, now: u64) -> Option<Ejection> {
        self.of.get(name)?.get(key).and_then(|known| known.now(now))
    }

    /// Whether there was something.
    fn forget(&mut self, name: &ServiceName, key: &BackendKey) -> bool {
        let Some(all) = self.of.get_mut(name) else { return false };
        let known = all.remove(key);
        if all.is_empty() {
            self.of.remove(name);
        }
        known.is_some_and(|known| self.order.remove(&known.number).is_some())
    }

    /// Forgets all of a service.
    pub(super) fn forget_all(&mut self, name: &ServiceName) {
        for known in self.of.remove(name).into_iter().flat_map(BTreeMap::into_values) {
            self.order.remove(&known.number);
        }
    }

    /// A service is called something else, and has what it had under its former name.
    pub(super) fn rename(&mut self, former: &ServiceName, name: &ServiceName) {
        self.forget_all(name);
        let Some(known) = self.of.remove(former) else { return };
        for (key, known) in &known {
            self.order.insert(known.number, (name.clone(), *key));
        }
        self.of.insert(name.clone(), known);
    }
}

impl Known {
    /// What counts of it now.
    fn now(&self, now: u64) -> Option<Ejection> {
        Some(self.ejection.arrive(self.policy, now)).filter(|known| *known != Ejection::NONE)
    }
}

// === impl Reconciler ===

impl<M: Maps> Reconciler<M> {
    /// Keeps what is known of a backend that a service has just let go of.
    pub(super) fn remember(&mut self, gone: &LetGo, policy: Policy) {
        let known = self.maps.counts(gone.id).ejection;
        self.absent.note(gone, known, policy, ticks(clock::monotonic()));
    }

    /// What a backend begins with that a service has not had, or has again.
    pub(super) fn start(
        &self,
        name: &ServiceName,
        held: &Held,
        wanted: &Tables,
        place: usize,
        outs: &mut Outs,
    ) -> Start {
        let policy = wanted.rules.policy;
        let key = wanted.backends[place].key;
        let from = match policy {
            Policy::OFF => None,
            _ => self.recall(name, held, wanted, key, ticks(clock::monotonic())),
        };
        let Some((_, known)) = from else { return Start { ejection: Ejection::NONE, from } };
        let ejection = match self.has_room(held, wanted, place, known, outs) {
            true => known,
            false => known.spare(policy, ticks(clock::monotonic())),
        };
        Start { ejection, from }
    }

    /// What is known of an endpoint, and for which of the service's backends that was kept: for this one, or
    /// for one of a port that the service has no more.
    fn recall(
        &self,
        name: &ServiceName,
        held: &Held,
        wanted: &Tables,
        key: BackendKey,
        now: u64,
    ) -> Option<(BackendKey, Ejection)> {
        if let Some(known) = self.absent.get(name, &key, now) {
            return Some((key, known));
        }
        let is_other = |other: &BackendKey| {
            let of_port =
                |(at, _): &(TableKey, Rows)| (at.port, at.protocol) == (other.port, other.protocol);
            (other.address, other.protocol) == (key.address, key.protocol)
                && !wanted.tables.iter().any(of_port)
        };
        // One that is let go of in a moment, when this one is in its table.
        let ports = held.tables.keys().map(|table| BackendKey { port: table.port, ..key });
        let leaving = ports.filter(is_other).find_map(|other| {
            let known = self.maps.counts(held.backends.get(&other)?.id).ejection;
            let policy = held.rules.policy;
            Some((other, known.leave(policy, now).arrive(policy, now)))
        });
        leaving.filter(|(_, known)| *known != Ejection::NONE).or_else(|| {
            let mut others = self.absent.of.get(name)?.iter().filter(|(other, _)| is_other(other));
            others.find_map(|(other, known)| Some((*other, known.now(now)?)))
        })
    }

    /// Whether as many may be out of the table that leads to a backend, if one does. Counts it, if it is.
    fn has_room(
        &self,
        held: &Held,
        wanted: &Tables,
        place: usize,
        known: Ejection,
        outs: &mut Outs,
    ) -> bool {
        // Who is out for all comes before what single clients suspect, as for the kernel's own verdicts.
        let (client, kind) = match known.phase() {
            Phase::In => return true,
            Phase::Ejected | Phase::Trying => (Client::NOBODY, 0),
            Phase::Suspected | Phase::SuspectTry => (Client::SEVERAL, 1),
        };
        let BackendKey { port, protocol, address } = wanted.backends[place].key;
        let table = TableKey { port, protocol, v4: address.is_ipv4() };
        let rows = wanted.tables.iter().find(|(key, _)| *key == table);
        let Some((_, Rows::Candidates(rows))) = rows else { return true };
        if !rows.iter().any(|row| row.place == place) {
            return true;
        }
        let counted = outs.entry(table).or_insert_with(|| {
            let ids =
                rows.iter().filter_map(|row| held.backends.get(&wanted.backends[row.place].key));
            let known: Vec<_> = ids.map(|held| self.maps.counts(held.id).ejection).collect();
            let out = |client| known.iter().filter(|known| known.is_out_for(client)).count() as u64;
            [Client::NOBODY, Client::SEVERAL].map(out)
        });
        let has_room = (counted[kind] + 1) * 100 <= wanted.rules.policy.share() * rows.len() as u64;
        if has_room {
            counted[0] += u64::from(client == Client::NOBODY);
            counted[1] += 1;
        }
        has_room
    }

    /// A backend has begun its life.
    pub(super) fn started(&mut self, service: &ServiceName, key: BackendKey, start: Start) {
        let Some((from, known)) = start.from else { return };
        if !self.absent.forget(service, &from) {
            self.absent.replaced.insert((service.clone(), from));
        }
        if !known.is_in() {
            let (service, is_spared) = (service.clone(), start.ejection != known);
            self.returned.push(Returned { service, key, ejection: known, is_spared });
        }
    }

    /// The backends that have come back since this was asked last, and would be out.
    pub fn take_returned(&mut self) -> Vec<Returned> {
        std::mem::take(&mut self.returned)
    }

    /// Backends that a service does not have, and that would be out for all if it had them again.
    pub fn absent(&self, name: &ServiceName) -> impl Iterator<Item = BackendKey> {
        let now = ticks(clock::monotonic());
        let known = self.absent.of.get(name).into_iter().flatten();
        let is_out = move |known: &Known| {
            known.now(now).is_some_and(|known| known.is_out_for(Client::NOBODY))
        };
        known.filter(move |(_, known)| is_out(known)).map(|(key, _)| *key)
    }
}

#[cfg(test)]
mod tests {
    use mesh_common::{Protocol, Token};

    use super::*;

    fn gone(n: usize) -> LetGo {
        let port = u16::try_from(n).expect("few");
        let address = ([10, 0, 0, 1], port).into();
        let key = BackendKey { port: 80, protocol: Protocol::Tcp, address };
        LetGo { service: ServiceName::new("s"), key, id: 0, generation: 1 }
    }

    /// So many ticks, counted from 1,000 on.
    fn note(absent: &mut Absent, n: usize, ticks: u32) {
        let policy = Policy::new(1, ticks, ticks, 50);
        let out = Ejection::NONE.fail(policy, Client::of_cgroup(7), Token::NONE, 1_000);
        absent.note(&gone(n), out.expect("a change"), policy, 1_000);
    }

    fn has(absent: &Absent, n: usize, now: u64) -> bool {
        absent.get(&gone(n).service, &gone(n).key, now).is_some()
    }

    #[test]
    fn those_that_went_first_are_forgotten_first() {
        let mut absent = Absent::default();
        for n in 0..REMEMBERED + 10 {
            note(&mut absent, n, 60);
        }
        assert_eq!((absent.order.len(), absent.of.len()), (REMEMBERED, 1));
        assert!(!has(&absent, 9, 1_000) && has(&absent, 10, 1_000));
        // The same one again takes no more room, and is the last.
        note(&mut absent, 10, 60);
        note(&mut absent, 0, 60);
        assert_eq!(absent.order.len(), REMEMBERED);
        assert!(!has(&absent, 11, 1_000) && has(&absent, 10, 1_000));
        absent.forget_all(&gone(0).service);
        assert!(absent.order.is_empty() && absent.of.is_empty());
    }

    #[test]
    fn what_has_ended_makes_room() {
        let mut absent = Absent::default();
        note(&mut absent, 1, 60);
        note(&mut absent, 2, 600);
        assert!(has(&absent, 1, 1_119) && !has(&absent, 1, 1_120));
        absent.note(&gone(3), Ejection::NONE, Policy::OFF, 2_000);
        note(&mut absent, 4, 6_000);
        assert_eq!(absent.order.len(), 3);
        let late = Policy::new(1, 60, 60, 50);
        let out = Ejection::NONE.fail(late, Client::of_cgroup(7), Token::NONE, 1_900);
        absent.note(&gone(5), out.expect("a change"), late, 1_950);
        assert_eq!(absent.order.len(), 3, "the first has gone");
    }
}
