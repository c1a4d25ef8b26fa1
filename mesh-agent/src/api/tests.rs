//! Both ends over a real socket, and the life of the socket.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::time::Duration;

use mesh_common::Protocol;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::client::{Client, ClientError};
use super::server::{ExplainQuery, View, ViewError, serve};
use super::socket::{Claim, SocketError};
use super::types::{self, BackendCounts, Event};
use crate::engine::journal::{FOLLOWERS, Journal, missed};

/// One service, and explanations that repeat the question.
#[derive(Clone)]
struct Fixed;

const NAME: &str = "orders & co/1";

impl View for Fixed {
    async fn services(&self) -> Result<Vec<types::Service>, ViewError> {
        Ok(vec![types::Service {
            name: NAME.into(),
            source: "files".into(),
            balance: "random".into(),
            frontends: Vec::new(),
            backends: BackendCounts { total: 2, healthy: 1 },
            active: 0,
            opened: 0,
            failed: 0,
            failures: types::Failures::default(),
            refused: Vec::new(),
            problems: Vec::new(),
        }])
    }

    async fn backends(&self, service: Option<String>) -> Result<Vec<types::Backend>, ViewError> {
        match service {
            None => Ok(Vec::new()),
            Some(name) => Err(ViewError::no_service(&name)),
        }
    }

    async fn status(&self) -> Result<types::Status, ViewError> {
        Err(ViewError::Unavailable("stopping".into()))
    }

    async fn explain(&self, query: ExplainQuery) -> Result<types::Explanation, ViewError> {
        Ok(types::Explanation {
            client: query.from,
            frontend: format!("{}/{}", query.address, query.protocol.name()),
            service: None,
            algorithm: None,
            steps: Vec::new(),
            candidates: Vec::new(),
            answer: None,
        })
    }
}

struct Running {
    socket: PathBuf,
    journal: Journal,
    cancel: CancellationToken,
    task: JoinHandle<std::io::Result<()>>,
    _directory: TempDir,
}

async fn start() -> Running {
    let directory = tempfile::tempdir().expect("temporary directory");
    let socket = directory.path().join("run/agent.sock");
    let listener = Claim::take(&socket).await.and_then(Claim::listen).expect("free socket");
    let cancel = CancellationToken::new();
    let journal = Journal::default();
    let task = tokio::spawn(serve(listener, Fixed, journal.clone(), cancel.clone()));
    Running { socket, journal, cancel, task, _directory: directory }
}

#[tokio::test]
async fn answers_arrive_and_errors_keep_their_status() {
    let server = start().await;
    let client = Client::new(&server.socket);
    let services = client.services(Some(NAME)).await.expect("services");
    assert_eq!(services, Fixed.services().await.expect("services"));
    assert_eq!(client.version().await.expect("version").pid, std::process::id());

    let query = ExplainQuery {
        address: "[fd00:96::10]:80".parse().expect("address"),
        protocol: Protocol::Udp,
        from: Some("/sys/fs/cgroup/a b".into()),
    };
    let explanation = client.explain(&query).await.expect("explanation");
    assert_eq!(explanation.frontend, "[fd00:96::10]:80/udp");
    assert_eq!(explanation.client, query.from);

    let status = |error| match error {
        ClientError::Refused { status, message } => (status, message),
        other => panic!("{other}"),
    };
    let (code, message) = status(client.services(Some("x")).await.expect_err("unknown"));
    assert_eq!(code, 404);
    assert!(message.contains("\"x\""), "{message}");
    assert_eq!(status(client.backends(Some("x")).await.expect_err("unknown")).0, 404);
    assert_eq!(status(client.status().await.expect_err("stopping")).0, 503);
}

fn happened(service: &str) -> Event {
    Event { service: Some(service.into()), missed: None, ..missed(0, "") }
}

/// How the followers of [`follow`] end.
#[derive(Debug)]
enum Ended {
    Enough,
    Error(ClientError),
}

impl From<ClientError> for Ended {
    fn from(error: ClientError) -> Self {
        Self::Error(error)
    }
}

/// Follows until the event with this number.
async fn follow(client: &Client, service: Option<&str>, until: u64) -> (Vec<u64>, Ended) {
    let mut seen = Vec::new();
    let take = |event: Event| {
        seen.push(event.seq);
        if event.seq == until { Err(Ended::Enough) } else { Ok(()) }
    };
    let following = client.follow(service, take);
    let ended = tokio::time::timeout(Duration::from_secs(20), following).await;
    let ended = match ended.expect("in time") {
        Ok(never) => match never {},
        Err(ended) => ended,
    };
    (seen, ended)
}

#[tokio::test]
async fn events_are_read_and_followed() {
    let server = start().await;
    let client = Client::new(&server.socket);
    assert_eq!(client.events(None).await.expect("events"), []);
    for service in [NAME, "gone", NAME] {
        server.journal.push(happened(service));
    }
    let numbers =
        |events: Vec<Event>| events.into_iter().map(|event| event.seq).collect::<Vec<_>>();
    assert_eq!(numbers(client.events(None).await.expect("events")), [1, 2, 3]);
    assert_eq!(numbers(client.events(Some(NAME)).await.expect("events")), [1, 3]);
    // A service that is gone is known by what happened to it.
    assert_eq!(numbers(client.events(Some("gone")).await.expect("events")), [2]);

    let writer = async {
        for _ in 0..3 {
            tokio::time::sleep(Duration::from_millis(50)).await;
            server.journal.push(happened("gone"));
            server.journal.push(happened(NAME));
        }
    };
    let (all, one, ()) =
        tokio::join!(follow(&client, None, 9), follow(&client, Some(NAME), 9), writer);
    assert!(matches!((&all.1, &one.1), (Ended::Enough, Ended::Enough)), "{all:?} {one:?}");
    assert_eq!(all.0, (1..=9).collect::<Vec<_>>());
    assert_eq!(one.0, [1, 3, 5, 7, 9]);

    // It ends with the agent, at once.
    let (rest, stopped) = tokio::join!(follow(&client, None, 99), async {
        tokio::time::sleep(Duration::from_millis(50)).await;
        server.cancel.cancel();
        tokio::time::timeout(Duration::from_millis(900), server.task).await
    });
    assert!(matches!(rest.1, Ended::Error(ClientError::Gone { .. })), "{rest:?}");
    stopped.expect("in time").expect("no panic").expect("no error");
}

/// Who does not read is told what was missed, and holds up neither the journal nor the others.
#[tokio::test]
async fn a_follower_that_does_not_read_misses_and_is_told() {
    let server = start().await;
    let mut slow = UnixStream::connect(&server.socket).await.expect("connect");
    slow.write_all(b"GET /v1/events?follow=true HTTP/1.1\r\nHost: x\r\n\r\n").await.expect("send");
    let mut some = [0; 512];
    server.journal.push(happened("a"));
    slow.read_exact(&mut some[..64]).await.expect("the first");
    // More than the buffers of the socket and of the journal take together.
    for _ in 0..200 {
        for _ in 0..100 {
            server.journal.push(happened("a"));
        }
        tokio::task::yield_now().await;
    }
    let (seen, _) = follow(&Client::new(&server.socket), None, 20_001).await;
    assert_eq!(seen.len(), 1_000);
    let mut text = Vec::new();
    let read = async {
        while !text.windows(7).any(|part| part == b"\"missed") {
            let count = slow.read(&mut some).await.expect("receive");
            assert_ne!(count, 0, "ended");
            text.extend_from_slice(&some[..count]);
        }
    };
    tokio::time::timeout(Duration::from_secs(20), read).await.expect("told");
}

#[tokio::test]
async fn followers_are_few_and_their_places_come_back() {
    let server = start().await;
    let follow = async || {
        let mut stream = UnixStream::connect(&server.socket).await.expect("connect");
        let request = b"GET /v1/events?follow=true HTTP/1.1\r\nHost: x\r\n\r\n";
        stream.write_all(request).await.expect("send");
        let mut answer = vec![0; 256];
        let count = stream.read(&mut answer).await.expect("receive");
        answer.truncate(count);
        (String::from_utf8(answer).expect("text"), stream)
    };
    let mut following = Vec::new();
    for _ in 0..FOLLOWERS {
        let (answer, stream) = follow().await;
        assert!(answer.contains("200 OK") && answer.contains("application/x-ndjson"), "{answer}");
        following.push(stream);
    }
    let (answer, _) = follow().await;
    assert!(answer.contains("503") && answer.contains("16 clients follow"), "{answer}");
    // Nothing happens, and the place of one who goes is free all the same.
    following.pop();
    let free = async {
        while !follow().await.0.contains("200 OK") {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), free).await.expect("a place");
}

/// As `curl --unix-socket` does it.
async fn raw(server: &Running, request: &str) -> String {
    let mut stream = UnixStream::connect(&server.socket).await.expect("connect");
    let request = format!("{request} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.expect("send");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.expect("receive");
    answer
}

#[tokio::test]
async fn wrong_requests_are_told_so_in_json() {
    let server = start().await;
    for (request, status, words) in [
        ("GET /v2/services", "404", "no such path"),
        ("POST /v1/services", "405", "GET is understood, and POST by /v1/drain"),
        ("GET /v1/drain?service=a&address=10.0.0.1", "405", "POST by /v1/drain"),
        ("POST /v1/drain?address=10.0.0.1", "400", "the parameter service is missing"),
        ("POST /v1/drain?service=a", "400", "the parameter address is missing"),
        ("POST /v1/undrain?service=a&address=b", "400", "expected IP or IP:PORT"),
        ("POST /v1/undrain?service=a&address=10.0.0.1", "503", "nothing to drain"),
        ("POST /v1/forget", "400", "expected either service=NAME or all=true"),
        ("POST /v1/forget?service=a&all=true", "400", "expected either service=NAME or all=true"),
        ("POST /v1/forget?all=true", "503", "nothing to forget"),
        ("GET /v1/forget?all=true", "405", "POST by /v1/drain"),
        ("GET /v1/services?nmae=x", "400", r#"unknown parameter \"nmae\": expected name"#),
        ("GET /v1/backends?service=a&service=b", "400", "service is here twice"),
        ("GET /v1/services/%FF", "400", "not UTF-8"),
        ("GET /v1/explain", "400", "the parameter address is missing"),
        ("GET /v1/explain?address=10.0.0.1", "400", "expected IP:PORT"),
        ("GET /v1/explain?address=10.0.0.1:80&protocol=sctp", "400", "expected tcp or udp"),
        ("GET /v1/services/x", "404", "no service"),
        ("GET /v1/events?service=x", "404", "no service"),
        ("GET /v1/events?service=x&follow=true", "404", "no service"),
        ("GET /v1/events?follow=yes", "400", "expected true or false"),
    ] {
        let answer = raw(&server, request).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{request}: {answer}");
        assert!(answer.contains(words) && answer.contains("{\"error\":"), "{request}: {answer}");
    }
    let answer = raw(&server, "GET /v1/services/orders%20%26%20co%2F1").await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
}

#[tokio::test]
async fn a_second_agent_is_refused_and_names_the_first() {
    let server = start().await;
    let mode = fs::metadata(&server.socket).expect("socket").permissions().mode();
    assert_eq!(mode & 0o777, 0o660);
    let refused = Claim::take(&server.socket).await.expect_err("taken");
    let SocketError::Taken { pid, .. } = refused else { panic!("{refused}") };
    assert_eq!(pid, Some(std::process::id()));
    // An agent that lost its lock file still answers.
    fs::remove_file(server.socket.with_extension("sock.lock")).expect("lock file");
    let refused = Claim::take(&server.socket).await.expect_err("taken");
    let SocketError::Taken { pid, .. } = refused else { panic!("{refused}") };
    assert_eq!(pid, Some(std::process::id()));
    Client::new(&server.socket).version().await.expect("the first still answers");
}

/// One that was killed holds its lock until the kernel is done with it.
#[tokio::test]
async fn an_agent_that_is_ending_is_waited_for() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let socket = directory.path().join("agent.sock");
    let first = Claim::take(&socket).await.expect("free");
    let ending = async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        drop(first);
    };
    let (second, ()) = tokio::join!(Claim::take(&socket), ending);
    second.expect("free again");
}

#[tokio::test]
async fn paths_where_no_socket_can_be_are_told_apart() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let file = directory.path().join("file");
    fs::write(&file, "").expect("file");
    let name = |length: usize| {
        let base = directory.path().as_os_str().len() + 1;
        directory.path().join("x".repeat(length - base))
    };
    drop(Claim::take(&name(107)).await.and_then(Claim::listen).expect("107 bytes are right"));
    for (path, taking, asking) in [
        (name(108), "at most 107 bytes, and this one has 108", "at most 107 bytes"),
        (file.clone(), "is not a socket", "file is not a socket; name the agent's socket"),
        (directory.path().into(), "is not a socket", "is not a socket; name the agent's socket"),
        (file.join("sock"), "is a file and not a directory", "is not a directory; name"),
        ("/proc/nothing/sock".into(), "nothing can be made there", "there is no such socket"),
    ] {
        let refused = Claim::take(&path).await.expect_err("no socket").to_string();
        assert!(refused.contains(taking) && refused.contains("--socket"), "{refused}");
        assert!(!refused.contains("run as root"), "{refused}");
        let error = Client::new(&path).version().await.expect_err("no socket").to_string();
        assert!(error.contains(asking), "{error}");
    }
}

#[tokio::test]
async fn a_stop_removes_the_socket_and_waits_for_nobody_long() {
    let server = start().await;
    // A client that never finishes its request must not keep the agent alive.
    let mut stuck = UnixStream::connect(&server.socket).await.expect("connect");
    stuck.write_all(b"GET /v1/ver").await.expect("send");
    Client::new(&server.socket).version().await.expect("accepted in order");
    server.cancel.cancel();
    let stopped = tokio::time::timeout(Duration::from_secs(5), server.task).await;
    stopped.expect("in time").expect("no panic").expect("no error");
    let left: Vec<_> =
        fs::read_dir(server.socket.parent().expect("directory")).expect("directory").collect();
    assert!(left.is_empty(), "{left:?}");
    let error = Client::new(&server.socket).version().await.expect_err("gone");
    assert!(matches!(error, ClientError::NotRunning { .. }), "{error}");
}

#[tokio::test]
async fn what_a_dead_agent_left_is_removed_and_nothing_else() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let socket = directory.path().join("agent.sock");
    drop(std::os::unix::net::UnixListener::bind(&socket).expect("bind"));
    fs::write(socket.with_extension("sock.lock"), "1\n").expect("lock file");
    let error = Client::new(&socket).version().await.expect_err("stale");
    assert!(error.to_string().contains("left from an agent"), "{error}");
    drop(Claim::take(&socket).await.and_then(Claim::listen).expect("stale, so free"));

    fs::write(&socket, "precious").expect("file");
    let error = Claim::take(&socket).await.expect_err("not a socket");
    assert!(matches!(error, SocketError::NotASocket(_)), "{error}");
    assert_eq!(fs::read(&socket).expect("still there"), b"precious");
}

/// Whoever may write the directory does not have the agent write elsewhere.
#[tokio::test]
async fn a_lock_that_is_a_link_is_not_followed() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let (socket, theirs) = (directory.path().join("socket"), directory.path().join("theirs"));
    fs::write(&theirs, "precious").expect("a file");
    let lock = Claim::lock_path(&socket);
    std::os::unix::fs::symlink(&theirs, &lock).expect("a link");
    let error = Claim::take(&socket).await.expect_err("a link").to_string();
    assert!(error.contains("a symbolic link is there"), "{error}");
    assert_eq!(fs::read_to_string(&theirs).expect("still there"), "precious");
    fs::remove_file(&lock).expect("removed");
    let _listener = Claim::take(&socket).await.and_then(Claim::listen).expect("free");
    let mode = fs::metadata(&socket).expect("a socket").permissions().mode();
    assert_eq!(mode & 0o777, 0o660, "whatever the umask is");
}
