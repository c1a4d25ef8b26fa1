//! What other programs ask about the agent, over HTTP: `/metrics` for Prometheus, `/healthz` and `/readyz`
//! for whoever restarts the agent or sends work to the node.

mod exposition;
#[cfg(test)]
mod tests;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use bytes::Bytes;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::api::server::ViewError;
use crate::api::types;
use crate::dataplane::sys::heap;

/// How long the agent may take for an answer. Longer, and it counts as hanging.
const ANSWER: Duration = Duration::from_secs(2);

/// How long a visitor may take until it has asked.
const QUESTION: Duration = Duration::from_secs(1);

/// How long a visitor may take from its coming to the last byte.
const VISIT: Duration = Duration::from_secs(10);

/// How many visitors there may be at a time; others wait to be accepted. Each takes a file descriptor,
/// which the health checks need too.
const VISITORS: usize = 128;

/// How many of them may have all that is counted, which can be tens of megabytes.
const READERS: usize = 2;

/// An answer of so many bytes is large.
const LARGE: usize = 1 << 20;

/// How often it is tried to listen where somebody else does.
const RETRY: Duration = Duration::from_secs(5);

/// What is asked of the engine.
pub trait Readings: Clone + Send + Sync + 'static {
    /// Answers as soon as the engine gets to it.
    fn alive(&self) -> impl Future<Output = Result<(), ViewError>> + Send;

    /// Whether all sources have been read and all programs are attached; what is in the way of that, and
    /// what else needs attention.
    fn readiness(&self) -> impl Future<Output = Result<(bool, Vec<String>), ViewError>> + Send;

    /// Says why nobody can ask, or that everybody can.
    fn set_hindrance(&self, why: Option<String>) -> impl Future<Output = ()> + Send;

    /// Everything that is counted.
    fn snapshot(&self) -> impl Future<Output = Result<Snapshot, ViewError>> + Send;
}

/// Everything that is counted, within some milliseconds.
#[derive(Clone, PartialEq, Debug)]
pub struct Snapshot {
    /// The agent, and the data plane as a whole.
    pub status: types::Status,
    /// What the agent has made outside of itself, and whether it is there as it was made.
    pub in_place: Vec<(&'static str, bool)>,
    /// Backends of the services that this node has used.
    pub backends: Vec<Traffic>,
}

/// What is counted for a backend since it appeared.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Traffic {
    /// Its service.
    pub service: Arc<str>,
    /// The service's port.
    pub port: u16,
    /// Transport protocol.
    pub protocol: &'static str,
    /// Its address, with the port.
    pub address: SocketAddr,
    /// Connects that were given to it.
    pub opened: u64,
    /// How many of them are open.
    pub active: u64,
    /// How many of them failed, by reason.
    pub failures: types::Failures,
}

/// Answers at this address until `cancel`. When somebody else listens there, that is said, and tried
/// again: no connect on this node depends on it.
pub async fn serve<R: Readings>(listen: SocketAddr, readings: R, cancel: CancellationToken) {
    if let Some(listener) = cancel.run_until_cancelled(bind(listen, &readings)).await {
        receive(listener, readings, cancel).await;
    }
}

async fn receive<R: Readings>(listener: TcpListener, readings: R, cancel: CancellationToken) {
    let router = router(readings);
    let places = Arc::new(Semaphore::new(VISITORS));
    // Dropped with this, they end.
    let mut visits = JoinSet::new();
    loop {
        while visits.try_join_next().is_some() {}
        let next = async {
            let place = Arc::clone(&places).acquire_owned().await.ok()?;
            Some((accept(&listener).await, place))
        };
        let Some(Some((stream, place))) = cancel.run_until_cancelled(next).await else { return };
        let router = router.clone();
        visits.spawn(async move {
            visit(stream, router).await;
            drop(place);
        });
    }
}

async fn bind<R: Readings>(listen: SocketAddr, readings: &R) -> TcpListener {
    let mut hindrance = None;
    loop {
        match TcpListener::bind(listen).await {
            Ok(listener) => {
                tracing::info!(%listen, "metrics");
                if hindrance.is_some() {
                    readings.set_hindrance(None).await;
                }
                return listener;
            }
            Err(error) => {
                let why = format!(
                    "metrics cannot be had at {listen}: {error}; name another address with \
                     `metrics: {{listen: …}}` in the agent file, or `none`; it is tried again every \
                     {} seconds",
                    RETRY.as_secs()
                );
                if hindrance.as_ref() != Some(&why) {
                    tracing::error!("{why}");
                    readings.set_hindrance(Some(why.clone())).await;
                    hindrance = Some(why);
                }
            }
        }
        tokio::time::sleep(RETRY).await;
    }
}

async fn accept(listener: &TcpListener) -> TcpStream {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => return stream,
            Err(error) => {
                // Most likely no file descriptor is free. Without a pause this would spin.
                tracing::warn!(%error, "cannot accept a visitor of the metrics");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// One request: who comes for the next one comes again.
async fn visit(stream: TcpStream, router: Router) {
    let answer = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(QUESTION)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    match tokio::time::timeout(VISIT, answer).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%error, "a visitor of the metrics"),
        Err(_) => tracing::debug!("a visitor of the metrics is too slow"),
    }
}

fn router<R: Readings>(readings: R) -> Router {
    Router::new()
        .route("/metrics", get(metrics::<R>))
        .route("/healthz", get(healthz::<R>))
        .route("/readyz", get(readyz::<R>))
        .fallback(async || {
            (StatusCode::NOT_FOUND, "no such path: there are /metrics, /healthz and /readyz\n")
        })
        .with_state(Shared { readings, readers: Arc::new(Semaphore::new(READERS)) })
}

/// What the handlers share.
#[derive(Clone)]
struct Shared<R> {
    readings: R,
    readers: Arc<Semaphore>,
}

// === handlers ===

/// What comes of a question within [`ANSWER`].
async fn within<T>(answer: impl Future<Output = Result<T, ViewError>>) -> Result<T, Response> {
    let text = match tokio::time::timeout(ANSWER, answer).await {
        Ok(Ok(answer)) => return Ok(answer),
        Ok(Err(error)) => format!("{error}\n"),
        Err(_) => format!("the engine has not answered for {} seconds\n", ANSWER.as_secs()),
    };
    Err((StatusCode::SERVICE_UNAVAILABLE, text).into_response())
}

async fn healthz<R: Readings>(State(Shared { readings, .. }): State<Shared<R>>) -> Response {
    match within(readings.alive()).await {
        Ok(()) => "ok\n".into_response(),
        Err(response) => response,
    }
}

/// The reasons are told also when the node is ready: then they are what needs attention.
async fn readyz<R: Readings>(State(Shared { readings, .. }): State<Shared<R>>) -> Response {
    let (ready, reasons) = match within(readings.readiness()).await {
        Ok(readiness) => readiness,
        Err(response) => return response,
    };
    let (status, first) = match ready {
        true => (StatusCode::OK, "ready"),
        false => (StatusCode::SERVICE_UNAVAILABLE, "not ready"),
    };
    let lines: Vec<&str> =
        std::iter::once(first).chain(reasons.iter().map(String::as_str)).collect();
    (status, lines.join("\n") + "\n").into_response()
}

/// What is being sent. Its place is free when the last of it is gone, or nobody wants it any more.
struct Told {
    text: String,
    _place: OwnedSemaphorePermit,
}

impl Drop for Told {
    /// What was taken for a large answer is given back to the system.
    fn drop(&mut self) {
        if self.text.len() > LARGE {
            drop(std::mem::take(&mut self.text));
            heap::trim();
        }
    }
}

impl AsRef<[u8]> for Told {
    fn as_ref(&self) -> &[u8] {
        self.text.as_bytes()
    }
}

async fn metrics<R: Readings>(State(shared): State<Shared<R>>) -> Response {
    let Ok(place) = shared.readers.try_acquire_owned() else {
        let text = format!("{READERS} others are reading the metrics; try again\n");
        return (StatusCode::SERVICE_UNAVAILABLE, text).into_response();
    };
    let snapshot = match within(shared.readings.snapshot()).await {
        Ok(snapshot) => snapshot,
        Err(response) => return response,
    };
    let text = tokio::task::spawn_blocking(move || exposition::text(snapshot));
    let wrong = match text.await {
        Ok(Ok(text)) => {
            let text = Bytes::from_owner(Told { text, _place: place });
            return ([(header::CONTENT_TYPE, exposition::CONTENT_TYPE)], text).into_response();
        }
        Ok(Err(error)) => error.to_string(),
        Err(error) => error.to_string(),
    };
    let text = format!("writing the metrics: {wrong}; please report this\n");
    (StatusCode::INTERNAL_SERVER_ERROR, text).into_response()
}
