//! What the kernel thinks of a backend, as people see it: whether it is out of rotation because
//! connects to it failed, for whom, and until when.

use std::time::{Duration, SystemTime};

use mesh_common::ejection::{Phase, TICK_SHIFT};
use mesh_common::{Client, Ejection, Policy, State};

use super::standing::{Said, Voice};

/// What the kernel programs say of a backend; nothing while it is in. `suspected_by` is the client that it is
/// suspected for, when its name is known.
pub(super) fn said(
    ejection: Ejection,
    policy: Policy,
    suspected_by: Option<&str>,
    now: u64,
) -> Option<Said> {
    let left = ejection.until().saturating_sub(now);
    let whose = suspected_by.unwrap_or("one client");
    let (state, what) = match ejection.phase() {
        Phase::In => return None,
        Phase::Ejected if left == 0 => {
            (Some(State::Ejected), "the next connect tries it".to_owned())
        }
        Phase::Ejected => (Some(State::Ejected), format!("out for {} more", time(left))),
        Phase::Trying => (Some(State::Ejected), "one connect tries it".to_owned()),
        Phase::Suspected if left > 0 => {
            (None, format!("out for {whose} alone, for {} more", time(left)))
        }
        Phase::Suspected => (None, format!("out for {whose} alone, whose next connect tries it")),
        Phase::SuspectTry => {
            (None, format!("out for {whose} alone, one connect of which tries it"))
        }
    };
    let since = match ejection.phase() {
        Phase::Ejected | Phase::Suspected => began(ejection, policy, now),
        _ => None,
    };
    let reason = format!("{}; {what}", failed(ejection));
    Some(Said { by: Voice::Kernel, state, reason, since })
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
pub(super) fn time(ticks: u64) -> String {
    let tenths = duration(ticks).as_millis() / 100;
    format!("{}.{} s", tenths / 10, tenths % 10)
}

#[cfg(test)]
mod tests {
    use super::super::standing::{Standing, standing};
    use super::*;

    const NOW: u64 = 10_000;

    /// One second is 60 ticks and a bit.
    fn policy() -> Policy {
        Policy::new(1, 60, 3600, 50)
    }

    /// With checks that pass.
    fn shown(ejection: Ejection, now: u64) -> (State, String) {
        let checks = Said {
            by: Voice::Checks,
            state: Some(State::Healthy),
            reason: "checks pass".into(),
            since: None,
        };
        let said = said(ejection, policy(), None, now).into_iter().chain([checks]);
        let Standing { state, reason, .. } = standing(said.collect());
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
}
