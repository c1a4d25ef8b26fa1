//! What becomes of an endpoint: who says what about it, and who of them is heard. A pure function of all that is
//! known, so that people and programs see the same, whoever asks.
//!
//! | who | may say | heard |
//! | --- | --- | --- |
//! | its source, a command | it drains | before all others: somebody wants that |
//! | its checks | unhealthy | before the kernel: they go on while nobody connects |
//! | the kernel programs | ejected, for all | before checks that pass: clients see what checks do not |
//! | its checks | healthy, or nothing yet | when nobody above has said anything |
//!
//! What the kernel suspects for one client alone does not change the state; it is told as a reason. That an
//! endpoint is in none of these states is what its source says by defining it.

use std::time::SystemTime;

use mesh_common::State;

/// Who says something about an endpoint.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Voice {
    /// What defines it.
    Source,
    /// Somebody, by `drain`.
    Command,
    /// Its health checks.
    Checks,
    /// The kernel programs, by the connects that they saw fail.
    Kernel,
}

impl Voice {
    /// The name in tables and JSON.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Command => "command",
            Self::Checks => "checks",
            Self::Kernel => "kernel",
        }
    }
}

/// What one of them says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Said {
    /// Who.
    pub(super) by: Voice,
    /// What it makes of the endpoint; nothing when that is only so for one client.
    pub(super) state: Option<State>,
    /// Why.
    pub(super) reason: String,
    /// Since when, as far as is known.
    pub(super) since: Option<SystemTime>,
}

/// The state of an endpoint, and why.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Standing {
    /// The state.
    pub(super) state: State,
    /// Why.
    pub(super) reason: String,
    /// Since when.
    pub(super) since: Option<SystemTime>,
    /// All that is said, in the order in which it is heard.
    pub(super) said: Vec<Said>,
}

/// Where something that is said comes in the order: lower is heard first.
fn rank(said: &Said) -> u8 {
    match (said.by, said.state) {
        (Voice::Source, _) => 0,
        (Voice::Command, _) => 1,
        (Voice::Checks, Some(State::Unhealthy)) => 2,
        // Also what is so for one client alone: its reason is worth more than that all is well.
        (Voice::Kernel, _) => 3,
        (Voice::Checks, _) => 4,
    }
}

/// Puts together what is said about an endpoint. Without anything it is [`State::Unknown`].
pub(super) fn standing(mut said: Vec<Said>) -> Standing {
    said.sort_by_key(rank);
    let heard = said.iter().find(|said| said.state.is_some());
    let state = heard.and_then(|said| said.state).unwrap_or_default();
    let since = heard.and_then(|said| said.since);
    // Who drains it says nothing about how it is, which whoever waits for the end wants to know.
    let drains = said.iter().take_while(|said| said.state == Some(State::Draining));
    let drains = drains.count();
    let reasons = said.iter().take(drains + 1).map(|said| said.reason.as_str());
    let reasons: Vec<&str> = reasons.filter(|reason| !reason.is_empty()).collect();
    Standing { state, reason: reasons.join("; "), since, said }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(by: Voice, state: Option<State>, reason: &str) -> Said {
        Said { by, state, reason: reason.to_owned(), since: None }
    }

    /// What each of them can say.
    fn all() -> [Vec<Option<Said>>; 4] {
        let drains = |by, reason| vec![None, Some(said(by, Some(State::Draining), reason))];
        let checks =
            |state: State| Some(said(Voice::Checks, Some(state), &format!("c {}", state.name())));
        [
            drains(Voice::Source, "by file"),
            drains(Voice::Command, "by hand"),
            vec![checks(State::Unknown), checks(State::Healthy), checks(State::Unhealthy)],
            vec![
                None,
                Some(said(Voice::Kernel, None, "suspected")),
                Some(said(Voice::Kernel, Some(State::Ejected), "ejected")),
            ],
        ]
    }

    /// Every combination, in this order: the file, a command, the checks, the kernel.
    #[test]
    fn who_is_heard() {
        use State::{Draining, Ejected, Healthy, Unhealthy, Unknown};
        let [files, hands, checks, kernel] = all();
        let mut table = Vec::new();
        for (file, hand) in files.iter().flat_map(|file| hands.iter().map(move |hand| (file, hand)))
        {
            for (check, kernel) in checks.iter().flat_map(|c| kernel.iter().map(move |k| (c, k))) {
                // In any order.
                let said = [kernel, hand, check, file].into_iter().flatten().cloned().collect();
                let Standing { state, reason, .. } = standing(said);
                table.push((state, reason));
            }
        }
        let below = [
            (Unknown, "c unknown"),
            (Unknown, "suspected"),
            (Ejected, "ejected"),
            (Healthy, "c healthy"),
            (Healthy, "suspected"),
            (Ejected, "ejected"),
            (Unhealthy, "c unhealthy"),
            (Unhealthy, "c unhealthy"),
            (Unhealthy, "c unhealthy"),
        ];
        let drained = |who: &str| {
            let reason = |(_, reason): &(State, &str)| (Draining, format!("{who}; {reason}"));
            below.iter().map(reason).collect::<Vec<_>>()
        };
        let plain = below.iter().map(|(state, reason)| (*state, (*reason).to_owned()));
        let expected: Vec<_> = plain
            .chain(drained("by hand"))
            .chain(drained("by file"))
            .chain(drained("by file; by hand"))
            .collect();
        assert_eq!(table, expected);
        assert_eq!(standing(Vec::new()).state, Unknown);
    }

    /// When it came into its state is told by who is heard, and all is kept in the order of that.
    #[test]
    fn the_time_is_that_of_who_is_heard() {
        let [first, second] =
            [1, 2].map(|s| SystemTime::UNIX_EPOCH.checked_add(std::time::Duration::from_secs(s)));
        let checks = Said { since: first, ..said(Voice::Checks, Some(State::Healthy), "") };
        let kernel = Said { since: second, ..said(Voice::Kernel, Some(State::Ejected), "out") };
        let known = standing(vec![checks.clone(), kernel.clone()]);
        assert_eq!((known.since, &known.said), (second, &vec![kernel.clone(), checks.clone()]));
        // A suspicion does not change since when it is healthy.
        let known = standing(vec![checks, Said { state: None, ..kernel }]);
        assert_eq!((known.state, known.since), (State::Healthy, first));
    }
}
