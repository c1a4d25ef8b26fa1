//! What is counted for each backend and each frontend, and the transitions that change it.

use crate::ejection::{Client, Ejection, Policy, Token};
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
    /// How many of those that ended failed, by [`Failure`].
    pub failed: [Word; 4],
}

/// A record of `SERVICE_STATS`: connects to a frontend that were refused, by [`Reason`]. Written by
/// the connect programs, atomic addition; the agent sets it to 0 while nothing names the record.
#[repr(C, align(8))]
#[cfg_attr(not(target_arch = "bpf"), derive(Debug, Default))]
pub struct ServiceStats {
    /// By the number of the reason.
    pub refused: [Word; Reason::ALL.len()],
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
        self.closed.increment();
        if !token.is_some() {
            return None;
        }
        let now = now();
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
    /// what it tells about the backend, it has told. The caller has taken the token
    /// ([`crate::flow::settle`]).
    #[inline(always)]
    pub fn stay_silent(
        &self,
        policy: Policy,
        client: Client,
        token: Token,
        now: u64,
    ) -> Option<Change> {
        change(&self.ejection, |ejection| match ejection.token() == token {
            true => ejection.fail_now(policy, client, token, now),
            false => None,
        })
    }

    /// A connection of this backend has failed. `may_go` says whether it may be taken out, for this
    /// client or for all, and whether it is counted among those that are out already; it is asked
    /// before and after: of two that go at the same
    /// time, and are one too many, both come back.
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
        if let Some(failed) = self.failed.get(failure as usize) {
            failed.increment();
        }
        let (mut spared, mut known) = (false, Ejection::NONE);
        let changed = change(&self.ejection, |ejection| {
            (spared, known) = (false, ejection.known_to(client, now));
            let next = known.fail_now(policy, client, token, now)?;
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
        change(&self.ejection, |ejection| ejection.succeed(policy, client, token, now))
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
    assert!(size_of::<ServiceStats>() == 64);
};

/// What an error that a socket reports means for its connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// It goes on.
    Nothing,
    /// It is over, which says nothing about the backend.
    Over,
    /// It is over, and the backend, or the way to it, is the reason.
    Failed(Failure),
}

/// Linux's numbers, the same on all architectures that it runs BPF programs on but MIPS.
pub mod errno {
    /// Reset by the peer; given up by this side.
    pub const ECONNRESET: i32 = 104;
    /// No answer.
    pub const ETIMEDOUT: i32 = 110;
    /// Refused.
    pub const ECONNREFUSED: i32 = 111;
    /// No way to the host.
    pub const EHOSTUNREACH: i32 = 113;
}

/// What is seen of a TCP socket that reports an error.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Seen {
    /// `sk_err`; 0 when somebody has asked for it already.
    pub error: i32,
    /// The peer has acknowledged at least the SYN (`bytes_acked`), and the socket was not
    /// disconnected since.
    pub connected: bool,
    /// It has received data or the peer's FIN (`bytes_received`), likewise.
    pub answered: bool,
    /// Its state is `TCP_CLOSE`.
    pub closed: bool,
    /// It has no peer (any more).
    pub disconnected: bool,
    /// It has sent something more than once.
    pub repeated: bool,
    /// `sk_err_soft`: somebody said on the way that the host cannot be reached, which was not
    /// believed at once.
    pub unreachable: bool,
}

/// Judges an error that a TCP socket reports (`sk_error_report`), which is told after the kernel has
/// woken who waits for it. So the error may have been fetched already, by an application on another
/// CPU, and is so always by the parent of an MPTCP subflow: then what the kernel did to the socket
/// says what it was. A peer's reset was seen before ([`judge_reset`]).
///
/// `tcp_disconnect` (a connect to `AF_UNSPEC`, a close with `SO_LINGER` 0) reports `ECONNRESET`, or
/// nothing, after it has taken the peer away and set the counters to 0: that says nothing about the
/// backend. Neither do `ECONNABORTED` (the socket was destroyed by an administrator), `ENETUNREACH`
/// (this node has no route), `EACCES` and `EPERM` (this node forbids it).
#[inline(always)]
#[must_use]
pub const fn judge(seen: Seen) -> Outcome {
    let Seen { error, connected, answered, closed, disconnected, .. } = seen;
    match error {
        errno::ECONNREFUSED if !connected => Outcome::Failed(Failure::Refused),
        errno::EHOSTUNREACH if !connected => Outcome::Failed(Failure::Unreachable),
        errno::ETIMEDOUT if !answered => Outcome::Failed(Failure::Timeout),
        errno::ECONNRESET | errno::ETIMEDOUT => Outcome::Over,
        // Fetched.
        0 if closed && !disconnected && !answered => match given_up(seen) {
            Some(failure) => Outcome::Failed(failure),
            None => Outcome::Over,
        },
        // An error that a socket reports before it is connected ends the attempt; later, the
        // application may only have asked to be told (`IP_RECVERR`).
        0 if closed => Outcome::Over,
        0 => Outcome::Nothing,
        _ if closed || !connected => Outcome::Over,
        _ => Outcome::Nothing,
    }
}

/// Why the kernel gave a connection up, when nobody says: what has sent its SYN or its data again has
/// waited for an answer; otherwise somebody said at once that there will be none.
#[inline(always)]
const fn given_up(seen: Seen) -> Option<Failure> {
    match (seen.connected, seen.repeated && !seen.unreachable) {
        (_, true) => Some(Failure::Timeout),
        (false, false) => Some(Failure::Unreachable),
        (true, false) => None,
    }
}

/// Judges the end of a TCP socket whose record nobody has released: nothing when that says nothing
/// about the backend.
///
/// A connect that the kernel gave up has a peer, was never answered, and has nothing in flight any
/// more; one that the application gave up still has its SYN in flight. Normally the kernel has
/// reported that error, but nobody need have seen it: a tracing program is not run while it runs on
/// the same CPU. Why it was given up is judged as in [`judge`].
#[inline(always)]
#[must_use]
pub const fn judge_end(seen: Seen, in_flight: bool) -> Option<Failure> {
    if seen.connected || seen.disconnected || in_flight { None } else { given_up(seen) }
}

/// Judges a peer's reset of a socket that its application has not closed: nothing when the peer had
/// answered before. See [`Seen`].
#[inline(always)]
#[must_use]
pub const fn judge_reset(connected: bool, answered: bool) -> Option<Failure> {
    match (connected, answered) {
        (false, _) => Some(Failure::Refused),
        (true, false) => Some(Failure::Reset),
        (true, true) => None,
    }
}

#[cfg(test)]
mod tests;
