//! What the engine tells: the answers of the API, read from the kernel's maps and named with what
//! the agent knows.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime};

use mesh_common::ejection::ticks;
use mesh_common::layout::counter;
use mesh_common::{
    Algorithm, Backend, Client, FrontendKey, Policy, Protocol, Reason, State, Table,
};
use tokio::sync::{mpsc, oneshot};

use super::drains::Cause;
use super::out;
use super::standing::{Said, Standing, Voice, standing};
use super::{Engine, Known, Pulse, Question, few};
use crate::api::server::{DrainQuery, ExplainQuery, View, ViewError};
use crate::api::types;
use crate::audit::Report;
use crate::audit::task::{Audited, Auditor};
use crate::canary;
use crate::catalog::{self, Entry};
use crate::compile;
use crate::config::Config;
use crate::dataplane::clock;
use crate::dataplane::footprint;
use crate::dataplane::maps::Maps as _;
use crate::dataplane::maps::{self, Counts};
use crate::dataplane::programs::{self, Attachment, ProgramState};
use crate::explain::{self, BackendInfo, ClientView, FrontendInfo, Names};
use crate::model::ServiceName;

/// How long finding out who a client is may take: its cgroup may be on a file system that hangs.
const PATIENCE: Duration = Duration::from_secs(2);

/// A way to ask the engine.
#[derive(Clone)]
pub struct Handle {
    questions: mpsc::Sender<Question>,
    pulses: mpsc::Sender<Pulse>,
    pub(super) config: Arc<Config>,
    pub(super) auditor: Auditor,
}

impl Handle {
    pub(super) fn new(
        questions: mpsc::Sender<Question>,
        pulses: mpsc::Sender<Pulse>,
        config: Arc<Config>,
        auditor: Auditor,
    ) -> Self {
        Self { questions, pulses, config, auditor }
    }

    /// Runs `question` in the engine's task, between two changes.
    pub(super) async fn ask<T: Send + 'static>(
        &self,
        question: impl FnOnce(&mut Engine) -> T + Send + 'static,
    ) -> Result<T, ViewError> {
        let stopping = || ViewError::Unavailable("the agent is stopping".to_owned());
        let (sender, answer) = oneshot::channel();
        let question: Question = Box::new(move |engine| {
            // Whoever asked may have gone.
            let _ = sender.send(question(engine));
        });
        self.questions.send(question).await.map_err(|_| stopping())?;
        answer.await.map_err(|_| stopping())
    }

    /// Waits for a turn of the engine, whatever it is busy with.
    pub(super) async fn feel_pulse(&self) -> Result<(), ViewError> {
        let stopping = || ViewError::Unavailable("the agent is stopping".to_owned());
        let (sender, answer) = oneshot::channel();
        self.pulses.send(sender).await.map_err(|_| stopping())?;
        answer.await.map_err(|_| stopping())
    }

    /// Tells the engine what is attached.
    pub async fn set_attachment(&self, attachment: Option<Attachment>) {
        // An engine that is gone does not need to know.
        let set = move |engine: &mut Engine| {
            engine.attachment = attachment;
            engine.lost = None;
        };
        let _ = self.ask(set).await;
    }

    /// Not every source has answered in time.
    pub async fn gather_no_more(&self) {
        let _ = self.ask(Engine::gather_no_more).await;
    }

    /// Tells the engine why what was attached cannot be attached again.
    pub async fn set_lost(&self, error: String) {
        let _ = self.ask(move |engine| engine.lost = Some(error)).await;
    }

    /// Who `from` is; not asked in the engine's task, because files are looked at.
    async fn client(&self, from: String) -> Result<Option<ClientView>, ViewError> {
        let Some(cgroup) = self.config.cgroup.clone() else { return Ok(None) };
        let name = from.clone();
        let excluded = self.config.exclude.cgroups.clone();
        let resolve =
            tokio::task::spawn_blocking(move || ClientView::resolve(&from, &cgroup, &excluded));
        match tokio::time::timeout(PATIENCE, resolve).await {
            Ok(Ok(client)) => {
                client.map(Some).map_err(|error| ViewError::BadRequest(error.to_string()))
            }
            Ok(Err(error)) => Err(ViewError::Failed(error.to_string())),
            Err(_) => Err(ViewError::Failed(format!("looking at {name} takes too long"))),
        }
    }
}

impl View for Handle {
    async fn services(&self) -> Result<Vec<types::Service>, ViewError> {
        self.ask(|engine| engine.services()).await
    }

    async fn backends(&self, service: Option<String>) -> Result<Vec<types::Backend>, ViewError> {
        self.ask(move |engine| match service {
            None => Ok(engine
                .names()
                .into_iter()
                .flat_map(|name| engine.backends(name, engine.catalog.get(name.as_str())))
                .collect()),
            Some(name) => {
                let name = ServiceName::new(&name);
                if !engine.knows(&name) {
                    return Err(ViewError::no_service(name.as_str()));
                }
                Ok(engine.backends(&name, engine.catalog.get(name.as_str())))
            }
        })
        .await?
    }

    async fn connections(
        &self,
        service: Option<String>,
    ) -> Result<Vec<types::Connection>, ViewError> {
        self.open_connections(service).await
    }

    async fn status(&self) -> Result<types::Status, ViewError> {
        let status = self.ask(|engine| engine.status()).await?;
        let memory = tokio::task::spawn_blocking(footprint::measure).await.unwrap_or_default();
        let maps = status.memory.maps + memory.maps;
        Ok(types::Status { memory: types::Memory { maps, ..memory }, ..status })
    }

    async fn audit(&self) -> Result<types::Audit, ViewError> {
        let audited = self.auditor.pass().await;
        let audited =
            audited.ok_or_else(|| ViewError::Unavailable("the agent is stopping".to_owned()))?;
        Ok(audit(&audited))
    }

    async fn drain(&self, query: DrainQuery) -> Result<Vec<types::Backend>, ViewError> {
        self.ask(move |engine| engine.drain(&query)).await?
    }

    async fn forget(&self, service: Option<String>) -> Result<Vec<String>, ViewError> {
        self.ask(move |engine| engine.forget(service.as_deref())).await?
    }

    async fn explain(&self, query: ExplainQuery) -> Result<types::Explanation, ViewError> {
        let ExplainQuery { address, protocol, from } = query;
        let client = match from {
            Some(from) => self.client(from).await?,
            None => None,
        };
        self.ask(move |engine| {
            let query = explain::Query { address, protocol };
            explain::explain(query, client.as_ref(), engine.reconciler.maps(), engine)
        })
        .await
    }
}

impl Engine {
    /// What is defined, and of what the kernel still holds something.
    fn names(&self) -> BTreeSet<&ServiceName> {
        let held = self.reconciler.services().filter(|name| !canary::is(name));
        self.catalog.iter().map(|(name, _)| name).chain(held).collect()
    }

    fn services(&self) -> Vec<types::Service> {
        let one = |name: &ServiceName| self.service(name, self.catalog.get(name.as_str()));
        self.names().into_iter().map(one).collect()
    }

    fn service(&self, name: &ServiceName, entry: Option<&Entry>) -> types::Service {
        let mut frontends: Vec<FrontendKey> = self.reconciler.frontends(name).collect();
        frontends.sort_by_key(|key| (key.addr.octets(), key.host_port(), key.protocol));
        let maps = self.reconciler.maps();
        let ids: Vec<u32> = self.reconciler.backends(name).map(|(_, id)| id).collect();
        let counts: Vec<Counts> = ids.iter().map(|&id| maps.counts(id)).collect();
        let healthy = ids.iter().zip(&counts).filter(|&(&id, counts)| {
            let state = maps.backend(id).map(|backend| backend.marks.state());
            state == Some(State::Healthy) && !out::is_out(counts.ejection, Client::NOBODY)
        });
        let failed = counts.iter().fold([0; 4], |mut sum, counts| {
            sum.iter_mut().zip(counts.failed).for_each(|(sum, one)| *sum += one);
            sum
        });
        let refused = frontends.iter().map(|key| self.reconciler.refused(key));
        let refused = refused.fold(maps::Refused::default(), |mut sum, one| {
            sum.iter_mut().zip(one).for_each(|(sum, one)| *sum += one);
            sum
        });
        let problems = self.problems.get(name).into_iter().flatten();
        let notes = self.notes.get(name).into_iter().flatten();
        let held = self.stale.notes(name);
        types::Service {
            name: name.to_string(),
            source: entry.map_or_else(String::new, |entry| entry.origin.item.to_string()),
            balance: self.algorithm(entry, &frontends).name().to_owned(),
            frontends: frontends.iter().map(frontend).collect(),
            backends: types::BackendCounts { total: ids.len(), healthy: healthy.count() },
            active: counts.iter().map(|counts| counts.active).sum(),
            opened: counts.iter().map(|counts| counts.opened).sum(),
            failed: failed.iter().sum(),
            failures: failures(failed),
            refused: by_reason(refused).filter(|refused| refused.count > 0).collect(),
            problems: problems.chain(notes).cloned().chain(held).collect(),
        }
    }

    /// Also of a service that is not defined, as the kernel has it.
    pub(super) fn backends(
        &self,
        name: &ServiceName,
        entry: Option<&Entry>,
    ) -> Vec<types::Backend> {
        let policy = self.reconciler.rules(name).policy;
        let endpoints = entry.map(|entry| &entry.service.endpoints);
        let endpoints: HashMap<_, _> = endpoints
            .into_iter()
            .flatten()
            .map(|endpoint| ((endpoint.address, endpoint.port), endpoint))
            .collect();
        let drained = entry.map(|entry| self.drains.causes(name, entry)).unwrap_or_default();
        let mut held: Vec<_> = self.reconciler.backends(name).collect();
        held.sort();
        held.into_iter()
            .filter_map(|(key, id)| {
                let backend = self.reconciler.maps().backend(id)?;
                let counts = self.reconciler.maps().counts(id);
                let latency = self.reconciler.maps().latency_of(id);
                let own = self.known(name, key.address);
                let behind = entry.and_then(|entry| self.behind(entry)).filter(|_| own.is_none());
                let known =
                    own.or_else(|| behind.and_then(|(other, _)| self.known(other, key.address)));
                let cause = drained.get(&key.address).copied().unwrap_or_default();
                let mut standing = self.standing(id, &backend, known, cause, policy);
                if let Some((other, _)) = behind {
                    standing.reason = format!("of service {other}; {}", standing.reason);
                }
                let (ip, port) = (key.address.ip(), key.address.port());
                let endpoint = endpoints.get(&(ip, Some(port))).or(endpoints.get(&(ip, None)));
                Some(types::Backend {
                    service: name.to_string(),
                    port: key.port,
                    protocol: key.protocol.name().to_owned(),
                    address: SocketAddr::new(backend.addr.ip(), u16::from_be(backend.port))
                        .to_string(),
                    state: standing.state.name().to_owned(),
                    reason: standing.reason,
                    weight: backend.weight.into(),
                    zone: endpoint.and_then(|e| e.zone.as_deref()).map(str::to_owned),
                    active: counts.active,
                    opened: counts.opened,
                    failed: counts.failed.iter().sum(),
                    failures: failures(counts.failed),
                    latency_us: Some(latency).filter(|&latency| latency > 0),
                    since: timestamp(
                        standing.since.or(known.map(|k| k.since)).unwrap_or_else(SystemTime::now),
                    ),
                    inputs: standing.said.into_iter().map(input).collect(),
                })
            })
            .collect()
    }

    /// How the kernel chooses now; of a service whose tables have no slots, how it would.
    fn algorithm(&self, entry: Option<&Entry>, frontends: &[FrontendKey]) -> Algorithm {
        let mut tables = frontends.iter().map(|key| self.table(key));
        let in_force = tables.find(|table| !table.is_empty()).map(Table::algorithm);
        in_force.or(entry.map(|entry| entry.service.algorithm)).unwrap_or_default()
    }

    /// What is said of a backend. Without an agent, its record is all that is known of checks and drains.
    fn standing(
        &self,
        id: u32,
        backend: &Backend,
        known: Option<&Known>,
        cause: Cause,
        policy: Policy,
    ) -> Standing {
        let state = backend.marks.state();
        let mut said = cause.said();
        if said.is_empty() && state == State::Draining {
            let by = if backend.marks.is_by_command() { Voice::Command } else { Voice::Source };
            said.push(Said { by, state: Some(state), reason: String::new(), since: None });
        }
        let found = known.map(|known| known.state).or((state != State::Draining).then_some(state));
        said.extend(found.map(|state| Said {
            by: Voice::Checks,
            state: Some(state),
            reason: known.map_or("", |known| &*known.reason).to_owned(),
            since: known.map(|known| known.since),
        }));
        let ejection = self.reconciler.maps().counts(id).ejection;
        let suspect = self.suspect(id, backend.generation);
        said.extend(out::said(ejection, policy, suspect, ticks(clock::monotonic())));
        standing(said)
    }

    fn known(&self, name: &ServiceName, address: SocketAddr) -> Option<&Known> {
        self.health.get(name)?.endpoints.get(&address)
    }

    fn status(&self) -> types::Status {
        let programs = self.programs();
        let attached = programs.iter().all(|program| program.attached);
        let reasons = self.reasons(attached);
        let config = &self.config;
        types::Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            node: config.node.clone(),
            zone: config.zone.clone(),
            ready: self.is_ready(attached),
            reasons,
            pid: std::process::id(),
            cgroup: config.cgroup.as_ref().map_or_else(String::new, |c| c.display().to_string()),
            programs: programs
                .into_iter()
                .map(|program| types::Program {
                    name: program.name.to_owned(),
                    hook: program.hook,
                    id: program.id,
                    attached: program.attached,
                })
                .collect(),
            sources: self.source_states(),
            maps: self.maps(),
            memory: types::Memory {
                anonymous: 0,
                maps: self.reconciler.maps().bytes() + self.auditor.bytes(),
            },
            counters: self.counters(),
            checks: self.monitor.tally().read(),
            audit: self.auditor.last().map(|audited| audit(&audited)),
            last_error: self.last_error.as_ref().map(|(time, error)| types::LastError {
                time: timestamp(*time),
                error: error.clone(),
            }),
        }
    }

    /// The kernel programs, as they are now.
    pub(super) fn programs(&self) -> Vec<ProgramState> {
        self.attachment.as_ref().map_or_else(programs::detached, Attachment::states)
    }

    /// Whether connects are balanced as defined.
    pub(super) fn is_ready(&self, attached: bool) -> bool {
        attached && self.all_ready() && self.proof.is_enough()
    }

    /// Why the node is not ready, and what else needs attention.
    pub(super) fn reasons(&self, attached: bool) -> Vec<String> {
        let mut reasons = Vec::new();
        for position in 0..self.config.sources.len() {
            match self.sources.get(&position) {
                None => reasons.push(format!("source {} has not answered yet", position + 1)),
                Some(source) if !source.ready && source.errors.is_empty() => {
                    reasons.push(format!("source {} has not been read yet", source.name));
                }
                Some(source) => reasons.extend(source.errors.iter().cloned()),
            }
        }
        if !attached {
            reasons.push(match (&self.attachment, &self.config.cgroup) {
                (Some(_), Some(cgroup)) => format!(
                    "the kernel programs are no longer attached to {}: nothing is balanced; it is \
                     tried again every second ({})",
                    cgroup.display(),
                    self.lost.as_deref().unwrap_or("not tried yet")
                ),
                _ => "the kernel programs are not attached yet".to_owned(),
            });
        }
        if attached {
            reasons.extend(self.doubts());
        }
        reasons.extend(self.outside.values().cloned());
        reasons.extend(self.stale.reason());
        reasons.extend(few(self.troubles()));
        reasons.extend(self.unheard.clone());
        let of_services = |texts: &BTreeMap<ServiceName, Vec<String>>| {
            let text = |(name, texts): (&ServiceName, &Vec<String>)| {
                format!("service {name}: {}", texts.join("; "))
            };
            texts.iter().map(text).collect::<Vec<_>>()
        };
        let mut others = of_services(&self.problems);
        others.extend(of_services(&self.notes));
        others.extend(self.shadowed.iter().cloned());
        reasons.extend(few(others));
        reasons
    }

    fn source_states(&self) -> Vec<types::Source> {
        let mut services = vec![0; self.config.sources.len()];
        for (_, entry) in self.catalog.iter() {
            if let Some(count) = services.get_mut(entry.origin.source) {
                *count += 1;
            }
        }
        self.sources
            .values()
            .map(|source| types::Source {
                name: source.name.clone(),
                state: match (source.ready, source.errors.is_empty()) {
                    (_, false) => "error",
                    (true, true) => "ready",
                    (false, true) => "starting",
                }
                .to_owned(),
                services: services.get(source.source).copied().unwrap_or_default(),
                error: (!source.errors.is_empty()).then(|| source.errors.join("; ")),
            })
            .collect()
    }

    fn maps(&self) -> Vec<types::Map> {
        let (used, maps) = (self.reconciler.usage(), self.reconciler.maps());
        let (size, max) = (maps.sizes(), maps.capacity());
        let [flows, overflow] = self.auditor.used();
        let pinned = self.pinned.load(Ordering::Relaxed);
        let limits = self.config.limits;
        [
            ("FRONTENDS", used.frontends, size.frontends, max.frontends),
            ("SERVICES", used.services, size.services, max.services),
            ("SLOTS", used.slots, size.slots, max.slots),
            ("BACKENDS", used.backends, size.backends, max.backends),
            ("VIRTUAL_IPS", used.virtual_ips, size.virtual_ips, max.virtual_ips),
            ("FLOWS", flows.used, flows.size, limits.records),
            ("OVERFLOW", overflow.used, overflow.size, overflow.size),
            ("AFFINITY", pinned, limits.pins, limits.pins),
        ]
        .map(|(name, used, size, max)| types::Map {
            name: name.to_owned(),
            used: used.into(),
            size: size.into(),
            max: max.into(),
        })
        .into()
    }

    fn counters(&self) -> types::Counters {
        let maps = self.reconciler.maps();
        types::Counters {
            balanced: self.reconciler.opened().saturating_sub(self.opened_by_canary()),
            no_flow_record: maps.counter(counter::NO_FLOW_RECORD),
            retries: maps.counter(counter::RETRIES),
            collisions: maps.counter(counter::COLLISIONS),
            overflowed: maps.counter(counter::OVERFLOWED),
            all_ejected: maps.counter(counter::ALL_EJECTED),
            share_reached: maps.counter(counter::SHARE_REACHED),
            gave_way: maps.counter(counter::GAVE_WAY),
            map_writes: maps.writes(),
            no_pin: maps.counter(counter::NO_PIN),
            events_lost: maps.counter(counter::EVENTS_LOST),
            refused: by_reason(Reason::ALL.map(|reason| maps.counter(reason as u32))).collect(),
        }
    }
}

impl Names for Engine {
    fn unit(&self, cgroup: u64) -> Option<u64> {
        self.unit_keys.of(cgroup)
    }

    fn frontend(&self, key: &FrontendKey) -> Option<FrontendInfo> {
        // Without an owner in the kernel it may be one that did not fit.
        let name = self.reconciler.owner(key).or_else(|| {
            let protocol = Protocol::from_number(key.protocol)?;
            let (address, port) = (key.addr.ip(), key.host_port());
            self.catalog.owner(&catalog::Frontend { address, port, protocol })
        })?;
        let entry = self.catalog.get(name.as_str());
        let policy = compile::policy(entry.and_then(|entry| entry.service.ejection));
        let drained = entry.map(|entry| self.drains.causes(name, entry)).unwrap_or_default();
        let mut backends: Vec<BackendInfo> = self
            .reconciler
            .backends(name)
            .filter(|(backend, _)| {
                backend.port == key.host_port()
                    && backend.protocol as u8 == key.protocol
                    && backend.address.is_ipv4() == key.addr.is_v4()
            })
            .filter_map(|(backend, id)| {
                let record = self.reconciler.maps().backend(id)?;
                let known = self.known(name, backend.address);
                let ejection = self.reconciler.maps().counts(id).ejection;
                let cause = drained.get(&backend.address).copied().unwrap_or_default();
                let Standing { state, reason, .. } =
                    self.standing(id, &record, known, cause, policy);
                Some(BackendInfo {
                    address: backend.address,
                    state,
                    reason,
                    weight: record.weight.into(),
                    ejection,
                })
            })
            .collect();
        backends.sort_by_key(|backend| backend.address);
        let algorithm = self.algorithm(entry, std::slice::from_ref(key)).name().to_owned();
        let affinity = entry.and_then(|entry| entry.service.affinity);
        Some(FrontendInfo { service: name.to_string(), algorithm, affinity, backends })
    }
}

fn input(said: Said) -> types::Input {
    let Said { by, state, reason, since } = said;
    // That of the kernel programs, when it is out for one client alone.
    let state = state.map_or("suspected", State::name).to_owned();
    types::Input { by: by.name().to_owned(), state, reason, since: since.map(timestamp) }
}

fn audit(audited: &Audited) -> types::Audit {
    let Report { records, seen, unseen, ended, in_unknown_namespaces, undecided, problem } =
        &audited.report;
    types::Audit {
        time: timestamp(audited.time),
        passes: audited.passes,
        records: *records,
        seen: *seen,
        unseen: *unseen,
        ended: *ended,
        in_unknown_namespaces: *in_unknown_namespaces,
        undecided: *undecided,
        released: audited.released,
        released_ever: audited.released_ever,
        settled: audited.settled,
        problem: audited.error.as_ref().or(problem.as_ref()).cloned(),
    }
}

fn by_reason(counts: maps::Refused) -> impl Iterator<Item = types::Refused> {
    Reason::ALL
        .into_iter()
        .zip(counts)
        .map(|(reason, count)| types::Refused { reason: reason.name().to_owned(), count })
}

pub(super) fn failures([refused, timeout, unreachable, reset]: [u64; 4]) -> types::Failures {
    types::Failures { refused, timeout, unreachable, reset }
}

fn frontend(key: &FrontendKey) -> types::Frontend {
    let protocol = Protocol::from_number(key.protocol).map_or("", Protocol::name);
    types::Frontend {
        address: key.addr.ip().to_string(),
        port: key.host_port(),
        protocol: protocol.to_owned(),
    }
}

/// RFC 3339, in UTC, to the millisecond.
fn timestamp(time: SystemTime) -> String {
    humantime::format_rfc3339_millis(time).to_string()
}
