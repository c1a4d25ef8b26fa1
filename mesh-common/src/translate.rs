//! The decision of the connect hook: from the dialled address to a backend, a refusal, or nothing.
//!
//! Generic over where the tables live, so that the kernel programs run it on maps, `explain` on
//! the agent's view of the same maps, and the tests on tables that change between any two reads.

use crate::layout::{FrontendKey, FrontendValue, Reason, Service, Slot};
use crate::{Addr, alias};

/// How often a program looks again when the tables change under it. Each attempt can only fail
/// when another update lands in its window of well under a microsecond.
pub const ATTEMPTS: u32 = 8;

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
    /// A random number, even over its 32 bits.
    fn random(&self) -> u32;
    /// Called for each attempt that found the tables changed.
    fn retried(&self) {}
}

/// What is to be done with a connect.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict<'t> {
    /// Not ours: do not touch it.
    Pass,
    /// Go to this backend. The slot stays as it is for as long as the program runs.
    Balance(&'t Slot),
    /// Fail with `ECONNREFUSED`, for this reason.
    Refuse(Reason),
}

/// Decides about a connect to `key`.
///
/// What it must be robust against, and why it is:
///
/// * The frontend's hash element is reused while it is read: then `value` names another frontend's
///   record or nonsense; the record's own key differs from `key`, and it looks again.
/// * The frontend is removed, and perhaps made again, after the first read: the record's
///   generation is 0 or another one at the last read, and it looks again.
/// * The table is switched after it was read: the word differs at the last read, and it looks
///   again, so no connect whose last read comes after the switch uses the old table.
/// * Slots are overwritten while they are read: they are not. An extent, a record and a backend id
///   are used again only after a grace period that waits for every running program.
#[inline(always)]
pub fn translate<'t, T: Tables>(tables: &'t T, key: &FrontendKey) -> Verdict<'t> {
    for _ in 0..ATTEMPTS {
        let Some(value) = tables.frontend(key) else { return unknown(tables, key) };
        // An index out of range can only come from a torn value.
        if let Some(service) = tables.service(value.service) {
            let table = service.table();
            let choice = choose(tables, table);
            if service.generation() == value.generation
                && service.key == *key
                && service.table() == table
            {
                return choice.verdict();
            }
        }
        tables.retried();
    }
    Verdict::Refuse(Reason::Contended)
}

/// What a table says. Both fields always have a value: the payload of an enum that is alive across
/// the end of a loop becomes a register that the verifier finds uninitialised.
struct Choice<'t> {
    slot: Option<&'t Slot>,
    /// Why there is no slot.
    reason: Reason,
}

impl<'t> Choice<'t> {
    #[inline(always)]
    fn verdict(self) -> Verdict<'t> {
        match self.slot {
            Some(slot) => Verdict::Balance(slot),
            None => Verdict::Refuse(self.reason),
        }
    }
}

#[inline(always)]
fn choose<T: Tables>(tables: &T, table: crate::Table) -> Choice<'_> {
    if table.is_empty() {
        return Choice { slot: None, reason: table.reason() };
    }
    let (column, position) = alias::column(tables.random(), table.len());
    let mut slot = tables.slot(table.base().wrapping_add(column));
    if let Some(own) = slot
        && position >= own.threshold
        && own.alias != column
    {
        slot = tables.slot(table.base().wrapping_add(own.alias));
    }
    Choice { slot, reason: Reason::Corrupt }
}

/// The address and port are no frontend.
#[inline(always)]
fn unknown<'t, T: Tables>(tables: &'t T, key: &FrontendKey) -> Verdict<'t> {
    if !tables.is_virtual(&key.addr) {
        return Verdict::Pass;
    }
    match tables.frontend(&FrontendKey::address_only(key.addr)) {
        Some(_) => Verdict::Refuse(Reason::NoPort),
        None => Verdict::Refuse(Reason::NoService),
    }
}
