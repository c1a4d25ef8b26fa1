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
//! | `tcp_retransmit_skb` | a try's SYN is sent again | [`tell`]: the token is used up, the backend is blamed now; [`settle`] when the try counts as answered already |
//! | `tcp_retransmit_skb` | a SYN is sent again the second time | [`tell`]: the backend is blamed now |
//! | `inet_sk_error_report` | refused, timed out, reset, disconnected | [`release`] |
//! | `recvmsg` of the cgroup | something came back to a try | [`settle`]: the token is used up |
//! | `inet_sk_error_report` | a datagram was not taken | [`tell`]: the socket goes on |
//! | `tcp_destroy_sock` | the socket ends, whatever it was | [`release`] |
//! | `sock_release` of the cgroup | a datagram socket ends | [`release`] |
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
/// 63            27   26    25     24   23       0
/// [ cookie >> 16 ][ told ][ token ][ 1 ][ backend ]
/// ```
///
/// The lower bits of the cookie are the record's place, so records are at least 2^16. The kernel counts
/// cookies up from 1, and, for those that it makes while it is making another on the same CPU, down from
/// 2^64 (`gen_cookie_next`): the 37 bits kept here are a signed number, which lasts for 2^52 of each.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Held(pub u64);

impl Held {
    const USED: u64 = 1 << 24;
    const TOKEN: u64 = 1 << 25;
    /// The backend was blamed for a failure, and the socket goes on.
    const TOLD: u64 = 1 << 26;
    const COOKIE_SHIFT: u32 = 27;
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
        let upper = self.0.cast_signed() >> Self::COOKIE_SHIFT;
        upper.cast_unsigned() << Self::PLACE_BITS | place as u64 & ((1 << Self::PLACE_BITS) - 1)
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

    /// Whether the backend was blamed for a failure already.
    #[inline(always)]
    #[must_use]
    pub const fn is_told(self) -> bool {
        self.0 & Self::TOLD != 0
    }
}

/// Where the records of sockets are: one word of `SETTINGS`, which the agent writes.
///
/// The table can grow while sockets have records in it. A socket that connects from then on has its record
/// at the place among so many more; what was recorded before stays where it is until it is released, so
/// whoever looks for a record looks at both places, until the agent has seen that no record is left at a
/// place that it would not be given now.
///
/// ```text
/// 63                          32 31                           0
/// [ records when it last settled ] [ records, a power of two   ]
/// ```
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Places(pub u64);

impl Places {
    /// A table of `records`, a power of two, in which every record is at its place.
    #[must_use]
    pub const fn settled(records: u32) -> Self {
        Self::grown(records, records)
    }

    /// A table that had `former` records, and now has `records`.
    #[must_use]
    pub const fn grown(former: u32, records: u32) -> Self {
        Self((former as u64) << 32 | records as u64)
    }

    /// Where the socket with this cookie has its record, if it connects now.
    #[inline(always)]
    #[must_use]
    pub const fn of(self, cookie: u64) -> u32 {
        Self::masked(cookie, self.0 & Self::LOW)
    }

    /// Where else it may have one, from before the table grew.
    #[inline(always)]
    #[must_use]
    pub const fn former(self, cookie: u64) -> Option<u32> {
        let place = Self::masked(cookie, self.0 >> 32);
        if place == self.of(cookie) { None } else { Some(place) }
    }

    /// How many records the table has.
    #[must_use]
    pub const fn records(self) -> u64 {
        self.0 & Self::LOW
    }

    /// Whether it can be what was told about a table that has `there` records.
    #[must_use]
    pub const fn is_of(self, there: u32) -> bool {
        let (former, records) = (self.0 >> 32, self.records());
        former.is_power_of_two()
            && records.is_power_of_two()
            && former <= records
            && records <= there as u64
    }

    /// Whether records may be at former places.
    #[inline(always)]
    #[must_use]
    pub const fn has_former(self) -> bool {
        self.0 >> 32 != self.records()
    }

    const LOW: u64 = u32::MAX as u64;

    #[expect(clippy::cast_possible_truncation, reason = "it is below the number of records")]
    #[inline(always)]
    const fn masked(cookie: u64, records: u64) -> u32 {
        (cookie & records.wrapping_sub(1)) as u32
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
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Given {
    /// What the application dialled.
    pub frontend: FrontendKey,
    /// [`peer_hash`] of the backend.
    pub peer: u32,
    /// Where and when.
    pub origin: Origin,
    /// Id of the cgroup of the task that connected.
    pub client: u64,
    /// By which service, and what else the socket has.
    pub role: Role,
    /// The backend's generation when it was chosen.
    pub generation: u32,
    /// The token of the try that this connect is, if [`Held::has_token`].
    pub token: Token,
}

impl Given {
    /// From the words of a record behind its first, for whoever reads records word by word. They may be
    /// of two claims; who acts on them looks again whether the record is the same.
    #[must_use]
    pub const fn from_words(words: [u64; size_of::<Given>() / 8]) -> Self {
        let [first, second, third, origin, client, role, token] = words;
        let (a, b) = halves(first);
        let (c, d) = halves(second);
        let (dialled, peer) = halves(third);
        let [port_low, port_high, protocol, pad] = dialled.to_ne_bytes();
        let port = u16::from_ne_bytes([port_low, port_high]);
        let frontend = FrontendKey { addr: Addr::from_words([a, b, c, d]), port, protocol, pad };
        let (role, generation) = halves(role);
        Self {
            frontend,
            peer,
            origin: Origin(origin),
            client,
            role: Role(role),
            generation,
            token: Token(token),
        }
    }
}

/// The two halves of a word, in the order of memory.
const fn halves(word: u64) -> (u32, u32) {
    let [a, b, c, d, e, f, g, h] = word.to_ne_bytes();
    (u32::from_ne_bytes([a, b, c, d]), u32::from_ne_bytes([e, f, g, h]))
}

/// In which network namespace a socket was given a backend, and when: one word.
///
/// ```text
/// 63                36 35          0
/// [ jiffies >> 8, cut ][ its cookie ]
/// ```
///
/// Cookies of namespaces count up from 1. The time goes round after 2 years and more, by the kernel's
/// `HZ`. For a datagram socket that is not connected it is when it was last used, written by the
/// programs that run for the socket, one after the other (its lock), in one store.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Origin(pub u64);

impl Origin {
    const NETNS_BITS: u32 = 36;
    /// Its unit of time: 2 to this power jiffies.
    pub const TIME_SHIFT: u32 = 8;

    /// Of a namespace's cookie and `jiffies_64`.
    #[inline(always)]
    #[must_use]
    pub const fn new(netns: u64, jiffies: u64) -> Self {
        let netns = netns & ((1 << Self::NETNS_BITS) - 1);
        Self(jiffies >> Self::TIME_SHIFT << Self::NETNS_BITS | netns)
    }

    /// The namespace's cookie.
    #[inline(always)]
    #[must_use]
    pub const fn netns(self) -> u64 {
        self.0 & ((1 << Self::NETNS_BITS) - 1)
    }

    /// How long before `jiffies` it was, in units of 2^[`Origin::TIME_SHIFT`] of them, rounded either
    /// way.
    #[inline(always)]
    #[must_use]
    pub const fn age(self, jiffies: u64) -> u64 {
        let now = jiffies >> Self::TIME_SHIFT;
        now.wrapping_sub(self.0 >> Self::NETNS_BITS) << Self::NETNS_BITS >> Self::NETNS_BITS
    }
}

/// By which service a socket was given a backend, and what else it has: one word.
///
/// ```text
/// 31         30 .. 27          26 .. 23       22         21         20      0
/// [ connected ][ further records ][ last used ][ measured ][ elsewhere ][ service ]
/// ```
///
/// *Further records* are told of in a datagram socket's own record only. *Last used* is, there, the index
/// of the further record that the socket has last sent by, a hint where to look first; in any record of a
/// datagram socket it is 15 when the record is passed over: somebody else was asked later at the address
/// of its backend. No build before that wrote 15, and those that read it find no record at that index.
///
/// Written like [`Origin`].
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Role(pub u32);

impl Role {
    const CONNECTED: u32 = 1 << 31;
    const MORE_SHIFT: u32 = 27;
    const LAST_SHIFT: u32 = 23;
    const MEASURED: u32 = 1 << 22;
    const ELSEWHERE: u32 = 1 << 21;
    const COUNT: u32 = 0xf;
    const PASSED_OVER: u32 = Self::COUNT << Self::LAST_SHIFT;
    /// How many further records a datagram socket has at the most: one for each service that it sends
    /// to without being connected.
    pub const MOST: u32 = 8;

    /// Of a socket that is connected, or is a datagram socket that only sends; by the service at this
    /// index of `SERVICES`.
    #[inline(always)]
    #[must_use]
    pub const fn new(service: u32, connected: bool) -> Self {
        let connected = if connected { Self::CONNECTED } else { 0 };
        Self(connected | service & (Self::ELSEWHERE - 1))
    }

    /// The same, with so many further records.
    #[inline(always)]
    #[must_use]
    pub const fn with_more(self, more: u32) -> Self {
        let more = if more > Self::MOST { Self::MOST } else { more };
        Self(self.0 & !(Self::COUNT << Self::MORE_SHIFT) | more << Self::MORE_SHIFT)
    }

    /// The same, when the socket has last sent by its further record at this index, or by its own: 0. A
    /// record that is passed over stays so, without the hint, until it is used itself.
    #[inline(always)]
    #[must_use]
    pub const fn with_last(self, index: u32) -> Self {
        if self.is_passed_over() && index != 0 {
            return self;
        }
        let index = if index > Self::MOST { 0 } else { index };
        Self(self.0 & !Self::PASSED_OVER | index << Self::LAST_SHIFT)
    }

    /// The same, when another service was asked later at the address of the record's backend, or that
    /// address itself: what comes from there is not this service's.
    #[inline(always)]
    #[must_use]
    pub const fn passed_over(self) -> Self {
        Self(self.0 | Self::PASSED_OVER)
    }

    /// The same of a record that is used again.
    #[inline(always)]
    #[must_use]
    pub const fn asked(self) -> Self {
        self.with_last(0)
    }

    /// The same of a connection whose round-trip time is to be noted.
    #[inline(always)]
    #[must_use]
    pub const fn measured(self, measured: bool) -> Self {
        if measured { Self(self.0 | Self::MEASURED) } else { self }
    }

    /// Whether its round-trip time is to be noted.
    #[inline(always)]
    #[must_use]
    pub const fn is_measured(self) -> bool {
        self.0 & Self::MEASURED != 0
    }

    /// The same in a record that is not in `FLOWS`: all records of `OVERFLOW` are so, and no other, so this
    /// tells of a record where it is, whoever's it has become meanwhile.
    #[inline(always)]
    #[must_use]
    pub const fn elsewhere(self) -> Self {
        Self(self.0 | Self::ELSEWHERE)
    }

    /// Whether the record is in `OVERFLOW`.
    #[inline(always)]
    #[must_use]
    pub const fn is_elsewhere(self) -> bool {
        self.0 & Self::ELSEWHERE != 0
    }

    /// The same of a socket that is not connected any more.
    #[inline(always)]
    #[must_use]
    pub const fn disconnected(self) -> Self {
        Self(self.0 & !Self::CONNECTED)
    }

    /// Index into `SERVICES`.
    #[inline(always)]
    #[must_use]
    pub const fn service(self) -> u32 {
        self.0 & (Self::ELSEWHERE - 1)
    }

    /// Whether the socket is connected: what it has a backend for is then its only peer.
    #[inline(always)]
    #[must_use]
    pub const fn is_connected(self) -> bool {
        self.0 & Self::CONNECTED != 0
    }

    /// How many further records the socket has.
    #[inline(always)]
    #[must_use]
    pub const fn more(self) -> u32 {
        self.0 >> Self::MORE_SHIFT & Self::COUNT
    }

    /// By which of its further records the socket has last sent, if that is known and was not its own: a
    /// hint. Otherwise 0.
    #[inline(always)]
    #[must_use]
    pub const fn last(self) -> u32 {
        let last = self.0 >> Self::LAST_SHIFT & Self::COUNT;
        if last > Self::MOST { 0 } else { last }
    }

    /// Whether somebody else was asked later at the address of the record's backend.
    #[inline(always)]
    #[must_use]
    pub const fn is_passed_over(self) -> bool {
        self.0 & Self::PASSED_OVER == Self::PASSED_OVER
    }
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
    // A token is used up and a failure told, neither of which is ever taken back.
    let settled = seen.0 & !Held::TOKEN;
    let candidates = [seen, Held(settled), Held(settled | Held::TOLD)];
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

/// Notes that the backend is blamed for a failure of a socket that goes on, and uses up its token: whoever gets
/// `true` accounts for the failure, once. `seen` is the word as it was before anything else of the record
/// was read: the socket may have connected again since.
#[inline(always)]
#[must_use]
pub fn tell(held: &Word, seen: Held, cookie: u64) -> bool {
    seen.is_of(cookie)
        && !seen.is_told()
        && held.replace(seen.0, seen.0 & !Held::TOKEN | Held::TOLD)
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
    assert!(offset_of!(Given, origin) % 8 == 0);
    assert!(crate::Limits::MOST.frontends <= Role::ELSEWHERE);
    #[cfg(not(loom))]
    assert!(size_of::<Flow>() == 64);
};

#[cfg(test)]
mod tests;
