//! Ejection: taking a backend out of rotation because connects to it failed, for a growing time,
//! and trying it with a single connect before it is used again.
//!
//! Everything that is known about a backend is one word, so every change of it is one
//! compare-and-swap, wherever it is made: by the programs that see a connect fail or succeed, by
//! the connect program that takes the token of a try, by the agent whose own probe failed.
//!
//! What one client saw says something about that client (its own firewall, its own network) or
//! about the backend. So the first client that sees failures takes the backend out for itself
//! alone: it is *suspected*. When another client sees it fail as well, or the agent's probe does,
//! it is *ejected*, for all.
//!
//! ```text
//!            failures in a row, one client                  expired: its next connect
//!      In ─────────────────────────────────▶ Suspected ───────────────────────────▶ SuspectTry
//!      ▲ ▲      several clients │    another client, │ ▲       fails: for longer       │ │
//!      │ │                      ▼    or a probe      │ └───────────────────────────────┘ │
//!      │ │                   Ejected ◀───────────────┘                                   │
//!      │ │   fails: for longer ▲ │ expired: the next connect                             │
//!      │ │                     │ ▼                                                       │
//!      │ └──────────────────  Trying                                                     │
//!      │        answered                                 answered                        │
//!      └─────────────────────────────────────────────────────────────────────────────────┘
//! ```
//!
//! Only the outcome of the try decides while a backend is out: connects that were under way when
//! it was taken out fail or succeed later, and say nothing new.
//!
//! Nothing runs when a connect is answered: that would cost every connection of the machine
//! something. What is known instead: whether a connection was ever answered is seen when it ends;
//! and of a try, that no bad news is good news. A connect that is not refused, does not fail, and
//! does not have to send its SYN again, which it does after a second (RFC 6298), has been answered.

pub(crate) mod apart;
mod away;
mod policy;

pub use policy::Policy;

/// Time is counted in ticks of 2^24 ns (16.8 ms) of `CLOCK_MONOTONIC`, so that 34 bits last for
/// nine years of uptime.
pub const TICK_SHIFT: u32 = 24;

/// A time in ticks, from nanoseconds of `CLOCK_MONOTONIC`.
#[inline(always)]
#[must_use]
pub const fn ticks(ns: u64) -> u64 {
    ns >> TICK_SHIFT
}

/// How long bad news of a try can take: the first retransmission of a SYN (`TCP_TIMEOUT_INIT`, one
/// second), and what timers may be late. In ticks: 1.3 s.
pub const ANSWERED: u64 = 78;

/// How long a suspicion that its client does not renew still counts when another client sees a
/// failure, after its end. In ticks: a minute.
pub const LAPSE: u64 = 3576;

/// A client, told apart from others by 16 bits: a hash of its cgroup's id. 0 is nobody.
///
/// Two clients that share a tag are one client here: that can keep a backend from being ejected
/// for all for a while, and takes it out for both when only one saw it fail.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Client(u16);

impl Client {
    /// Nobody.
    pub const NOBODY: Self = Self(0);
    /// Several, none of whom is known.
    pub const SEVERAL: Self = Self(u16::MAX);

    /// Its 16 bits.
    #[inline(always)]
    #[must_use]
    pub const fn tag(self) -> u16 {
        self.0
    }

    /// From its 16 bits.
    #[inline(always)]
    #[must_use]
    pub const fn from_tag(tag: u16) -> Self {
        Self(tag)
    }

    /// Of a cgroup's id (the number of its directory's inode).
    #[inline(always)]
    #[must_use]
    pub const fn of_cgroup(id: u64) -> Self {
        let mixed = (id ^ (id >> 32)).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 48;
        let tag = mixed as u16;
        // The two that have a meaning of their own.
        if tag == 0 || tag == u16::MAX { Self(1) } else { Self(tag) }
    }
}

/// The token of a try, which one connect holds: when the try counts as answered, in ticks. So it is
/// another one for each try.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Token(pub u64);

impl Token {
    /// None.
    pub const NONE: Self = Self(0);

    /// Whether there is one.
    #[inline(always)]
    #[must_use]
    pub const fn is_some(self) -> bool {
        self.0 != 0
    }
}

/// In which part of the life cycle a backend is.
#[repr(u8)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Phase {
    /// It takes connections. There may have been failures, but not enough of them.
    In = 0,
    /// It is out for one client.
    Suspected = 1,
    /// That client has a try under way; it is still out for its other connects.
    SuspectTry = 2,
    /// It is out for all.
    Ejected = 3,
    /// One connect tries it; it is still out for all others.
    Trying = 4,
}

/// What a connect may do with a backend.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Admission {
    /// Go there.
    In,
    /// Go there if you get the token ([`Ejection::take`]).
    Try,
    /// A try has been answered: go there once that is noted ([`Ejection::recover`]).
    Answered,
    /// Go elsewhere.
    Out,
}

/// All that is known about failures of a backend: one word of its `BACKEND_STATS`; 0 is nothing.
///
/// ```text
/// 63     30 29      14 13   10 9        3 2     0
/// [ until ][ client   ][ level ][ failures ][ phase ]
/// ```
///
/// `until` is a time in ticks: the end of the ejection; of the try, which has been answered if
/// nothing was heard of it until then; or, while the backend is in, until when what is known of
/// failures and ejections counts.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct Ejection(pub u64);

/// The highest level: from there on an ejection lasts as long as may be.
const MAX_LEVEL: u64 = 15;

impl Ejection {
    /// Nothing is known.
    pub const NONE: Self = Self(0);

    #[inline(always)]
    const fn new(phase: Phase, failures: u64, level: u64, client: Client, until: u64) -> Self {
        Self(until << 30 | (client.0 as u64) << 14 | level << 10 | failures << 3 | phase as u64)
    }

    /// Whether any connect may go there: the only question that costs something when nothing is
    /// wrong.
    #[inline(always)]
    #[must_use]
    pub const fn is_in(self) -> bool {
        self.0 & 7 == Phase::In as u64
    }

    /// The phase. An unknown number, which only a damaged map has, is [`Phase::In`].
    #[inline(always)]
    #[must_use]
    pub const fn phase(self) -> Phase {
        match self.0 & 7 {
            1 => Phase::Suspected,
            2 => Phase::SuspectTry,
            3 => Phase::Ejected,
            4 => Phase::Trying,
            _ => Phase::In,
        }
    }

    /// Failures in a row.
    #[inline(always)]
    #[must_use]
    pub const fn failures(self) -> u64 {
        self.0 >> 3 & 0x7f
    }

    /// How many ejections there were in a row, this one included.
    #[inline(always)]
    #[must_use]
    pub const fn level(self) -> u64 {
        self.0 >> 10 & MAX_LEVEL
    }

    /// Who saw the failures.
    #[inline(always)]
    #[must_use]
    pub const fn client(self) -> Client {
        Client((self.0 >> 14 & 0xffff) as u16)
    }

    /// In ticks.
    #[inline(always)]
    #[must_use]
    pub const fn until(self) -> u64 {
        self.0 >> 30
    }

    /// Whether it is out for this client, whether or not it may be tried; with [`Client::SEVERAL`],
    /// whether it is for anybody.
    #[inline(always)]
    #[must_use]
    pub fn is_out_for(self, client: Client) -> bool {
        match self.phase() {
            Phase::In => false,
            Phase::Suspected | Phase::SuspectTry => {
                self.client() == client || client == Client::SEVERAL
            }
            Phase::Ejected | Phase::Trying => true,
        }
    }

    /// What a connect of this client may do.
    #[inline(always)]
    #[must_use]
    pub fn admits(self, client: Client, now: u64) -> Admission {
        let over = self.until() <= now;
        match self.phase() {
            _ if !self.is_out_for(client) => Admission::In,
            Phase::SuspectTry | Phase::Trying if over => Admission::Answered,
            _ if over => Admission::Try,
            _ => Admission::Out,
        }
    }

    // === transitions: the next word, or nothing when nothing changes ===

    /// A connect takes the token of a try, where [`Ejection::admits`] said [`Admission::Try`].
    #[inline(always)]
    #[must_use]
    pub fn take(self, now: u64) -> Self {
        let phase = match self.phase() {
            Phase::Suspected | Phase::SuspectTry => Phase::SuspectTry,
            _ => Phase::Trying,
        };
        Self::new(phase, self.failures(), self.level(), self.client(), now + ANSWERED)
    }

    /// A try was answered: it is in, and for as long as it was out before, it is remembered how
    /// often.
    #[inline(always)]
    #[must_use]
    pub fn recover(self, policy: Policy, now: u64) -> Self {
        let until = now + policy.duration(self.level());
        Self::new(Phase::In, 0, self.level(), Client::NOBODY, until)
    }

    /// What counts of it when a connect of `client` fails: nothing while it is in and that is too long
    /// ago, nor of a try of another client that was answered, nor of a suspicion that another client
    /// has not renewed for a minute. That client may never come along again: a suspicion must not wait
    /// for the next failure of anybody.
    #[inline(always)]
    #[must_use]
    pub const fn known_to(self, client: Client, now: u64) -> Self {
        // Without a branch, as in `Policy::duration`: 1 where it is so, and then no bit is kept.
        let is_in = (self.0 & 7).wrapping_sub(1) >> 63;
        let is_try = (self.0 & 7 ^ Phase::SuspectTry as u64).wrapping_sub(1) >> 63;
        let others = 0u64.wrapping_sub(self.client().0 as u64 ^ client.0 as u64) >> 63;
        let is_suspected = (self.0 & 7 ^ Phase::Suspected as u64).wrapping_sub(1) >> 63;
        let is_over = self.until().wrapping_sub(now + 1) >> 63;
        let is_old = (self.until() + LAPSE).wrapping_sub(now + 1) >> 63;
        let void = (is_in | is_try & others) & is_over | is_suspected & others & is_old;
        Self(self.0 & void.wrapping_sub(1))
    }

    /// A connect of `client` failed, which held this token.
    #[inline(always)]
    #[must_use]
    pub fn fail(self, policy: Policy, client: Client, token: Token, now: u64) -> Option<Self> {
        self.known_to(client, now).fail_now(policy, client, token, now)
    }

    /// [`Ejection::fail`], of what [`Ejection::known_to`] gives.
    #[inline(always)]
    pub(crate) fn fail_now(
        self,
        policy: Policy,
        client: Client,
        token: Token,
        now: u64,
    ) -> Option<Self> {
        match self.phase() {
            Phase::In => {
                let before = self.failures();
                let first = before == 0 || self.client() == client;
                let seen_by = if first { client } else { Client::SEVERAL };
                let failures = min(before + 1, Policy::MAX_FAILURES as u64);
                if policy.failures() == 0 || failures < policy.failures() {
                    let (level, until) = (self.level(), now + policy.max());
                    return Some(Self::new(Phase::In, failures, level, seen_by, until));
                }
                // After a recovery that did not last, the next ejection is longer. A level of 0 is
                // that of a backend that was never out.
                let level = min(self.level() + 1, MAX_LEVEL);
                let phase =
                    if seen_by == Client::SEVERAL { Phase::Ejected } else { Phase::Suspected };
                Some(Self::new(phase, failures, level, seen_by, now + policy.duration(level)))
            }
            phase @ (Phase::Suspected | Phase::SuspectTry) if self.client() != client => {
                if policy.failures() == 0 {
                    return None;
                }
                // Others have to see as many in a row.
                let failures = min(self.failures() + 1, Policy::MAX_FAILURES as u64);
                let (level, needed) = (self.level(), policy.agreement());
                if failures < needed {
                    return Some(Self::new(phase, failures, level, self.client(), self.until()));
                }
                let until = now + policy.duration(level);
                Some(Self::new(Phase::Ejected, policy.failures(), level, Client::SEVERAL, until))
            }
            phase @ (Phase::SuspectTry | Phase::Trying) if self.is_of(token) => {
                let level = min(self.level() + 1, MAX_LEVEL);
                let phase = if phase as u8 == Phase::Trying as u8 {
                    Phase::Ejected
                } else {
                    Phase::Suspected
                };
                let until = now + policy.duration(level);
                Some(Self::new(phase, self.failures(), level, self.client(), until))
            }
            _ => None,
        }
    }

    /// A connection of `client` was answered, as is known at its end.
    #[inline(always)]
    #[must_use]
    pub fn succeed(self, policy: Policy, client: Client, token: Token, now: u64) -> Option<Self> {
        match self.phase() {
            // Failures are counted while they are in a row for those who see them: the successes
            // of others do not help a client that cannot get there.
            Phase::In => {
                let ends = self.failures() > 0
                    && (self.client() == client || self.client() == Client::SEVERAL);
                ends.then(|| Self::new(Phase::In, 0, self.level(), Client::NOBODY, self.until()))
            }
            Phase::SuspectTry | Phase::Trying if self.is_of(token) => {
                Some(self.recover(policy, now))
            }
            // What others saw fail was not in a row.
            phase @ (Phase::Suspected | Phase::SuspectTry) if self.client() != client => {
                let failures = policy.failures();
                let ends = self.failures() > failures;
                ends.then(|| Self::new(phase, failures, self.level(), self.client(), self.until()))
            }
            _ => None,
        }
    }

    /// The token of the try that is under way; [`Token::NONE`] when there is none.
    #[inline(always)]
    #[must_use]
    pub const fn token(self) -> Token {
        match self.phase() {
            Phase::SuspectTry | Phase::Trying => Token(self.until()),
            _ => Token::NONE,
        }
    }

    /// Whether that is the token of the try that is under way. One of an earlier try, which counts
    /// as answered since, is worth nothing.
    #[inline(always)]
    const fn is_of(self, token: Token) -> bool {
        token.is_some() && token.0 == self.token().0
    }

    /// The connect that held the token ended without an answer of any kind: the next one may try.
    #[inline(always)]
    #[must_use]
    pub fn give_back(self, token: Token, now: u64) -> Option<Self> {
        let phase = match self.phase() {
            _ if !self.is_of(token) => return None,
            Phase::SuspectTry => Phase::Suspected,
            Phase::Trying => Phase::Ejected,
            _ => return None,
        };
        Some(Self::new(phase, self.failures(), self.level(), self.client(), now))
    }

    /// The agent's own probe failed too: what holds for one client holds for all from now on, for as
    /// long as it would have for that one. A try that is under way goes on.
    #[inline(always)]
    #[must_use]
    pub fn confirm(self, policy: Policy, now: u64) -> Option<Self> {
        let (failures, level) = (self.failures(), self.level());
        match self.phase() {
            Phase::Suspected => {
                let over = self.until() <= now;
                let until = if over { now + policy.duration(level) } else { self.until() };
                Some(Self::new(Phase::Ejected, failures, level, Client::SEVERAL, until))
            }
            // Answered, as far as is known.
            Phase::SuspectTry if self.until() <= now => None,
            Phase::SuspectTry => {
                Some(Self::new(Phase::Trying, failures, level, Client::SEVERAL, self.until()))
            }
            _ => None,
        }
    }

    /// It may not be taken out, because so many others are: what is known ([`Ejection::known_to`])
    /// stays, at no more than one failure less than it takes.
    #[inline(always)]
    #[must_use]
    pub fn spare(self, policy: Policy, now: u64) -> Self {
        let failures = min(self.failures(), policy.failures().saturating_sub(1));
        Self::new(Phase::In, failures, self.level(), self.client(), now + policy.max())
    }

    /// This is what was known ([`Ejection::known_to`]) before it was taken out for more clients, which
    /// turned out to be one backend too many. A try that was under way may have ended meanwhile, which
    /// meant nothing: it is void, and the backend stays out for its client for another time.
    #[inline(always)]
    #[must_use]
    pub fn come_back(self, policy: Policy, now: u64) -> Self {
        match self.phase() {
            Phase::In => self.spare(policy, now),
            Phase::SuspectTry => {
                let until = now + policy.duration(self.level());
                Self::new(Phase::Suspected, self.failures(), self.level(), self.client(), until)
            }
            _ => self,
        }
    }
}

impl core::fmt::Debug for Ejection {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Ejection")
            .field("phase", &self.phase())
            .field("failures", &self.failures())
            .field("level", &self.level())
            .field("client", &self.client())
            .field("until", &self.until())
            .finish()
    }
}

const fn min(a: u64, b: u64) -> u64 {
    if a < b { a } else { b }
}

#[cfg(test)]
mod tests;
