//! What the agent has made outside of itself, and others may take away while it runs: its pins, and the socket by
//! which it is asked. It is looked at every second, and made again where that can be.

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::dataplane::pindir::{PinDir, Repaired};
use crate::engine::{Handle, Outside};

/// Who looks after the pins.
pub struct Upkeep<'a> {
    pins: &'a PinDir,
    engine: &'a Handle,
    /// What is wrong with them, as it was told last.
    told: Option<String>,
}

impl<'a> Upkeep<'a> {
    /// Of these, and tells that engine.
    #[must_use]
    pub fn new(pins: &'a PinDir, engine: &'a Handle) -> Self {
        Self { pins, engine, told: None }
    }

    /// Looks, and makes again what is gone. What is new is told.
    pub async fn look(&mut self) {
        let wrong = match self.pins.repair() {
            Ok(Repaired { names, hindrance }) => {
                self.tell_repaired(&names);
                hindrance
            }
            Err(lost) => Some(lost),
        };
        if wrong == self.told {
            return;
        }
        match &wrong {
            Some(wrong) => tracing::error!("{wrong}"),
            None => tracing::info!("pins are in place, and can be changed, again"),
        }
        self.told.clone_from(&wrong);
        self.engine.set_outside(Outside::Pins, wrong).await;
    }

    fn tell_repaired(&self, names: &[String]) {
        let Some(first) = names.first() else { return };
        tracing::warn!(
            pins = names.len(),
            directory = %self.pins.directory().display(),
            "pins were removed by somebody else, and are made again ({first}, ...); `mesh-agent cleanup` ends \
             balancing in order, once the agent is stopped"
        );
    }
}

/// Tells the engine what is wrong with the socket, until `cancel`.
pub async fn tell_of_socket(
    mut wrong: watch::Receiver<Option<String>>,
    engine: Handle,
    cancel: CancellationToken,
) {
    while let Some(Ok(())) = cancel.run_until_cancelled(wrong.changed()).await {
        let now = wrong.borrow_and_update().clone();
        engine.set_outside(Outside::Socket, now).await;
    }
    // The API ends a little earlier.
    cancel.cancelled().await;
}
