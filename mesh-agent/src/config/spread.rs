//! The keys of a service that say which of its endpoints are preferred: `affinity`, `locality`,
//! `slow-start`, `fallback`.

use std::ops::RangeInclusive;
use std::time::Duration;

use mesh_common::affinity::By;

use super::values::{duration, name, percent};
use crate::model::{Affinity, Fallback, Locality, ServiceName};
use crate::yaml::{Fields, Keys, Problems, Value, excerpt, fields, text};

const PERCENT: RangeInclusive<u8> = 1..=100;

/// How long an endpoint may have less than its weight.
const SLOW_START: RangeInclusive<Duration> =
    Duration::from_secs(1)..=Duration::from_secs(24 * 3_600);

/// How long a client may keep its endpoint without a connect.
const AFFINITY_TIMEOUT: RangeInclusive<Duration> =
    Duration::from_secs(1)..=Duration::from_secs(30 * 86_400);

const AFFINITY: Keys = Keys { of: "affinity", known: &["by", "timeout"], later: &[] };

const LOCALITY: Keys = Keys { of: "locality", known: &["threshold"], later: &[] };

const FALLBACK: Keys = Keys { of: "fallback", known: &["service", "below", "back"], later: &[] };

/// Nothing without the key.
pub(super) fn affinity(service: &Fields<'_>, problems: &mut Problems) -> Option<Affinity> {
    const BY: &str = "client or namespace";
    let fields = fields(service.get("affinity")?, &AFFINITY, problems)?;
    let by = match fields.get("by") {
        None => By::Client,
        Some(node) => match text(node, BY, problems)? {
            "client" => By::Client,
            "namespace" => By::Namespace,
            other => {
                problems.add(node.at, format!("by: expected {BY}; found {}", excerpt(other)));
                return None;
            }
        },
    };
    let timeout = match fields.get("timeout") {
        Some(node) => duration(node, "timeout", AFFINITY_TIMEOUT, problems)?,
        // That of Kubernetes' services.
        None => Duration::from_secs(3 * 3_600),
    };
    Some(Affinity { by, timeout })
}

/// Nothing without the key, and for `off`.
pub(super) fn locality(service: &Fields<'_>, problems: &mut Problems) -> Option<Locality> {
    const EXPECTED: &str = "a mapping such as {threshold: 70%}, or off, for `locality`";
    let node = service.get("locality")?;
    let Value::Mapping(_) = node.value else {
        match text(node, EXPECTED, problems)? {
            // As YAML 1.1 has it.
            "off" | "false" => {}
            other => {
                problems.add(node.at, format!("expected {EXPECTED}; found {}", excerpt(other)));
            }
        }
        return None;
    };
    let fields = fields(node, &LOCALITY, problems)?;
    let threshold = match fields.get("threshold") {
        Some(node) => percent(node, "threshold", PERCENT, problems)?,
        None => Locality::default().threshold,
    };
    Some(Locality { threshold })
}

/// Nothing without the key.
pub(super) fn slow_start(service: &Fields<'_>, problems: &mut Problems) -> Option<Duration> {
    service.get("slow-start").and_then(|node| duration(node, "slow-start", SLOW_START, problems))
}

/// When what is behind is used, and the service there, if it is one.
pub(super) fn fallback(
    service: &Fields<'_>,
    own: Option<&str>,
    problems: &mut Problems,
) -> Option<(Fallback, Option<ServiceName>)> {
    let node = service.get("fallback")?;
    let fields = fields(node, &FALLBACK, problems)?;
    let default = Fallback::default();
    let below = match fields.get("below") {
        Some(node) => percent(node, "below", PERCENT, problems)?,
        None => default.below,
    };
    let back = match fields.get("back") {
        Some(node) => percent(node, "back", PERCENT, problems)?,
        None => default.back.max(below),
    };
    if back < below {
        let at = fields.get("back").map_or(fields.at, |node| node.at);
        problems.add(
            at,
            format!("`back` ({back}%) is less than `below` ({below}%); expected at least that"),
        );
    }
    let other = fields.get("service").and_then(|node| {
        let other = name(node, "a service name", problems)?;
        if Some(other) == own {
            problems.add(node.at, "a service cannot fall back to itself; name another one");
        }
        Some(ServiceName::new(other))
    });
    Some((Fallback { below, back }, other))
}
