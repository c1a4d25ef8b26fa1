//! Whether connects are balanced, as a canary has found, and the service that it connects to.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_common::{Algorithm, FrontendKey, Protocol, State};

use super::Engine;
use super::view::Handle;
use crate::canary::{self, Canary};
use crate::compile::{Backend, BackendKey, Candidate, Rows, Rules, TableKey, Tables};
use crate::dataplane::maps::Maps as _;
use crate::text;

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
    canary: Option<&'a Canary>,
    engine: &'a Handle,
    /// When the next one is due.
    due: Instant,
    /// Why the last one did not come back.
    failed: Option<String>,
}

impl Handle {
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

impl Engine {
    /// Has the kernel hold the canary's service, or not, if it is not wanted.
    pub(super) fn hold_canary(&mut self) {
        let tables = match self.canary {
            Some(address) => tables(address),
            None => {
                self.proof = Proof::Off;
                Tables::default()
            }
        };
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
    }
}

// === impl Prover ===

impl<'a> Prover<'a> {
    /// Who sends this one, if any.
    #[must_use]
    pub fn new(canary: Option<&'a Canary>, engine: &'a Handle) -> Self {
        Self { canary, engine, due: Instant::now(), failed: None }
    }

    /// Sends one when it is time.
    pub async fn prove_if_due(&mut self) {
        if self.due <= Instant::now() {
            self.prove().await;
        }
    }

    /// Sends one; after a failure the next is due at once.
    pub async fn prove(&mut self) {
        let Some(canary) = self.canary else { return };
        let found = canary.prove().await.map_err(|error| text::chain(error.as_ref()));
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
    }
}
