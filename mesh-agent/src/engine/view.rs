//! What the engine tells: the answers of the API, read from the kernel's maps and named with what
//! the agent knows.

use std::net::SocketAddr;
use std::time::SystemTime;

use mesh_common::layout::counter;
use mesh_common::{FrontendKey, Protocol, Reason, State};
use tokio::sync::{mpsc, oneshot};

use super::{Engine, Known, Question};
use crate::api::server::{ExplainQuery, View, ViewError};
use crate::api::types;
use crate::catalog::Entry;
use crate::dataplane::load::PROGRAMS;
use crate::dataplane::maps::Maps as _;
use crate::explain::{self, BackendInfo, ClientView, FrontendInfo, Names};
use crate::model::ServiceName;

/// The only algorithm there is.
const RANDOM: &str = "random";

/// How many items of a kind are spelled out where a list is meant for people.
const MANY: usize = 20;

/// A way to ask the engine.
#[derive(Clone)]
pub struct Handle {
    questions: mpsc::Sender<Question>,
}

impl Handle {
    pub(super) fn new(questions: mpsc::Sender<Question>) -> Self {
        Self { questions }
    }

    /// Runs `question` in the engine's task, between two changes.
    async fn ask<T: Send + 'static>(
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

    /// Tells the engine whether the programs are attached.
    pub async fn set_attached(&self, attached: bool) {
        // An engine that is gone does not need to know.
        let _ = self.ask(move |engine| engine.attached = attached).await;
    }
}

impl View for Handle {
    async fn services(&self) -> Result<Vec<types::Service>, ViewError> {
        self.ask(|engine| {
            engine.catalog.iter().map(|(name, entry)| engine.service(name, entry)).collect()
        })
        .await
    }

    async fn backends(&self, service: Option<String>) -> Result<Vec<types::Backend>, ViewError> {
        self.ask(move |engine| match service {
            None => Ok(engine
                .catalog
                .iter()
                .flat_map(|(name, entry)| engine.backends(name, entry))
                .collect()),
            Some(name) => {
                let name = ServiceName::new(&name);
                let entry = engine.catalog.get(name.as_str()).ok_or_else(|| {
                    ViewError::NotFound(format!(
                        "there is no service {name}; `mesh-agent services` lists them"
                    ))
                })?;
                Ok(engine.backends(&name, entry))
            }
        })
        .await?
    }

    async fn status(&self) -> Result<types::Status, ViewError> {
        self.ask(|engine| engine.status()).await
    }

    async fn explain(&self, query: ExplainQuery) -> Result<types::Explanation, ViewError> {
        let ExplainQuery { address, protocol, from } = query;
        self.ask(move |engine| {
            let client = match (from, &engine.config.cgroup) {
                (Some(from), Some(cgroup)) => Some(
                    ClientView::resolve(&from, cgroup)
                        .map_err(|error| ViewError::BadRequest(error.to_string()))?,
                ),
                _ => None,
            };
            let query = explain::Query { address, protocol };
            Ok(explain::explain(query, client.as_ref(), engine.reconciler.maps(), engine))
        })
        .await?
    }
}

impl Engine {
    fn service(&self, name: &ServiceName, entry: &Entry) -> types::Service {
        let mut frontends: Vec<FrontendKey> = self.reconciler.frontends(name).collect();
        frontends.sort_by_key(|key| (key.addr.octets(), key.host_port(), key.protocol));
        let states: Vec<State> = self
            .reconciler
            .backends(name)
            .filter_map(|(_, id)| self.reconciler.maps().backend(id))
            .map(|backend| State::from_number(backend.state))
            .collect();
        let problems = self.problems.get(name).into_iter().flatten();
        types::Service {
            name: name.to_string(),
            source: entry.origin.item.to_string(),
            balance: RANDOM.to_owned(),
            frontends: frontends.iter().map(frontend).collect(),
            backends: types::BackendCounts {
                total: states.len(),
                healthy: states.iter().filter(|&&state| state == State::Healthy).count(),
            },
            problems: problems.chain(&entry.shadowed).chain(&entry.warnings).cloned().collect(),
        }
    }

    fn backends(&self, name: &ServiceName, entry: &Entry) -> Vec<types::Backend> {
        let mut held: Vec<_> = self.reconciler.backends(name).collect();
        held.sort();
        held.into_iter()
            .filter_map(|(key, id)| {
                let backend = self.reconciler.maps().backend(id)?;
                let known = self.known(name, key.address);
                let endpoint =
                    entry.service.endpoints.iter().find(|e| e.address == key.address.ip());
                Some(types::Backend {
                    service: name.to_string(),
                    port: key.port,
                    protocol: key.protocol.name().to_owned(),
                    address: SocketAddr::new(backend.addr.ip(), u16::from_be(backend.port))
                        .to_string(),
                    state: State::from_number(backend.state).name().to_owned(),
                    reason: known.map_or_else(String::new, |known| known.reason.clone()),
                    weight: backend.weight,
                    zone: endpoint.and_then(|e| e.zone.as_deref()).map(str::to_owned),
                    active: None,
                    opened: self.reconciler.maps().opened(id),
                    failed: None,
                    since: timestamp(known.map_or_else(SystemTime::now, |known| known.since)),
                })
            })
            .collect()
    }

    fn known(&self, name: &ServiceName, address: SocketAddr) -> Option<&Known> {
        self.health.get(name)?.endpoints.get(&address)
    }

    fn status(&self) -> types::Status {
        let reasons = self.reasons();
        let config = &self.config;
        types::Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            node: config.node.clone(),
            zone: config.zone.clone(),
            ready: self.attached && self.all_ready(),
            reasons,
            pid: std::process::id(),
            cgroup: config.cgroup.as_ref().map_or_else(String::new, |c| c.display().to_string()),
            programs: PROGRAMS
                .iter()
                .map(|&(name, hook)| types::Program {
                    name: name.to_owned(),
                    hook: hook.to_owned(),
                    attached: self.attached,
                })
                .collect(),
            sources: self.source_states(),
            maps: self.maps(),
            counters: self.counters(),
            last_error: self.last_error.clone(),
        }
    }

    /// Why the node is not ready, and what else needs attention.
    fn reasons(&self) -> Vec<String> {
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
        if !self.attached {
            reasons.push("the kernel programs are not attached yet".to_owned());
        }
        let shadowed = self.catalog.shadowed_definitions().map(|shadowed| shadowed.to_string());
        let problems = self
            .problems
            .iter()
            .map(|(name, texts)| format!("service {name}: {}", texts.join("; ")));
        let mut others: Vec<String> = problems.chain(shadowed).collect();
        if others.len() > MANY {
            let more = others.len() - MANY;
            others.truncate(MANY);
            others.push(format!("… and {more} more"));
        }
        reasons.extend(others);
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
        let (used, max) = (self.reconciler.usage(), self.reconciler.maps().capacity());
        [
            ("FRONTENDS", used.frontends, max.frontends),
            ("SERVICES", used.services, max.services),
            ("SLOTS", used.slots, max.slots),
            ("BACKENDS", used.backends, max.backends),
        ]
        .map(|(name, used, max)| types::Map {
            name: name.to_owned(),
            used: used.into(),
            max: max.into(),
        })
        .into()
    }

    fn counters(&self) -> types::Counters {
        let maps = self.reconciler.maps();
        types::Counters {
            balanced: maps.counter(counter::BALANCED),
            no_flow_record: maps.counter(counter::NO_FLOW_RECORD),
            retries: maps.counter(counter::RETRIES),
            refused: Reason::ALL
                .into_iter()
                .map(|reason| types::Refused {
                    reason: reason.name().to_owned(),
                    count: maps.counter(reason as u32),
                })
                .collect(),
        }
    }
}

impl Names for Engine {
    fn frontend(&self, key: &FrontendKey) -> Option<FrontendInfo> {
        let name = self.reconciler.owner(key)?;
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
                Some(BackendInfo {
                    address: backend.address,
                    state: State::from_number(record.state),
                    reason: known.map_or_else(String::new, |known| known.reason.clone()),
                    weight: record.weight,
                })
            })
            .collect();
        backends.sort_by_key(|backend| backend.address);
        Some(FrontendInfo { service: name.to_string(), algorithm: RANDOM.to_owned(), backends })
    }
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
