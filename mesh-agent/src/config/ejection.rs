//! The `ejection` key of a service: when the kernel takes an endpoint out, or `off`.
//!
//! It is on unless a file says otherwise, so a service without the key has a policy, and only a
//! word that a person wrote on purpose turns it off: a key with nothing behind it is refused.

use std::ops::RangeInclusive;
use std::time::Duration;

use humantime::format_duration;

use super::values::{duration, percent};
use crate::model::EjectionPolicy;
use crate::yaml::{Fields, Keys, Node, Problems, Value, excerpt, fields, integer, text};

/// How many failures may be asked for. The kernel programs count them in seven bits.
const FAILURES: RangeInclusive<u64> = 1..=127;

/// How long an ejection may last. The kernel programs count in ticks of 17 ms, of which 25 bits
/// last for six and a half days: the lower bound is several ticks, the upper one whole days.
const TIME: RangeInclusive<Duration> =
    Duration::from_millis(100)..=Duration::from_secs(6 * 24 * 60 * 60);

/// How many per cent may be ejected. 0 would be a second way to write `off`.
const SHARE: RangeInclusive<u8> = 1..=100;

/// Of how many connects the share that fails is taken at least. Fewer would be a number in a row.
const SAMPLES: RangeInclusive<u64> = 5..=65_535;

/// The share that fails. All is what `failures` is for.
const RATE: RangeInclusive<u8> = 1..=99;

const EJECTION: Keys = Keys {
    of: "ejection",
    known: &["failures", "failure-rate", "samples", "base", "max", "share"],
    later: &[],
};

/// The policy of a service: the default without the key, nothing for `off`. A value with a problem
/// gives nothing as well; the file is refused in any case.
pub(super) fn ejection(service: &Fields<'_>, problems: &mut Problems) -> Option<EjectionPolicy> {
    const EXPECTED: &str = "a mapping such as {failures: 1, base: 1s, max: 60s, share: 50%}, or \
                            off, for `ejection`";
    let Some(node) = service.get("ejection") else { return Some(EjectionPolicy::default()) };
    if let Value::Mapping(_) = node.value {
        return policy(node, problems);
    }
    match text(node, EXPECTED, problems)? {
        // In YAML 1.1 `off` is a boolean, so tools that write files may turn it into `false`.
        "off" | "false" => {}
        other => {
            problems.add(node.at, format!("expected {EXPECTED}; found {}", excerpt(other)));
        }
    }
    None
}

fn policy(node: &Node, problems: &mut Problems) -> Option<EjectionPolicy> {
    let fields = fields(node, &EJECTION, problems)?;
    let default = EjectionPolicy::default();
    let failures = match fields.get("failures") {
        Some(node) => integer(node, "failures", FAILURES, problems),
        None => Some(default.failures),
    };
    let mut time = |key, default| match fields.get(key) {
        Some(node) => duration(node, key, TIME, problems),
        None => Some(default),
    };
    let base = time("base", default.base);
    let max = time("max", default.max);
    let share = match fields.get("share") {
        Some(node) => percent(node, "share", SHARE, problems),
        None => Some(default.share),
    };
    let rate = match fields.get("failure-rate") {
        Some(node) => percent(node, "failure-rate", RATE, problems),
        None => Some(default.rate),
    };
    let samples = match fields.get("samples") {
        Some(node) => integer(node, "samples", SAMPLES, problems),
        None => Some(default.samples),
    };
    if failures == Some(1)
        && let Some(key) =
            ["failure-rate", "samples"].into_iter().find(|key| fields.get(key).is_some())
    {
        let default = if fields.get("failures").is_none() { ", the default" } else { "" };
        problems.add(
            fields.key_at(key),
            format!("`{key}` says nothing with `failures: 1`{default}: one failure is enough"),
        );
    }
    let (base, max) = (base?, max?);
    if max < base {
        shorter(&fields, base, max, problems);
    }
    Some(EjectionPolicy {
        failures: failures?,
        rate: rate?,
        samples: samples?,
        base,
        max,
        share: share?,
    })
}

/// Says that `max` is shorter than `base`, at the one that is written: the other may be a default
/// that the file does not show.
fn shorter(fields: &Fields<'_>, base: Duration, max: Duration, problems: &mut Problems) {
    let default = |key| if fields.get(key).is_none() { ", the default" } else { "" };
    let at = fields.get("max").or_else(|| fields.get("base")).map_or(fields.at, |node| node.at);
    problems.add(
        at,
        format!(
            "`max` ({}{}) is shorter than `base` ({}{}); expected a `max` that is at least `base`",
            format_duration(max),
            default("max"),
            format_duration(base),
            default("base"),
        ),
    );
}
