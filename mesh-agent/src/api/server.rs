//! The serving end: HTTP over the agent's socket, generic over what it shows. What changes something
//! is a POST.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use axum::body::Body;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, RawQuery, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use bytes::Bytes;
use futures_util::stream;
use mesh_common::{ABI_VERSION, Protocol};
use tokio::net::UnixStream;
use tokio_util::sync::CancellationToken;

use super::socket::Listener;
use super::types;
use crate::engine::journal::{FOLLOWERS, Follower, Journal};

/// How long answers under way may take once the agent stops.
const GRACE: Duration = Duration::from_secs(1);

/// What the server shows: the engine, or a stand-in of the tests.
pub trait View: Clone + Send + Sync + 'static {
    /// All services, in the order in which they are to be shown.
    fn services(&self) -> impl Future<Output = Result<Vec<types::Service>, ViewError>> + Send;

    /// The backends of one service, or of all. An unknown service is [`ViewError::NotFound`].
    fn backends(
        &self,
        service: Option<String>,
    ) -> impl Future<Output = Result<Vec<types::Backend>, ViewError>> + Send;

    /// The open connections of one service, or of all. An unknown service is [`ViewError::NotFound`].
    fn connections(
        &self,
        service: Option<String>,
    ) -> impl Future<Output = Result<Vec<types::Connection>, ViewError>> + Send {
        let _ = service;
        async { Err(ViewError::Unavailable("there are no records of connections".to_owned())) }
    }

    /// The state of the agent.
    fn status(&self) -> impl Future<Output = Result<types::Status, ViewError>> + Send;

    /// Compares the records of sockets with the sockets that exist, now.
    fn audit(&self) -> impl Future<Output = Result<types::Audit, ViewError>> + Send {
        async { Err(ViewError::Unavailable("there is nothing to audit".to_owned())) }
    }

    /// Drains endpoints, or ends that; gives them as they are then.
    fn drain(
        &self,
        query: DrainQuery,
    ) -> impl Future<Output = Result<Vec<types::Backend>, ViewError>> + Send {
        let _ = query;
        async { Err(ViewError::Unavailable("there is nothing to drain".to_owned())) }
    }

    /// Removes services that are held as a former agent left them, whatever their sources might say: one of
    /// them, or all that no source defines. Gives the names of those.
    fn forget(
        &self,
        service: Option<String>,
    ) -> impl Future<Output = Result<Vec<String>, ViewError>> + Send {
        let _ = service;
        async { Err(ViewError::Unavailable("there is nothing to forget".to_owned())) }
    }

    /// What a connect would do.
    fn explain(
        &self,
        query: ExplainQuery,
    ) -> impl Future<Output = Result<types::Explanation, ViewError>> + Send;
}

/// The question of `GET /v1/explain`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ExplainQuery {
    /// What is dialled.
    pub address: SocketAddr,
    /// With which protocol.
    pub protocol: Protocol,
    /// Who dials: a process id or an absolute cgroup directory, for
    /// [`ClientView::resolve`](crate::explain::ClientView::resolve).
    pub from: Option<String>,
}

/// The order of `POST /v1/drain` and `POST /v1/undrain`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DrainQuery {
    /// The service.
    pub service: String,
    /// The endpoint's address.
    pub address: IpAddr,
    /// Its port; without it all of them.
    pub port: Option<u16>,
    /// Whether it is to be drained, or not any more.
    pub drain: bool,
}

/// Why there is no answer. The texts are for people, and say what to do next.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ViewError {
    /// What was asked for does not exist: status 404.
    #[error("{0}")]
    NotFound(String),
    /// The question makes no sense: status 400.
    #[error("{0}")]
    BadRequest(String),
    /// The agent is stopping, or not there yet: status 503.
    #[error("{0}")]
    Unavailable(String),
    /// The agent failed: status 500.
    #[error("{0}")]
    Failed(String),
}

/// Serves `view`, and the events of `journal`, until `cancel`; then ends what is under way, within a
/// second, and removes the socket.
///
/// # Errors
///
/// When the socket can no longer be accepted from.
pub async fn serve<V: View>(
    listener: Listener,
    view: V,
    journal: Journal,
    cancel: CancellationToken,
) -> io::Result<()> {
    let happenings = Happenings { view: view.clone(), journal, cancel: cancel.clone() };
    let server = axum::serve(Accept(listener), router(view, happenings))
        .with_graceful_shutdown(cancel.clone().cancelled_owned());
    let too_late = async {
        cancel.cancelled().await;
        tokio::time::sleep(GRACE).await;
    };
    tokio::select! {
        result = server => result,
        () = too_late => Ok(()),
    }
}

/// The listener as axum takes it; it keeps the claim to the socket until the server ends.
struct Accept(Listener);

impl axum::serve::Listener for Accept {
    type Io = UnixStream;
    type Addr = ();

    async fn accept(&mut self) -> (UnixStream, ()) {
        loop {
            match self.0.accept().await {
                Ok(stream) => return (stream, ()),
                Err(error) => {
                    // Most likely no file descriptor is free. Without a pause this would spin.
                    tracing::warn!(%error, socket = %self.0.path().display(), "cannot accept");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }

    fn local_addr(&self) -> io::Result<()> {
        Ok(())
    }
}

/// What the handler of events needs.
#[derive(Clone)]
struct Happenings<V> {
    view: V,
    journal: Journal,
    /// Ends those who follow.
    cancel: CancellationToken,
}

fn router<V: View>(view: V, happenings: Happenings<V>) -> Router {
    let events = Router::new().route("/v1/events", get(events::<V>)).with_state(happenings);
    Router::new()
        .route("/v1/version", get(async || Json(version())))
        .route("/v1/status", get(status::<V>))
        .route("/v1/audit", get(audit::<V>))
        .route("/v1/services", get(services::<V>))
        .route("/v1/services/{name}", get(service::<V>))
        .route("/v1/backends", get(backends::<V>))
        .route("/v1/connections", get(connections::<V>))
        .route("/v1/explain", get(explain::<V>))
        .route("/v1/drain", post(async |view, query| drain::<V>(view, query, true).await))
        .route("/v1/undrain", post(async |view, query| drain::<V>(view, query, false).await))
        .route("/v1/forget", post(forget::<V>))
        .fallback(async || {
            ViewError::NotFound(
                "no such path: there are /v1/services, /v1/services/NAME, /v1/backends, \
                 /v1/connections, /v1/status, /v1/audit, /v1/events, /v1/explain and /v1/version, and to POST to \
                 /v1/drain, /v1/undrain and /v1/forget"
                    .into(),
            )
        })
        .method_not_allowed_fallback(async || {
            let error = "GET is understood, and POST by /v1/drain, /v1/undrain and /v1/forget";
            problem(StatusCode::METHOD_NOT_ALLOWED, error.into())
        })
        .with_state(view)
        .merge(events)
}

fn version() -> types::Version {
    types::Version {
        version: env!("CARGO_PKG_VERSION").into(),
        abi: ABI_VERSION,
        pid: std::process::id(),
    }
}

// === handlers ===

type Answer<T> = Result<Json<T>, ViewError>;

/// The parameters of a question, in the order of `known`.
fn parameters<const N: usize>(
    query: Option<&str>,
    known: [&str; N],
) -> Result<[Option<String>; N], ViewError> {
    let mut values = [const { None }; N];
    for (key, value) in form_urlencoded::parse(query.unwrap_or_default().as_bytes()) {
        let Some(place) = known.iter().position(|name| *name == key) else {
            return Err(ViewError::BadRequest(format!(
                "unknown parameter {key:?}: expected {}",
                known.join(", ")
            )));
        };
        if values[place].replace(value.into_owned()).is_some() {
            return Err(ViewError::BadRequest(format!("the parameter {key} is here twice")));
        }
    }
    Ok(values)
}

async fn status<V: View>(State(view): State<V>) -> Answer<types::Status> {
    view.status().await.map(Json)
}

async fn audit<V: View>(State(view): State<V>) -> Answer<types::Audit> {
    view.audit().await.map(Json)
}

async fn services<V: View>(
    State(view): State<V>,
    RawQuery(query): RawQuery,
) -> Answer<Vec<types::Service>> {
    let [name] = parameters(query.as_deref(), ["name"])?;
    match name {
        None => view.services().await.map(Json),
        Some(name) => Ok(Json(vec![find(&view, &name).await?])),
    }
}

async fn service<V: View>(
    State(view): State<V>,
    name: Result<Path<String>, PathRejection>,
) -> Answer<types::Service> {
    let Path(name) = name.map_err(|_| {
        ViewError::BadRequest("the name of the service is not UTF-8, percent-encoded".into())
    })?;
    find(&view, &name).await.map(Json)
}

async fn find<V: View>(view: &V, name: &str) -> Result<types::Service, ViewError> {
    let services = view.services().await?;
    services
        .into_iter()
        .find(|service| service.name == name)
        .ok_or_else(|| ViewError::no_service(name))
}

async fn backends<V: View>(
    State(view): State<V>,
    RawQuery(query): RawQuery,
) -> Answer<Vec<types::Backend>> {
    let [service] = parameters(query.as_deref(), ["service"])?;
    view.backends(service).await.map(Json)
}

async fn connections<V: View>(
    State(view): State<V>,
    RawQuery(query): RawQuery,
) -> Answer<Vec<types::Connection>> {
    let [service] = parameters(query.as_deref(), ["service"])?;
    view.connections(service).await.map(Json)
}

async fn explain<V: View>(
    State(view): State<V>,
    RawQuery(query): RawQuery,
) -> Answer<types::Explanation> {
    const EXPECTED: &str = "expected IP:PORT, like 10.96.0.10:80 or [fd00:96::10]:80";
    let [address, protocol, from] = parameters(query.as_deref(), ["address", "protocol", "from"])?;
    let address = address.ok_or_else(|| {
        ViewError::BadRequest(format!("the parameter address is missing: {EXPECTED}"))
    })?;
    let address = address
        .parse()
        .map_err(|_| ViewError::BadRequest(format!("address {address:?}: {EXPECTED}")))?;
    let protocol = match protocol.as_deref() {
        None | Some("tcp") => Protocol::Tcp,
        Some("udp") => Protocol::Udp,
        Some(other) => {
            return Err(ViewError::BadRequest(format!("protocol {other:?}: expected tcp or udp")));
        }
    };
    view.explain(ExplainQuery { address, protocol, from }).await.map(Json)
}

async fn drain<V: View>(
    State(view): State<V>,
    RawQuery(query): RawQuery,
    drain: bool,
) -> Answer<Vec<types::Backend>> {
    let [service, address] = parameters(query.as_deref(), ["service", "address"])?;
    let missing = |name| ViewError::BadRequest(format!("the parameter {name} is missing"));
    let service = service.ok_or_else(|| missing("service"))?;
    let address = address.ok_or_else(|| missing("address"))?;
    let (address, port) = endpoint(&address)
        .map_err(|expected| ViewError::BadRequest(format!("address {address:?}: {expected}")))?;
    view.drain(DrainQuery { service, address, port, drain }).await.map(Json)
}

async fn forget<V: View>(State(view): State<V>, RawQuery(query): RawQuery) -> Answer<Vec<String>> {
    let [service, all] = parameters(query.as_deref(), ["service", "all"])?;
    let service = match (service, all.as_deref()) {
        (Some(service), None) => Some(service),
        (None, Some("true")) => None,
        _ => {
            let expected = "either service=NAME or all=true";
            return Err(ViewError::BadRequest(format!("expected {expected}")));
        }
    };
    view.forget(service).await.map(Json)
}

/// Reads an endpoint's address with or without a port; says what was expected.
///
/// # Errors
///
/// It is neither.
pub fn endpoint(text: &str) -> Result<(IpAddr, Option<u16>), &'static str> {
    if let Ok(address) = text.trim_matches(['[', ']']).parse::<IpAddr>() {
        return Ok((address.to_canonical(), None));
    }
    match text.parse::<SocketAddr>() {
        Ok(address) if address.port() != 0 => {
            Ok((address.ip().to_canonical(), Some(address.port())))
        }
        _ => Err("expected IP or IP:PORT, like 10.0.0.1, 10.0.0.1:8080 or [fd00::1]:8080"),
    }
}

async fn events<V: View>(
    State(happenings): State<Happenings<V>>,
    RawQuery(query): RawQuery,
) -> Result<Response, ViewError> {
    let Happenings { view, journal, cancel } = happenings;
    let [service, follow] = parameters(query.as_deref(), ["service", "follow"])?;
    let follow = match follow.as_deref() {
        None | Some("false") => false,
        Some("true") => true,
        Some(other) => {
            return Err(ViewError::BadRequest(format!("follow {other:?}: expected true or false")));
        }
    };
    let kept = journal.events(service.as_deref());
    // What is kept of a service that is gone is still worth reading.
    if let Some(name) = &service
        && !kept.iter().any(|event| event.service.as_ref() == Some(name))
    {
        find(&view, name).await?;
    }
    if !follow {
        return Ok(
            Json(kept.iter().map(AsRef::as_ref).collect::<Vec<&types::Event>>()).into_response()
        );
    }
    let follower = journal.follow(service).ok_or_else(|| {
        ViewError::Unavailable(format!(
            "{FOLLOWERS} clients follow the events already, and no more may: end one of them, or \
             ask without following"
        ))
    })?;
    Ok(([(header::CONTENT_TYPE, "application/x-ndjson")], lines(follower, cancel)).into_response())
}

/// Events as lines of JSON: what is kept at once, then each as it comes, until `cancel`.
fn lines(follower: Follower, cancel: CancellationToken) -> Body {
    Body::from_stream(stream::unfold((follower, cancel), async |(mut follower, cancel)| {
        let mut text = Vec::new();
        for event in follower.past() {
            line(&mut text, &event);
        }
        if text.is_empty() {
            let event = cancel.run_until_cancelled(follower.next()).await??;
            line(&mut text, &event);
        }
        Some((Ok::<_, io::Error>(Bytes::from(text)), (follower, cancel)))
    }))
}

fn line(text: &mut Vec<u8>, event: &types::Event) {
    match serde_json::to_vec(event) {
        Ok(json) => text.extend(json),
        // It cannot: the type has nothing that JSON does not.
        Err(error) => tracing::error!(%error, "an event as JSON"),
    }
    text.push(b'\n');
}

// === errors ===

impl From<crate::explain::UnknownClient> for ViewError {
    fn from(error: crate::explain::UnknownClient) -> Self {
        Self::BadRequest(error.to_string())
    }
}

impl ViewError {
    /// There is no service of this name.
    #[must_use]
    pub fn no_service(name: &str) -> Self {
        Self::NotFound(format!("there is no service {name:?}: `mesh-agent services` lists them"))
    }
}

impl IntoResponse for ViewError {
    fn into_response(self) -> Response {
        let status = match &self {
            Self::NotFound(_) => StatusCode::NOT_FOUND,
            Self::BadRequest(_) => StatusCode::BAD_REQUEST,
            Self::Unavailable(_) => StatusCode::SERVICE_UNAVAILABLE,
            Self::Failed(_) => StatusCode::INTERNAL_SERVER_ERROR,
        };
        problem(status, self.to_string())
    }
}

fn problem(status: StatusCode, error: String) -> Response {
    (status, Json(types::ErrorBody { error })).into_response()
}
