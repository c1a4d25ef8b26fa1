//! A GET request, over HTTP/1.1 or HTTP/2.

use std::net::SocketAddr;
use std::pin::pin;

use bytes::Bytes;
use futures_util::future::{self, Either};
use http::header::{CONNECTION, HOST, USER_AGENT};
use http::uri::Authority;
use http::{HeaderValue, Request, StatusCode, Uri};
use http_body_util::{BodyExt as _, Empty};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};

use super::{Failure, http2};
use crate::model::HttpCheck;

/// How requests of checks name their sender.
pub(super) const AGENT: HeaderValue =
    HeaderValue::from_static(concat!("mesh-agent/", env!("CARGO_PKG_VERSION")));

/// How much of the head of an answer is read, in bytes.
pub(super) const HEAD: usize = 16 * 1024;

/// How much of its body is: all of what servers answer to checks, since they complain when they are cut
/// off.
pub(super) const BODY: usize = 16 * 1024;

/// Asks, and judges the answer by its status.
pub(super) async fn ask<S>(check: &HttpCheck, stream: S, address: SocketAddr) -> Result<(), Failure>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let status = match check.http2 {
        true => over_http2(check, stream, address).await?,
        false => over_http1(check, stream, address).await?,
    };
    if check.expect.iter().any(|range| range.contains(&status.as_u16())) {
        return Ok(());
    }
    Err(Failure::Endpoint(format!("GET {} was answered with {status}", check.path)))
}

/// The host that is asked for: where it goes, if none is named.
pub(super) fn host(named: Option<&Authority>, address: SocketAddr) -> String {
    named.map_or_else(|| address.to_string(), ToString::to_string)
}

async fn over_http1<S>(
    check: &HttpCheck,
    stream: S,
    address: SocketAddr,
) -> Result<StatusCode, Failure>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let failed = |error: hyper::Error| Failure::of("HTTP", &error);
    let host = host(check.host.as_ref(), address);
    let mut request = Request::get(Uri::from(check.path.clone()))
        .header(HOST, host)
        .header(CONNECTION, HeaderValue::from_static("close"))
        .body(Empty::<Bytes>::new())
        .map_err(|error| Failure::Local(error.to_string()))?;
    say(check, request.headers_mut());
    let handshake = http1::Builder::new().max_buf_size(HEAD).handshake(TokioIo::new(stream));
    let (mut sender, connection) = handshake.await.map_err(failed)?;
    let asked = async {
        let response = sender.send_request(request).await?;
        let status = response.status();
        read_some(response.into_body()).await?;
        Ok(status)
    };
    // Nothing comes unless the connection is polled beside what waits for it.
    match future::select(pin!(asked), pin!(connection)).await {
        Either::Left((answer, _)) => answer.map_err(failed),
        Either::Right((Ok(()), asked)) => asked.await.map_err(failed),
        Either::Right((Err(error), _)) => Err(failed(error)),
    }
}

async fn over_http2<S>(
    check: &HttpCheck,
    stream: S,
    address: SocketAddr,
) -> Result<StatusCode, Failure>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let host = host(check.host.as_ref(), address);
    let mut request =
        http2::request(Request::get(http2::uri(check.tls.is_some(), host, &check.path)?))?;
    say(check, request.headers_mut());
    Ok(http2::exchange(stream, request, None).await?.head.status)
}

/// Adds what is sent besides.
fn say(check: &HttpCheck, headers: &mut http::HeaderMap) {
    headers.insert(USER_AGENT, AGENT);
    headers.extend(check.headers.clone());
}

/// Reads a body to its end, but no more than so much.
async fn read_some(mut body: Incoming) -> Result<(), hyper::Error> {
    let mut read = 0;
    while read < BODY
        && let Some(frame) = body.frame().await
    {
        read += frame?.data_ref().map_or(0, Bytes::len);
    }
    Ok(())
}
