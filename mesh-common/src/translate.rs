//! The decision of the connect hook: from the dialled address to a backend, a refusal, or nothing.
//!
//! Generic over where the tables live, so that the kernel programs run it on maps, `explain` on
//! the agent's view of the same maps, and the tests on tables that change between any two reads.

use crate::balance::Loaded;
use crate::ejection::{Admission, Client, Ejection, Policy, Token};
use crate::layout::{FrontendKey, FrontendValue, Reason, Service, Slot, Table};
use crate::{Addr, Affinity, Algorithm, Protocol, alias, balance, maglev};

/// How often a program looks again when the tables change under it. Each attempt can only fail
/// when another update lands in its window of well under a microsecond.
pub const ATTEMPTS: u32 = 8;

/// How often another backend is drawn when the first is ejected.
pub const REDRAWS: u32 = 4;

/// How many slots are looked at one after another when all draws were ejected ones.
pub const SCAN: u32 = 256;

/// Where the tables are.
pub trait Tables {
    /// The entry of `FRONTENDS`. It may be another frontend's, or torn, when the element was
    /// reused while it was read: [`translate`] finds that out.
    fn frontend(&self, key: &FrontendKey) -> Option<FrontendValue>;
    /// A record of `SERVICES`.
    fn service(&self, index: u32) -> Option<&Service>;
    /// A record of `SLOTS`.
    fn slot(&self, index: u32) -> Option<&Slot>;
    /// Whether the address is inside `virtual-ips`.
    fn is_virtual(&self, addr: &Addr) -> bool;
    /// A random number, even over its 32 bits, for what is drawn after the first.
    fn random(&self) -> u32;
    /// What is known of failures of a backend that a slot names.
    fn ejection(&self, backend: u32) -> Ejection;
    /// How many connections of a backend are open.
    fn active(&self, backend: u32) -> u64;
    /// Both of these, in one look. Asked only by [`Algorithm::LeastConnections`] and [`Algorithm::Latency`].
    fn load(&self, backend: u32) -> (Ejection, u64) {
        (self.ejection(backend), self.active(backend))
    }
    /// How far a backend is ([`crate::latency`]), in microseconds; 0 when nothing is known. Asked only by
    /// [`Algorithm::Latency`].
    fn latency(&self, backend: u32) -> u64 {
        let _ = backend;
        0
    }
    /// How many turns a service has had, and counts one more. Asked only by
    /// [`Algorithm::RoundRobin`].
    fn position(&self, service: u32) -> u64;
    /// [`balance::turn`], which the kernel has in a function of its own, like all that follow.
    fn turn(&self, service: u32, table: Table) -> u32 {
        balance::turn(self, service, table)
    }
    /// [`balance::lighter`].
    fn lighter(&self, table: Table, chance: u32) -> u32 {
        balance::lighter(self, table, chance)
    }
    /// [`balance::nearer`].
    fn nearer(&self, one: Loaded, other: Loaded) -> bool {
        balance::nearer(self, one, other)
    }
    /// [`maglev::look_up`].
    fn look_up(&self, table: Table, key: u64) -> u32 {
        maglev::look_up(self, table, key)
    }
    /// What a connect may do with the backend of this slot. The kernel has this, and
    /// [`Tables::around`], in functions of their own, which its verifier looks at once.
    fn admission(&self, slot: u32, client: Client, now: u64) -> Admission {
        admission(self, slot, client, now)
    }
    /// Whether the backend of this slot is out for this client: 1 or 0. No branch hangs on the
    /// answer, so that the verifier does not have to follow both for each slot that is counted.
    fn is_out(&self, slot: u32, client: Client) -> u64 {
        is_out(self, slot, client)
    }
    /// [`unknown`], which the kernel has apart from the way of the connects that it balances.
    fn unknown(&self, key: &FrontendKey) -> Option<Reason> {
        unknown(self, key)
    }
    /// [`around`].
    fn around(&self, table: Table, first: u32) -> Detour {
        around(self, table, first)
    }
    /// Who connects. Asked only when a backend is out.
    fn client(&self) -> Client;
    /// What time it is, in ticks. Asked only when a backend is out.
    fn now(&self) -> u64;
    /// Called for each attempt that found the tables changed.
    fn retried(&self) {}
    /// Called when all that was looked at is ejected, and is used all the same.
    fn all_ejected(&self) {}
}

/// Who connects: what no other reader of the tables has, or may do.
pub trait Caller {
    /// A random number for the first draw, even over its 32 bits.
    fn chance(&self) -> u32;
    /// What a consistent hash is of: the cgroup, the network namespace or the process, by the algorithm.
    fn key(&self, by: Algorithm) -> u64;
    /// Asks for entry to a backend that is out, or was: takes the token of its try, or notes that
    /// the last one was answered. `None` when somebody else was faster; otherwise the token, if this
    /// connect holds one now.
    fn enter(&self, backend: u32, policy: Policy) -> Option<Token>;
}

/// A backend was chosen.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Choice<'t> {
    /// Which. The slot stays as it is for as long as the program runs.
    pub slot: &'t Slot,
    /// Index of the record in `SERVICES`.
    pub service: u32,
    /// The table that it was chosen from.
    pub table: Table,
    /// What clients of the service keep.
    pub affinity: Affinity,
    /// The token, when this connect is the one that tries an ejected backend.
    pub token: Token,
}

/// What is to be done with a connect.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict<'t> {
    /// Not ours: do not touch it.
    Pass,
    /// Go to this backend.
    Balance(Choice<'t>),
    /// Fail with `ECONNREFUSED`, for this reason; with the record's index in `SERVICES`, or
    /// `u32::MAX` when there is none.
    Refuse(Reason, u32),
}

/// Decides about a connect to `key`.
///
/// What it must be robust against, and why it is:
///
/// * The frontend's hash element is reused while it is read: then `value` names another frontend's
///   record or nonsense; the record's own key differs from `key`, and it looks again. Reused for an
///   address alone, it has the generation 0, as has a record that is retired: that is nobody's.
/// * The frontend is removed, and perhaps made again, after the first read: the record's
///   generation is 0 or another one at the last read, and it looks again.
/// * The table is switched after it was read: the word differs at the last read, and it looks
///   again, so no connect whose last read comes after the switch uses the old table.
/// * Slots are overwritten while they are read: they are not. An extent, a record and a backend id
///   are used again only after a grace period that waits for every running program.
/// * Another connect takes the token of the same try: it looks again, and finds the backend out.
#[inline(always)]
pub fn translate<'t, T: Tables>(
    tables: &'t T,
    caller: &impl Caller,
    key: &FrontendKey,
) -> Verdict<'t> {
    for _ in 0..ATTEMPTS {
        let Some(value) = tables.frontend(key) else {
            return match tables.unknown(key) {
                Some(reason) => Verdict::Refuse(reason, u32::MAX),
                None => Verdict::Pass,
            };
        };
        // An index out of range can only come from a torn value.
        if let Some(service) = tables.service(value.service) {
            let (table, affinity) = (service.table(), service.affinity());
            let found = |slot, token| {
                Verdict::Balance(Choice { slot, service: value.service, table, affinity, token })
            };
            let drawn = choose(tables, caller, value.service, table);
            if value.generation != 0
                && service.generation() == value.generation
                && service.key == *key
                && service.table() == table
            {
                let Some(slot) = drawn.slot else {
                    return Verdict::Refuse(drawn.reason, value.service);
                };
                if !drawn.asks {
                    let token = Token::NONE;
                    return found(slot, token);
                }
                if let Some(token) = caller.enter(slot.backend, service.policy()) {
                    return found(slot, token);
                }
            }
        }
        tables.retried();
    }
    Verdict::Refuse(Reason::Contended, u32::MAX)
}

/// What a table says. All fields always have a value: the payload of an enum that is alive across
/// the end of a loop becomes a register that the verifier finds uninitialised.
#[derive(Clone, Copy)]
struct Drawn<'t> {
    slot: Option<&'t Slot>,
    /// Why there is no slot.
    reason: Reason,
    /// [`Caller::enter`] has to be asked.
    asks: bool,
}

#[inline(always)]
fn choose<'t, T: Tables>(
    tables: &'t T,
    caller: &impl Caller,
    service: u32,
    table: Table,
) -> Drawn<'t> {
    if table.is_empty() {
        return Drawn { slot: None, reason: table.reason(), asks: false };
    }
    let at = |index| (index, tables.slot(index));
    let (index, slot) = match table.algorithm() {
        Algorithm::Random => drawn(tables, table, caller.chance()),
        Algorithm::RoundRobin => at(tables.turn(service, table)),
        Algorithm::LeastConnections | Algorithm::Latency => {
            at(tables.lighter(table, caller.chance()))
        }
        by => at(tables.look_up(table, caller.key(by))),
    };
    if let Some(first) = slot
        && !tables.ejection(first.backend).is_in()
    {
        let Detour { index, asks } = tables.around(table, index);
        return Drawn { slot: tables.slot(index), reason: Reason::Corrupt, asks };
    }
    Drawn { slot, reason: Reason::Corrupt, asks: false }
}

/// The slot that a random number draws by weight, and its index.
#[inline(always)]
pub(crate) fn drawn<T: Tables + ?Sized>(
    tables: &T,
    table: Table,
    random: u32,
) -> (u32, Option<&Slot>) {
    match draw(tables, table, random) {
        (index, None) => (index, tables.slot(index)),
        known => known,
    }
}

/// The index of the slot that a random number draws by weight, and the slot, if it was looked at for that.
#[inline(always)]
fn draw<T: Tables + ?Sized>(tables: &T, table: Table, random: u32) -> (u32, Option<&Slot>) {
    let (column, position) = alias::column(random, table.len());
    let index = table.base().wrapping_add(column);
    match tables.slot(index) {
        Some(own) if position >= own.threshold && own.alias != column => {
            (table.base().wrapping_add(own.alias), None)
        }
        own => (index, own),
    }
}

/// Where to go instead.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Detour {
    /// Index of the slot.
    pub index: u32,
    /// Its backend may be used only if [`Caller::enter`] says so.
    pub asks: bool,
}

/// The first draw, the slot with this index, is out for somebody: for this client? Then another one
/// that is not, by weight as long as drawing finds one, and otherwise the next one in the table. If
/// all are out, the first.
#[inline(always)]
pub fn around<T: Tables + ?Sized>(tables: &T, table: Table, first: u32) -> Detour {
    let (client, now) = (tables.client(), tables.now());
    let mut index = first;
    for step in 0..1 + REDRAWS + SCAN {
        match tables.admission(index, client, now) {
            Admission::In => return Detour { index, asks: false },
            Admission::Try | Admission::Answered => return Detour { index, asks: true },
            Admission::Out => {}
        }
        if step < REDRAWS {
            index = draw(tables, table, tables.random()).0;
        } else if step - REDRAWS < table.len() {
            // From the last draw on, round the table. Without a branch, of which the verifier
            // would have to follow both ways for each slot.
            let column = index.wrapping_sub(table.base()).wrapping_add(1);
            index = table.base().wrapping_add(column.checked_rem(table.len()).unwrap_or(0));
        } else {
            break;
        }
    }
    tables.all_ejected();
    Detour { index: first, asks: false }
}

/// What a connect may do with the backend of a slot; nothing, when there is no such slot.
#[inline(always)]
pub fn admission<T: Tables + ?Sized>(tables: &T, slot: u32, client: Client, now: u64) -> Admission {
    match tables.slot(slot) {
        Some(slot) => tables.ejection(slot.backend).admits(client, now),
        None => Admission::Out,
    }
}

/// Whether the backend of a slot is out for this client: 1 or 0.
#[inline(always)]
pub fn is_out<T: Tables + ?Sized>(tables: &T, slot: u32, client: Client) -> u64 {
    let slot = tables.slot(slot);
    slot.is_some_and(|slot| tables.ejection(slot.backend).is_out_for(client)).into()
}

/// How many slots are counted at the most to find out how many backends are out. Beyond that, the
/// share is that of a part of the table that begins anywhere.
pub const CENSUS: u32 = 256;

/// Whether the share of a table's backends that may be out for `client` (for all, if it is
/// nobody) allows for one more; or, when the one in question is out already, for itself.
#[inline(always)]
pub fn share_allows<T: Tables>(
    tables: &T,
    table: Table,
    policy: Policy,
    client: Client,
    is_out: bool,
) -> bool {
    let len = table.len();
    let counted = if len < CENSUS { len } else { CENSUS };
    let first = if len > CENSUS { alias::column(tables.random(), len - counted + 1).0 } else { 0 };
    let first = table.base().wrapping_add(first);
    let mut out: u64 = if is_out { 0 } else { 1 };
    for step in 0..CENSUS {
        if step >= counted {
            break;
        }
        out += tables.is_out(first.wrapping_add(step), client);
    }
    out * 100 <= policy.share() * counted as u64
}

/// Why a connect is refused whose address and port are no frontend; nothing, when it is not ours.
#[inline(always)]
pub fn unknown<T: Tables + ?Sized>(tables: &T, key: &FrontendKey) -> Option<Reason> {
    if !tables.is_virtual(&key.addr) {
        return None;
    }
    let known = tables.frontend(&FrontendKey::address_only(key.addr)).is_some();
    Some(if known { Reason::NoPort } else { Reason::NoService })
}

/// Whether a *connect* that [`translate`] refuses is let go on as it was dialled all the same: one of a
/// datagram socket to a service that has no such port. Nothing is sent by it. `getaddrinfo` sorts the
/// addresses of a name by such connects, with whatever port it was asked for or 0, and programs find out
/// their own address towards the service like that; both take a refusal for an address that cannot be
/// reached. A datagram that names its destination is refused.
#[inline(always)]
#[must_use]
pub const fn is_probe(key: &FrontendKey, reason: Reason) -> bool {
    key.protocol == Protocol::Udp as u8 && matches!(reason, Reason::NoPort)
}

#[cfg(test)]
mod tests;
