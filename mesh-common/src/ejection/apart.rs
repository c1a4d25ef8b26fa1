//! Transitions as functions of plain numbers.
//!
//! In the kernel programs these are global functions. The verifier looks at such a function once, and at what
//! follows a call with a number that it knows nothing of. Inlined, a transition multiplies the paths through
//! each further attempt of [`crate::stats::change`] by the phases that it tells apart. On the host they are
//! ordinary functions, so that tests run the same code.
//!
//! A word that is given back as it was means that nothing changes.

use super::{Client, Ejection, Policy, Token};

/// [`Ejection::fail_now`]; likewise.
#[inline(always)]
pub(crate) fn fail_now(
    known: Ejection,
    policy: Policy,
    client: Client,
    token: Token,
    now: u64,
) -> Option<Ejection> {
    changed(known, mesh_fail(known.0, policy.0, client.tag().into(), token.0, now))
}

/// [`Ejection::succeed`]; likewise.
#[inline(always)]
pub(crate) fn succeed(
    known: Ejection,
    policy: Policy,
    client: Client,
    token: Token,
    now: u64,
) -> Option<Ejection> {
    changed(known, mesh_succeed(known.0, policy.0, client.tag().into(), token.0, now))
}

#[inline(always)]
fn changed(before: Ejection, after: u64) -> Option<Ejection> {
    (after != before.0).then_some(Ejection(after))
}

#[cfg_attr(
    target_arch = "bpf",
    expect(unsafe_code, reason = "exported, so that it stays a global function")
)]
#[cfg_attr(target_arch = "bpf", unsafe(no_mangle), inline(never))]
extern "C" fn mesh_fail(word: u64, policy: u64, client: u64, token: u64, now: u64) -> u64 {
    let (known, client) = (Ejection(word), Client::from_tag((client & 0xffff) as u16));
    known.fail_now(Policy(policy), client, Token(token), now).unwrap_or(known).0
}

#[cfg_attr(
    target_arch = "bpf",
    expect(unsafe_code, reason = "exported, so that it stays a global function")
)]
#[cfg_attr(target_arch = "bpf", unsafe(no_mangle), inline(never))]
extern "C" fn mesh_succeed(word: u64, policy: u64, client: u64, token: u64, now: u64) -> u64 {
    let (known, client) = (Ejection(word), Client::from_tag((client & 0xffff) as u16));
    known.succeed(Policy(policy), client, Token(token), now).unwrap_or(known).0
}
