//! Datagram sockets that send without being connected: how long one goes on with the backend that it
//! was given.
//!
//! Who sends several datagrams to a service means one partner (QUIC, TFTP, a DNS query that is
//! repeated), so a socket keeps its backend for a service while it uses it. Who never closes its socket
//! (statsd, syslog) is balanced anew after a pause, as connection tracking does it.

use crate::ejection::{Client, Ejection};
use crate::layout::State;

/// For how many seconds a socket that sends nothing to a service keeps its backend there. Linux keeps
/// an entry of connection tracking that has seen an answer for two minutes, and one that has not for
/// half a minute (`nf_conntrack_udp_timeout`).
pub const IDLE_SECONDS: u64 = 60;

/// What there is to know when a socket sends to a service again.
#[derive(Clone, Copy, Debug)]
pub struct Standing {
    /// The backend is still the one that was given, and the frontend leads to the same service.
    pub is_there: bool,
    /// The socket is connected there: then it has no choice.
    pub is_connected: bool,
    /// How long ago the socket last sent there, and how long that may be.
    pub idle: (u64, u64),
    /// What is known of failures of the backend.
    pub ejection: Ejection,
    /// What its checks say.
    pub state: State,
    /// This socket is the one that tries the backend.
    pub is_try: bool,
}

/// Whether the socket goes on with its backend. `client` is asked only when the backend is out for
/// anybody.
#[inline(always)]
#[must_use]
pub fn keeps(standing: Standing, client: impl FnOnce() -> Client) -> bool {
    let Standing { is_there, is_connected, idle: (idle, most), ejection, state, is_try } = standing;
    let kept = idle <= most && (is_try || serves(state, ejection, client));
    is_there && (is_connected || kept)
}

/// Whether a backend is one to go to, or to stay with. Who has one that is not leaves it for one that is,
/// and not for another of the same kind: when all are unhealthy, or out, all are used, and a socket that
/// chose among them with each datagram would have no partner.
#[inline(always)]
#[must_use]
pub fn serves(state: State, ejection: Ejection, client: impl FnOnce() -> Client) -> bool {
    // What is drained finishes what it has.
    let works = state.is_usable() || matches!(state, State::Draining);
    works && (ejection.is_in() || !ejection.is_out_for(client()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Policy, Token};

    const GOOD: Standing = Standing {
        is_there: true,
        is_connected: false,
        idle: (60, 60),
        ejection: Ejection::NONE,
        state: State::Healthy,
        is_try: false,
    };

    #[test]
    fn a_backend_is_kept_while_it_serves() {
        let me = Client::of_cgroup(7);
        let keeps = |standing| keeps(standing, || me);
        assert!(keeps(GOOD));
        assert!(keeps(Standing { state: State::Draining, ..GOOD }), "it finishes what it has");
        assert!(keeps(Standing { state: State::Unknown, ..GOOD }));
        assert!(!keeps(Standing { state: State::Unhealthy, ..GOOD }));
        assert!(!keeps(Standing { idle: (61, 60), ..GOOD }));
        let gone = Standing { is_there: false, ..GOOD };
        assert!(!keeps(gone));
        assert!(!keeps(Standing { is_connected: true, ..gone }));
    }

    #[test]
    fn what_is_out_for_the_client_is_left() {
        let policy = Policy::new(1, 100, 100, 100);
        let me = Client::of_cgroup(7);
        let out = Ejection::NONE.fail(policy, me, Token::NONE, 1_000).expect("a change");
        let standing = Standing { ejection: out, ..GOOD };
        assert!(!keeps(standing, || me));
        assert!(keeps(standing, || Client::of_cgroup(8)), "one that saw nothing of it");
        assert!(keeps(Standing { is_try: true, ..standing }, || me), "it is the one to try it");
        let connected = Standing { is_connected: true, idle: (1_000, 60), ..standing };
        assert!(keeps(connected, || me), "it has no other peer");
    }
}
