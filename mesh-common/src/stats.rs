//! What is counted for each backend and each frontend, and the transitions that change it.

use crate::ejection::{Client, Ejection, Policy, Token, apart};
use crate::flow::Held;
use crate::{Reason, Word};

/// How a connect failed, as far as it says something about the backend. The numbers index
/// [`BackendStats::failed`].
#[repr(u8)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Failure {
    /// The peer, or a firewall on the way, refused: `ECONNREFUSED`.
    Refused = 0,
    /// Nothing was answered: `ETIMEDOUT`.
    Timeout = 1,
    /// Somebody on the way, or this node for want of a neighbour, said that it cannot be reached:
    /// `EHOSTUNREACH`.
    Unreachable = 2,
    /// The connection was made, and reset before a single byte came: `ECONNRESET`.
    Reset = 3,
}

impl Failure {
    /// All of them, in the order of their numbers.
    pub const ALL: [Self; 4] = [Self::Refused, Self::Timeout, Self::Unreachable, Self::Reset];

    /// From its number.
    #[must_use]
    pub const fn from_number(number: u8) -> Option<Self> {
        match number {
            0 => Some(Self::Refused),
            1 => Some(Self::Timeout),
            2 => Some(Self::Unreachable),
            3 => Some(Self::Reset),
            _ => None,
        }
    }

    /// The name used in tables, JSON and metrics.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Refused => "refused",
            Self::Timeout => "timeout",
            Self::Unreachable => "unreachable",
            Self::Reset => "reset",
        }
    }
}

/// A record of `BACKEND_STATS`, of one cache line.
///
/// | word | written by | if somebody else writes meanwhile |
/// | --- | --- | --- |
/// | `generation` | agent: 0 when the backend goes; another one after a grace period | a program that has seen the old one ends before the id is used again |
/// | `opened`, `closed`, `failed` | programs, atomic addition; agent sets 0 while `generation` is 0 and no program has seen another | an addition is never lost |
/// | `ejection` | programs and agent, compare-and-swap | the loser looks again |
#[repr(C, align(8))]
#[cfg_attr(not(target_arch = "bpf"), derive(Debug, Default))]
pub struct BackendStats {
    /// [`crate::Backend::generation`] while the id is that backend's; 0 while it is nobody's.
    pub generation: Word,
    /// Connects for which this backend was chosen.
    pub opened: Word,
    /// How many of those have ended, in whatever way.
    pub closed: Word,
    /// An [`Ejection`].
    pub ejection: Word,
    /// How many of those failed, by [`Failure`]. They have ended, but for those of datagram sockets.
    pub failed: [Word; 4],
}

/// A record of `SERVICE_STATS`: connects to a frontend that were refused, by [`Reason`]. Written by
/// the connect programs, atomic addition; the agent sets it to 0 while nothing names the record.
#[repr(C, align(8))]
#[cfg_attr(not(target_arch = "bpf"), derive(Debug, Default))]
pub struct ServiceStats {
    /// By the number of the reason.
    pub refused: [Word; Reason::ALL.len()],
    /// Whose frontend it is: index into `NAMES`. Written and read by the agent only.
    pub owner: Word,
}

/// How often a change of [`BackendStats::ejection`] is tried. What changes it is rare, so somebody
/// else being faster this often in a row does not happen; then one observation is lost.
const ATTEMPTS: u32 = 8;

/// A change of [`BackendStats::ejection`]: before and after.
pub type Change = (Ejection, Ejection);

/// Changes a word; nothing when `next` says that nothing changes.
#[inline(always)]
pub fn change(word: &Word, mut next: impl FnMut(Ejection) -> Option<Ejection>) -> Option<Change> {
    for _ in 0..ATTEMPTS {
        let before = Ejection(word.load());
        let after = next(before)?;
        if before == after {
            return None;
        }
        if word.replace(before.0, after.0) {
            return Some((before, after));
        }
    }
    None
}

impl BackendStats {
    /// What is known of failures.
    #[inline(always)]
    #[must_use]
    pub fn ejection(&self) -> Ejection {
        Ejection(self.ejection.load())
    }

    /// Whether the id still is the backend's with this generation. A program that is told so can
    /// rely on it until it ends.
    #[inline(always)]
    #[must_use]
    pub fn is_life(&self, generation: u32) -> bool {
        self.generation.load() == generation as u64
    }

    /// Connections that are open, or being opened.
    #[must_use]
    pub fn active(&self) -> u64 {
        // In this order: what is closed was opened before.
        let closed = self.closed.load();
        self.opened.load().saturating_sub(closed)
    }

    /// A connection of this backend has ended, and was not seen to fail; whether it was answered is
    /// not known. The token of a try comes back.
    #[inline(always)]
    pub fn end(&self, token: Token, now: impl FnOnce() -> u64) -> Option<Change> {
        if self.close(token) { self.give_back(token, now()) } else { None }
    }

    /// The first part of [`BackendStats::end`]: counts the end. Whether there is a token to
    /// [give back](BackendStats::give_back).
    #[inline(always)]
    #[must_use]
    pub fn close(&self, token: Token) -> bool {
        self.closed.increment();
        token.is_some()
    }

    /// The token of a try comes back: the next connect may try.
    #[inline(always)]
    pub fn give_back(&self, token: Token, now: u64) -> Option<Change> {
        change(&self.ejection, |ejection| ejection.give_back(token, now))
    }

    /// Whether [`BackendStats::succeed`] can change anything, which is asked before anything is
    /// found out that costs something.
    #[inline(always)]
    #[must_use]
    pub fn awaits_success(&self, held: Held) -> bool {
        let known = self.ejection();
        held.has_token() || known.failures() > 0
    }

    /// The connect that tries this backend has to send its SYN again. It may succeed or fail later;
    /// what it tells about the backend, it has told. The caller has noted that, and taken the token
    /// ([`crate::flow::tell`]).
    #[inline(always)]
    pub fn stay_silent(
        &self,
        policy: Policy,
        client: Client,
        token: Token,
        now: u64,
    ) -> Option<Change> {
        change(&self.ejection, |ejection| match ejection.token() == token {
            true => apart::fail_now(ejection, policy, client, token, now),
            false => None,
        })
    }

    /// A connection of this backend has failed. `may_go` says whether it may be taken out, for this
    /// client or for all, and whether it is counted among those that are out already; it is asked
    /// before and after: of two that go at the same time, and are one too many, both come back.
    ///
    /// Before is what counted then ([`Ejection::known_to`]). A backend that was in and is spared is
    /// always told of, also when its word stays as it is: then before and after are the same.
    #[inline(always)]
    pub fn fail(
        &self,
        failure: Failure,
        token: Token,
        policy: Policy,
        client: Client,
        now: u64,
        may_go: impl Fn(Ejection, bool) -> bool,
    ) -> Option<Change> {
        self.closed.increment();
        self.fail_open(failure, token, policy, client, now, may_go)
    }

    /// [`BackendStats::fail`] for what goes on to be open: a datagram socket whose peer said that nobody
    /// takes its datagrams.
    #[inline(always)]
    pub fn fail_open(
        &self,
        failure: Failure,
        token: Token,
        policy: Policy,
        client: Client,
        now: u64,
        may_go: impl Fn(Ejection, bool) -> bool,
    ) -> Option<Change> {
        self.count(failure);
        self.blame(token, policy, client, now, may_go)
    }

    /// A connection of this backend has failed that it was blamed for before.
    #[inline(always)]
    pub fn fail_blamed(&self, failure: Failure) {
        self.closed.increment();
        self.count(failure);
    }

    #[inline(always)]
    fn count(&self, failure: Failure) {
        if let Some(failed) = self.failed.get(failure as usize) {
            failed.increment();
        }
    }

    /// What a failure means for the backend, whether or not it is one yet: of a connect whose SYN was sent
    /// twice again, nobody waits for the end. The caller has noted that ([`crate::flow::tell`]). For the
    /// rest see [`BackendStats::fail`].
    #[inline(always)]
    pub fn blame(
        &self,
        token: Token,
        policy: Policy,
        client: Client,
        now: u64,
        may_go: impl Fn(Ejection, bool) -> bool,
    ) -> Option<Change> {
        let (mut spared, mut known) = (false, Ejection::NONE);
        let changed = change(&self.ejection, |ejection| {
            (spared, known) = (false, ejection.known_to(client, now));
            let next = apart::fail_now(known, policy, client, token, now)?;
            if wider(known, next) && !may_go(next, false) {
                spared = known.is_in();
                return spared.then(|| known.spare(policy, now));
            }
            Some(next)
        });
        let Some((_, mut after)) = changed else { return spared.then_some((known, known)) };
        if wider(known, after) && !may_go(after, true) {
            let back = known.come_back(policy, now);
            if self.ejection.replace(after.0, back.0) {
                after = back;
            }
        }
        Some((known, after))
    }

    /// A connection of this backend has ended that was answered. Returns what that changed.
    #[inline(always)]
    pub fn succeed(
        &self,
        token: Token,
        policy: Policy,
        client: Client,
        now: u64,
    ) -> Option<Change> {
        self.closed.increment();
        self.succeed_open(token, policy, client, now)
    }

    /// [`BackendStats::succeed`] for what goes on to be open: a datagram came back.
    #[inline(always)]
    pub fn succeed_open(
        &self,
        token: Token,
        policy: Policy,
        client: Client,
        now: u64,
    ) -> Option<Change> {
        change(&self.ejection, |ejection| apart::succeed(ejection, policy, client, token, now))
    }
}

/// Whether it goes out for somebody for whom it was not out.
#[inline(always)]
fn wider(before: Ejection, after: Ejection) -> bool {
    use crate::ejection::Phase::{Ejected, Suspected, Trying};
    match after.phase() {
        Suspected => before.is_in(),
        Ejected => !matches!(before.phase(), Ejected | Trying),
        _ => false,
    }
}

const _: () = {
    #[cfg(not(loom))]
    assert!(size_of::<BackendStats>() == 64);
    #[cfg(not(loom))]
    assert!(size_of::<ServiceStats>() == 72);
};

#[cfg(test)]
mod tests;
