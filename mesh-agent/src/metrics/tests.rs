//! Over real sockets, with an engine that answers, is not ready, or hangs.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;

use super::{READERS, Readings, Snapshot, Traffic, VISITORS, exposition, receive};
use crate::api::server::ViewError;
use crate::api::types::{
    Checks, Counters, Failures, Map, Memory, Program, Refused, Source, Status,
};

#[derive(Clone, Copy, PartialEq, Eq)]
enum Fixed {
    Ready,
    NotReady,
    Hanging,
    Stopping,
    /// Ready, with more to tell than a socket's buffers hold.
    Large,
}

impl Fixed {
    async fn give<T>(self, answer: T) -> Result<T, ViewError> {
        match self {
            Self::Hanging => std::future::pending().await,
            Self::Stopping => Err(ViewError::Unavailable("the agent is stopping".into())),
            Self::Ready | Self::NotReady | Self::Large => Ok(answer),
        }
    }
}

impl Readings for Fixed {
    async fn alive(&self) -> Result<(), ViewError> {
        self.give(()).await
    }

    async fn readiness(&self) -> Result<(bool, Vec<String>), ViewError> {
        self.give((*self == Self::Ready, vec!["one".into(), "two".into()])).await
    }

    async fn set_hindrance(&self, _: Option<String>) {}

    async fn snapshot(&self) -> Result<Snapshot, ViewError> {
        let mut snapshot = snapshot();
        if *self == Self::Large {
            let one = snapshot.backends[0].clone();
            snapshot.backends = vec![one; 20_000];
        }
        self.give(snapshot).await
    }
}

fn snapshot() -> Snapshot {
    let traffic = |service: &str, address: &str, opened, reset| Traffic {
        service: service.into(),
        port: 80,
        protocol: "tcp",
        address: address.parse().expect("an address"),
        opened,
        active: 1,
        failures: Failures { reset, ..Failures::default() },
    };
    Snapshot {
        in_place: vec![("pins", false), ("socket", true)],
        status: Status {
            version: "1.2.3".into(),
            node: "a \"b\"\\c".into(),
            zone: None,
            ready: true,
            reasons: Vec::new(),
            checks: Checks {
                passed: 12,
                failed: 3,
                unmade: 1,
                unjudged: 4,
                late: 2,
                longest_delay_us: 0,
            },
            pid: 1,
            cgroup: String::new(),
            programs: vec![Program {
                name: "mesh_connect4".into(),
                hook: "cgroup/connect4".into(),
                id: None,
                attached: false,
            }],
            sources: vec![Source {
                name: "files".into(),
                state: "ready".into(),
                services: 3,
                error: None,
            }],
            maps: vec![Map { name: "FLOWS".into(), used: 5, size: 6, max: 7 }],
            memory: Memory { anonymous: 10, maps: 20 },
            counters: Counters {
                balanced: 42,
                refused: vec![Refused { reason: "no endpoint".into(), count: 2 }],
                ..Counters::default()
            },
            audit: None,
            last_error: None,
        },
        backends: vec![
            traffic("orders", "10.0.0.1:8080", 40, 0),
            traffic("orders", "[fd00::1]:8080", 2, 1),
        ],
    }
}

/// Serves it on a port of its own.
async fn start(readings: Fixed) -> (SocketAddr, CancellationToken) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("bound");
    let cancel = CancellationToken::new();
    let token = cancel.clone();
    tokio::spawn(async move { receive(listener, readings, token).await });
    (address, cancel)
}

async fn ask(address: SocketAddr, request: &str) -> String {
    let mut stream = TcpStream::connect(address).await.expect("it listens");
    stream.write_all(request.as_bytes()).await.expect("sent");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.expect("an answer");
    answer
}

async fn get(address: SocketAddr, path: &str) -> String {
    ask(address, &format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n")).await
}

#[tokio::test]
async fn probes_say_what_is_the_matter() {
    let all = [
        (Fixed::Ready, "/healthz", "200 OK", "\r\n\r\nok\n"),
        (Fixed::Ready, "/readyz", "200 OK", "\r\n\r\nready\none\ntwo\n"),
        (Fixed::NotReady, "/healthz", "200 OK", "\r\n\r\nok\n"),
        (Fixed::NotReady, "/readyz", "503", "\r\n\r\nnot ready\none\ntwo\n"),
        (Fixed::NotReady, "/metrics", "200 OK", "# EOF\n"),
        (Fixed::Stopping, "/healthz", "503", "\r\n\r\nthe agent is stopping\n"),
        (Fixed::Stopping, "/metrics", "503", "\r\n\r\nthe agent is stopping\n"),
        (Fixed::Ready, "/", "404", "/metrics, /healthz and /readyz\n"),
    ];
    for (readings, path, status, end) in all {
        let (address, _cancel) = start(readings).await;
        let answer = get(address, path).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{path}: {answer}");
        assert!(answer.ends_with(end), "{path}: {answer}");
    }
}

#[tokio::test]
async fn nothing_is_changed_from_here() {
    let (address, _cancel) = start(Fixed::Ready).await;
    let answer =
        ask(address, "POST /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.1 405"), "{answer}");
}

#[tokio::test(start_paused = true)]
async fn an_engine_that_hangs_is_not_alive() {
    let (address, _cancel) = start(Fixed::Hanging).await;
    for path in ["/healthz", "/readyz", "/metrics"] {
        let answer = get(address, path).await;
        assert!(answer.starts_with("HTTP/1.1 503"), "{answer}");
        assert!(answer.contains("has not answered for 2 seconds"), "{answer}");
    }
}

/// Those who say nothing are sent away, and so do not keep others out for good.
#[tokio::test(start_paused = true)]
async fn silent_visitors_go() {
    let (address, _cancel) = start(Fixed::Ready).await;
    let mut silent = Vec::new();
    for _ in 0..2 * VISITORS {
        silent.push(TcpStream::connect(address).await.expect("it listens"));
    }
    assert!(get(address, "/healthz").await.ends_with("ok\n"));
    for mut stream in silent {
        let mut answer = Vec::new();
        // Ended, in one way or another.
        let _ = stream.read_to_end(&mut answer).await;
    }
}

#[tokio::test]
async fn it_ends_when_it_is_told_to() {
    let (address, cancel) = start(Fixed::Hanging).await;
    let mut waiting = TcpStream::connect(address).await.expect("it listens");
    waiting.write_all(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n").await.expect("sent");
    cancel.cancel();
    let mut rest = Vec::new();
    let end = waiting.read_to_end(&mut rest);
    let end = tokio::time::timeout(Duration::from_secs(1), end);
    assert!(end.await.is_ok(), "the visitor is still there");
}

/// Who does not read what was asked for keeps neither memory without bound nor the probes.
#[tokio::test]
async fn few_have_all_of_it_at_a_time() {
    let (address, _cancel) = start(Fixed::Large).await;
    let mut slow = Vec::new();
    for _ in 0..READERS {
        let mut stream = TcpStream::connect(address).await.expect("it listens");
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").await.expect("sent");
        // Its first byte is there: it has its place.
        stream.readable().await.expect("an answer");
        slow.push(stream);
    }
    let answer = get(address, "/metrics").await;
    assert!(answer.starts_with("HTTP/1.1 503"), "{}", &answer[..200]);
    assert!(get(address, "/healthz").await.ends_with("ok\n"));
    // Who goes makes room.
    drop(slow);
    let again = async {
        while !get(address, "/metrics").await.ends_with("# EOF\n") {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), again).await.expect("room");
}

#[test]
fn names_labels_and_kinds() {
    let text = exposition::text(snapshot()).expect("text");
    for line in [
        r#"mesh_agent_info{version="1.2.3",node="a \"b\"\\c"} 1"#,
        "# TYPE mesh_ready gauge",
        "mesh_ready 1",
        r#"mesh_in_place{of="pins"} 0"#,
        r#"mesh_in_place{of="socket"} 1"#,
        r#"mesh_program_attached{program="mesh_connect4",hook="cgroup/connect4"} 0"#,
        r#"mesh_source_ready{source="files"} 1"#,
        r#"mesh_source_services{source="files"} 3"#,
        r#"mesh_map_entries{map="FLOWS"} 5"#,
        r#"mesh_map_entries_limit{map="FLOWS"} 7"#,
        r#"mesh_memory_bytes{of="agent"} 10"#,
        "# TYPE mesh_connects counter",
        "mesh_connects_total 42",
        r#"mesh_connects_refused_total{reason="no endpoint"} 2"#,
        r#"mesh_checks_total{result="failed"} 3"#,
        r#"mesh_checks_total{result="unmade"} 1"#,
        r#"mesh_checks_total{result="unjudged"} 4"#,
        "mesh_checks_late_total 2",
        r#"mesh_backend_connects_total{service="orders",port="80",protocol="tcp",backend="10.0.0.1:8080"} 40"#,
        r#"mesh_backend_connections{service="orders",port="80",protocol="tcp",backend="[fd00::1]:8080"} 1"#,
        r#"mesh_backend_failures_total{service="orders",port="80",protocol="tcp",backend="[fd00::1]:8080",reason="reset"} 1"#,
        "# EOF",
    ] {
        assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
    }
    // A counter is seen before it counts.
    assert_eq!(text.matches("mesh_backend_failures_total{").count(), 8, "{text}");
}
