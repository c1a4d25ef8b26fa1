//! What the client saw, by backend.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// An account of connections, or several added up.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Tally {
    /// By service and backend: `name ip:port`; only `name` where the backend cannot be known.
    pub accounts: BTreeMap<String, Counts>,
    /// How often each kind of connection was tried.
    pub kinds: BTreeMap<String, u64>,
    /// Answers that came through a service.
    pub answered: u64,
    /// What went otherwise than it must.
    pub unexpected: BTreeMap<String, u64>,
}

/// An account of the connections to one backend.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Counts {
    /// Calls of connect(2) for which the backend was chosen, whatever came of them.
    pub opened: u64,
    /// Those that failed with `ECONNREFUSED`.
    pub refused: u64,
    /// Those that failed with `ETIMEDOUT`.
    pub timeout: u64,
    /// Those that failed with `EHOSTUNREACH`.
    pub unreachable: u64,
    /// Those that were established, and reset by the server before it had sent anything.
    pub reset: u64,
    /// Connections that are open still.
    pub held: u64,
}

// === impl Tally ===

impl Tally {
    /// The account of a backend.
    pub fn account(&mut self, name: String) -> &mut Counts {
        self.accounts.entry(name).or_default()
    }

    /// Adds another tally to this one.
    pub fn add(&mut self, other: &Self) {
        for (name, counts) in &other.accounts {
            self.accounts.entry(name.clone()).or_default().add(counts);
        }
        for (from, to) in
            [(&other.kinds, &mut self.kinds), (&other.unexpected, &mut self.unexpected)]
        {
            for (name, count) in from {
                *to.entry(name.clone()).or_default() += count;
            }
        }
        self.answered += other.answered;
    }

    /// The sum of all accounts.
    #[must_use]
    pub fn total(&self) -> Counts {
        self.accounts.values().fold(Counts::default(), |mut sum, counts| {
            sum.add(counts);
            sum
        })
    }
}

// === impl Counts ===

impl Counts {
    /// Adds another account to this one.
    pub fn add(&mut self, other: &Self) {
        self.opened += other.opened;
        self.refused += other.refused;
        self.timeout += other.timeout;
        self.unreachable += other.unreachable;
        self.reset += other.reset;
        self.held += other.held;
    }

    /// Those that failed so that it says something about the backend.
    #[must_use]
    pub const fn failed(&self) -> u64 {
        self.refused + self.timeout + self.unreachable + self.reset
    }

    /// The least number of events that were not seen, if that is why this account is not the
    /// `wanted` one: of a failure, which is then not counted or for another reason; of an end, which
    /// then seems to be open. `None` when that cannot be why.
    #[must_use]
    pub fn unseen(&self, wanted: &Self) -> Option<u64> {
        let reasons =
            |counts: &Self| [counts.refused, counts.timeout, counts.unreachable, counts.reset];
        let (mut more, mut less) = (0, 0);
        for (kernel, wanted) in reasons(self).into_iter().zip(reasons(wanted)) {
            more += kernel.saturating_sub(wanted);
            less += wanted.saturating_sub(kernel);
        }
        let possible = self.opened == wanted.opened && self.held >= wanted.held && more <= less;
        possible.then(|| less + (self.held - wanted.held))
    }
}
