//! The `health` key: of a service, and of the agent file for services that say nothing about it.

use std::ops::RangeInclusive;
use std::time::Duration;

use humantime::format_duration;

use super::checks;
use super::values::{duration, port_number};
use crate::model::{Ending, Health, HealthCheck, HealthPolicy, Pace};
use crate::yaml::{Fields, Keys, Node, Problems, Value, excerpt, fields, integer, text};

/// How long the time between two checks of one endpoint may be.
const INTERVAL: RangeInclusive<Duration> = Duration::from_millis(10)..=Duration::from_secs(86_400);

/// How long a check may wait. While it does, it takes one of the places of its service, whose other
/// endpoints wait.
const TIMEOUT: RangeInclusive<Duration> = Duration::from_millis(1)..=Duration::from_secs(10);

/// How long an endpoint may be unhealthy before connections to it are ended.
const END_AFTER: RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(3_600);

/// How many results in a row may be asked for.
const IN_A_ROW: RangeInclusive<u64> = 1..=1000;

const HEALTH: Keys = Keys {
    of: "health",
    known: &[
        "tcp",
        "http",
        "https",
        "grpc",
        "command",
        "port",
        "probe",
        "background",
        "interval",
        "timeout",
        "rise",
        "fall",
        "end-connections",
        "end-after",
    ],
    later: &[],
};

/// What a service says about checks.
pub(super) fn health(service: &Fields<'_>, problems: &mut Problems) -> Option<Health> {
    const EXPECTED: &str = "a mapping such as {tcp: {}, interval: 1s}, or off, for `health`";
    let Some(node) = service.get("health") else { return Some(Health::Default) };
    if let Value::Mapping(_) = node.value {
        return policy(node, problems).map(Health::Checked);
    }
    match text(node, EXPECTED, problems)? {
        // In YAML 1.1 `off` is a boolean, so tools that write files may turn it into `false`.
        "off" | "false" => Some(Health::Off),
        other => {
            problems.add(node.at, format!("expected {EXPECTED}; found {}", excerpt(other)));
            None
        }
    }
}

/// How checks are made.
pub(super) fn policy(node: &Node, problems: &mut Problems) -> Option<HealthPolicy> {
    let fields = fields(node, &HEALTH, problems)?;
    let check = check(&fields, problems);
    let port = fields.get("port").map(|node| port_number(node, "port", problems));
    let pace = pace(&fields, problems);
    let ending = ending(&fields, problems);
    let mut time = |key, range| fields.get(key).map(|node| duration(node, key, range, problems));
    let interval = time("interval", INTERVAL).unwrap_or(Some(HealthPolicy::INTERVAL));
    let timeout = time("timeout", TIMEOUT);
    let mut count = |key, default| match fields.get(key) {
        Some(node) => integer(node, key, IN_A_ROW, problems),
        None => Some(default),
    };
    let rise = count("rise", HealthPolicy::RISE);
    let fall = count("fall", HealthPolicy::FALL);
    let interval = interval?;
    let default = match check {
        // To start a program can take longer than all that it does.
        Some(HealthCheck::Command(_)) => *TIMEOUT.end(),
        _ => HealthPolicy::TIMEOUT,
    };
    let timeout = timeout.unwrap_or(Some(default.min(interval)))?;
    if timeout > interval {
        let default = if fields.get("interval").is_none() { ", the default" } else { "" };
        problems.add(
            fields.get("timeout").map_or(fields.at, |node| node.at),
            format!(
                "`timeout` ({}) is longer than `interval` ({}{default}): a check would begin before the one \
                 before has ended; expected an `interval` that is at least `timeout`",
                format_duration(timeout),
                format_duration(interval),
            ),
        );
    }
    let port = match port {
        Some(port) => Some(port?),
        None => None,
    };
    Some(HealthPolicy {
        check: check?,
        port,
        pace: pace?,
        interval,
        timeout,
        rise: rise?,
        fall: fall?,
        ending: ending?,
    })
}

/// The one kind of check that is there.
fn check(fields: &Fields<'_>, problems: &mut Problems) -> Option<HealthCheck> {
    let written: Vec<(&str, &Node)> =
        checks::KINDS.iter().filter_map(|&kind| Some((kind, fields.get(kind)?))).collect();
    match *written {
        [] => {
            problems.add(
                fields.at,
                "the kind of check is missing; expected one of tcp: {}, http: {path: /}, https: {path: /}, \
                 grpc: {} and command: {run: [/path/to/program]}",
            );
            None
        }
        [(kind, node)] => checks::check(kind, node, problems),
        [(first, _), (second, _), ..] => {
            problems.add(
                fields.key_at(second),
                format!("`{first}` and `{second}` are both here; a service has one kind of check"),
            );
            None
        }
    }
}

fn pace(fields: &Fields<'_>, problems: &mut Problems) -> Option<Pace> {
    const EXPECTED: &str = "when-used or always";
    let probe = match fields.get("probe") {
        Some(node) => Some((text(node, EXPECTED, problems)?, node.at)),
        None => None,
    };
    let background =
        fields.get("background").map(|node| duration(node, "background", INTERVAL, problems));
    match (probe, background) {
        (None | Some(("when-used", _)), background) => {
            Some(Pace::WhenUsed { background: background.unwrap_or(Some(Pace::BACKGROUND))? })
        }
        (Some(("always", _)), None) => Some(Pace::Always),
        (Some(("always", _)), Some(_)) => {
            problems.add(
                fields.key_at("background"),
                "`background` says nothing with `probe: always`; remove one of them",
            );
            None
        }
        (Some((other, at)), _) => {
            problems.add(at, format!("expected {EXPECTED}; found {}", excerpt(other)));
            None
        }
    }
}

fn ending(fields: &Fields<'_>, problems: &mut Problems) -> Option<Ending> {
    const EXPECTED: &str = "never, silent or all";
    let which = match fields.get("end-connections") {
        Some(node) => Some((text(node, EXPECTED, problems)?, node.at)),
        None => None,
    };
    let after =
        fields.get("end-after").map(|node| duration(node, "end-after", END_AFTER, problems));
    match (which, after) {
        (None | Some(("never", _)), None) => Some(Ending::Never),
        (None | Some(("never", _)), Some(_)) => {
            problems.add(
                fields.key_at("end-after"),
                "`end-after` says nothing without `end-connections: silent` or `all`",
            );
            None
        }
        (Some(("silent", _)), after) => Some(Ending::Silent(after.unwrap_or(Some(Ending::AFTER))?)),
        (Some(("all", _)), after) => Some(Ending::All(after.unwrap_or(Some(Ending::AFTER))?)),
        (Some((other, at)), _) => {
            problems.add(at, format!("expected {EXPECTED}; found {}", excerpt(other)));
            None
        }
    }
}
