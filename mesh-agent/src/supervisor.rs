//! What the service manager is told (`sd_notify(3)`): that the agent is ready, that it is alive, that it ends.
//! Where there is none, nobody is told. Its socket is a path (`NOTIFY_SOCKET`), as systemd's is.

use std::time::Duration;

use sd_notify::NotifyState;
use tokio::sync::{Mutex, MutexGuard};
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use crate::metrics::Readings;

/// Connects are balanced from now on, as `status` says in a few words.
pub async fn ready(status: String) {
    tell(Some(NotifyState::Ready), status).await;
}

/// What the agent is doing now, in a few words.
pub async fn status(status: String) {
    tell(None, status).await;
}

/// The agent ends, for this reason.
pub async fn stopping(reason: String) {
    tell(Some(NotifyState::Stopping), reason).await;
}

/// Tells that the agent is alive each time that the engine answers, twice in the time that the service
/// manager has set (`WatchdogSec=`), until `cancel`.
pub async fn watchdog<R: Readings>(readings: R, cancel: CancellationToken) {
    let Some(limit) = sd_notify::watchdog_enabled() else { return cancel.cancelled().await };
    let period = (limit / 2).max(Duration::from_millis(1));
    let mut tick = tokio::time::interval(period);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while cancel.run_until_cancelled(tick.tick()).await.is_some() {
        match tokio::time::timeout(period, readings.alive()).await {
            // While something else is being told, the next time will do.
            Ok(Ok(())) => {
                if let Ok(turn) = TELLING.try_lock() {
                    cancel.run_until_cancelled(send(turn, Some(NotifyState::Watchdog), None)).await;
                }
            }
            Ok(Err(_)) | Err(_) => tracing::error!("the engine does not answer"),
        }
    }
}

/// How long the agent waits until the service manager was told something.
const PATIENCE: Duration = Duration::from_millis(250);

/// Who is telling something: one at a time.
static TELLING: Mutex<()> = Mutex::const_new(());

/// Tells it in the order in which this is called, as soon as the service manager listens; waits for that
/// only for a moment.
async fn tell(state: Option<NotifyState<'static>>, status: String) {
    let told = tokio::spawn(async {
        let turn = TELLING.lock().await;
        send(turn, state, Some(status)).await;
    });
    if tokio::time::timeout(PATIENCE, told).await.is_err() {
        tracing::warn!("the service manager does not listen");
    }
}

/// In a thread of its own, which waits while nobody reads.
async fn send(
    turn: MutexGuard<'static, ()>,
    state: Option<NotifyState<'static>>,
    status: Option<String>,
) {
    let sent = tokio::task::spawn_blocking(move || {
        let _turn = turn;
        let status = status.as_deref().map(NotifyState::Status);
        sd_notify::notify(&state.into_iter().chain(status).collect::<Vec<_>>())
    });
    match sent.await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::warn!(%error, "the service manager cannot be told"),
        Err(error) => tracing::warn!(%error, "the service manager cannot be told"),
    }
}
