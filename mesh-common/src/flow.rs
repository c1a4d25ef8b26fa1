//! The record of a socket: what it was given, and what is reserved for it.
//!
//! Records lie in an array at a place that the socket's cookie names. Whether a record is in use, by
//! which socket, and what it has reserved is one word, [`Held`]: a socket claims a record by
//! replacing 0 and fills it in before it says whose it is, and what is reserved is released by
//! whoever replaces that word by 0, which can happen only once. A cookie is never used again, so a
//! word that was read and is compared later cannot mean another socket's.
//!
//! | who | when | does |
//! | --- | --- | --- |
//! | connect program | the socket is given a backend | [`claim`] and [`publish`], after [`release`] of an earlier one |
//! | connect program | the socket goes elsewhere, or is refused | [`release`] |
//! | `tcp_retransmit_skb` | a try's SYN is sent again | [`settle`]: the token is used up |
//! | `inet_sk_error_report` | refused, timed out, reset, disconnected | [`release`] |
//! | `tcp_destroy_sock` | the socket ends, whatever it was | [`release`] |
//! | agent's audit | no such socket exists | [`release_seen`] |
//!
//! All of them may run at the same time, besides those that the socket lock orders.

use core::mem::offset_of;

use crate::ejection::Token;
use crate::layout::FrontendKey;
use crate::{Addr, Word};

/// What a record has reserved, and for which socket: one word; 0 is a free record.
///
/// ```text
/// 63            26   25     24   23       0
/// [ cookie >> 16 ][ token ][ 1 ][ backend ]
/// ```
///
/// The lower bits of the cookie are the record's place, so records are at least 2^16. The 38 bits
/// kept here last for 2^54 sockets.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Held(pub u64);

impl Held {
    const USED: u64 = 1 << 24;
    const TOKEN: u64 = 1 << 25;
    const COOKIE_SHIFT: u32 = 26;
    /// A record that is being filled in. No program is interrupted in this for good, so no record
    /// stays like that.
    const CLAIMED: u64 = 1;
    /// How many bits of a cookie are given by the place of its record.
    pub const PLACE_BITS: u32 = 16;
    /// Ids of backends are below this.
    pub const MAX_BACKENDS: u32 = 1 << 24;

    /// A reservation of a connection at `backend` for the socket with this cookie; `token`: it is
    /// the one connect that tries an ejected backend.
    #[inline(always)]
    #[must_use]
    pub const fn new(cookie: u64, backend: u32, token: bool) -> Self {
        let token = if token { Self::TOKEN } else { 0 };
        let cookie = cookie >> Self::PLACE_BITS << Self::COOKIE_SHIFT;
        Self(cookie | token | Self::USED | (backend & (Self::MAX_BACKENDS - 1)) as u64)
    }

    /// Whether something is reserved.
    #[inline(always)]
    #[must_use]
    pub const fn is_used(self) -> bool {
        self.0 & Self::USED != 0
    }

    /// Whether it is the socket's with this cookie, whose place the record is at.
    #[inline(always)]
    #[must_use]
    pub const fn is_of(self, cookie: u64) -> bool {
        let cookie = cookie >> Self::PLACE_BITS << Self::COOKIE_SHIFT;
        self.0 & Self::USED != 0 && self.0 >> Self::COOKIE_SHIFT << Self::COOKIE_SHIFT == cookie
    }

    /// The cookie of the socket, for a record at this place.
    #[must_use]
    pub const fn cookie(self, place: u32) -> u64 {
        self.0 >> Self::COOKIE_SHIFT << Self::PLACE_BITS
            | place as u64 & ((1 << Self::PLACE_BITS) - 1)
    }

    /// The backend.
    #[inline(always)]
    #[must_use]
    pub const fn backend(self) -> u32 {
        (self.0 & 0xff_ffff) as u32
    }

    /// Whether it holds the token of a try.
    #[inline(always)]
    #[must_use]
    pub const fn has_token(self) -> bool {
        self.0 & Self::TOKEN != 0
    }
}

/// A record of `FLOWS`.
///
/// `held` is shared, as the table above says. Everything else is written by the connect program
/// that has claimed the record, before it says whose it is, and read by programs that run for the
/// same socket later. The agent may see the fields of another claim than the word; it looks twice
/// before it acts.
#[repr(C, align(8))]
#[cfg_attr(not(target_arch = "bpf"), derive(Debug, Default))]
pub struct Flow {
    /// A [`Held`].
    pub held: Word,
    /// What the rest says.
    pub given: Given,
}

/// What a socket was given.
#[repr(C, align(8))]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Given {
    /// What the application dialled.
    pub frontend: FrontendKey,
    /// [`peer_hash`] of the backend.
    pub peer: u32,
    /// Cookie of the network namespace.
    pub netns: u64,
    /// Id of the cgroup of the task that connected.
    pub client: u64,
    /// Index into `SERVICES`.
    pub service: u32,
    /// The backend's generation when it was chosen.
    pub generation: u32,
    /// The token of the try that this connect is, if [`Held::has_token`].
    pub token: Token,
}

/// Which of a record's words holds [`Given::netns`], for whoever reads records word by word.
pub const NETNS_WORD: usize = (offset_of!(Flow, given) + offset_of!(Given, netns)) / 8;

/// Which of them holds [`Given::token`].
pub const TOKEN_WORD: usize = (offset_of!(Flow, given) + offset_of!(Given, token)) / 8;

/// Which of them holds [`Given::service`] and [`Given::generation`].
const GENERATION_WORD: usize = (offset_of!(Flow, given) + offset_of!(Given, service)) / 8;

/// [`Given::generation`] of a record read word by word.
#[must_use]
pub const fn generation_of(words: &[u64; size_of::<Flow>() / 8]) -> u32 {
    let [_, _, _, _, a, b, c, d] = words[GENERATION_WORD].to_ne_bytes();
    u32::from_ne_bytes([a, b, c, d])
}

/// What [`claim`] found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Claim {
    /// The record is the socket's now.
    Taken,
    /// It is another socket's.
    Collision,
}

/// How often a word is read again when it changed between being read and being replaced. A held
/// record changes at most twice before it is free: its token is used up, and it is released.
const ATTEMPTS: u32 = 4;

/// Claims a free record, to fill it in: it is nobody's until [`publish`]. The caller has released
/// what the socket held before.
#[inline(always)]
#[must_use]
pub fn claim(held: &Word) -> Claim {
    if held.load() == 0 && held.replace(0, Held::CLAIMED) { Claim::Taken } else { Claim::Collision }
}

/// Says whose a claimed record is, now that it is filled in.
#[inline(always)]
pub fn publish(held: &Word, mine: Held) {
    held.store(mine.0);
}

/// Releases what the socket with this cookie holds in this record. Whoever gets an answer accounts
/// for it; everybody else gets none.
#[inline(always)]
#[must_use]
pub fn release(held: &Word, cookie: u64) -> Option<Held> {
    for _ in 0..ATTEMPTS {
        let now = Held(held.load());
        if !now.is_of(cookie) {
            return None;
        }
        if held.replace(now.0, 0) {
            return Some(now);
        }
    }
    None
}

/// Releases a reservation that was seen some time ago, whether or not its token was used up since.
/// Nothing, when it has been released: what the same socket holds now, which may have connected
/// again, is none of the caller's business, and what it read of the record then is not true of it.
///
/// For the agent, which reads a record long before it knows that no such socket exists.
#[must_use]
pub fn release_seen(held: &Word, seen: Held) -> Option<Held> {
    if !seen.is_used() {
        return None;
    }
    // A token is used up, and never comes back to the same reservation.
    let candidates = [seen, Held(seen.0 & !Held::TOKEN)];
    candidates.into_iter().find(|candidate| held.replace(candidate.0, 0))
}

/// Uses up the token, if the socket holds one: whoever gets `true` accounts for the outcome of the
/// try.
#[inline(always)]
#[must_use]
pub fn settle(held: &Word, cookie: u64) -> bool {
    let now = Held(held.load());
    // Only a release can come in between, which gives the token back itself.
    now.is_of(cookie) && now.has_token() && held.replace(now.0, now.0 & !Held::TOKEN)
}

/// A hash of where a socket is connected to, for comparing its present peer with its record. The
/// port is in network byte order.
#[inline(always)]
#[must_use]
pub const fn peer_hash(addr: Addr, port: u16) -> u32 {
    let [a, b, c, d] = addr.words();
    let high = (a as u64) << 32 | b as u64;
    let low = (c as u64) << 32 | d as u64;
    let mixed = (high ^ low.rotate_left(29)).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ port as u64;
    (mixed.wrapping_mul(0xff51_afd7_ed55_8ccd) >> 32) as u32
}

const _: () = {
    assert!(Held::MAX_BACKENDS - 1 == 0xff_ffff);
    assert!(size_of::<Given>() == 56);
    assert!(offset_of!(Given, netns) % 8 == 0);
    assert!(offset_of!(Given, generation) == offset_of!(Given, service) + 4);
    #[cfg(not(loom))]
    assert!(size_of::<Flow>() == 64);
};

#[cfg(test)]
mod tests;
