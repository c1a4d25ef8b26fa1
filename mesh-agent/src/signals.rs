//! The signals that end the agent in order.

use anyhow::Context as _;
use tokio::signal::unix::{Signal, SignalKind, signal};

/// What ends the agent in order.
pub struct Signals {
    terminate: Signal,
    interrupt: Signal,
    /// The terminal was closed.
    hangup: Signal,
}

impl Signals {
    /// Listens for all of them.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn listen() -> anyhow::Result<Self> {
        let listen = |kind| signal(kind).context("listening for signals");
        Ok(Self {
            terminate: listen(SignalKind::terminate())?,
            interrupt: listen(SignalKind::interrupt())?,
            hangup: listen(SignalKind::hangup())?,
        })
    }

    /// Waits for the next one.
    pub async fn next(&mut self) -> Ended {
        tokio::select! {
            _ = self.terminate.recv() => Ended::Terminated,
            _ = self.interrupt.recv() => Ended::Interrupted,
            _ = self.hangup.recv() => Ended::HungUp,
        }
    }
}

/// By which signal the agent ends.
#[derive(Clone, Copy)]
pub enum Ended {
    /// SIGTERM.
    Terminated,
    /// SIGINT.
    Interrupted,
    /// SIGHUP.
    HungUp,
}

impl Ended {
    /// Its name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Terminated => "SIGTERM",
            Self::Interrupted => "SIGINT",
            Self::HungUp => "SIGHUP",
        }
    }

    /// Whether balancing ends too. A service manager sends SIGTERM, and starts the agent anew; the others
    /// come from a person who has tried it in a terminal.
    #[must_use]
    pub const fn detaches(self) -> bool {
        !matches!(self, Self::Terminated)
    }
}
