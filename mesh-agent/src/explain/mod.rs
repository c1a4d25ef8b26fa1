//! What a connect would do, and why, in plain words.
//!
//! The decision itself is [`mesh_common::translate()`], the same code that the kernel runs, on the
//! agent's view of the same tables; this module only watches it and says what it saw.

pub mod client;
mod words;

use std::cell::Cell;
use std::cmp::Ordering;
use std::net::SocketAddr;

use mesh_common::latency::{self, Candidate};
use mesh_common::translate::is_probe;
use mesh_common::{
    Algorithm, Caller, Client, Ejection, FrontendKey, FrontendValue, Policy, Protocol, Service,
    Slot, State, Table, Tables, Token, Verdict, maglev, translate,
};

use crate::api::types;
use crate::model::Affinity;
pub use client::{ClientView, UnknownClient};

/// A connect that somebody asks about.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Query {
    /// What is dialled.
    pub address: SocketAddr,
    /// With which protocol.
    pub protocol: Protocol,
}

/// What people know of the numbers in the tables.
pub trait Names {
    /// Who owns a frontend; nothing when no service has it.
    fn frontend(&self, key: &FrontendKey) -> Option<FrontendInfo>;
    /// The key of the unit that this cgroup is part of, if the programs know it.
    fn unit(&self, cgroup: u64) -> Option<u64>;
}

/// A frontend as people know it.
#[derive(Clone, PartialEq, Debug)]
pub struct FrontendInfo {
    /// The service.
    pub service: String,
    /// How it balances.
    pub algorithm: String,
    /// Whether its clients keep their endpoints.
    pub affinity: Option<Affinity>,
    /// Every endpoint of the service behind this frontend, also those that take no connection.
    pub backends: Vec<BackendInfo>,
}

/// A backend as people know it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BackendInfo {
    /// Where it listens.
    pub address: SocketAddr,
    /// Its state.
    pub state: State,
    /// Why it is in that state; may be empty.
    pub reason: String,
    /// Its weight.
    pub weight: u32,
    /// What the kernel has seen of it.
    pub ejection: Ejection,
}

/// Explains what a connect from `client` would do; without a client, what one from a socket made
/// inside the balanced cgroup would do.
///
/// `answer` is `None` when the connect is not touched: the client is not balanced, or the address
/// is no service.
pub fn explain(
    query: Query,
    client: Option<&ClientView>,
    tables: &impl Tables,
    names: &impl Names,
) -> types::Explanation {
    let key = FrontendKey::new(query.address.ip().into(), query.address.port(), query.protocol);
    let info = names.frontend(&key);
    let mut story = words::Story::new(query, client, info);
    if !client.is_none_or(|client| client.inside) {
        return story.not_balanced();
    }
    if client.is_some_and(|client| client.excluded) {
        return story.excluded();
    }
    let cgroup = client.and_then(|client| client.id);
    let id = cgroup.map_or(Client::NOBODY, Client::of_cgroup);
    let unit = cgroup.and_then(|cgroup| names.unit(cgroup));
    story.knows_unit = unit.is_some();
    let traced = Traced::new(tables, cgroup, unit);
    let verdict = translate(&traced, &traced, &key);
    story.looked_up(&traced.seen());
    match verdict {
        Verdict::Pass => story.passed(),
        Verdict::Balance(choice) => {
            let shares = traced.shares();
            let algorithm = traced.seen().table.unwrap_or_default().algorithm();
            story.balanced(algorithm, choice.slot, &shares, id)
        }
        Verdict::Refuse(reason, _) if is_probe(&key, reason) => story.passed_as_probe(reason),
        Verdict::Refuse(reason, _) => story.refused(reason),
    }
}

/// For so many backends, each is compared with each other; with more, each by itself is about right.
const PAIRS: usize = 1_024;

/// What a run of the decision read.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
struct Seen {
    /// The frontend's entry, at the last attempt.
    frontend: Option<FrontendValue>,
    /// Whether the address is virtual, if that was asked.
    is_virtual: Option<bool>,
    /// Attempts that found the tables changed.
    retries: u32,
    /// How many turns were looked at.
    turns: u64,
    /// The service's table, at the time of the last look at its record.
    table: Option<Table>,
}

/// Tables that note what is read from them.
struct Traced<'a, T> {
    tables: &'a T,
    client: Client,
    /// The client's cgroup, if it is known.
    cgroup: Option<u64>,
    /// The key of its unit, if that is known.
    unit: Option<u64>,
    seen: Cell<Seen>,
}

impl<'a, T: Tables> Traced<'a, T> {
    fn new(tables: &'a T, cgroup: Option<u64>, unit: Option<u64>) -> Self {
        let client = cgroup.map_or(Client::NOBODY, Client::of_cgroup);
        Self { tables, client, cgroup, unit, seen: Cell::default() }
    }

    /// The client's key of a consistent hash, if it is known who it is.
    fn known_key(&self, by: Algorithm) -> Option<u64> {
        match by {
            Algorithm::HashClient => self.cgroup,
            Algorithm::HashUnit => self.unit.or(self.cgroup),
            _ => None,
        }
    }

    fn seen(&self) -> Seen {
        self.seen.get()
    }

    fn note(&self, change: impl FnOnce(&mut Seen)) {
        let mut seen = self.seen.get();
        change(&mut seen);
        self.seen.set(seen);
    }

    /// Each slot of the table with the probability that a connect ends at it: that a draw does, or,
    /// when some are out for this client, that a draw does which ends at one that is not. What is
    /// due for a try is left out: one connect gets it. In turn each gets that share of all connects.
    ///
    /// A column of an alias table takes `1 / len` of all draws; of these its own slot gets what
    /// lies below the threshold, and its alias the rest.
    fn shares(&self) -> Vec<(Slot, f64)> {
        let Some(table) = self.seen().table else { return Vec::new() };
        let slots: Vec<Slot> = (0..table.len())
            .filter_map(|column| self.tables.slot(table.base().checked_add(column)?).copied())
            .collect();
        let mut shares: Vec<_> = slots.iter().map(|slot| (*slot, 0.0)).collect();
        let whole = 2f64.powi(32);
        let is_in = |slot: &Slot| !self.tables.ejection(slot.backend).is_out_for(self.client);
        if table.algorithm().is_hash() {
            let hashed = self.hashed(table, shares.clone());
            // What it leads to may be out; then it is drawn as by chance.
            if hashed.iter().all(|(slot, share)| *share == 0.0 || is_in(slot)) {
                return hashed;
            }
        }
        for (column, slot) in slots.iter().enumerate() {
            // A column that is its own alias is all its own, see `mesh_common::alias`.
            let own = f64::from(slot.threshold) / whole;
            let len = f64::from(table.len());
            shares[column].1 += own / len;
            if let Some(alias) = shares.get_mut(slot.alias as usize) {
                alias.1 += (1.0 - own) / len;
            }
        }
        if matches!(table.algorithm(), Algorithm::LeastConnections | Algorithm::Latency) {
            self.choose_of_two(&mut shares);
        }
        let usable: f64 =
            shares.iter().filter(|(slot, _)| is_in(slot)).map(|(_, share)| share).sum();
        if usable > 0.0 {
            for (slot, share) in &mut shares {
                *share = if is_in(slot) { *share / usable } else { 0.0 };
            }
        }
        shares
    }
}

impl<T: Tables> Traced<'_, T> {
    /// With a consistent hash: all for the backend of this client, if it is known who it is; otherwise
    /// the part of all clients that each has.
    fn hashed(&self, table: Table, mut shares: Vec<(Slot, f64)>) -> Vec<(Slot, f64)> {
        let known = self.known_key(table.algorithm());
        let entries = table.size().entries();
        let first = table.base().wrapping_add(table.len());
        let columns: Vec<u32> = match known {
            Some(key) => vec![maglev::look_up(self.tables, table, key) - table.base()],
            None => (0..entries)
                .filter_map(|entry| {
                    let slot = self.tables.slot(first.wrapping_add(entry / maglev::PER_SLOT))?;
                    Some(u32::from(slot.entry(entry)))
                })
                .collect(),
        };
        for column in &columns {
            if let Some(share) = shares.get_mut(*column as usize) {
                share.1 += 1.0 / columns.len() as f64;
            }
        }
        shares
    }

    fn candidate(&self, slot: &Slot) -> Candidate {
        let (latency, active) =
            (self.tables.latency(slot.backend), self.tables.active(slot.backend));
        Candidate { latency, active, weight: slot.weight }
    }

    /// From the probabilities of a draw those of the better one of two: a slot is chosen when it is
    /// drawn first and the second is no better, or second and better than the first. When both are
    /// out for this client, it is drawn again, by weight.
    fn choose_of_two(&self, shares: &mut [(Slot, f64)]) {
        let is_out = |slot: &Slot| self.tables.ejection(slot.backend).is_out_for(self.client);
        let by_latency = self.seen().table.unwrap_or_default().algorithm() == Algorithm::Latency;
        let candidates: Vec<_> = shares.iter().map(|(slot, _)| self.candidate(slot)).collect();
        let (mut order, out): (Vec<usize>, Vec<usize>) =
            (0..shares.len()).partition(|&index| !is_out(&shares[index].0));
        if order.is_empty() {
            return;
        }
        let total = |indices: &[usize], shares: &[(Slot, f64)]| -> f64 {
            indices.iter().map(|&index| shares[index].1).sum()
        };
        let (inside, outside) = (total(&order, shares), total(&out, shares));
        let again = outside * outside / inside;
        if by_latency && candidates.len() <= PAIRS {
            let drawn: Vec<f64> = shares.iter().map(|(_, share)| *share).collect();
            for &index in &order {
                let mut factor = 2.0 * outside + again;
                for &other in &order {
                    factor += match latency::compare(candidates[index], candidates[other]) {
                        Ordering::Less => 2.0 * drawn[other],
                        Ordering::Equal => drawn[other],
                        Ordering::Greater => 0.0,
                    };
                }
                shares[index].1 *= factor;
            }
            return;
        }
        let heaviest = candidates.iter().map(|of| of.weight).max().unwrap_or(1).max(1);
        let load = |of: &Candidate| {
            let load = of.active as f64 / f64::from(of.weight.max(1));
            // As if each were compared with the heaviest.
            let more = 1.0 / f64::from(heaviest);
            if by_latency { of.latency as f64 * (load + more) } else { load }
        };
        let loads: Vec<f64> = candidates.iter().map(load).collect();
        let compare = |a: &usize, b: &usize| loads[*a].total_cmp(&loads[*b]);
        order.sort_by(compare);
        // What is drawn at all that is heavier than what is looked at, or out.
        let mut heavier = inside + outside;
        for equal in order.chunk_by(|a, b| compare(a, b).is_eq()) {
            let same = total(equal, shares);
            heavier -= same;
            for &index in equal {
                shares[index].1 *= same + 2.0 * heavier + again;
            }
        }
    }
}

impl<T: Tables> Tables for Traced<'_, T> {
    fn frontend(&self, key: &FrontendKey) -> Option<FrontendValue> {
        let value = self.tables.frontend(key);
        // Entries of protocol 0 only say that the address belongs to somebody.
        if key.protocol != 0 {
            self.note(|seen| seen.frontend = value);
        }
        value
    }

    fn service(&self, index: u32) -> Option<&Service> {
        let service = self.tables.service(index);
        self.note(|seen| seen.table = service.map(Service::table));
        service
    }

    fn slot(&self, index: u32) -> Option<&Slot> {
        self.tables.slot(index)
    }

    fn is_virtual(&self, addr: &mesh_common::Addr) -> bool {
        let answer = self.tables.is_virtual(addr);
        self.note(|seen| seen.is_virtual = Some(answer));
        answer
    }

    fn random(&self) -> u32 {
        self.tables.random()
    }

    fn ejection(&self, backend: u32) -> Ejection {
        self.tables.ejection(backend)
    }

    fn latency(&self, backend: u32) -> u64 {
        self.tables.latency(backend)
    }

    fn active(&self, backend: u32) -> u64 {
        self.tables.active(backend)
    }

    fn position(&self, service: u32) -> u64 {
        // An attempt that names no ticket goes on to the next.
        let tried = self.seen().turns;
        self.note(|seen| seen.turns += 1);
        self.tables.position(service).wrapping_add(tried)
    }

    fn client(&self) -> Client {
        self.client
    }

    fn now(&self) -> u64 {
        self.tables.now()
    }

    fn retried(&self) {
        self.note(|seen| seen.retries += 1);
        self.tables.retried();
    }
}

impl<T: Tables> Caller for Traced<'_, T> {
    fn chance(&self) -> u32 {
        self.tables.random()
    }

    fn key(&self, by: Algorithm) -> u64 {
        self.known_key(by).unwrap_or_else(|| self.tables.random().into())
    }

    /// Whoever only asks takes nothing.
    fn enter(&self, _: u32, _: Policy) -> Option<Token> {
        Some(Token::NONE)
    }
}

#[cfg(test)]
mod tests;
