//! The binary as a person or a script uses it, against a server with a fixed view.

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Command, Output, Stdio};

use mesh_agent::api::server::{ExplainQuery, View, ViewError, serve};
use mesh_agent::api::socket::Claim;
use mesh_agent::api::types;
use mesh_agent::engine::journal::{Journal, missed};
use mesh_common::Protocol;
use tokio_util::sync::CancellationToken;

#[derive(Clone)]
struct Fixed;

const ORDERS: &str = "10.96.0.10:80";

const NO_SUCH: &str = "there is no service \"nosuch\": `mesh-agent services` lists them";

impl View for Fixed {
    async fn services(&self) -> Result<Vec<types::Service>, ViewError> {
        Ok(vec![types::Service {
            name: "orders".into(),
            source: "files".into(),
            balance: "random".into(),
            frontends: Vec::new(),
            backends: types::BackendCounts { total: 2, healthy: 1 },
            active: 0,
            opened: 0,
            failed: 0,
            failures: types::Failures::default(),
            refused: Vec::new(),
            problems: Vec::new(),
        }])
    }

    async fn backends(&self, service: Option<String>) -> Result<Vec<types::Backend>, ViewError> {
        service.map_or(Ok(Vec::new()), |name| Err(ViewError::no_service(&name)))
    }

    async fn status(&self) -> Result<types::Status, ViewError> {
        Err(ViewError::Failed("the engine has stopped: see the log".into()))
    }

    async fn explain(&self, query: ExplainQuery) -> Result<types::Explanation, ViewError> {
        let known = query.address.to_string() == ORDERS && query.protocol == Protocol::Tcp;
        Ok(types::Explanation {
            client: query.from,
            frontend: query.address.to_string(),
            service: None,
            algorithm: None,
            steps: Vec::new(),
            candidates: Vec::new(),
            answer: known.then(|| types::Answer::Refused {
                errno: "ECONNREFUSED".into(),
                reason: "no-endpoint".into(),
            }),
        })
    }
}

fn mesh(socket: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_mesh-agent"))
        .arg("--socket")
        .arg(socket)
        .args(args)
        .output()
        .expect("the binary runs")
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).expect("UTF-8")
}

/// Exit status, standard output and standard error that a person sees.
#[tokio::test(flavor = "multi_thread")]
async fn each_way_a_command_can_end() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let socket = directory.path().join("agent.sock");
    let listener = Claim::take(&socket).await.and_then(Claim::listen).expect("free socket");
    let journal = Journal::default();
    let server = tokio::spawn(serve(listener, Fixed, journal, CancellationToken::new()));

    for (args, status, stdout, stderr) in [
        (&["services"] as &[&str], 0, "orders  random   1/2", ""),
        (&["services", "orders", "-o", "json"], 0, r#""name": "orders""#, ""),
        (&["services", "-o", "yaml"], 0, "- name: orders", ""),
        (&["services", "nosuch"], 1, "", NO_SUCH),
        (&["backends", "nosuch"], 1, "", NO_SUCH),
        (&["backends"], 0, "", "no backends"),
        (&["backends", "-o", "json"], 0, "[]", ""),
        (&["status"], 1, "", "see the log"),
        (&["events"], 0, "", "no events"),
        (&["events", "-o", "json"], 0, "[]", ""),
        (&["events", "--service", "nosuch"], 1, "", NO_SUCH),
        (&["events", "--follow", "--service", "nosuch"], 1, "", NO_SUCH),
        (&["version"], 0, "running: ", ""),
        (&["explain", ORDERS], 0, "ECONNREFUSED (no-endpoint)", ""),
        (&["explain", "192.0.2.1:80"], 1, "not touched", "192.0.2.1:80 is no service"),
        (&["explain", "192.0.2.1"], 2, "", "the port is missing"),
        (&["cleanup"], 1, "", "an agent already answers"),
        (&["explain", ORDERS, "--protocol", "udp"], 1, "", "is no service"),
        (&["register", "orders", "10.0.0.1"], 2, "", "`register` is not in this version"),
        (&["darin"], 2, "", "unrecognized subcommand"),
    ] {
        let output = mesh(&socket, args);
        let shown = format!("{args:?}: {output:?}");
        assert_eq!(output.status.code(), Some(status), "{shown}");
        assert!(text(&output.stdout).contains(stdout), "{shown}");
        assert!(text(&output.stderr).contains(stderr), "{shown}");
        if status == 1 {
            assert_eq!(text(&output.stderr).lines().count(), 1, "{shown}");
        }
    }
    assert!(socket.exists(), "cleanup left the socket of the agent that answers");
    server.abort();
}

#[test]
fn no_agent_is_a_status_of_its_own() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let socket = directory.path().join("agent.sock");
    for command in [
        &["status"] as &[&str],
        &["services"],
        &["backends"],
        &["explain", ORDERS],
        &["events"],
        &["events", "--follow"],
    ] {
        let output = mesh(&socket, command);
        assert_eq!(output.status.code(), Some(3), "{command:?}: {output:?}");
        assert!(text(&output.stderr).contains(&socket.display().to_string()), "{output:?}");
        assert!(text(&output.stderr).contains("mesh-agent run"), "{output:?}");
    }
}

/// What it prints comes at once; it ends when nobody reads on, at Ctrl-C, and with the agent.
#[tokio::test(flavor = "multi_thread")]
async fn following_ends_in_each_way() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let socket = directory.path().join("agent.sock");
    let listener = Claim::take(&socket).await.and_then(Claim::listen).expect("free socket");
    let (journal, cancel) = (Journal::default(), CancellationToken::new());
    let server = tokio::spawn(serve(listener, Fixed, journal.clone(), cancel.clone()));
    let follow = |format: &str| {
        let mut child = Command::new(env!("CARGO_BIN_EXE_mesh-agent"))
            .args(["events", "--follow", "-o", format, "--socket"])
            .arg(&socket)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the binary runs");
        let lines = BufReader::new(child.stdout.take().expect("piped")).lines();
        (child, lines)
    };
    journal.push(missed(3, "events"));
    let (unread, mut lines) = follow("table");
    let header = lines.next().expect("a line").expect("text");
    assert!(header.starts_with("TIME      KIND       SERVICE"), "{header}");
    assert!(lines.next().expect("a line").expect("text").contains("missed"));
    drop(lines);

    let (interrupted, mut lines) = follow("json");
    for seq in 1..=3 {
        let event: types::Event =
            serde_json::from_str(&lines.next().expect("a line").expect("text")).expect("JSON");
        assert_eq!((event.seq, event.kind.as_str()), (seq, "missed"));
        journal.push(missed(1, "event"));
    }
    let pid = interrupted.id().to_string();
    let signalled = Command::new("sh").args(["-c", "kill -INT \"$1\"", "sh", &pid]).status();
    assert!(signalled.expect("sh runs").success());

    let (ended, mut lines) = follow("yaml");
    assert_eq!(lines.next().expect("a line").expect("text"), "---");
    cancel.cancel();
    server.await.expect("no panic").expect("no error");
    // The reader of the first went while nothing happened.
    for (child, status, words) in
        [(unread, Some(0), ""), (interrupted, None, ""), (ended, Some(3), "no more events come")]
    {
        let output = child.wait_with_output().expect("it ends");
        assert_eq!(output.status.code(), status, "{output:?}");
        assert!(text(&output.stderr).contains(words), "{output:?}");
    }
}

#[test]
fn a_limit_on_open_files_is_named() {
    // From what ends before the runtime is made to what is enough.
    for (limit, status, words) in
        [(4, 1, "see `ulimit -n`"), (7, 1, "see `ulimit -n`"), (16, 3, "no such socket")]
    {
        let output = Command::new("sh")
            .args(["-c", &format!("ulimit -n {limit}; exec \"$0\" --socket /none status")])
            .arg(env!("CARGO_BIN_EXE_mesh-agent"))
            .output()
            .expect("sh runs");
        assert_eq!(output.status.code(), Some(status), "{limit}: {output:?}");
        assert!(text(&output.stderr).contains(words), "{limit}: {output:?}");
    }
}

/// `mesh-agent completions bash | head -0`: the reader is gone before anything is written.
#[test]
fn a_reader_that_goes_away_is_no_failure() {
    let (reader, writer) = std::io::pipe().expect("pipe");
    drop(reader);
    let output = Command::new(env!("CARGO_BIN_EXE_mesh-agent"))
        .args(["completions", "bash"])
        .stdout(writer)
        .stderr(Stdio::piped())
        .output()
        .expect("the binary runs");
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert!(output.stderr.is_empty(), "{output:?}");
}
