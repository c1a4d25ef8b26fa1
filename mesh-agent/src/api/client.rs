//! The asking end, used by the command line.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;
use std::{fs, io};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Empty};
use hyper::body::Incoming;
use hyper::client::conn::http1::{self, Connection, SendRequest};
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

use super::server::{DrainQuery, ExplainQuery};
use super::{socket, types};

/// How long one question may take. The agent answers from memory.
const TIMEOUT: Duration = Duration::from_secs(5);

/// No event is longer than this, in bytes: names and reasons have limits of their own.
const LONGEST: usize = 1 << 20;

/// Asks the agent behind a socket. Each question has a connection of its own.
#[derive(Clone, Debug)]
pub struct Client {
    socket: PathBuf,
}

/// Why there is no answer. Each is one line for people that says what to do next.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens.
    #[error(
        "no agent answers on {}: {reason}; start it with `mesh-agent run --cgroup DIR` or \
         `systemctl start mesh-agent`, or name its socket with --socket",
        socket.display()
    )]
    NotRunning {
        /// Path of the socket.
        socket: PathBuf,
        /// What was found there.
        reason: String,
    },
    /// No agent can listen there.
    #[error("{reason}; name the agent's socket with --socket")]
    NoSocket {
        /// What is there instead, with its path.
        reason: String,
    },
    /// The socket is there, but not for this user.
    #[error(
        "{}: permission denied: an agent may be running; run this as root, or as a member of the \
         socket's group",
        socket.display()
    )]
    Permission {
        /// Path of the socket.
        socket: PathBuf,
    },
    /// The agent listens, but does not answer.
    #[error(
        "the agent on {} did not answer within {} s: see its log, or restart it",
        socket.display(),
        TIMEOUT.as_secs()
    )]
    Timeout {
        /// Path of the socket.
        socket: PathBuf,
    },
    /// What answers speaks another language.
    #[error(
        "{}: not the answer of an agent of this version: {reason}; compare with `mesh-agent version`",
        socket.display()
    )]
    Protocol {
        /// Path of the socket.
        socket: PathBuf,
        /// What is wrong with the answer.
        reason: String,
    },
    /// The agent, whose events were followed, has ended.
    #[error(
        "the agent on {} has stopped: no more events come; see its log, or start it again",
        socket.display()
    )]
    Gone {
        /// Path of the socket.
        socket: PathBuf,
    },
    /// The agent answered that it cannot.
    #[error("{message}")]
    Refused {
        /// HTTP status.
        status: u16,
        /// What it said.
        message: String,
    },
}

// === impl Client ===

impl Client {
    /// A client of the agent at this socket path. Nothing is asked yet.
    #[must_use]
    pub fn new(socket: &Path) -> Self {
        Self { socket: socket.to_path_buf() }
    }

    /// One service, or all.
    ///
    /// # Errors
    ///
    /// See [`ClientError`]; so for each question.
    pub async fn services(&self, name: Option<&str>) -> Result<Vec<types::Service>, ClientError> {
        self.get("/v1/services", &[("name", name)]).await
    }

    /// The backends of one service, or of all.
    ///
    /// # Errors
    ///
    /// See [`ClientError`].
    pub async fn backends(
        &self,
        service: Option<&str>,
    ) -> Result<Vec<types::Backend>, ClientError> {
        self.get("/v1/backends", &[("service", service)]).await
    }

    /// The open connections of one service, or of all.
    ///
    /// # Errors
    ///
    /// See [`ClientError`].
    pub async fn connections(
        &self,
        service: Option<&str>,
    ) -> Result<Vec<types::Connection>, ClientError> {
        self.get("/v1/connections", &[("service", service)]).await
    }

    /// The state of the agent.
    ///
    /// # Errors
    ///
    /// See [`ClientError`].
    pub async fn status(&self) -> Result<types::Status, ClientError> {
        self.get("/v1/status", &[]).await
    }

    /// Compares the records of sockets with the sockets that exist, now.
    ///
    /// # Errors
    ///
    /// See [`ClientError`].
    pub async fn audit(&self) -> Result<types::Audit, ClientError> {
        self.get("/v1/audit", &[]).await
    }

    /// The version of the agent.
    ///
    /// # Errors
    ///
    /// See [`ClientError`].
    pub async fn version(&self) -> Result<types::Version, ClientError> {
        self.get("/v1/version", &[]).await
    }

    /// What a connect would do.
    ///
    /// # Errors
    ///
    /// See [`ClientError`].
    pub async fn explain(&self, query: &ExplainQuery) -> Result<types::Explanation, ClientError> {
        let address = query.address.to_string();
        let query = [
            ("address", Some(address.as_str())),
            ("protocol", Some(query.protocol.name())),
            ("from", query.from.as_deref()),
        ];
        self.get("/v1/explain", &query).await
    }

    /// Drains endpoints, or ends that; gives them as they are then.
    ///
    /// # Errors
    ///
    /// See [`ClientError`].
    pub async fn drain(&self, query: &DrainQuery) -> Result<Vec<types::Backend>, ClientError> {
        let address = match query.port {
            Some(port) => SocketAddr::new(query.address, port).to_string(),
            None => query.address.to_string(),
        };
        let path = if query.drain { "/v1/drain" } else { "/v1/undrain" };
        let parameters = [("service", Some(&*query.service)), ("address", Some(&*address))];
        self.answer(Method::POST, path, &parameters).await
    }

    /// Removes services that are held as a former agent left them: this one, or all that no source defines.
    /// Gives their names.
    ///
    /// # Errors
    ///
    /// See [`ClientError`].
    pub async fn forget(&self, service: Option<&str>) -> Result<Vec<String>, ClientError> {
        let all = if service.is_none() { Some("true") } else { None };
        self.answer(Method::POST, "/v1/forget", &[("service", service), ("all", all)]).await
    }

    /// The events that are kept, of one service or all, the oldest first.
    ///
    /// # Errors
    ///
    /// See [`ClientError`].
    pub async fn events(&self, service: Option<&str>) -> Result<Vec<types::Event>, ClientError> {
        self.get("/v1/events", &[("service", service)]).await
    }

    /// Hands the events that are kept, of one service or all, to `take`, and then each as it comes,
    /// until `take` fails.
    ///
    /// # Errors
    ///
    /// That of `take`; otherwise see [`ClientError`]: [`ClientError::Gone`] when the agent ends.
    pub async fn follow<E: From<ClientError>>(
        &self,
        service: Option<&str>,
        take: impl FnMut(types::Event) -> Result<(), E>,
    ) -> Result<Infallible, E> {
        let query = [("service", service), ("follow", Some("true"))];
        let (mut sender, connection, request) =
            self.in_time(self.dial(Method::GET, "/v1/events", &query)).await??;
        let answer = async {
            let response = self.in_time(sender.send_request(request)).await?;
            let response = response.map_err(|error| self.protocol(&error))?;
            let (status, body) = (response.status(), response.into_body());
            if status.is_success() {
                return self.each_line(body, take).await;
            }
            let body = self.in_time(body.collect()).await?;
            let body = body.map_err(|error| self.protocol(&error))?.to_bytes();
            Err(self.refused(status, &body).into())
        };
        drive(connection, answer).await
    }

    async fn each_line<E: From<ClientError>>(
        &self,
        mut body: Incoming,
        mut take: impl FnMut(types::Event) -> Result<(), E>,
    ) -> Result<Infallible, E> {
        let mut text = Vec::new();
        // An agent that is killed ends its answer with an error.
        while let Some(Ok(frame)) = body.frame().await {
            let Ok(data) = frame.into_data() else { continue };
            text.extend_from_slice(&data);
            let mut rest = text.as_slice();
            while let Some(end) = rest.iter().position(|&byte| byte == b'\n') {
                let event = serde_json::from_slice(&rest[..end]);
                rest = &rest[end + 1..];
                take(event.map_err(|error| self.protocol(&error))?)?;
            }
            if rest.len() > LONGEST {
                let error = io::Error::other("an event has no end");
                return Err(self.protocol(&error).into());
            }
            text = rest.to_vec();
        }
        Err(ClientError::Gone { socket: self.socket.clone() }.into())
    }

    async fn get<T: DeserializeOwned>(
        &self,
        path: &str,
        query: &[(&str, Option<&str>)],
    ) -> Result<T, ClientError> {
        self.answer(Method::GET, path, query).await
    }

    async fn answer<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        query: &[(&str, Option<&str>)],
    ) -> Result<T, ClientError> {
        let (status, body) = self.in_time(self.ask(method, path, query)).await??;
        if status.is_success() {
            return serde_json::from_slice(&body).map_err(|error| self.protocol(&error));
        }
        Err(self.refused(status, &body))
    }

    async fn ask(
        &self,
        method: Method,
        path: &str,
        query: &[(&str, Option<&str>)],
    ) -> Result<(StatusCode, Bytes), ClientError> {
        let (mut sender, connection, request) = self.dial(method, path, query).await?;
        let answer = async {
            let response = sender.send_request(request).await?;
            let status = response.status();
            Ok::<_, hyper::Error>((status, response.into_body().collect().await?.to_bytes()))
        };
        drive(connection, answer).await.map_err(|error| self.protocol(&error))
    }

    /// A connection to the agent, and what is to be sent there.
    async fn dial(
        &self,
        method: Method,
        path: &str,
        query: &[(&str, Option<&str>)],
    ) -> Result<Dialled, ClientError> {
        socket::check_length(&self.socket)
            .map_err(|error| ClientError::NoSocket { reason: error.to_string() })?;
        let stream =
            UnixStream::connect(&self.socket).await.map_err(|error| self.absent(&error))?;
        let (sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(|error| self.protocol(&error))?;
        let request = Request::builder()
            .method(method)
            .uri(uri(path, query))
            // HTTP/1.1 demands it; a unix socket has no name to put there.
            .header(hyper::header::HOST, "localhost")
            .body(Empty::<Bytes>::new())
            .map_err(|error| self.protocol(&error))?;
        Ok((sender, connection, request))
    }

    async fn in_time<F: Future>(&self, future: F) -> Result<F::Output, ClientError> {
        let result = tokio::time::timeout(TIMEOUT, future).await;
        result.map_err(|_| ClientError::Timeout { socket: self.socket.clone() })
    }

    /// What the agent says when it cannot.
    fn refused(&self, status: StatusCode, body: &[u8]) -> ClientError {
        match serde_json::from_slice::<types::ErrorBody>(body) {
            Ok(body) => ClientError::Refused { status: status.as_u16(), message: body.error },
            Err(error) => self.protocol(&error),
        }
    }

    fn absent(&self, error: &io::Error) -> ClientError {
        let socket = self.socket.clone();
        // The kernel says of other files, too, that they refuse the connection.
        if fs::metadata(&socket).is_ok_and(|found| !found.file_type().is_socket()) {
            return ClientError::NoSocket {
                reason: format!("{} is not a socket", socket.display()),
            };
        }
        match error.kind() {
            io::ErrorKind::NotADirectory => ClientError::NoSocket {
                reason: format!("{}: a part of the path is not a directory", socket.display()),
            },
            io::ErrorKind::PermissionDenied => ClientError::Permission { socket },
            io::ErrorKind::NotFound => {
                ClientError::NotRunning { socket, reason: "there is no such socket".into() }
            }
            io::ErrorKind::ConnectionRefused => ClientError::NotRunning {
                socket,
                reason: "the socket is left from an agent that is gone".into(),
            },
            _ => ClientError::NotRunning { socket, reason: error.to_string() },
        }
    }

    fn protocol(&self, error: &dyn std::error::Error) -> ClientError {
        ClientError::Protocol { socket: self.socket.clone(), reason: error.to_string() }
    }
}

/// A connection, both ends of it in this process, and what is to be sent.
type Dialled = (
    SendRequest<Empty<Bytes>>,
    Connection<TokioIo<UnixStream>, Empty<Bytes>>,
    Request<Empty<Bytes>>,
);

/// Waits for an answer. The connection is driven here and not in a task, so that nothing outlives
/// the question.
async fn drive<T>(
    connection: Connection<TokioIo<UnixStream>, Empty<Bytes>>,
    answer: impl Future<Output = T>,
) -> T {
    let mut answer = std::pin::pin!(answer);
    tokio::select! {
        result = &mut answer => return result,
        // It can end in the same moment in which the answer is complete; when it fails, so does what
        // waits for the answer.
        _ = connection => {}
    }
    answer.await
}

/// Path and query; every byte of a value that could mean something is escaped (RFC 3986, 2.1).
fn uri(path: &str, query: &[(&str, Option<&str>)]) -> String {
    let mut uri = path.to_owned();
    let given = query.iter().filter_map(|(key, value)| Some((key, (*value)?)));
    for (index, (key, value)) in given.enumerate() {
        uri.push(if index == 0 { '?' } else { '&' });
        uri.push_str(key);
        uri.push('=');
        for byte in value.bytes() {
            if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
                uri.push(char::from(byte));
            } else {
                uri.push_str(&format!("%{byte:02X}"));
            }
        }
    }
    uri
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_escaped() {
        let text = uri("/v1/x", &[("a", None), ("b", Some("ä &=#?/")), ("c", Some("[::1]:80"))]);
        assert_eq!(text, "/v1/x?b=%C3%A4%20%26%3D%23%3F%2F&c=%5B%3A%3A1%5D%3A80");
        assert!(text.parse::<hyper::Uri>().is_ok());
    }
}
