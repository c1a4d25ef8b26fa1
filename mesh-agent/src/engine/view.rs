//! What the engine tells: the answers of the API, read from the kernel's maps and named with what
//! the agent knows.

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use mesh_common::layout::counter;
use mesh_common::{FrontendKey, Protocol, Reason, State};
use tokio::sync::{mpsc, oneshot};

use super::{Engine, Known, Question, few};
use crate::api::server::{ExplainQuery, View, ViewError};
use crate::api::types;
use crate::catalog::{self, Entry};
use crate::config::Config;
use crate::dataplane::load::{Attachment, PROGRAMS};
use crate::dataplane::maps::Maps as _;
use crate::explain::{self, BackendInfo, ClientView, FrontendInfo, Names};
use crate::model::ServiceName;

/// The only algorithm there is.
const RANDOM: &str = "random";

/// How long finding out who a client is may take: its cgroup may be on a file system that hangs.
const PATIENCE: Duration = Duration::from_secs(2);

/// A way to ask the engine.
#[derive(Clone)]
pub struct Handle {
    questions: mpsc::Sender<Question>,
    config: Arc<Config>,
}

impl Handle {
    pub(super) fn new(questions: mpsc::Sender<Question>, config: Arc<Config>) -> Self {
        Self { questions, config }
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

    /// Tells the engine what is attached.
    pub async fn set_attachment(&self, attachment: Option<Attachment>) {
        // An engine that is gone does not need to know.
        let set = move |engine: &mut Engine| {
            engine.attachment = attachment;
            engine.lost = None;
        };
        let _ = self.ask(set).await;
    }

    /// Tells the engine why what was attached cannot be attached again.
    pub async fn set_lost(&self, error: String) {
        let _ = self.ask(move |engine| engine.lost = Some(error)).await;
    }

    /// Who `from` is; not asked in the engine's task, because files are looked at.
    async fn client(&self, from: String) -> Result<Option<ClientView>, ViewError> {
        let Some(cgroup) = self.config.cgroup.clone() else { return Ok(None) };
        let name = from.clone();
        let resolve = tokio::task::spawn_blocking(move || ClientView::resolve(&from, &cgroup));
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
                .catalog
                .iter()
                .flat_map(|(name, entry)| engine.backends(name, entry))
                .collect()),
            Some(name) => {
                let name = ServiceName::new(&name);
                let entry = engine
                    .catalog
                    .get(name.as_str())
                    .ok_or_else(|| ViewError::no_service(name.as_str()))?;
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
    /// What is defined, and what the kernel still holds of services that are not defined any more.
    fn services(&self) -> Vec<types::Service> {
        let defined = self.catalog.iter().map(|(name, entry)| self.service(name, Some(entry)));
        let undefined = self
            .reconciler
            .services()
            .filter(|name| self.catalog.get(name.as_str()).is_none())
            .map(|name| self.service(name, None));
        let mut services: Vec<_> = defined.chain(undefined).collect();
        services.sort_by(|a, b| a.name.cmp(&b.name));
        services
    }

    fn service(&self, name: &ServiceName, entry: Option<&Entry>) -> types::Service {
        let mut frontends: Vec<FrontendKey> = self.reconciler.frontends(name).collect();
        frontends.sort_by_key(|key| (key.addr.octets(), key.host_port(), key.protocol));
        let states: Vec<State> = self
            .reconciler
            .backends(name)
            .filter_map(|(_, id)| self.reconciler.maps().backend(id))
            .map(|backend| State::from_number(backend.state))
            .collect();
        let problems = self.problems.get(name).into_iter().flatten();
        let notes = self.notes.get(name).into_iter().flatten();
        types::Service {
            name: name.to_string(),
            source: entry.map_or_else(String::new, |entry| entry.origin.item.to_string()),
            balance: RANDOM.to_owned(),
            frontends: frontends.iter().map(frontend).collect(),
            backends: types::BackendCounts {
                total: states.len(),
                healthy: states.iter().filter(|&&state| state == State::Healthy).count(),
            },
            problems: problems.chain(notes).cloned().collect(),
        }
    }

    fn backends(&self, name: &ServiceName, entry: &Entry) -> Vec<types::Backend> {
        let endpoints = &entry.service.endpoints;
        let endpoints: HashMap<_, _> = endpoints
            .iter()
            .map(|endpoint| ((endpoint.address, endpoint.port), endpoint))
            .collect();
        let mut held: Vec<_> = self.reconciler.backends(name).collect();
        held.sort();
        held.into_iter()
            .filter_map(|(key, id)| {
                let backend = self.reconciler.maps().backend(id)?;
                let known = self.known(name, key.address);
                let (ip, port) = (key.address.ip(), key.address.port());
                let endpoint = endpoints.get(&(ip, Some(port))).or(endpoints.get(&(ip, None)));
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
        let programs = match &self.attachment {
            Some(attachment) => attachment.states(),
            None => PROGRAMS.map(|(name, hook)| (name, hook, false)).into(),
        };
        let attached = programs.iter().all(|(_, _, attached)| *attached);
        let reasons = self.reasons(attached);
        let config = &self.config;
        types::Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            node: config.node.clone(),
            zone: config.zone.clone(),
            ready: attached && self.all_ready(),
            reasons,
            pid: std::process::id(),
            cgroup: config.cgroup.as_ref().map_or_else(String::new, |c| c.display().to_string()),
            programs: programs
                .into_iter()
                .map(|(name, hook, attached)| types::Program {
                    name: name.to_owned(),
                    hook: format!("cgroup/{}", hook.name()),
                    attached,
                })
                .collect(),
            sources: self.source_states(),
            maps: self.maps(),
            counters: self.counters(),
            last_error: self.last_error.as_ref().map(|(time, error)| types::LastError {
                time: timestamp(*time),
                error: error.clone(),
            }),
        }
    }

    /// Why the node is not ready, and what else needs attention.
    fn reasons(&self, attached: bool) -> Vec<String> {
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
        reasons.extend(self.trouble.clone());
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
        let (used, max) = (self.reconciler.usage(), self.reconciler.maps().capacity());
        [
            ("FRONTENDS", used.frontends, max.frontends),
            ("SERVICES", used.services, max.services),
            ("SLOTS", used.slots, max.slots),
            ("BACKENDS", used.backends, max.backends),
            ("VIRTUAL_IPS", used.virtual_ips, max.virtual_ips),
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
        // Without an owner in the kernel it may be one that did not fit.
        let name = self.reconciler.owner(key).or_else(|| {
            let protocol = Protocol::from_number(key.protocol)?;
            let (address, port) = (key.addr.ip(), key.host_port());
            self.catalog.owner(&catalog::Frontend { address, port, protocol })
        })?;
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
