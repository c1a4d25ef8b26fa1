//! Compares the records of balanced sockets with the sockets that exist, so that a record that
//! outlived its socket is noticed, told about, and released.
//!
//! The kernel programs release a record when its socket ends, so an audit should find nothing. It
//! must not do harm either: a record is given to the caller for release only when its socket was
//! missed in two passes, each of which saw everything in the socket's network namespace, and the
//! record is the very same all the while.
//!
//! The order in a pass makes that safe: records first, then the sockets, then the suspicious
//! records again. A socket that began after the records were read has no record among them; one
//! that ended before the sockets were listed has released its record by the time of the second
//! look.

pub mod namespaces;
pub mod sockets;
pub mod task;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::time::Duration;
use std::{io, thread};

use mesh_common::{Given, Protocol};
use namespaces::Namespace;
use sockets::{End, Socket};
use tokio::sync::oneshot;

/// The least time between entering one namespace and the next: the audit is in no hurry.
const PAUSE: Duration = Duration::from_millis(10);

/// Where a record lies.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Place {
    /// In the array, at this index.
    Array(u32),
    /// In the map of those that do not lie at the place that their cookie names, at this index of the
    /// socket's ([`mesh_common::Elsewhere`]).
    Elsewhere(u64),
}

/// A record that was in use when it was read.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Record {
    /// Where it was.
    pub place: Place,
    /// Cookie of the socket; with MPTCP, of the subflow.
    pub cookie: u64,
    /// The word that says whose the record is, and what is reserved.
    pub word: u64,
    /// The rest. May be wrong while the record is being written: then it is another one in the next
    /// pass, and the record is not the very same.
    pub given: Given,
}

impl Record {
    /// Cookie of the network namespace.
    #[must_use]
    pub const fn netns(&self) -> u64 {
        self.given.origin.netns()
    }

    /// Whether it is of a datagram socket.
    #[must_use]
    pub const fn is_datagram(&self) -> bool {
        self.given.frontend.protocol == Protocol::Udp as u8
    }
}

/// What was found in one network namespace.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Found {
    /// The sockets that exist, by cookie. Those that nobody asked for may be left out.
    pub sockets: HashMap<u64, Socket>,
    /// Why there may be more, by protocol.
    pub incomplete: BTreeMap<u8, String>,
}

/// What a pass found, in numbers of records. All but the first and the last add up to the first.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Report {
    /// In use when they were read.
    pub records: usize,
    /// Whose socket exists.
    pub seen: usize,
    /// Whose socket was not found. Not always a mistake: the kernel does not list a socket without
    /// port and peer, which an application may hold after its connection has ended, nor does it
    /// promise to list all others ([`sockets`]).
    pub unseen: usize,
    /// That were no longer the same when the sockets had been listed.
    pub ended: usize,
    /// Of sockets in namespaces that were not found.
    pub in_unknown_namespaces: usize,
    /// Of sockets that were not found where not all sockets could be listed.
    pub undecided: usize,
    /// Why, for one such namespace.
    pub problem: Option<String>,
}

/// The memory of the audit: what was suspicious in the pass before.
#[derive(Debug, Default)]
pub struct Audit {
    suspicious: HashSet<Record>,
}

// === impl Audit ===

impl Audit {
    /// One pass over `records`, which the caller has read just before: lists the sockets of the
    /// namespaces that occur in them, one namespace after another, and compares. Takes 10 ms for
    /// each namespace, and more if there are many sockets.
    ///
    /// Returns the report, and the records to be released: see [`Audit::compare`].
    ///
    /// Nothing is remembered of a pass whose future is dropped.
    ///
    /// # Errors
    ///
    /// No thread can be started, or there is no `/proc`.
    pub async fn pass(
        &mut self,
        records: Vec<Record>,
        still: impl Fn(&Record) -> bool,
    ) -> io::Result<(Report, Vec<Record>)> {
        let found = find(&records).await?;
        Ok(self.compare(&records, &found, still))
    }

    /// Compares `records`, read **before** the sockets were listed, with what was `found` in each
    /// namespace, by its cookie. `still` reads a record again: whether its word is the same.
    ///
    /// Returns the report, and the records that were unseen in this pass and the one before, the
    /// very same both times. Whoever releases them compares the word once more while doing so, as
    /// everybody does who releases a record.
    pub fn compare(
        &mut self,
        records: &[Record],
        found: &HashMap<u64, Found>,
        still: impl Fn(&Record) -> bool,
    ) -> (Report, Vec<Record>) {
        let mut report = Report { records: records.len(), ..Report::default() };
        let mut unseen = HashSet::new();
        for record in records {
            match found.get(&record.netns()) {
                Some(found) if found.sockets.contains_key(&record.cookie) => report.seen += 1,
                _ if !still(record) => report.ended += 1,
                None => report.in_unknown_namespaces += 1,
                Some(found) => match found.incomplete.get(&record.given.frontend.protocol) {
                    Some(problem) => {
                        report.undecided += 1;
                        report.problem.get_or_insert_with(|| problem.clone());
                    }
                    None => {
                        report.unseen += 1;
                        unseen.insert(*record);
                    }
                },
            }
        }
        let gone = unseen.intersection(&self.suspicious).copied().collect();
        self.suspicious = unseen;
        (report, gone)
    }
}

/// Lists the sockets of these records, as far as they exist, in each namespace that is found, by its
/// cookie.
///
/// # Errors
///
/// No thread can be started, or there is no `/proc`.
pub async fn find(records: &[Record]) -> io::Result<HashMap<u64, Found>> {
    visit(records, |_| {}).await
}

/// The same, and calls `inside` for what was found in each namespace, on a thread that is in it.
///
/// # Errors
///
/// Those of [`find`].
pub async fn visit(
    records: &[Record],
    inside: impl FnMut(&Found) + Send + 'static,
) -> io::Result<HashMap<u64, Found>> {
    let wanted = by_namespace(records);
    let (answer, answered) = oneshot::channel();
    // A thread of its own, which ends: it goes from one namespace to the other.
    thread::Builder::new().name("mesh-audit".to_owned()).spawn(move || {
        let found = list(wanted, || answer.is_closed(), inside);
        // Nobody waits any more if the pass was given up.
        answer.send(found).ok();
    })?;
    answered.await.map_err(|_| io::Error::other("the audit's thread panicked"))?
}

/// Which sockets of a namespace are looked for.
#[derive(Debug, Default)]
struct Wanted {
    cookies: HashSet<u64>,
    /// IANA numbers. Lists of other protocols are not asked for: a kernel may be without.
    protocols: BTreeSet<u8>,
}

/// What is looked for, by the cookie of the namespace.
fn by_namespace(records: &[Record]) -> HashMap<u64, Wanted> {
    let mut wanted = HashMap::<u64, Wanted>::new();
    for record in records {
        let of = wanted.entry(record.netns()).or_default();
        of.cookies.insert(record.cookie);
        of.protocols.insert(record.given.frontend.protocol);
    }
    wanted
}

/// Lists the sockets that are `wanted`, as far as their namespaces are found. The calling thread is
/// in some other namespace afterwards. Ends early, with less, when nobody waits for it any more.
fn list(
    wanted: HashMap<u64, Wanted>,
    given_up: impl Fn() -> bool,
    mut inside: impl FnMut(&Found),
) -> io::Result<HashMap<u64, Found>> {
    let mut namespaces = namespaces::find(&wanted.keys().copied().collect())?;
    let mut all = HashMap::new();
    for (netns, wanted) in wanted {
        let Some(namespace) = namespaces.remove(&netns) else { continue };
        if given_up() {
            break;
        }
        let found = list_one(&namespace, &wanted);
        inside(&found);
        all.insert(netns, found);
        // The namespace ends now, if nobody else holds it.
        drop(namespace);
        thread::sleep(PAUSE);
    }
    Ok(all)
}

/// Lists those of these sockets that exist. No more are remembered than were asked for, however
/// many there are.
fn list_one(namespace: &Namespace, wanted: &Wanted) -> Found {
    let (mut sockets, mut incomplete) = (HashMap::new(), BTreeMap::new());
    for &protocol in &wanted.protocols {
        let end = namespace.enter().and_then(|()| {
            sockets::dump(protocol, |socket| {
                if wanted.cookies.contains(&socket.cookie) {
                    sockets.insert(socket.cookie, socket);
                }
            })
        });
        let problem = match end {
            Ok(End::Complete) => continue,
            Ok(End::Incomplete) => "the kernel's list of sockets was cut short".to_owned(),
            Err(error) => format!("sockets of protocol {protocol} cannot be listed: {error}"),
        };
        incomplete.insert(protocol, problem);
    }
    Found { sockets, incomplete }
}

#[cfg(test)]
mod tests;
