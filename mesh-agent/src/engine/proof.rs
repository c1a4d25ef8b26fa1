//! Whether connects are balanced, as a canary has found, and the service that it connects to.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_common::{Algorithm, FrontendKey, Protocol, State};

use super::view::Handle;
use super::{Engine, few};
use crate::canary::{self, Canary};
use crate::check::hooks;
use crate::compile::{Backend, BackendKey, Candidate, Rows, Rules, TableKey, Tables};
use crate::config::Config;
use crate::dataplane::maps::Maps as _;
use crate::dataplane::programs::Attachment;
use crate::{supervisor, text};

/// How often a connect proves that all is as it should be.
const PROVING: Duration = Duration::from_secs(30);

/// What is known.
#[derive(Debug, Default)]
pub(super) enum Proof {
    /// None was sent yet, since the programs were attached.
    #[default]
    Awaited,
    /// It came back.
    Given,
    /// Why it did not, or was not sent.
    Failed(String),
    /// The agent file wants none.
    Off,
}

impl Proof {
    /// Whether connects may be taken to be balanced.
    pub(super) const fn is_enough(&self) -> bool {
        matches!(self, Self::Given | Self::Off)
    }

    /// Why not.
    pub(super) fn reason(&self) -> Option<String> {
        match self {
            Self::Awaited => Some("no connect has been seen to be balanced yet".to_owned()),
            Self::Failed(why) => Some(format!(
                "a connect from inside the cgroup is not seen to be balanced: {why}; it is tried again \
                 every second"
            )),
            Self::Given | Self::Off => None,
        }
    }
}

/// Who sends canaries, and tells the engine of them.
pub struct Prover<'a> {
    config: &'a Config,
    cgroup: &'a Path,
    /// Nothing before the agent listens for them.
    canary: Option<Canary>,
    /// Others' programs that were found to run first.
    rivals: Vec<String>,
    engine: &'a Handle,
    /// When the next one is due.
    due: Instant,
    /// When it is looked around the next time, which takes longer where there are many cgroups.
    look_due: Instant,
    /// Why the last one did not come back.
    failed: Option<String>,
    /// Whether the service manager was told that the agent is ready, and what it was told last.
    is_ready: bool,
    told: Option<String>,
}

impl Handle {
    /// Has the kernel lead canaries there.
    async fn lead_canaries(&self, address: SocketAddr) {
        let _ = self.ask(move |engine| engine.hold_canary(tables(address))).await;
    }

    /// What a canary has found; nothing when the next one has to prove it anew.
    pub async fn set_proof(&self, found: Option<Result<(), String>>) {
        let proof = match found {
            None => Proof::Awaited,
            Some(Ok(())) => Proof::Given,
            Some(Err(why)) => Proof::Failed(why),
        };
        // An engine that is gone does not need to know.
        let set = move |engine: &mut Engine| {
            if !matches!(engine.proof, Proof::Off) {
                engine.proof = proof;
            }
        };
        let _ = self.ask(set).await;
    }
}

/// What is said of programs that run first.
fn rivals_reason(rivals: &[String]) -> Option<String> {
    (!rivals.is_empty()).then(|| {
        format!(
            "programs of others see what is dialled before this agent's do, and what they rewrite is not \
             balanced: {}; make sure that they leave the addresses of your services alone",
            few(rivals.to_vec()).join("; ")
        )
    })
}

impl Engine {
    /// What may keep connects from being balanced.
    pub(super) fn doubts(&self) -> impl Iterator<Item = String> {
        self.proof.reason().into_iter().chain(rivals_reason(&self.rivals))
    }

    /// Has the kernel hold the canary's service before all others, or none, if none is wanted.
    pub(super) fn begin_proof(&mut self) {
        match self.canary {
            Some(address) => self.hold_canary(tables(address)),
            None if self.config.canary => {}
            None => {
                self.proof = Proof::Off;
                self.hold_canary(Tables::default());
            }
        }
    }

    fn hold_canary(&mut self, tables: Tables) {
        let outcome = self.reconciler.apply(vec![(canary::name(), Arc::new(tables))]);
        self.note(outcome);
    }

    /// How many connects were its own.
    pub(super) fn opened_by_canary(&self) -> u64 {
        let name = canary::name();
        let ids = self.reconciler.backends(&name);
        ids.map(|(_, id)| self.reconciler.maps().opened(id)).sum()
    }
}

fn tables(address: SocketAddr) -> Tables {
    const WEIGHT: u16 = 1;
    let (port, protocol) = (canary::ADDRESS.port(), Protocol::Tcp);
    let key = BackendKey { port, protocol, address };
    let backend =
        Backend { key, weight: WEIGHT, state: State::Healthy, listed: true, by_command: false };
    let rows = Rows::Candidates(vec![Candidate { place: 0, weight: WEIGHT }]);
    let frontend = FrontendKey::new((*canary::ADDRESS.ip()).into(), port, protocol);
    Tables {
        backends: vec![backend],
        tables: vec![(TableKey { port, protocol, v4: true }, rows)],
        frontends: vec![(frontend, 0)],
        rules: Rules::default(),
        algorithm: Algorithm::Random,
        groups: BTreeMap::new(),
        panics: BTreeSet::new(),
        source: 0,
    }
}

// === impl Prover ===

impl<'a> Prover<'a> {
    /// Who sends some into this cgroup, unless the agent file wants none.
    #[must_use]
    pub fn new(
        config: &'a Config,
        cgroup: &'a Path,
        canary: Option<Canary>,
        engine: &'a Handle,
    ) -> Self {
        let (due, look_due) = (Instant::now(), Instant::now());
        let (rivals, failed, is_ready, told) = (Vec::new(), None, false, None);
        Self { config, cgroup, canary, rivals, engine, due, look_due, failed, is_ready, told }
    }

    /// Sends one when it is time.
    pub async fn prove_if_due(&mut self, attachment: &Attachment) {
        if self.due <= Instant::now() {
            self.prove(attachment).await;
        }
    }

    /// The programs were attached anew, perhaps behind others.
    pub fn look_again(&mut self) {
        self.look_due = Instant::now();
        self.told = None;
    }

    /// Sends one, and looks who else is attached; after a failure the next is due at once.
    pub async fn prove(&mut self, attachment: &Attachment) {
        if self.look_due <= Instant::now() {
            self.look_due = Instant::now() + PROVING;
            self.look_around(attachment).await;
        }
        if !self.config.canary {
            self.due = self.look_due;
            return self.tell().await;
        }
        let found = self.send().await.map_err(|error| text::chain(error.as_ref()));
        self.due = Instant::now() + if found.is_ok() { PROVING } else { Duration::ZERO };
        let failed = found.as_ref().err().cloned();
        match &failed {
            Some(error) if self.failed != failed => {
                tracing::error!(
                    "a connect from inside the cgroup is not seen to be balanced: {error}"
                );
            }
            None if self.failed.is_some() => {
                tracing::info!("a connect from inside the cgroup is balanced again");
            }
            _ => {}
        }
        self.failed = failed;
        self.engine.set_proof(Some(found)).await;
        self.tell().await;
    }

    /// Tells the service manager what is new: that the agent is ready not before it was proved.
    async fn tell(&mut self) {
        let status = match &self.failed {
            None => format!("balancing {}", self.cgroup.display()),
            Some(error) => format!("connects are not seen to be balanced: {error}"),
        };
        if self.told.as_ref() == Some(&status) {
            return;
        }
        self.told = Some(status.clone());
        if self.failed.is_none() && !self.is_ready {
            self.is_ready = true;
            supervisor::ready(status).await;
        } else {
            supervisor::status(status).await;
        }
    }

    /// Tells the engine of others' programs that run before these.
    async fn look_around(&mut self, attachment: &Attachment) {
        let (cgroup, ours) = (self.cgroup.to_owned(), attachment.hooks());
        let looking = tokio::task::spawn_blocking(move || hooks::before(&cgroup, &ours));
        let Ok(rivals) = looking.await else { return };
        if rivals != self.rivals {
            if let Some(reason) = rivals_reason(&rivals) {
                tracing::warn!("{reason}");
            }
            self.rivals.clone_from(&rivals);
            let _ = self.engine.ask(move |engine| engine.rivals = rivals).await;
        }
    }

    async fn send(&mut self) -> anyhow::Result<()> {
        let canary = match self.canary.take() {
            Some(canary) => canary,
            None => {
                let canary = Canary::new(self.cgroup, &self.config.exclude).await?;
                self.engine.lead_canaries(canary.address()?).await;
                canary
            }
        };
        self.canary.insert(canary).prove().await
    }
}
