//! The gRPC health checking protocol: `grpc.health.v1.Health/Check`
//! (<https://github.com/grpc/grpc/blob/master/doc/health-checking.md>).

use std::net::SocketAddr;

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use http::header::{CONTENT_TYPE, TE, USER_AGENT};
use http::uri::PathAndQuery;
use http::{HeaderMap, Request, StatusCode};
use prost::Message;
use tokio::io::{AsyncRead, AsyncWrite};

use super::http::{AGENT, host};
use super::{Failure, http2};
use crate::model::GrpcCheck;

/// What is called.
const METHOD: &str = "/grpc.health.v1.Health/Check";

/// A message is preceded by whether it is compressed, one byte, and its length, four, big endian.
const PREFIX: usize = 5;

/// `grpc.health.v1.HealthCheckRequest`.
#[derive(Clone, PartialEq, Message)]
struct Question {
    #[prost(string, tag = "1")]
    service: String,
}

/// `grpc.health.v1.HealthCheckResponse`.
#[derive(Clone, PartialEq, Message)]
struct Reply {
    #[prost(enumeration = "ServingStatus", tag = "1")]
    status: i32,
}

/// `grpc.health.v1.HealthCheckResponse.ServingStatus`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, prost::Enumeration)]
#[repr(i32)]
enum ServingStatus {
    Unknown = 0,
    Serving = 1,
    NotServing = 2,
    ServiceUnknown = 3,
}

/// Asks, and judges the answer.
pub(super) async fn ask<S>(check: &GrpcCheck, stream: S, address: SocketAddr) -> Result<(), Failure>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let (path, host) = (PathAndQuery::from_static(METHOD), host(check.host.as_ref(), address));
    let builder = Request::post(http2::uri(check.tls.is_some(), host, &path)?)
        .header(CONTENT_TYPE, "application/grpc")
        .header(TE, "trailers")
        .header(USER_AGENT, AGENT);
    let request = http2::request(builder)?;
    let question = framed(&Question { service: check.service.clone() });
    let http2::Answer { head, body, trailers } =
        http2::exchange(stream, request, Some(question)).await?;
    if head.status != StatusCode::OK {
        return Err(Failure::Endpoint(format!("it does not speak gRPC: {}", head.status)));
    }
    // An answer of an error may have nothing but a head.
    let trailers = trailers.unwrap_or(head.headers);
    judge(&trailers, body)
}

fn judge(trailers: &HeaderMap, body: Bytes) -> Result<(), Failure> {
    let field = |name| trailers.get(name).map(|value| String::from_utf8_lossy(value.as_bytes()));
    match field("grpc-status").as_deref() {
        Some("0") => {}
        Some(code) => {
            let message = field("grpc-message").unwrap_or_default();
            return Err(Failure::said(&match (code, &*message) {
                ("12", _) => "it has no gRPC health service (status 12, unimplemented)".to_owned(),
                ("5", _) => "its gRPC health service does not know that name (status 5)".to_owned(),
                (code, "") => format!("gRPC status {code}"),
                (code, message) => format!("gRPC status {code}: {message}"),
            }));
        }
        None => return Err(Failure::Endpoint("it does not speak gRPC: no grpc-status".to_owned())),
    }
    let reply = unframed(body).and_then(|body| Reply::decode(body).ok());
    let Some(reply) = reply else {
        return Err(Failure::Endpoint("its gRPC health service sends garbage".to_owned()));
    };
    match reply.status() {
        ServingStatus::Serving => Ok(()),
        other => Err(Failure::Endpoint(format!("its gRPC health service says {}", other.name()))),
    }
}

fn framed(message: &impl Message) -> Bytes {
    let length = message.encoded_len();
    let mut bytes = BytesMut::with_capacity(PREFIX + length);
    bytes.put_u8(0);
    bytes.put_u32(u32::try_from(length).unwrap_or(u32::MAX));
    bytes.extend(message.encode_to_vec());
    bytes.freeze()
}

/// The one message that there is, not compressed: nothing was said that would allow it.
fn unframed(mut bytes: Bytes) -> Option<Bytes> {
    if bytes.len() < PREFIX || bytes.get_u8() != 0 {
        return None;
    }
    let length = usize::try_from(bytes.get_u32()).ok()?;
    (bytes.len() == length).then_some(bytes)
}

impl ServingStatus {
    const fn name(self) -> &'static str {
        match self {
            Self::Unknown => "UNKNOWN",
            Self::Serving => "SERVING",
            Self::NotServing => "NOT_SERVING",
            Self::ServiceUnknown => "SERVICE_UNKNOWN",
        }
    }
}
