//! The sentences of an explanation.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::SocketAddr;

use mesh_common::affinity::By;
use mesh_common::datagram::IDLE_SECONDS;
use mesh_common::{Algorithm, Client, Protocol, Reason, Slot, State};

use super::{BackendInfo, ClientView, FrontendInfo, Query, Seen};
use crate::api::types::{Answer, Candidate, Explanation, Step};
use crate::model::Affinity;

/// How many endpoints that take no connection are named one by one; the candidates list them all.
const NAMED: usize = 8;

/// An explanation in the making.
pub(super) struct Story {
    explanation: Explanation,
    backends: Vec<BackendInfo>,
    is_datagram: bool,
    /// Who keeps an endpoint, and for how long.
    affinity: Option<Affinity>,
    /// Whether it is known which unit the client is part of.
    pub(super) knows_unit: bool,
}

impl Story {
    /// Begins with who asks.
    pub(super) fn new(
        query: Query,
        client: Option<&ClientView>,
        info: Option<FrontendInfo>,
    ) -> Self {
        let (service, algorithm, backends, affinity) = match info {
            Some(info) => (Some(info.service), Some(info.algorithm), info.backends, info.affinity),
            None => (None, None, Vec::new(), None),
        };
        let mut story = Self {
            explanation: Explanation {
                client: client.map(|client| client.name.clone()),
                frontend: format!("{}/{}", query.address, query.protocol.name()),
                service,
                algorithm,
                steps: Vec::new(),
                candidates: Vec::new(),
                answer: None,
            },
            backends,
            is_datagram: query.protocol == Protocol::Udp,
            affinity,
            knows_unit: false,
        };
        story.step(
            "client",
            client.map_or_else(
                || {
                    "not named (--from): taken as a socket created inside the balanced cgroup"
                        .into()
                },
                ClientView::describe,
            ),
        );
        story
    }

    fn step(&mut self, step: &str, detail: impl Into<String>) {
        self.explanation.steps.push(Step { step: step.into(), detail: detail.into() });
    }

    /// The client is outside.
    pub(super) fn not_balanced(mut self) -> Explanation {
        self.step("answer", "not balanced: connects of this client are not touched");
        self.explanation
    }

    /// The client is left alone.
    pub(super) fn excluded(mut self) -> Explanation {
        self.step("answer", "not balanced: the agent file excludes this client's cgroup");
        self.explanation
    }

    /// What the look-ups found.
    pub(super) fn looked_up(&mut self, seen: &Seen) {
        if seen.retries > 0 {
            let times = seen.retries;
            self.step("retry", format!("the tables changed meanwhile: looked again ({times})"));
        }
        let frontend = &self.explanation.frontend;
        let found = match (seen.frontend, &self.explanation.service) {
            (Some(value), Some(service)) => {
                format!("{frontend} is service {service} (record {})", value.service)
            }
            (Some(value), None) => {
                format!("{frontend} is record {}, of a service that has just gone", value.service)
            }
            (None, Some(service)) => format!(
                "{frontend} is defined by service {service}, but is not in the kernel's tables: \
                 `mesh-agent services {service} -o wide` says why"
            ),
            (None, None) => format!("{frontend} is not an address and port of any service"),
        };
        self.step("frontend", found);
        if let Some(is_virtual) = seen.is_virtual {
            let found = match (is_virtual, self.is_datagram) {
                (true, false) => {
                    "the address is inside virtual-ips, so the connect must not leave the node"
                }
                (true, true) => {
                    "the address is inside virtual-ips, so no datagram that names it may leave the node"
                }
                (false, _) => "the address is not inside virtual-ips",
            };
            self.step("virtual-ips", found);
        }
        if let Some(table) = seen.table {
            let found = match table.len() {
                0 => "empty: no endpoint can be chosen".into(),
                1 => "1 slot".into(),
                len => format!("{len} slots"),
            };
            self.step("table", found);
        }
    }

    /// Not ours.
    pub(super) fn passed(mut self) -> Explanation {
        self.step("answer", "passed: not a service, the connect goes where it was going");
        self.explanation
    }

    /// Let go on, as a connect that only looks for the way there.
    pub(super) fn passed_as_probe(mut self, reason: Reason) -> Explanation {
        self.step(
            "answer",
            format!(
                "passed: a UDP connect sends nothing, and `getaddrinfo` and others find out by one whether there is \
                 a route, so it goes where it was going; a datagram that names the address is refused with \
                 ECONNREFUSED: {}",
                reason.describe()
            ),
        );
        self.explanation
    }

    /// Refused.
    pub(super) fn refused(mut self, reason: Reason) -> Explanation {
        self.candidates(&[]);
        self.step("answer", format!("refused with ECONNREFUSED: {}", reason.describe()));
        self.explanation.answer =
            Some(Answer::Refused { errno: "ECONNREFUSED".into(), reason: reason.name().into() });
        self.explanation
    }

    /// A backend was drawn.
    pub(super) fn balanced(
        mut self,
        algorithm: Algorithm,
        drawn: &Slot,
        shares: &[(Slot, f64)],
        client: Client,
    ) -> Explanation {
        self.ejected(client);
        self.candidates(shares);
        let backend = address(drawn).to_string();
        let percent = by_address(shares).get(&address(drawn)).copied().unwrap_or_default() * 100.0;
        let choice = match algorithm {
            Algorithm::Random => format!(
                "random by weight, drawn anew for each connect; this draw: {backend} \
                 (probability {percent:.1} %)"
            ),
            Algorithm::RoundRobin => format!(
                "in turn, by weight; whose turn it is: {backend} ({percent:.1} % of all connects)"
            ),
            Algorithm::HashClient
            | Algorithm::HashNamespace
            | Algorithm::HashProcess
            | Algorithm::HashUnit => {
                let (of, known) = match algorithm {
                    Algorithm::HashNamespace => ("network namespace", false),
                    Algorithm::HashProcess => ("process", false),
                    Algorithm::HashUnit if self.explanation.client.is_none() => ("unit", false),
                    Algorithm::HashUnit if self.knows_unit => ("unit", true),
                    Algorithm::HashUnit => ("cgroup, whose unit is not known yet", true),
                    _ => ("cgroup", self.explanation.client.is_some()),
                };
                match known {
                    true => format!("by the client's {of}, always the same: {backend}"),
                    false => format!(
                        "by the client's {of}, always the same for one; {percent:.1} % of all go \
                         to {backend}"
                    ),
                }
            }
            Algorithm::Latency => format!(
                "of two drawn by weight, the one where a connect waits less, by round-trip time and \
                 open connections for its weight; this time: {backend} (probability {percent:.1} % \
                 as things are)"
            ),
            Algorithm::LeastConnections => format!(
                "of two drawn by weight, the one with fewer connections for its weight; this time: \
                 {backend} (probability {percent:.1} % as things are)"
            ),
        };
        self.step("choice", choice);
        if let Some(Affinity { by, timeout }) = self.affinity {
            let who = match by {
                By::Client => "a cgroup",
                By::Namespace => "a network namespace",
            };
            let kept = format!(
                "{who} that has connected within {} keeps the endpoint that it had, while that is \
                 usable; this is for one that has not",
                humantime::format_duration(timeout)
            );
            self.step("affinity", kept);
        }
        if self.is_datagram {
            let kept = format!(
                "a socket that sends without being connected keeps its backend until it has sent \
                 nothing there for {IDLE_SECONDS} s, or the backend is gone, unhealthy or out"
            );
            self.step("kept", kept);
        }
        self.step("answer", format!("the connect goes to {backend}"));
        self.explanation.answer = Some(Answer::Backend { backend });
        self.explanation
    }

    /// Who is out because of what the kernel saw.
    fn ejected(&mut self, client: Client) {
        let out: Vec<BackendInfo> = self
            .backends
            .iter()
            .filter(|b| b.state.is_usable() || b.state == State::Ejected)
            .filter(|b| b.ejection.is_out_for(client))
            .cloned()
            .collect();
        let all = self.backends.iter().filter(|b| b.weight > 0).count();
        if out.is_empty() {
            return;
        }
        let named = left_out(&out.iter().collect::<Vec<_>>());
        self.step("ejected", format!("{} of {all} endpoints are out: {named}", out.len()));
        if out.len() == all {
            self.step("panic", "all endpoints are ejected, so all are used");
        }
    }

    /// Which backends can be chosen, and why the others cannot.
    fn candidates(&mut self, shares: &[(Slot, f64)]) {
        let mut shares_left = by_address(shares);
        let backends = std::mem::take(&mut self.backends);
        let (mut inside, mut outside) = (Vec::new(), Vec::new());
        for backend in &backends {
            let score = shares_left.remove(&backend.address).unwrap_or_default();
            if score > 0.0 { &mut inside } else { &mut outside }.push(backend);
            self.explanation.candidates.push(Candidate {
                address: backend.address.to_string(),
                state: backend.state.name().into(),
                score,
            });
        }
        // In the table, but no longer (or not yet) known by name.
        self.explanation.candidates.extend(shares_left.into_iter().map(|(address, score)| {
            Candidate { address: address.to_string(), state: State::Unknown.name().into(), score }
        }));
        if !shares.is_empty() {
            let candidates = &self.explanation.candidates;
            let can = candidates.iter().filter(|candidate| candidate.score > 0.0).count();
            let all = candidates.len();
            self.step("candidates", format!("{can} of {all} endpoints can be chosen"));
        }
        if !outside.is_empty() {
            self.step("left out", left_out(&outside));
        }
        if !inside.is_empty() && inside.iter().all(|backend| backend.state == State::Draining) {
            self.step("draining", "no other endpoint is usable, so those that drain are used");
        } else if !inside.is_empty() && inside.iter().all(|backend| !backend.state.is_usable()) {
            self.step(
                "panic",
                "no endpoint is usable, so all are used: when every check fails, the checks are \
                 the likelier culprit (when-all-unhealthy: refuse changes that)",
            );
        } else if inside.iter().any(|backend| backend.state == State::Unhealthy) {
            self.step(
                "panic",
                "less than `panic-threshold` of the endpoints is usable, so those whose checks fail are used \
                 too",
            );
        }
    }
}

/// The probability of each address, over all slots that lead there.
fn by_address(shares: &[(Slot, f64)]) -> BTreeMap<SocketAddr, f64> {
    let mut found = BTreeMap::new();
    for (slot, share) in shares {
        *found.entry(address(slot)).or_default() += share;
    }
    found
}

/// Why each of these takes no connection.
fn left_out(backends: &[&BackendInfo]) -> String {
    let mut text = String::new();
    for backend in backends.iter().take(NAMED) {
        let separator = if text.is_empty() { "" } else { "; " };
        // Writing to a string cannot fail.
        let _ = write!(text, "{separator}{}: {}", backend.address, why_not(backend));
    }
    if backends.len() > NAMED {
        let _ = write!(text, "; and {} more", backends.len() - NAMED);
    }
    text
}

fn why_not(backend: &BackendInfo) -> String {
    match (backend.state.is_usable(), backend.reason.as_str()) {
        _ if backend.weight == 0 => "weight 0".into(),
        (false, "") => backend.state.name().into(),
        (false, reason) => format!("{} ({reason})", backend.state.name()),
        (true, reason) if !backend.ejection.is_in() => reason.into(),
        (true, _) => "not in the table that is in force".into(),
    }
}

/// Where a slot leads.
fn address(slot: &Slot) -> SocketAddr {
    SocketAddr::new(slot.addr.ip(), u16::from_be(slot.port))
}
