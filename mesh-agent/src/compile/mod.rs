//! From a service and the states of its endpoints to tables: a pure function, the same bytes for
//! the same input.

mod candidates;

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::Duration;

use mesh_common::alias::{self, Column, Entry};
use mesh_common::ejection::TICK_SHIFT;
use mesh_common::maglev::{self, Size, Turn};
use mesh_common::{
    Affinity, Algorithm, FrontendKey, Policy, Protocol, Rate, Reason, Slot, State, balance,
};

use crate::model::{self, EjectionPolicy, Endpoint, Service, ServicePort};
use candidates::Chosen;

/// What distinguishes a backend from the others of its service.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct BackendKey {
    /// The service port that it serves.
    pub port: u16,
    /// Transport protocol.
    pub protocol: Protocol,
    /// Where it listens.
    pub address: SocketAddr,
}

/// A backend as it is wanted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Backend {
    /// Which one.
    pub key: BackendKey,
    /// Weight.
    pub weight: u16,
    /// State.
    pub state: State,
    /// Whether a table in force leads there.
    pub listed: bool,
    /// Whether somebody has it drained by command.
    pub by_command: bool,
}

/// Which table of a service: endpoints are balanced within their address family.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct TableKey {
    /// The service port.
    pub port: u16,
    /// Transport protocol.
    pub protocol: Protocol,
    /// IPv4, or IPv6.
    pub v4: bool,
}

/// What a table holds.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Rows {
    /// Nothing: connects are refused.
    Refuse(Reason),
    /// One slot for each of these: first those with a weight, each part in the order of their places.
    Candidates(Vec<Candidate>),
}

/// A slot of a table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Candidate {
    /// Its place in [`Tables::backends`].
    pub place: usize,
    /// Its weight in this table. 0: it is used only when all others are out.
    pub weight: u16,
}

/// What is known of an endpoint.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Condition {
    /// What its checks say, or whether it drains.
    pub state: State,
    /// Whether the kernel has it out for all. It stays in its table all the same: the kernel passes it
    /// by, and tries it.
    pub is_out: bool,
    /// Its part of its weight, in thousandths: less than 1,000 for a while after it came
    /// (slow start).
    pub ramp: u16,
    /// Whether somebody has it drained by command, for the agent that comes after this one.
    pub by_command: bool,
}

impl Condition {
    /// Of an endpoint that has been in this state for long.
    #[must_use]
    pub const fn settled(state: State) -> Self {
        Self { state, is_out: false, ramp: Self::FULL, by_command: false }
    }

    /// All of its weight.
    pub const FULL: u16 = 1_000;
}

/// Where this node is.
#[derive(Clone, Copy, Debug, Default)]
pub struct Here<'a> {
    /// Its name.
    pub node: &'a str,
    /// Its zone.
    pub zone: Option<&'a str>,
    /// Nanoseconds of a tick of its kernel.
    pub tick: u64,
}

/// All that a service is compiled from.
#[derive(Clone, Copy, Debug)]
pub struct Input<'a> {
    /// The service.
    pub service: &'a Service,
    /// The frontends that it owns; others may be shadowed.
    pub frontends: &'a [FrontendKey],
    /// The service that it falls back to, if that is defined.
    pub fallback: Option<&'a Service>,
    /// Where this node is.
    pub here: Here<'a>,
    /// Which group each table used before, as [`Tables::groups`] said.
    pub before: &'a BTreeMap<TableKey, u8>,
    /// Which source defines it.
    pub source: u64,
}

impl Rows {
    /// Number of slots.
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            Self::Refuse(_) => 0,
            Self::Candidates(candidates) => candidates.len(),
        }
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// All that the kernel is to hold for one service; the default is nothing.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Tables {
    /// Every backend, in an order that depends on nothing else, also those that no table uses now.
    pub backends: Vec<Backend>,
    /// The tables, in the order of their keys.
    pub tables: Vec<(TableKey, Rows)>,
    /// What clients dial, and the place of its table in `tables`.
    pub frontends: Vec<(FrontendKey, usize)>,
    /// What else the kernel programs go by.
    pub rules: Rules,
    /// How a backend of a table is chosen.
    pub algorithm: Algorithm,
    /// Which group of endpoints each table uses, where it is not the first ([`Endpoint::priority`], and
    /// behind all of those the [`FALLBACK`]).
    pub groups: BTreeMap<TableKey, u8>,
    /// Tables that use endpoints whose checks fail, because too few others are usable.
    pub panics: BTreeSet<TableKey>,
    /// Which source defines it, as [`crate::config::Source::key`] tells them apart.
    pub source: u64,
}

impl Tables {
    /// Whether the kernel is to hold nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.backends.is_empty() && self.tables.is_empty() && self.frontends.is_empty()
    }
}

/// What a service's record says besides its table.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Rules {
    /// When backends are ejected.
    pub policy: Policy,
    /// The share of failures that ejects them too.
    pub rate: Rate,
    /// Whether clients keep their backends.
    pub affinity: Affinity,
}

/// The group of the endpoints of the service that is fallen back to.
pub const FALLBACK: u8 = u8::MAX;

/// Where an endpoint listens for a service port.
#[must_use]
pub fn target(endpoint: &Endpoint, port: &ServicePort) -> SocketAddr {
    SocketAddr::new(endpoint.address, endpoint.port.unwrap_or(port.target))
}

/// Compiles a service. `condition` tells what is known of an endpoint, given by its address, of the
/// service itself or of the one that it falls back to.
pub fn compile(input: Input<'_>, condition: impl Fn(&Service, SocketAddr) -> Condition) -> Tables {
    let Input { service, frontends, here, .. } = input;
    let own = service.ports.iter().map(|port| (service, port, port, None));
    // Of the other service, the same port.
    let other = service.ports.iter().filter_map(|port| {
        let other = input.fallback?;
        let same = |p: &&ServicePort| (p.port, p.protocol) == (port.port, port.protocol);
        Some((other, port, other.ports.iter().find(same)?, Some(FALLBACK)))
    });
    let endpoints = own.chain(other).flat_map(|(of, port, listens, group)| {
        of.endpoints.iter().map(move |endpoint| (of, port, listens, group, endpoint))
    });
    let mut found: Vec<Found> = endpoints
        .map(|(of, port, listens, group, endpoint)| {
            let address = target(endpoint, listens);
            let key = BackendKey { port: port.port, protocol: port.protocol, address };
            let condition = condition(of, address);
            let (weight, state) = (endpoint.weight, condition.state);
            let by_command = condition.by_command;
            let backend = Backend { key, weight, state, listed: false, by_command };
            let group = group.unwrap_or(endpoint.priority);
            Found { backend, condition, group, distance: distance(here, endpoint) }
        })
        .collect();
    // The service's own come first.
    found.sort_by_key(|found| (found.backend.key, found.group == FALLBACK));
    // Two endpoints of one address whose ports come out the same are one backend.
    found.dedup_by_key(|found| found.backend.key);
    // Of each port, the other service's come last: when not all can be had, its own can.
    found.sort_by_key(|found| {
        let BackendKey { port, protocol, address } = found.backend.key;
        (port, protocol, found.group == FALLBACK, address)
    });
    let mut backends: Vec<Backend> = found.iter().map(|found| found.backend).collect();

    let mut keys: Vec<(FrontendKey, TableKey)> = frontends
        .iter()
        .filter_map(|key| {
            let protocol = Protocol::from_number(key.protocol)?;
            let table = TableKey { port: key.host_port(), protocol, v4: key.addr.is_v4() };
            Some((*key, table))
        })
        .collect();
    keys.sort_by_key(|&(key, table)| (table, key.addr.octets()));

    let mut tables: Vec<(TableKey, Rows)> = Vec::new();
    let mut owned = Vec::with_capacity(keys.len());
    let (mut groups, mut panics) = (BTreeMap::new(), BTreeSet::new());
    for (key, table) in keys {
        if tables.last().is_none_or(|(last, _)| *last != table) {
            let before = input.before.get(&table).copied();
            let Chosen { rows, group, panics: fails } =
                candidates::rows(&found, table, service, before);
            if fails {
                panics.insert(table);
            }
            if group.is_some_and(|group| group > 0) {
                groups.extend(group.map(|group| (table, group)));
            }
            if let Rows::Candidates(candidates) = &rows {
                for candidate in candidates.iter().filter(|candidate| candidate.weight > 0) {
                    backends[candidate.place].listed = true;
                }
            }
            tables.push((table, rows));
        }
        owned.push((key, tables.len() - 1));
    }
    let affinity = service.affinity.map_or(Affinity::OFF, |affinity| pins(affinity, here.tick));
    let rules = Rules { policy: policy(service.ejection), rate: rate(service.ejection), affinity };
    let algorithm = service.algorithm;
    let source = input.source;
    Tables { backends, tables, frontends: owned, rules, algorithm, groups, panics, source }
}

/// The rules of ejection as the kernel programs use them. Times are rounded up to whole ticks, and one
/// more, because the present is rounded down: nothing is out for less than it should be.
#[must_use]
pub fn policy(ejection: Option<EjectionPolicy>) -> Policy {
    let Some(EjectionPolicy { failures, base, max, share, .. }) = ejection else {
        return Policy::OFF;
    };
    let ticks = |time: Duration| {
        let ticks = time.as_nanos().div_ceil(1 << TICK_SHIFT) + 1;
        u32::try_from(ticks).unwrap_or(Policy::MAX_TICKS)
    };
    Policy::new(failures, ticks(base), ticks(max), share)
}

/// The share of failures that ejects, as the kernel programs have it.
#[must_use]
pub fn rate(ejection: Option<EjectionPolicy>) -> Rate {
    ejection.map_or(Rate::OFF, |ejection| Rate::new(ejection.rate, ejection.samples))
}

/// Affinity as the kernel programs have it: in whole jiffies, and one more, because the present is rounded
/// down. So it ends no earlier than it should, and at most three ticks later: 30 ms at `HZ` = 100.
fn pins(affinity: model::Affinity, tick: u64) -> Affinity {
    let jiffies = affinity.timeout.as_nanos().div_ceil(tick.max(1).into()) + 1;
    Affinity::new(affinity.by, u32::try_from(jiffies).unwrap_or(u32::MAX))
}

/// A backend, and what decides whether it is used.
#[derive(Clone, Copy, Debug)]
struct Found {
    backend: Backend,
    condition: Condition,
    /// Its priority: lower ones are used first.
    group: u8,
    /// 0 on this node, 1 in its zone, otherwise 2.
    distance: usize,
}

/// How far an endpoint is: 0 on this node, 1 in its zone, otherwise 2.
fn distance(here: Here<'_>, endpoint: &Endpoint) -> usize {
    let same = |one: Option<&str>, other: Option<&str>| one.is_some() && one == other;
    if same(endpoint.node.as_deref(), Some(here.node)) {
        0
    } else if same(endpoint.zone.as_deref(), here.zone) {
        1
    } else {
        2
    }
}

/// The columns of an alias table over these weights; not all of them are 0.
#[must_use]
pub fn columns(weights: impl Iterator<Item = u16>) -> Vec<Column> {
    let weights: Vec<u32> = weights.map(u32::from).collect();
    let mut columns = vec![Column::default(); weights.len()];
    let mut scratch = vec![Entry::default(); weights.len()];
    alias::build(&weights, &mut columns, &mut scratch);
    columns
}

/// The slots that hold the entries of a consistent hash over backends with these names and weights;
/// nothing when there are too many of them.
#[must_use]
pub fn entries(names: &[u64], weights: &[u16], size: Size) -> Option<Vec<Slot>> {
    let mut entries = vec![0; size.entries() as usize];
    let mut turns = vec![Turn::default(); names.len()];
    let built = maglev::build(names, weights, &mut entries, &mut turns);
    let (chunks, _) = entries.as_chunks();
    built.then(|| chunks.iter().map(|chunk| maglev::slot(*chunk)).collect())
}

/// Where the tickets of each of these weights end.
#[must_use]
pub fn ends(weights: impl Iterator<Item = u16>) -> Vec<u32> {
    let weights: Vec<u32> = weights.map(u32::from).collect();
    let mut ends = vec![0; weights.len()];
    balance::tickets(&weights, &mut ends);
    ends
}

#[cfg(test)]
mod tests;
