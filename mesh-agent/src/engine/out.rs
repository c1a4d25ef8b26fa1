//! What the kernel thinks of a backend, as people see it: whether it is out of rotation because
//! connects to it failed, for whom, and until when.

use std::time::{Duration, SystemTime};

use mesh_common::ejection::{Phase, TICK_SHIFT};
use mesh_common::{Client, Ejection, Policy, State};

/// The state and the reason of a backend.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Standing {
    /// The agent's state, or [`State::Ejected`] when the kernel has taken it out for all.
    pub(super) state: State,
    /// Why.
    pub(super) reason: String,
    /// Since when it is ejected.
    pub(super) since: Option<SystemTime>,
}

/// Puts together what the agent's checks say (`state`, `reason`) and what the kernel saw.
/// `suspected_by` is the client that the kernel suspects the backend for, when its name is known.
pub(super) fn standing(
    (state, reason): (State, &str),
    ejection: Ejection,
    policy: Policy,
    suspected_by: Option<&str>,
    now: u64,
) -> Standing {
    let plain = || Standing { state, reason: reason.to_owned(), since: None };
    if !state.is_usable() {
        return plain();
    }
    let left = ejection.until().saturating_sub(now);
    let whose = suspected_by.unwrap_or("one client");
    match ejection.phase() {
        Phase::In => plain(),
        Phase::Ejected => Standing {
            state: State::Ejected,
            reason: match left {
                0 => format!("{}; the next connect tries it", failed(ejection)),
                _ => format!("{}; out for {} more", failed(ejection), time(left)),
            },
            since: began(ejection, policy, now),
        },
        Phase::Trying => Standing {
            state: State::Ejected,
            reason: format!("{}; one connect tries it", failed(ejection)),
            since: None,
        },
        Phase::Suspected if left > 0 => Standing {
            reason: format!("{}; out for {whose} alone, for {} more", failed(ejection), time(left)),
            ..plain()
        },
        Phase::Suspected => Standing {
            reason: format!(
                "{}; out for {whose} alone, whose next connect tries it",
                failed(ejection)
            ),
            ..plain()
        },
        Phase::SuspectTry => Standing {
            reason: format!(
                "{}; out for {whose} alone, one connect of which tries it",
                failed(ejection)
            ),
            ..plain()
        },
    }
}

/// Whether it is out for this client.
pub(super) fn is_out(ejection: Ejection, client: Client) -> bool {
    ejection.is_out_for(client)
}

fn failed(ejection: Ejection) -> String {
    match ejection.failures() {
        1 => "a connect failed".into(),
        failures => format!("{failures} connects in a row failed"),
    }
}

/// When an ejection began, from when it ends.
fn began(ejection: Ejection, policy: Policy, now: u64) -> Option<SystemTime> {
    let start = ejection.until().checked_sub(policy.duration(ejection.level()))?;
    SystemTime::now().checked_sub(duration(now.checked_sub(start)?))
}

fn duration(ticks: u64) -> Duration {
    Duration::from_nanos(ticks << TICK_SHIFT)
}

/// For people: to a tenth of a second.
fn time(ticks: u64) -> String {
    let tenths = duration(ticks).as_millis() / 100;
    format!("{}.{} s", tenths / 10, tenths % 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: u64 = 10_000;

    /// One second is 60 ticks and a bit.
    fn policy() -> Policy {
        Policy::new(1, 60, 3600, 50)
    }

    fn shown(ejection: Ejection, now: u64) -> (State, String) {
        let healthy = (State::Healthy, "checks pass");
        let Standing { state, reason, .. } = standing(healthy, ejection, policy(), None, now);
        (state, reason)
    }

    #[test]
    fn each_phase_has_its_words() {
        let client = Client::of_cgroup(7);
        let token = mesh_common::Token::NONE;
        let fail = |e: Ejection, client, token, now| e.fail(policy(), client, token, now);
        let suspected = fail(Ejection::NONE, client, token, NOW).expect("a change");
        assert_eq!(shown(Ejection::NONE, NOW), (State::Healthy, "checks pass".into()));
        assert_eq!(
            shown(suspected, NOW),
            (State::Healthy, "a connect failed; out for one client alone, for 1.0 s more".into())
        );
        let ejected = fail(suspected, Client::of_cgroup(8), token, NOW).expect("a change");
        assert_eq!(
            shown(ejected, NOW),
            (State::Ejected, "a connect failed; out for 1.0 s more".into())
        );
        assert_eq!(
            shown(ejected, NOW + 60),
            (State::Ejected, "a connect failed; the next connect tries it".into())
        );
        let trying = ejected.take(NOW + 60);
        assert_eq!(
            shown(trying, NOW + 61),
            (State::Ejected, "a connect failed; one connect tries it".into())
        );
        assert_eq!(shown(trying.recover(policy(), NOW + 70), NOW + 70).0, State::Healthy);
    }

    /// What the checks say comes first: an endpoint that fails them is not in the table at all.
    #[test]
    fn unhealthy_stays_unhealthy() {
        let client = Client::of_cgroup(7);
        let out = Ejection::NONE.fail(policy(), client, mesh_common::Token::NONE, NOW);
        let shown =
            standing((State::Unhealthy, "refused"), out.expect("a change"), policy(), None, NOW);
        assert_eq!((shown.state, shown.reason.as_str()), (State::Unhealthy, "refused"));
    }
}
