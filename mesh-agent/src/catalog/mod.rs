//! The catalog: what all sources define, merged, with every disagreement decided.
//!
//! Two rules decide: of two definitions of the same service the lesser [`Origin`] is in force, and
//! of two services that claim the same frontend the lesser (origin, name) owns it. Both depend only
//! on what is defined now, never on what came first, so the catalog is the same after any order
//! of the same changes, and what lost comes into force by itself when the winner goes.
//!
//! The cost of a change depends on the services it touches and on those they share frontends with,
//! not on how many services there are.

mod few;
#[cfg(test)]
mod tests;

use std::collections::btree_map::{self, BTreeMap};
use std::collections::{BTreeSet, HashMap, HashSet, hash_map};
use std::fmt;
use std::hash::Hash;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use mesh_common::Protocol;

use self::few::Few;
use crate::discovery::Origin;
use crate::model::{Service, ServiceName};

/// How many texts of one kind an entry keeps; a last one counts the others.
const MAX_TEXTS: usize = 20;

/// What a client dials.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Frontend {
    /// Address; never IPv4-mapped IPv6.
    pub address: IpAddr,
    /// Port in host byte order.
    pub port: u16,
    /// Transport protocol.
    pub protocol: Protocol,
}

/// A frontend that its service owns.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct OwnedFrontend {
    /// What clients dial.
    pub frontend: Frontend,
    /// Which of [`Service::ports`] it is.
    pub port_index: usize,
}

/// A service that is in force.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Entry {
    /// The definition in force.
    pub service: Arc<Service>,
    /// Where that definition is.
    pub origin: Origin,
    /// Its frontends that no other service took, in the order of its addresses and ports.
    pub frontends: Vec<OwnedFrontend>,
    /// Its frontends that another service took, in plain words.
    pub shadowed: Vec<String>,
    /// What is likely a mistake but is done as written, in plain words: endpoints that are
    /// another service's frontend, which the kernel does not balance a second time.
    pub warnings: Vec<String>,
}

/// A definition that is not in force because a lesser origin defines the same service.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ShadowedDefinition<'a> {
    /// The service.
    pub name: &'a ServiceName,
    /// Where the definition is that is not used.
    pub origin: &'a Origin,
    /// Where the one is that is.
    pub by: &'a Origin,
}

/// Who wants a frontend; the least one owns it.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
struct Claim {
    origin: Origin,
    name: ServiceName,
}

/// Everything that is defined.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Catalog {
    /// Every definition; no value is empty, and the first of each is in force.
    definitions: BTreeMap<ServiceName, BTreeMap<Origin, Arc<Service>>>,
    /// Services with more than one definition.
    contested: BTreeSet<ServiceName>,
    /// What is in force.
    entries: BTreeMap<ServiceName, Entry>,
    /// Claims of the definitions in force; no value is empty.
    claims: HashMap<Frontend, Few<Claim>>,
    /// How many frontends of `claims` each address has; never 0. Most endpoints are at an address
    /// that has none, which one look-up tells.
    addresses: HashMap<IpAddr, usize>,
    /// Services in force by the addresses of their endpoints; no value is empty.
    endpoints: HashMap<IpAddr, Few<ServiceName>>,
}

// === impl Frontend ===

impl fmt::Display for Frontend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", SocketAddr::new(self.address, self.port), self.protocol.name())
    }
}

// === impl ShadowedDefinition ===

impl fmt::Display for ShadowedDefinition<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, origin, by } = self;
        write!(f, "service {name} in {} is not used: {} defines it first", origin.item, by.item)
    }
}

// === impl Catalog ===

impl Catalog {
    /// Applies one message of a source as a whole: first `removed`, then `upserts`. Removing what
    /// is not defined is no error.
    ///
    /// Gives the names, each once and in order, whose [`Entry`] is another one now: definition,
    /// origin, frontends, or what is said about them. Those that [`Catalog::get`] no longer finds
    /// are gone.
    pub fn apply(
        &mut self,
        upserts: impl IntoIterator<Item = (Origin, Arc<Service>)>,
        removed: impl IntoIterator<Item = (Origin, ServiceName)>,
    ) -> Vec<ServiceName> {
        let mut touched = BTreeSet::new();
        for (origin, name) in removed {
            if let btree_map::Entry::Occupied(mut definitions) =
                self.definitions.entry(name.clone())
            {
                definitions.get_mut().remove(&origin);
                if definitions.get().is_empty() {
                    definitions.remove();
                }
                touched.insert(name);
            }
        }
        for (origin, service) in upserts {
            let name = service.name.clone();
            self.definitions.entry(name.clone()).or_default().insert(origin, service);
            touched.insert(name);
        }
        let mut stale = BTreeSet::new();
        for name in touched {
            self.reindex(&name, &mut stale);
            stale.insert(name);
        }
        stale.into_iter().filter(|name| self.refresh(name)).collect()
    }

    /// The entry of a service.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&Entry> {
        self.entries.get(name)
    }

    /// All entries, by name.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&ServiceName, &Entry)> {
        self.entries.iter()
    }

    /// How many services are in force.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether no service is.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Which service owns a frontend.
    #[must_use]
    pub fn owner(&self, frontend: &Frontend) -> Option<&ServiceName> {
        Some(&self.claims.get(frontend)?.first()?.name)
    }

    /// Definitions that are not in force, by name and precedence.
    pub fn shadowed_definitions(&self) -> impl Iterator<Item = ShadowedDefinition<'_>> {
        self.contested.iter().filter_map(|name| self.definitions.get_key_value(name)).flat_map(
            |(name, definitions)| {
                let by = definitions.keys().next();
                let losers = definitions.keys().skip(1);
                losers.filter_map(move |origin| Some(ShadowedDefinition { name, origin, by: by? }))
            },
        )
    }

    /// Brings the indexes from the entry of a service, which is not touched yet, to its
    /// definitions, and collects other services whose entry may change by that.
    fn reindex(&mut self, name: &ServiceName, stale: &mut BTreeSet<ServiceName>) {
        let definitions = self.definitions.get(name);
        if definitions.is_some_and(|definitions| definitions.len() > 1) {
            self.contested.insert(name.clone());
        } else {
            self.contested.remove(name);
        }
        let old = self.entries.get(name).map(|e| (e.origin.clone(), Arc::clone(&e.service)));
        let new = definitions
            .and_then(BTreeMap::first_key_value)
            .map(|(origin, service)| (origin.clone(), Arc::clone(service)));
        if !same_claims(old.as_ref(), new.as_ref()) {
            let mut moved = HashSet::new();
            if let Some((origin, service)) = &old {
                let claim = Claim { origin: origin.clone(), name: name.clone() };
                for OwnedFrontend { frontend, .. } in frontends(service) {
                    self.unclaim(frontend, &claim);
                    moved.insert(frontend);
                }
            }
            if let Some((origin, service)) = &new {
                let claim = Claim { origin: origin.clone(), name: name.clone() };
                for OwnedFrontend { frontend, .. } in frontends(service) {
                    self.claim(frontend, claim.clone());
                    moved.insert(frontend);
                }
            }
            for frontend in moved {
                let claims = self.claims.get(&frontend).into_iter().flat_map(Few::iter);
                stale.extend(claims.map(|claim| claim.name.clone()));
                let endpoints = self.endpoints.get(&frontend.address);
                stale.extend(endpoints.into_iter().flat_map(Few::iter).cloned());
            }
        }
        for endpoint in old.iter().flat_map(|(_, service)| &service.endpoints) {
            take(&mut self.endpoints, &endpoint.address, name);
        }
        for endpoint in new.iter().flat_map(|(_, service)| &service.endpoints) {
            self.endpoints.entry(endpoint.address).or_default().insert(name.clone());
        }
    }

    fn claim(&mut self, frontend: Frontend, claim: Claim) {
        let claims = self.claims.entry(frontend).or_default();
        if claims.is_empty() {
            *self.addresses.entry(frontend.address).or_default() += 1;
        }
        claims.insert(claim);
    }

    fn unclaim(&mut self, frontend: Frontend, claim: &Claim) {
        if !take(&mut self.claims, &frontend, claim) {
            return;
        }
        if let hash_map::Entry::Occupied(mut count) = self.addresses.entry(frontend.address) {
            *count.get_mut() -= 1;
            if *count.get() == 0 {
                count.remove();
            }
        }
    }

    /// Makes the entry of a service anew, and tells whether it is another one.
    fn refresh(&mut self, name: &ServiceName) -> bool {
        let Some(new) = self.entry(name) else { return self.entries.remove(name).is_some() };
        match self.entries.entry(name.clone()) {
            btree_map::Entry::Vacant(place) => {
                place.insert(new);
                true
            }
            btree_map::Entry::Occupied(mut place) => {
                let changed = *place.get() != new;
                place.insert(new);
                changed
            }
        }
    }

    /// What the entry of a service must be by the indexes.
    fn entry(&self, name: &ServiceName) -> Option<Entry> {
        let (origin, service) = self.definitions.get(name)?.first_key_value()?;
        let mut owned = Vec::new();
        let mut shadowed = Texts::default();
        for frontend in frontends(service) {
            match self.claims.get(&frontend.frontend).and_then(Few::first) {
                Some(claim) if claim.name != *name => shadowed.add(|| {
                    let (winner, place) = (&claim.name, &claim.origin.item);
                    format!("{} is taken by service {winner} ({place})", frontend.frontend)
                }),
                _ => owned.push(frontend),
            }
        }
        Some(Entry {
            service: Arc::clone(service),
            origin: origin.clone(),
            frontends: owned,
            shadowed: shadowed.finish(),
            warnings: self.chains(service),
        })
    }

    /// Warnings about endpoints that are frontends. (Those that are the service's own are refused
    /// by the sources.)
    fn chains(&self, service: &Service) -> Vec<String> {
        let mut warnings = Texts::default();
        // An endpoint can be a frontend by several ports that have the same target.
        let mut seen = HashSet::new();
        let suspects = service.endpoints.iter().filter(|e| self.addresses.contains_key(&e.address));
        for endpoint in suspects {
            for port in &service.ports {
                let frontend = Frontend {
                    address: endpoint.address,
                    port: endpoint.port.unwrap_or(port.target),
                    protocol: port.protocol,
                };
                if let Some(owner) = self.owner(&frontend)
                    && seen.insert(frontend)
                {
                    warnings.add(|| {
                        format!(
                            "the endpoint {frontend} is an address of service {owner}: connects \
                             are not balanced a second time; name the servers of {owner} instead"
                        )
                    });
                }
            }
        }
        warnings.finish()
    }
}

/// A definition and where it is.
type Defined = (Origin, Arc<Service>);

/// Whether two definitions of the same service claim the same frontends with the same precedence.
fn same_claims(a: Option<&Defined>, b: Option<&Defined>) -> bool {
    match (a, b) {
        (Some((a_origin, a)), Some((b_origin, b))) => {
            a_origin == b_origin && a.addresses == b.addresses && a.ports == b.ports
        }
        (a, b) => a.is_none() && b.is_none(),
    }
}

/// Everything that a service claims.
fn frontends(service: &Service) -> impl Iterator<Item = OwnedFrontend> {
    service.addresses.iter().flat_map(|&address| {
        service.ports.iter().enumerate().map(move |(port_index, port)| OwnedFrontend {
            frontend: Frontend { address, port: port.port, protocol: port.protocol },
            port_index,
        })
    })
}

/// Takes a value out of the set at a key, and the set away with its last value: then it is true.
fn take<K: Hash + Eq, V: Ord>(sets: &mut HashMap<K, Few<V>>, key: &K, value: &V) -> bool {
    let Some(set) = sets.get_mut(key) else { return false };
    set.remove(value);
    let last = set.is_empty();
    if last {
        sets.remove(key);
    }
    last
}

/// A list of texts that cannot grow without bound.
#[derive(Default)]
struct Texts {
    kept: Vec<String>,
    more: usize,
}

// === impl Texts ===

impl Texts {
    fn add(&mut self, text: impl FnOnce() -> String) {
        if self.kept.len() < MAX_TEXTS {
            self.kept.push(text());
        } else {
            self.more += 1;
        }
    }

    fn finish(mut self) -> Vec<String> {
        if self.more > 0 {
            self.kept.push(format!("and {} more like that", self.more));
        }
        self.kept
    }
}
