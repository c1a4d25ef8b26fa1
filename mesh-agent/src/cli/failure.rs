//! How a command ends when it does not succeed.

use std::io;
use std::process::ExitCode;

use crate::api::client::ClientError;
use crate::text;

/// Why a command failed. Wrong usage is not among these: clap answers that itself, with status 2.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Failure {
    /// Status 1. The text is one line that says what to do next.
    Failed(String),
    /// Status 3: the agent does not answer. The text names the socket and what to do.
    NoAgent(String),
    /// Nobody reads what is written (`mesh-agent services | head -1`). That is no failure.
    Unread,
}

impl Failure {
    /// Status 1.
    #[expect(clippy::needless_pass_by_value, reason = "it is handed to `map_err` by name")]
    pub(super) fn failed(message: impl ToString) -> Self {
        Self::Failed(message.to_string())
    }

    /// Neither threads nor what they wait with can be had.
    pub(super) fn no_runtime(error: &io::Error) -> Self {
        let advice = text::open_files(error)
            .unwrap_or("see `ulimit -u`, and pids.max of the cgroup it is started in");
        Self::failed(format!("cannot start: {error}; {advice}"))
    }

    /// What is to be written to standard error.
    #[must_use]
    pub fn message(&self) -> Option<&str> {
        match self {
            Self::Failed(message) | Self::NoAgent(message) => Some(message),
            Self::Unread => None,
        }
    }

    /// The exit status of the process.
    #[must_use]
    pub fn exit_code(&self) -> ExitCode {
        ExitCode::from(match self {
            Self::Unread => 0,
            Self::Failed(_) => 1,
            Self::NoAgent(_) => 3,
        })
    }
}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        match error {
            // The agent did answer: it knows why it cannot.
            ClientError::Refused { .. } | ClientError::Protocol { .. } => Self::failed(error),
            ClientError::NotRunning { .. }
            | ClientError::NoSocket { .. }
            | ClientError::Permission { .. }
            | ClientError::Gone { .. }
            | ClientError::Timeout { .. } => Self::NoAgent(error.to_string()),
        }
    }
}
