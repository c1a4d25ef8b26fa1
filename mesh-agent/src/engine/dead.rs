//! Connections of endpoints whose checks fail: those of a service that says so are ended, so that its clients
//! connect again, elsewhere, instead of waiting for an answer that does not come.

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use mesh_common::{Protocol, State};
use tokio::time::Instant;

use super::Engine;
use super::ending::{self, Ended, Life, Looks, Next};
use super::wanted::Health;
use crate::audit::Record;
use crate::audit::sockets::Socket;
use crate::dataplane::maps::Maps as _;
use crate::dataplane::reconcile::LetGo;
use crate::model::{Ending, ServiceName};

/// How often connections of unhealthy endpoints are looked at, if they do not last much longer.
const LOOK: Duration = Duration::from_secs(1);

/// One look in so many parts of the time that is waited for.
const PARTS: u32 = 4;

/// What was not seen for so long is forgotten: longer than any two looks are apart.
const FORGET: Duration = Duration::from_secs(1_200);

/// Unhealthy endpoints whose connections will be ended.
#[derive(Debug)]
pub(super) struct Dead {
    endpoints: BTreeMap<(ServiceName, SocketAddr), Watch>,
    /// Connections that waited for an acknowledgement at the last look, by cookie.
    waiting: Arc<Mutex<HashMap<u64, Waiting>>>,
    looks: Looks,
    /// When the last look was over: there is only one at a time.
    free: Instant,
}

/// An endpoint that is watched.
#[derive(Clone, Copy, Debug)]
struct Watch {
    /// Of which life of the endpoint.
    life: u64,
    ending: Ending,
    /// Since when it is unhealthy, as far as this agent knows.
    since: Instant,
    /// When its connections are looked at.
    next: Instant,
}

/// A connection that waits for what it has sent to be acknowledged.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Waiting {
    since: Instant,
    retransmits: u8,
    unacknowledged: u32,
    /// When it was seen last.
    seen: Instant,
}

// === impl Watch ===

impl Watch {
    /// A look that comes late, though no other was under way, means that this process did not run, and no check of the
    /// endpoint passed or failed meanwhile: that time does not count for it being unhealthy.
    fn discount(&mut self, free: Instant, now: Instant) {
        let late = now.saturating_duration_since(self.next.max(free));
        if late > LOOK {
            self.since += late;
        }
    }
}

// === impl Waiting ===

impl Waiting {
    /// What is known of a connection, after another look; nothing if it does not wait.
    ///
    /// What is acknowledged ends the retransmissions, and is not in the queue any more: while neither
    /// becomes less, nothing was. (That both grow again between two looks as far as they were is possible
    /// where packets are lost, and needs an endpoint whose checks fail as well.)
    fn look(known: Option<Self>, socket: &Socket, now: Instant) -> Option<Self> {
        let (retransmits, unacknowledged) = (socket.retransmits, socket.unacknowledged);
        if retransmits == 0 || unacknowledged == 0 {
            return None;
        }
        let goes_on = |known: &Self| {
            retransmits >= known.retransmits && unacknowledged >= known.unacknowledged
        };
        let since = known.filter(goes_on).map_or(now, |known| known.since);
        Some(Self { since, retransmits, unacknowledged, seen: now })
    }
}

// === impl Dead ===

impl Dead {
    pub(super) fn new() -> Self {
        let (looks, free) = (Looks::new(), Instant::now());
        Self { endpoints: BTreeMap::new(), waiting: Arc::default(), looks, free }
    }

    /// Follows what the checks say of an endpoint, and which connections its service wants ended.
    pub(super) fn follow(
        &mut self,
        service: &ServiceName,
        address: SocketAddr,
        (life, state): (u64, State),
        ending: Ending,
    ) {
        let endpoint = (service.clone(), address);
        if state != State::Unhealthy || ending == Ending::Never {
            self.endpoints.remove(&endpoint);
            return;
        }
        let now = Instant::now();
        let known = self.endpoints.get(&endpoint).filter(|known| known.life == life);
        if known.is_some_and(|known| known.ending == ending) {
            return;
        }
        let since = known.map_or(now, |known| known.since);
        // Who waits is looked for from the beginning; others may do so who fall back there.
        self.endpoints.insert(endpoint, Watch { life, ending, since, next: now });
    }

    /// Waits until there is something to do.
    pub(super) async fn next(&mut self) -> Next {
        let first = self.endpoints.values().map(|watch| watch.next).min();
        self.looks.next(first).await
    }
}

impl Engine {
    /// Looks at connections of endpoints that are due, or tells what was ended.
    pub(super) fn take_dead(&mut self, next: Next) {
        match next {
            Next::Due => self.look_at_dead(),
            Next::Looked(Ended { counts, problems }) => {
                self.dead.free = Instant::now();
                for (backend, count) in counts {
                    self.tell_ended(&backend, count, "an unhealthy endpoint");
                }
                if let Some(problem) = problems.first() {
                    let text =
                        format!("connections to unhealthy endpoints cannot be ended: {problem}");
                    tracing::error!("{text}");
                    self.fail(text);
                }
            }
        }
    }

    /// A definition may want other connections of endpoints ended that are unhealthy already.
    pub(super) fn follow_dead(&mut self, service: &ServiceName) {
        let Some(health) = self.health.get(service) else { return };
        let ending = health.ending();
        if ending == Ending::Never {
            return;
        }
        for (address, known) in &health.endpoints {
            if known.state == State::Unhealthy {
                self.dead.follow(service, *address, (known.life, known.state), ending);
            }
        }
    }

    fn ending_of(&self, service: &ServiceName) -> Ending {
        self.health.get(service).map(Health::ending).unwrap_or_default()
    }

    fn look_at_dead(&mut self) {
        let now = Instant::now();
        // What is not checked any more, was removed, or is to go on after all, is no business of this.
        let health = &self.health;
        self.dead.endpoints.retain(|(service, address), watch| {
            let Some(health) = health.get(service) else { return false };
            let is_meant = health.ending() == watch.ending;
            let known = health.endpoints.get(address).filter(|_| is_meant);
            known.is_some_and(|known| known.life == watch.life && known.state == State::Unhealthy)
        });
        let mut due = BTreeMap::<ServiceName, HashMap<SocketAddr, (Ending, Instant)>>::new();
        for ((service, address), watch) in &mut self.dead.endpoints {
            if watch.next <= now {
                watch.discount(self.dead.free, now);
                // Those who fall back there may have to be looked at more often.
                let is_shared = self.spread.dependents(service).next().is_some();
                watch.next = now + if is_shared { LOOK } else { step(watch.ending) };
                let entry = due.entry(service.clone()).or_default();
                entry.insert(*address, (watch.ending, watch.since));
            }
        }
        let (mut lives, mut gone) = (HashMap::<Life, Ending>::new(), Vec::new());
        for (service, addresses) in due {
            for name in self.holders(&service) {
                let own = name == service;
                for (key, id) in self.reconciler.backends(&name) {
                    let ending = addresses.get(&key.address);
                    let ending = ending.filter(|_| key.protocol == Protocol::Tcp);
                    let Some(&(ending, since)) = ending else { continue };
                    // Who falls back there says itself what becomes of its connections, and when.
                    let ending = if own { ending } else { self.ending_of(&name) };
                    match ending {
                        Ending::Never => continue,
                        Ending::All(after) if now < since + after => continue,
                        Ending::All(_) | Ending::Silent(_) => {}
                    }
                    let Some(backend) = self.reconciler.maps().backend(id) else { continue };
                    // While it is used for want of any better one, the checks are the likelier culprit.
                    let is_used = backend.marks.is_listed() && matches!(ending, Ending::All(_));
                    if is_used || !own && self.defines(&name, key.address) {
                        continue;
                    }
                    let generation = backend.generation;
                    lives.insert((id, generation), ending);
                    gone.push(LetGo { service: name.clone(), key, id, generation });
                }
            }
        }
        if gone.is_empty() {
            return;
        }
        let waiting = Arc::clone(&self.dead.waiting);
        let known = Arc::clone(&waiting);
        let choose = move |record: &Record, socket: &Socket| match lives
            .get(&ending::backend(record))
        {
            Some(Ending::All(_)) => true,
            Some(ending @ Ending::Silent(after)) => waits(&known, socket, *after, step(*ending)),
            Some(Ending::Never) | None => false,
        };
        // Of connections that are gone nothing is remembered for longer than any is waited for.
        let forget = move || {
            let mut waiting = waiting.lock().unwrap_or_else(PoisonError::into_inner);
            waiting.retain(|_, one| one.seen + FORGET > now);
        };
        self.dead.looks.begin(self.auditor.clone(), gone, choose, forget);
    }
}

/// How far looks at the connections of an endpoint are apart.
fn step(ending: Ending) -> Duration {
    match ending {
        Ending::Silent(after) | Ending::All(after) => (after / PARTS).max(LOOK),
        Ending::Never => LOOK,
    }
}

/// Whether a connection has waited for so long; remembers since when. What was seen before other looks is
/// of another time.
fn waits(
    known: &Mutex<HashMap<u64, Waiting>>,
    socket: &Socket,
    after: Duration,
    step: Duration,
) -> bool {
    let mut known = known.lock().unwrap_or_else(PoisonError::into_inner);
    let now = Instant::now();
    let before = known.remove(&socket.cookie).filter(|before| now - before.seen <= step * 3);
    let Some(waiting) = Waiting::look(before, socket, now) else { return false };
    known.insert(socket.cookie, waiting);
    now - waiting.since >= after
}

#[cfg(test)]
mod tests {
    use netlink_packet_sock_diag::inet::SocketId;

    use super::*;

    fn socket(retransmits: u8, unacknowledged: u32) -> Socket {
        let (cookie, protocol, state, inode, family, id) = (1, 6, 1, 5, 2, SocketId::new_v4());
        Socket { cookie, protocol, state, inode, family, id, retransmits, unacknowledged }
    }

    /// What is known after each look, a second apart: since which second it waits.
    fn run(looks: &[(u8, u32)]) -> Vec<Option<u64>> {
        let begin = Instant::now();
        let mut known = None;
        let looks = looks.iter().zip(0..);
        let mut look = |(&(retransmits, unacknowledged), second): (&(u8, u32), u64)| {
            let now = begin + Duration::from_secs(second);
            known = Waiting::look(known, &socket(retransmits, unacknowledged), now);
            known.map(|known| (known.since - begin).as_secs())
        };
        looks.map(&mut look).collect()
    }

    /// An endpoint that nobody checked for a while was not unhealthy for so long, as far as anybody knows.
    #[test]
    fn a_late_look_does_not_count() {
        let begin = Instant::now();
        let ending = Ending::All(Duration::from_secs(10));
        let mut watch = Watch { life: 1, ending, since: begin, next: begin + LOOK };
        watch.discount(begin, begin + LOOK);
        watch.discount(begin, begin + LOOK + LOOK);
        assert_eq!(watch.since, begin, "a little late");
        let minute = Duration::from_secs(60);
        watch.discount(begin + minute, begin + minute + LOOK);
        assert_eq!(watch.since, begin, "the look before took long");
        watch.discount(begin, begin + LOOK + minute);
        assert_eq!(watch.since, begin + minute);
    }

    #[test]
    fn waits_while_nothing_is_acknowledged() {
        // What was never sent again may be on its way.
        assert_eq!(
            run(&[(0, 100), (1, 100), (2, 100), (2, 100)]),
            [None, Some(1), Some(1), Some(1)]
        );
        // More is sent meanwhile.
        assert_eq!(run(&[(1, 100), (2, 300)]), [Some(0), Some(0)]);
        // Something was acknowledged: all of it, a part, or what had to be sent again.
        assert_eq!(run(&[(3, 100), (0, 0), (1, 100)]), [Some(0), None, Some(2)]);
        assert_eq!(run(&[(3, 100), (3, 50)]), [Some(0), Some(1)]);
        assert_eq!(run(&[(3, 100), (1, 100)]), [Some(0), Some(1)]);
    }
}
