//! A snapshot as text, in the format of OpenMetrics 1.0. Names are a promise.
//!
//! A counter must never go down while its labels stay the same, or whoever reads it takes that for a
//! restart. So what is counted for backends is told of each backend, not summed over those that a service
//! happens to have.

use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{
    DescriptorEncoder, EncodeLabelSet, EncodeMetric, MetricEncoder, text::encode,
};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry, Unit};

use super::{Snapshot, Traffic};
use crate::api::types::{Checks, Counters, Status};

/// As Prometheus asks for it.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The text.
///
/// # Errors
///
/// None that is known: a string takes everything.
pub fn text(snapshot: Snapshot) -> Result<String, fmt::Error> {
    let mut registry = Registry::with_prefix("mesh");
    registry.register_collector(Box::new(snapshot));
    let mut text = String::new();
    encode(&mut text, &registry)?;
    Ok(text)
}

/// A metric without its prefix and the suffix that its kind and unit demand.
struct Family {
    name: &'static str,
    help: &'static str,
    unit: Option<Unit>,
}

impl Family {
    const fn new(name: &'static str, help: &'static str) -> Self {
        Self { name, help, unit: None }
    }

    /// Now so many.
    fn gauge(&self, encoder: &mut DescriptorEncoder<'_>, value: u64) -> fmt::Result {
        gauge(value).encode(self.begin(encoder, MetricType::Gauge)?)
    }

    /// Now so many of each.
    fn gauges<L: EncodeLabelSet>(
        &self,
        encoder: &mut DescriptorEncoder<'_>,
        values: impl Iterator<Item = (L, u64)>,
    ) -> fmt::Result {
        self.each(encoder, MetricType::Gauge, values.map(|(labels, value)| (labels, gauge(value))))
    }

    /// So many ever.
    fn counter(&self, encoder: &mut DescriptorEncoder<'_>, value: u64) -> fmt::Result {
        ConstCounter::new(value).encode(self.begin(encoder, MetricType::Counter)?)
    }

    /// So many of each, ever.
    fn counters<L: EncodeLabelSet>(
        &self,
        encoder: &mut DescriptorEncoder<'_>,
        values: impl Iterator<Item = (L, u64)>,
    ) -> fmt::Result {
        let values = values.map(|(labels, value)| (labels, ConstCounter::new(value)));
        self.each(encoder, MetricType::Counter, values)
    }

    fn each<L: EncodeLabelSet, V: EncodeMetric>(
        &self,
        encoder: &mut DescriptorEncoder<'_>,
        kind: MetricType,
        values: impl Iterator<Item = (L, V)>,
    ) -> fmt::Result {
        let mut family = self.begin(encoder, kind)?;
        for (labels, value) in values {
            value.encode(family.encode_family(&labels)?)?;
        }
        Ok(())
    }

    fn begin<'e>(
        &'e self,
        encoder: &'e mut DescriptorEncoder<'_>,
        kind: MetricType,
    ) -> Result<MetricEncoder<'e>, fmt::Error> {
        encoder.encode_descriptor(self.name, self.help, self.unit.as_ref(), kind)
    }
}

/// No number here comes near what does not fit.
fn gauge(value: u64) -> ConstGauge<i64> {
    ConstGauge::new(i64::try_from(value).unwrap_or(i64::MAX))
}

impl Collector for Snapshot {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        agent(&self.status, &mut encoder)?;
        let in_place = self.in_place.iter().map(|&(of, is)| ([("of", of)], is.into()));
        Family::new(
            "in_place",
            "1 while the pins, and the socket of commands, are as the agent made them",
        )
        .gauges(&mut encoder, in_place)?;
        data_plane(&self.status.counters, &mut encoder)?;
        checks(self.status.checks, &mut encoder)?;
        traffic(&self.backends, &mut encoder)
    }
}

fn agent(status: &Status, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
    let labels = [("version", status.version.as_str()), ("node", status.node.as_str())];
    let info = encoder.encode_descriptor("agent", "The agent", None, MetricType::Info)?;
    Info::new(labels).encode(info)?;
    Family::new("ready", "1 while all sources have been read and all programs are attached")
        .gauge(encoder, status.ready.into())?;
    let programs = status.programs.iter().map(|program| {
        let labels = [("program", program.name.as_str()), ("hook", program.hook.as_str())];
        (labels, program.attached.into())
    });
    Family::new("program_attached", "1 while a kernel program is attached")
        .gauges(encoder, programs)?;
    let sources =
        || status.sources.iter().map(|source| ([("source", source.name.as_str())], source));
    Family::new("source_ready", "1 while a source has been read and has no error").gauges(
        encoder,
        sources().map(|(labels, source)| (labels, (source.state == "ready").into())),
    )?;
    Family::new("source_services", "Services that a source defines").gauges(
        encoder,
        sources()
            .map(|(labels, source)| (labels, u64::try_from(source.services).unwrap_or(u64::MAX))),
    )?;
    let maps = || status.maps.iter().map(|map| ([("map", map.name.as_str())], map));
    Family::new("map_entries", "Entries of a map that are used")
        .gauges(encoder, maps().map(|(labels, map)| (labels, map.used)))?;
    Family::new("map_entries_limit", "Entries that a map can hold")
        .gauges(encoder, maps().map(|(labels, map)| (labels, map.max)))?;
    let memory = Family {
        unit: Some(Unit::Bytes),
        ..Family::new(
            "memory",
            "Memory that the agent has taken for itself, and the kernel for maps",
        )
    };
    memory.gauges(
        encoder,
        [([("of", "agent")], status.memory.anonymous), ([("of", "maps")], status.memory.maps)]
            .into_iter(),
    )
}

fn data_plane(counters: &Counters, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
    let Counters { refused, .. } = counters;
    for (name, help, count) in [
        ("connects", "Connects that were given a backend", counters.balanced),
        (
            "connects_without_record",
            "Connects that are not counted as open, for lack of room",
            counters.no_flow_record,
        ),
        (
            "connects_all_ejected",
            "Connects that went to an ejected backend because all were",
            counters.all_ejected,
        ),
        (
            "connects_without_affinity",
            "Connects that could not be given an endpoint to keep, for lack of room",
            counters.no_pin,
        ),
        (
            "connect_retries",
            "Selections that were repeated because the tables changed",
            counters.retries,
        ),
        (
            "ejections_withheld",
            "Times a backend was not ejected because as many as may be were",
            counters.share_reached,
        ),
        ("map_writes", "Changes of the maps by this agent", counters.map_writes),
        ("events_lost", "Events of the data plane that were left out", counters.events_lost),
    ] {
        Family::new(name, help).counter(encoder, count)?;
    }
    let refused = refused.iter().map(|one| ([("reason", one.reason.as_str())], one.count));
    Family::new("connects_refused", "Connects that were refused, by reason")
        .counters(encoder, refused)
}

fn checks(checks: Checks, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
    let Checks { passed, failed, unmade, unjudged, late, .. } = checks;
    let results =
        [("passed", passed), ("failed", failed), ("unmade", unmade), ("unjudged", unjudged)];
    let results = results.into_iter().map(|(result, count)| ([("result", result)], count));
    Family::new("checks", "Health checks, by result").counters(encoder, results)?;
    Family::new("checks_late", "Health checks that began more than 100 ms after they were due")
        .counter(encoder, late)
}

/// The labels of a backend.
type Labels<'t> = (&'static str, &'t str);

fn traffic(backends: &[Traffic], encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
    let places: Vec<(String, String)> = backends
        .iter()
        .map(|backend| (backend.port.to_string(), backend.address.to_string()))
        .collect();
    let all = || {
        backends.iter().zip(&places).map(|(backend, (port, address))| {
            let labels: [Labels<'_>; 4] = [
                ("service", &*backend.service),
                ("port", port),
                ("protocol", backend.protocol),
                ("backend", address),
            ];
            (labels, backend)
        })
    };
    Family::new("backend_connects", "Connects that a backend was given since it appeared")
        .counters(encoder, all().map(|(labels, backend)| (labels, backend.opened)))?;
    Family::new("backend_connections", "Connections to a backend that are open")
        .gauges(encoder, all().map(|(labels, backend)| (labels, backend.active)))?;
    let failures = all().flat_map(|(labels, backend)| {
        let [service, port, protocol, address] = labels;
        let failed = backend.failures;
        [
            ("refused", failed.refused),
            ("timeout", failed.timeout),
            ("unreachable", failed.unreachable),
            ("reset", failed.reset),
        ]
        .map(move |(reason, count)| ([service, port, protocol, address, ("reason", reason)], count))
    });
    Family::new("backend_failures", "Connections to a backend that failed, by reason")
        .counters(encoder, failures)
}
