//! An experiment, not a part of the agent: a connect that waits for a silent backend is led to another one
//! from outside of its process (`cargo xtask lab redial`). `docs/connect-that-does-not-fail.md` says what
//! came of it.
//!
//! Whoever may trace a process can have its socket (pidfd_getfd(2)), dissolve the connect that waits
//! (connect(2) to `AF_UNSPEC`) and connect the same socket again: to the service's address, so that the kernel
//! programs choose again.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};
use std::{fs, io};

use anyhow::{Context as _, Result, bail, ensure};
use clap::{Parser, ValueEnum};
use mesh_tests::client::{self, QUESTION, Way};
use mesh_tests::sys::socket::{disconnect, is_connecting};
use mesh_tests::sys::stopped::Stopped;
use mesh_tests::{Node, Service, process};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use socket2::{SockAddr, Socket};

/// What clients dial.
const VIP: &str = "10.96.0.10:80";

/// The backend that answers, and the one that nothing comes back from.
const ALIVE: &str = "10.0.0.1:8080";
const SILENT: &str = "10.0.0.2";

const DROP: &str = "add table inet t; \
                    add chain inet t in { type filter hook input priority 0; }; \
                    add rule inet t in ip daddr 10.0.0.2 tcp dport 8080 drop";

/// About half of the clients meet the silent backend.
const CLIENTS: usize = 40;

/// All SYNs have been sent by then, and none again.
const SENT: Duration = Duration::from_millis(300);

/// By then the kernel has blamed the silent backend: a SYN was sent twice again.
const BLAMED: Duration = Duration::from_secs(10);

/// A client that has been led elsewhere is answered in less.
const ANSWERED: Duration = Duration::from_secs(2);

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum Kind {
    /// connect(2) that waits.
    Blocking,
    /// connect(2) that waits, on a socket with `SO_SNDTIMEO`.
    Limited,
    /// connect(2) that does not wait, then poll(2).
    Poll,
    /// An io_uring request.
    Uring,
    /// `MSG_FASTOPEN`.
    FastOpen,
    /// A socket of `IPPROTO_MPTCP`.
    Mptcp,
}

/// Leads waiting connects elsewhere, and prints what came of it.
#[derive(Parser)]
struct Arguments {
    /// Does nothing to them: the control.
    #[arg(long)]
    leave: bool,
    /// Does not stop the threads that wait in connect(2).
    #[arg(long)]
    running: bool,
    /// Is one client of this kind.
    #[arg(long, value_enum, hide = true)]
    client: Option<Kind>,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    if let Some(kind) = arguments.client {
        println!("{}", connect(kind)?);
        return Ok(());
    }
    for kind in Kind::value_variants() {
        trial(*kind, &arguments).with_context(|| format!("{kind:?}"))?;
    }
    Ok(())
}

/// Who answers a client, or what it is told instead.
fn connect(kind: Kind) -> Result<String> {
    let way = match kind {
        Kind::Blocking => return Ok(plain().unwrap_or_else(|error| error.to_string())),
        Kind::Limited => Way::Blocking,
        Kind::Poll => Way::Nonblocking,
        Kind::Uring => Way::Uring,
        Kind::FastOpen => Way::FastOpen,
        Kind::Mptcp => Way::Mptcp,
    };
    let outcome = client::ask(way, VIP.parse()?);
    outcome.error.or(outcome.backend).context("an outcome")
}

/// As a program does that sets no limits.
fn plain() -> io::Result<String> {
    let mut stream = TcpStream::connect(VIP)?;
    stream.write_all(QUESTION)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer.trim_end().to_owned())
}

fn trial(kind: Kind, arguments: &Arguments) -> Result<()> {
    let app = Service::new("app").address("10.96.0.10").port(80, 8080);
    let app = app.endpoint("10.0.0.1").endpoint(SILENT).ejection("{base: 60s}");
    let mut node =
        Node::builder().service(app).quiet().backend("a", ALIVE).start_without_agent()?;
    node.add_address(SILENT.parse()?)?;
    let mut nft = node.outside("nft");
    nft.arg(DROP);
    process::stdout(nft)?;
    node.agent.start()?;

    let name = kind.to_possible_value().context("a name")?;
    let mut clients = Vec::new();
    let begin = Instant::now();
    for _ in 0..CLIENTS {
        let mut command: Command = node.command(std::env::current_exe()?);
        command.args(["--client", name.get_name()]).stdout(Stdio::piped());
        clients.push(command.spawn()?);
    }
    sleep(SENT);
    let (mut waiting, answered) = sort(clients)?;
    ensure!(!waiting.is_empty() && !answered.is_empty(), "all went one way: {answered:?}");

    // What the kernel programs find out, without a check.
    node.agent.until_backends("app", |all| all.iter().any(|b| b.state == "ejected"))?;
    let out = begin.elapsed();
    ensure!(out < BLAMED, "blamed late");
    let mut took = Vec::new();
    if !arguments.leave {
        for client in &waiting {
            let begin = Instant::now();
            redial(
                client.id(),
                kind == Kind::Blocking || kind == Kind::Limited,
                arguments.running,
            )?;
            took.push(begin.elapsed());
        }
    }
    sleep(ANSWERED);
    let count = waiting.len();
    let mut outcomes = BTreeMap::<String, usize>::new();
    for client in &mut waiting {
        let text = match client.try_wait()? {
            None => {
                client.kill()?;
                client.wait()?;
                "still waits".to_owned()
            }
            Some(_) => output(client)?,
        };
        *outcomes.entry(text).or_default() += 1;
    }
    took.sort_unstable();
    let median = took.get(took.len() / 2).map_or(0, Duration::as_micros);
    println!(
        "{kind:?}: {count} of {CLIENTS} met the silent backend, which was out after {} ms: {outcomes:?}; \
         {median} us each",
        out.as_millis()
    );
    let shown: serde_json::Value = node.agent.json(&["backends", "app"])?;
    for backend in shown.as_array().context("a list")? {
        let number = |key: &str| backend[key].as_u64().unwrap_or(u64::MAX);
        println!(
            "   {}: {}, opened {}, failed {}, active {}",
            backend["address"].as_str().unwrap_or_default(),
            backend["state"].as_str().unwrap_or_default(),
            number("opened"),
            number("failed"),
            number("active")
        );
    }
    Ok(())
}

/// Clients that wait, and what the others were told.
fn sort(clients: Vec<Child>) -> Result<(Vec<Child>, Vec<String>)> {
    let (mut waiting, mut answered) = (Vec::new(), Vec::new());
    for mut client in clients {
        match client.try_wait()? {
            None => waiting.push(client),
            Some(_) => answered.push(output(&mut client)?),
        }
    }
    if answered.iter().any(|answer| answer != "a") {
        bail!("answered without a reason: {answered:?}");
    }
    Ok((waiting, answered))
}

fn output(client: &mut Child) -> Result<String> {
    let mut text = String::new();
    client.stdout.take().context("its output")?.read_to_string(&mut text)?;
    Ok(text.trim_end().to_owned())
}

/// Leads the connect of a process with one thread elsewhere.
fn redial(process: u32, waits: bool, running: bool) -> Result<()> {
    let socket = connecting(process)?;
    let _stopped = (waits && !running).then(|| Stopped::new(process)).transpose()?;
    let target = SockAddr::from(VIP.parse::<SocketAddr>()?);
    // The flag is of the open file, which the client has too.
    if waits {
        socket.set_nonblocking(true)?;
    }
    disconnect(&socket).context("dissolve")?;
    let begun = socket.connect(&target);
    if waits {
        socket.set_nonblocking(false)?;
    }
    match begun {
        Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => {
            Err(error).context("connect")
        }
        _ => Ok(()),
    }
}

/// The socket of a process that is connecting.
fn connecting(process: u32) -> Result<Socket> {
    let pid = Pid::from_raw(process.cast_signed()).context("a process")?;
    let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
    for entry in fs::read_dir(format!("/proc/{process}/fd"))? {
        let entry = entry?;
        let is_socket = fs::read_link(entry.path())
            .is_ok_and(|target| target.to_string_lossy().starts_with("socket:"));
        let number = entry.file_name().to_string_lossy().parse()?;
        if is_socket {
            let socket = Socket::from(pidfd_getfd(&pidfd, number, PidfdGetfdFlags::empty())?);
            if is_connecting(&socket).is_ok_and(|connecting| connecting) {
                return Ok(socket);
            }
        }
    }
    bail!("no socket of {process} is connecting")
}
