//! What the model is of: the maps, the sockets' locks, and what `mesh-ebpf` does with them, step by
//! step (`records`, `lifecycle`, `connect`).

use std::sync::Mutex as Plain;

use loom::sync::{Arc, Mutex};
use mesh_common::ejection::{ANSWERED, Admission, Phase};
use mesh_common::flow::{self, Claim};
use mesh_common::stats::Change;
use mesh_common::translate::share_allows;
use mesh_common::{
    Addr, BackendStats, Client, Ejection, Failure, FrontendKey, FrontendValue, Held, Policy,
    Service, Slot, Table, Tables, Token, Word,
};

/// The time at which a model begins, in ticks.
pub const NOW: u64 = 1000;

/// When a try that begins then counts as answered, if nothing was heard of it.
pub const LATER: u64 = NOW + ANSWERED;

/// The first failure ejects; all backends may be out.
pub const POLICY: Policy = Policy::new(1, 10, 60, 100);

/// The first failure ejects; half of the backends may be out.
pub const HALF: Policy = Policy::new(1, 10, 60, 50);

/// The cookies of two sockets whose records share a place, and of one at another place.
pub const COOKIES: [u64; 3] = [0x0003_0000, 0x0005_0000, 0x0007_0001];
pub const A: usize = 0;
pub const B: usize = 1;
pub const ELSEWHERE: usize = 2;

/// The second failure ejects, whoever sees it; half of the backends may be out.
pub const TWICE: Policy = Policy::new(2, 10, 60, 50);

pub fn client(n: u64) -> Client {
    Client::of_cgroup(n)
}

/// A record of `FLOWS`, with those fields of the rest that the accounts depend on.
#[derive(Default)]
struct Record {
    held: Word,
    generation: Word,
    token: Word,
}

/// A reservation that was released.
struct Released {
    held: Held,
    generation: u64,
    token: Token,
}

/// How a socket ends whose record nobody has released, as `judge_end` and what it has received say.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum End {
    /// It was connected.
    Connected,
    /// It was not, and that says nothing.
    NotConnected,
    /// The kernel gave it up, which no program was run for.
    Unseen(Failure),
}

/// What the agent saw of a record.
pub struct Seen {
    pub held: Held,
    pub generation: u64,
    pub token: Token,
}

/// A token that was given out.
struct Issued {
    backend: usize,
    token: Token,
    held: bool,
}

/// The maps, and the sockets' locks.
pub struct Node {
    records: [Record; 2],
    pub backends: [BackendStats; 2],
    locks: [Mutex<()>; 3],
    slots: [Slot; 2],
    /// The tokens that were given out, and of those that are not given back, used up or void yet,
    /// how many hold each. Not part of the model: it checks, and orders nothing.
    tokens: Plain<Vec<Issued>>,
}

/// Of a backend that stays as long as the model runs.
pub fn generation(backend: u32) -> u32 {
    backend + 7
}

impl Node {
    pub fn new(ejections: [Ejection; 2]) -> Arc<Self> {
        let backend = |id: u32, ejection: Ejection| {
            let stats = BackendStats::default();
            stats.generation.store(u64::from(generation(id)));
            stats.ejection.store(ejection.0);
            stats
        };
        let [first, second] = ejections;
        Arc::new(Self {
            records: [Record::default(), Record::default()],
            backends: [backend(0, first), backend(1, second)],
            locks: [Mutex::new(()), Mutex::new(()), Mutex::new(())],
            slots: [0, 1].map(|backend| Slot { backend, ..Slot::default() }),
            tokens: Plain::new(Vec::new()),
        })
    }

    fn record(&self, cookie: u64) -> &Record {
        &self.records[(cookie & 1) as usize]
    }

    // === mesh-ebpf/src/records.rs ===

    /// Without `OVERFLOW`: as if that were full.
    fn claim(&self, cookie: u64, mine: Held, token: Token) -> bool {
        let record = self.record(cookie);
        if flow::claim(&record.held) != Claim::Taken {
            return false;
        }
        record.generation.store(u64::from(generation(mine.backend())));
        record.token.store(token.0);
        flow::publish(&record.held, mine);
        true
    }

    fn release(&self, cookie: u64) -> Option<Released> {
        let record = self.record(cookie);
        if !Held(record.held.load()).is_of(cookie) {
            return None;
        }
        let (generation, token) = (record.generation.load(), Token(record.token.load()));
        let held = flow::release(&record.held, cookie)?;
        assert!(held.is_of(cookie), "released another socket's");
        let token = self.lets_go(held, token);
        Some(Released { held, generation, token })
    }

    /// The token of a record that was released.
    fn lets_go(&self, held: Held, token: Token) -> Token {
        if !held.has_token() {
            return Token::NONE;
        }
        self.loses(held.backend() as usize, token);
        token
    }

    fn stats(&self, held: Held, generation: u64) -> Option<&BackendStats> {
        let generation = u32::try_from(generation).expect("a generation");
        self.backends.get(held.backend() as usize).filter(|stats| stats.is_life(generation))
    }

    /// Returns what was released.
    fn end(&self, socket: usize, now: u64) -> Option<Held> {
        let Released { held, generation, token } = self.release(COOKIES[socket])?;
        self.stats(held, generation)?.end(token, || now);
        Some(held)
    }

    // === mesh-ebpf/src/connect.rs ===

    /// What `around` and `enter` in maps.rs do: whether this client may go to the backend, which
    /// somebody has found not to be in, and the token, if it tries it.
    pub fn enters(&self, backend: usize, client: Client, now: u64) -> Option<Token> {
        let word = &self.backends[backend].ejection;
        let known = Ejection(word.load());
        let next = match known.admits(client, now) {
            Admission::In => return Some(Token::NONE),
            Admission::Try => known.take(now),
            Admission::Answered => known.recover(POLICY, now),
            Admission::Out => return None,
        };
        if !word.replace(known.0, next.0) {
            return None;
        }
        if next.token().is_some() {
            self.gains(backend, next.token(), now);
        }
        Some(next.token())
    }

    /// Nobody else holds a token that may still decide: those of tries that count as answered by now
    /// do not.
    fn gains(&self, backend: usize, token: Token, now: u64) {
        let mut tokens = self.tokens.lock().expect("tokens");
        for issued in tokens.iter().filter(|issued| issued.backend == backend) {
            assert!(!issued.held || issued.token.0 <= now, "two tries are under way");
            assert!(!issued.held || issued.token != token, "two tries have one token");
        }
        tokens.push(Issued { backend, token, held: true });
    }

    fn loses(&self, backend: usize, token: Token) {
        let mut tokens = self.tokens.lock().expect("tokens");
        let mut held = tokens
            .iter_mut()
            .filter(|issued| issued.held && issued.backend == backend && issued.token == token);
        held.next().expect("a token that was given out, and is lost once").held = false;
    }

    /// Returns whether the socket has a record.
    pub fn connect(&self, socket: usize, backend: u32, token: Token, now: u64) -> bool {
        let _locked = self.locks[socket].lock().expect("lock");
        self.end(socket, now);
        let stats = &self.backends[backend as usize];
        stats.opened.increment();
        let mine = Held::new(COOKIES[socket], backend, token.is_some());
        let recorded = self.claim(COOKIES[socket], mine, token);
        if !recorded {
            self.lets_go(mine, token);
            stats.end(token, || now);
        }
        recorded
    }

    // === mesh-ebpf/src/lifecycle.rs ===

    /// `tcp_retransmit_skb`: the SYN is sent again.
    pub fn retransmit(&self, socket: usize, client: Client, now: u64) {
        let _locked = self.locks[socket].lock().expect("lock");
        let (cookie, record) = (COOKIES[socket], self.record(COOKIES[socket]));
        let held = Held(record.held.load());
        if !held.is_of(cookie) || !held.has_token() {
            return;
        }
        let (generation, token) = (record.generation.load(), Token(record.token.load()));
        let Some(stats) = self.stats(held, generation) else { return };
        if stats.ejection().token() != token {
            if flow::settle(&record.held, cookie) {
                self.lets_go(held, token);
            }
        } else if flow::tell(&record.held, held, cookie) {
            let token = self.lets_go(held, token);
            stats.stay_silent(POLICY, client, token, now);
        }
    }

    /// `tcp_destroy_sock`. Returns what was released.
    pub fn destroy(&self, socket: usize, client: Client, end: End, now: u64) -> Option<Held> {
        let _locked = self.locks[socket].lock().expect("lock");
        let held = Held(self.record(COOKIES[socket]).held.load());
        if !held.is_of(COOKIES[socket]) {
            return None;
        }
        if let End::Unseen(failure) = end {
            return self.failed(socket, client, failure, now);
        }
        let stats = self.backends.get(held.backend() as usize);
        let matters = stats.is_some_and(|stats| stats.awaits_success(held));
        if end == End::NotConnected || !matters {
            return self.end(socket, now);
        }
        let Released { held, generation, token } = self.release(COOKIES[socket])?;
        self.stats(held, generation)?.succeed(token, POLICY, client, now);
        Some(held)
    }

    /// `tcp_receive_reset` and `inet_sk_error_report`, of a failure or of anything else that ends a
    /// connection. Returns whether it was this that released the record.
    pub fn error(&self, socket: usize, client: Client, failure: Option<Failure>, now: u64) -> bool {
        let _locked = self.locks[socket].lock().expect("lock");
        // Two programs are run for it, one after the other.
        let [first, second] = [(); 2].map(|()| match failure {
            Some(failure) => self.failed(socket, client, failure, now),
            None => self.end(socket, now),
        });
        assert_eq!(second, None, "the second program finds nothing");
        first.is_some()
    }

    /// Returns what was released.
    fn failed(&self, socket: usize, client: Client, failure: Failure, now: u64) -> Option<Held> {
        let Released { held, generation, token } = self.release(COOKIES[socket])?;
        if let Some(stats) = self.stats(held, generation) {
            self.fail(stats, failure, token, POLICY, client, now);
        }
        Some(held)
    }

    /// A failure of a connection whose record was released.
    pub fn fail(
        &self,
        stats: &BackendStats,
        failure: Failure,
        token: Token,
        policy: Policy,
        client: Client,
        now: u64,
    ) -> Option<Change> {
        stats.fail(failure, token, policy, client, now, |_, is_out| {
            share_allows(self, Table::slots(0, 2), policy, client, is_out)
        })
    }

    // === the agent's audit ===

    /// What it sees of a record in use, before it finds out whether there is such a socket.
    pub fn seen(&self, socket: usize) -> Seen {
        let record = self.record(COOKIES[socket]);
        Seen {
            held: Held(record.held.load()),
            generation: record.generation.load(),
            token: Token(record.token.load()),
        }
    }

    /// There is none: `Records::end` in mesh-agent/src/dataplane/records.rs.
    pub fn audit(&self, socket: usize, seen: &Seen, now: u64) -> Option<Held> {
        let held = flow::release_seen(&self.record(COOKIES[socket]).held, seen.held)?;
        let token = self.lets_go(held, seen.token);
        if let Some(stats) = self.stats(held, seen.generation) {
            stats.end(token, || now);
        }
        Some(held)
    }

    // === what must be true ===

    /// At any time: nothing is closed that was not opened.
    pub fn observe(&self) {
        for stats in &self.backends {
            let closed = stats.closed.load();
            assert!(closed <= stats.opened.load(), "closed before it was opened");
        }
    }

    /// When all sockets are gone. Returns how many connects failed.
    pub fn settled(&self, opened: [u64; 2]) -> u64 {
        assert!(self.records.iter().all(|record| record.held.load() == 0), "a record is left");
        let mut failed = 0;
        for (stats, opened) in self.backends.iter().zip(opened) {
            assert_eq!(stats.opened.load(), opened, "opened");
            assert_eq!(stats.closed.load(), opened, "released exactly once");
            let phase = stats.ejection().phase();
            assert!(!matches!(phase, Phase::Trying | Phase::SuspectTry), "the token is lost");
            failed += stats.failed.iter().map(Word::load).sum::<u64>();
        }
        let tokens = self.tokens.lock().expect("tokens");
        assert!(tokens.iter().all(|issued| !issued.held), "a token is lost");
        failed
    }
}

/// What [`share_allows`] needs: a table of both backends.
impl Tables for Node {
    fn frontend(&self, _: &FrontendKey) -> Option<FrontendValue> {
        None
    }

    fn service(&self, _: u32) -> Option<&Service> {
        None
    }

    fn slot(&self, index: u32) -> Option<&Slot> {
        self.slots.get(index as usize)
    }

    fn is_virtual(&self, _: &Addr) -> bool {
        false
    }

    fn random(&self) -> u32 {
        0
    }

    fn ejection(&self, backend: u32) -> Ejection {
        self.backends[backend as usize].ejection()
    }

    fn active(&self, _: u32) -> u64 {
        0
    }

    fn position(&self, _: u32) -> u64 {
        0
    }

    fn client(&self) -> Client {
        Client::NOBODY
    }

    fn now(&self) -> u64 {
        NOW
    }
}
