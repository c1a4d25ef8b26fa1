//! One request over HTTP/2, on a connection of its own.

use std::pin::pin;

use bytes::{Bytes, BytesMut};
use futures_util::future::{self, Either};
use http::request::Builder;
use http::response::Parts;
use http::uri::{PathAndQuery, Scheme};
use http::{HeaderMap, Request, Uri};
use tokio::io::{AsyncRead, AsyncWrite};

use super::Failure;
use super::http::{BODY, HEAD};

/// What was answered.
pub(super) struct Answer {
    pub(super) head: Parts,
    /// All of it, or as much as is read.
    pub(super) body: Bytes,
    pub(super) trailers: Option<HeaderMap>,
}

/// What is asked for.
pub(super) fn uri(is_secure: bool, host: String, path: &PathAndQuery) -> Result<Uri, Failure> {
    let uri = Uri::builder()
        .scheme(if is_secure { Scheme::HTTPS } else { Scheme::HTTP })
        .authority(host)
        .path_and_query(path.clone());
    uri.build().map_err(|error| Failure::Local(error.to_string()))
}

/// A request without a body of its own.
pub(super) fn request(builder: Builder) -> Result<Request<()>, Failure> {
    builder.body(()).map_err(|error| Failure::Local(error.to_string()))
}

/// Sends a request, and reads what is answered.
pub(super) async fn exchange<S>(
    stream: S,
    request: Request<()>,
    body: Option<Bytes>,
) -> Result<Answer, Failure>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let failed = |error: h2::Error| Failure::of("HTTP/2", &error);
    let window = u32::try_from(BODY).unwrap_or(u32::MAX);
    let handshake = h2::client::Builder::new()
        .enable_push(false)
        .max_header_list_size(u32::try_from(HEAD).unwrap_or(u32::MAX))
        .initial_window_size(window)
        .handshake::<_, Bytes>(stream);
    let (sender, connection) = handshake.await.map_err(failed)?;
    let asked = async {
        let mut sender = sender.ready().await?;
        let (response, mut rest) = sender.send_request(request, body.is_none())?;
        if let Some(body) = body {
            rest.send_data(body, true)?;
        }
        let (head, mut coming) = response.await?.into_parts();
        let mut body = BytesMut::new();
        while let Some(data) = coming.data().await {
            body.extend_from_slice(&data?);
            if body.len() >= BODY {
                return Ok(Answer { head, body: body.freeze(), trailers: None });
            }
        }
        let trailers = coming.trailers().await?;
        Ok(Answer { head, body: body.freeze(), trailers })
    };
    // Nothing comes unless the connection is polled beside what waits for it.
    match future::select(pin!(asked), pin!(connection)).await {
        Either::Left((answer, _)) => answer.map_err(failed),
        Either::Right((Ok(()), asked)) => asked.await.map_err(failed),
        Either::Right((Err(error), _)) => Err(failed(error)),
    }
}
