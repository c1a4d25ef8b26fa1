//! The first process of a test kernel: starts the agent and asserts that it balances there.
//!
//! `cargo xtask kernels` boots it from an initial ram disk that holds this program as `/init` and
//! the agent as `/bin/mesh-agent`, with one of another map layout beside it, the libraries that these need, and nothing else. It prints a line for each
//! assertion (`ok …` or `FAILED …`), `kernel-init: passed` at the end when all of them held, and
//! powers the machine off in any case. There is no route but loopback, so an answer through a
//! service address can only come from the kernel programs.
//!
//! As `init client …` it is the program that connects: see [`client`].

use std::collections::BTreeSet;
use std::env;
use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

const AGENT: &str = "/bin/mesh-agent";
/// One of another map layout.
const OTHER_AGENT: &str = "/bin/mesh-agent-other";
const SOCKET: &str = "/run/mesh/agent.sock";
const CONFIG: &str = "/etc/mesh/agent.yaml";
const SERVICES: &str = "/etc/mesh/services.d";
const CGROUP: &str = "/sys/fs/cgroup/balanced";

const CONFIG_TEXT: &str = r#"virtual-ips: ["10.96.0.0/16", "fd00:96::/64"]
sources:
- files: {directory: /etc/mesh/services.d}
"#;

const SERVICE_TEXT: &str = r#"services:
- name: demo
  addresses: [10.96.0.10, "fd00:96::10"]
  ports:
  - {port: 80, target: 8080}
  - {port: 53, target: 8080, protocol: udp}
  endpoints:
  - {address: 127.0.0.11}
  - {address: 127.0.0.12}
  - {address: 127.0.0.13}
  - {address: "::1", port: 8081}
  - {address: "::1", port: 8082}
  - {address: "::1", port: 8083}
"#;

/// The servers' names and addresses, as in [`SERVICE_TEXT`].
const SERVERS_4: [(&str, &str); 3] =
    [("v4-one", "127.0.0.11:8080"), ("v4-two", "127.0.0.12:8080"), ("v4-three", "127.0.0.13:8080")];
const SERVERS_6: [(&str, &str); 3] =
    [("v6-one", "[::1]:8081"), ("v6-two", "[::1]:8082"), ("v6-three", "[::1]:8083")];

/// How often to connect where all three servers must be seen: one is missed by chance once in
/// 10^10 runs.
const CONNECTS: usize = 60;

/// How long the agent may take to be ready; the emulated machine is slow.
const PATIENCE: Duration = Duration::from_secs(120);

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    if let [mode, cgroup, address, count] = arguments.as_slice()
        && mode == "client"
    {
        return match client(cgroup, address, count) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                println!("error {error:#}");
                ExitCode::FAILURE
            }
        };
    }
    if std::process::id() != 1 {
        eprintln!("this is the first process of a test kernel; `cargo xtask kernels` boots it");
        return ExitCode::FAILURE;
    }
    match run() {
        Ok(()) => println!("kernel-init: passed"),
        Err(error) => println!("FAILED {error:#}"),
    }
    let error = sys::power_off();
    println!("FAILED to power off: {error}");
    ExitCode::FAILURE
}

fn run() -> Result<()> {
    prepare()?;
    for (name, address) in SERVERS_4.into_iter().chain(SERVERS_6) {
        serve(name, address)?;
    }
    // Before the agent is there nothing answers, so what answers later is its work.
    expect_error("without the agent 10.96.0.10 is unreachable", CGROUP, "10.96.0.10:80", UNREACH)?;

    let mut agent = start_agent()?;
    wait_ready(&mut agent)?;
    ok("the agent is ready, and every program is attached");

    let all = SERVERS_4.map(|(name, _)| name);
    expect_all("IPv4 is balanced", "10.96.0.10:80", &all)?;
    expect_all("IPv6 is balanced", "[fd00:96::10]:80", &SERVERS_6.map(|(name, _)| name))?;
    expect_all("IPv4 from an IPv6 socket is balanced", "[::ffff:10.96.0.10]:80", &all)?;

    expect_all("datagrams over IPv4 are", "udp/10.96.0.10:53", &all)?;
    expect_all("and over IPv6", "udp/[fd00:96::10]:53", &SERVERS_6.map(|(name, _)| name))?;
    expect_all("and over IPv4 from an IPv6 socket", "udp/[::ffff:10.96.0.10]:53", &all)?;

    let refused = libc::ECONNREFUSED;
    expect_error("a virtual IP without service is refused", CGROUP, "10.96.0.99:80", refused)?;
    expect_error("the same with IPv6", CGROUP, "[fd00:96::99]:80", refused)?;
    expect_error("a port that is not listed is refused", CGROUP, "10.96.0.10:81", refused)?;

    expect_all("other traffic is not touched", "127.0.0.12:8080", &["v4-two"])?;
    expect_error("outside the cgroup nothing is balanced", OUTSIDE, "10.96.0.10:80", UNREACH)?;
    expect_error("the same with IPv6", OUTSIDE, "[fd00:96::10]:80", UNREACH)?;

    stop(&mut agent)?;
    ok("the agent ends cleanly");
    expect_all("after that connects are balanced as before", "10.96.0.10:80", &all)?;
    expect_all("and datagrams", "udp/[fd00:96::10]:53", &SERVERS_6.map(|(name, _)| name))?;
    let held = ask_agent(&["-o", "json", "services"])?;
    ensure!(held.as_array().is_some_and(|services| !services.is_empty()), "{held}");
    ok("what the kernel holds is shown without an agent");

    let mut agent = start_agent()?;
    wait_ready(&mut agent)?;
    let status = ask_agent(&["-o", "json", "status"])?;
    ensure!(status["counters"]["map_writes"] == 0, "{}", status["counters"]);
    ok("the next agent takes it over, and writes nothing");
    expect_all("and it is balanced still", "10.96.0.10:80", &all)?;

    for (binary, assertion) in [
        (OTHER_AGENT, "an agent of another map layout takes it over, and writes nothing"),
        (AGENT, "and the first one again"),
    ] {
        stop(&mut agent)?;
        agent = start(binary)?;
        wait_ready(&mut agent)?;
        let status = ask_agent(&["-o", "json", "status"])?;
        ensure!(status["counters"]["map_writes"] == 0, "{}", status["counters"]);
        ok(assertion);
        expect_all("it is balanced still", "10.96.0.10:80", &all)?;
        expect_all("and datagrams", "udp/[fd00:96::10]:53", &SERVERS_6.map(|(name, _)| name))?;
    }
    agent.kill().and_then(|()| agent.wait()).context("killing the agent")?;
    expect_all("also when that is killed", "10.96.0.10:80", &all)?;
    ask_agent(&["-o", "json", "cleanup"])?;
    expect_error("after cleanup nothing is balanced", CGROUP, "10.96.0.10:80", UNREACH)
}

/// What a command prints, which must succeed.
fn ask_agent(arguments: &[&str]) -> Result<Value> {
    let output = Command::new(AGENT).args(["--socket", SOCKET]).args(arguments).output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{arguments:?}: {said}");
    serde_json::from_slice(&output.stdout).with_context(|| format!("{arguments:?}"))
}

/// No route: there is only loopback.
const UNREACH: i32 = libc::ENETUNREACH;

/// In place of a cgroup: stay where the first process is.
const OUTSIDE: &str = "outside";

fn ok(assertion: &str) {
    println!("ok {assertion}");
}

// === the machine ===

fn prepare() -> Result<()> {
    sys::mount("proc", "/proc", "proc")?;
    sys::mount("sysfs", "/sys", "sysfs")?;
    sys::mount("devtmpfs", "/dev", "devtmpfs")?;
    sys::mount("tmpfs", "/run", "tmpfs")?;
    sys::mount("cgroup2", "/sys/fs/cgroup", "cgroup2")?;
    sys::mount("bpf", "/sys/fs/bpf", "bpf")?;
    sys::loopback_up().context("bringing up loopback")?;
    for directory in [SERVICES, CGROUP, "/run/mesh", "/var/lib/mesh"] {
        fs::create_dir_all(directory).with_context(|| format!("making {directory}"))?;
    }
    fs::write(CONFIG, CONFIG_TEXT).with_context(|| format!("writing {CONFIG}"))?;
    let service = Path::new(SERVICES).join("demo.yaml");
    fs::write(&service, SERVICE_TEXT).with_context(|| format!("writing {}", service.display()))?;
    let version = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    ok(&format!("kernel {} is up", version.trim()));
    Ok(())
}

/// A server that sends its name to whoever connects.
fn serve(name: &'static str, address: &str) -> Result<()> {
    let listener = TcpListener::bind(address).with_context(|| format!("listening on {address}"))?;
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            // A client that is gone already shows in its own assertion.
            let _ = stream.write_all(name.as_bytes());
        }
    });
    let datagrams = UdpSocket::bind(address).with_context(|| format!("datagrams on {address}"))?;
    thread::spawn(move || {
        let mut buffer = [0; 64];
        while let Ok((_, from)) = datagrams.recv_from(&mut buffer) {
            let _ = datagrams.send_to(name.as_bytes(), from);
        }
    });
    Ok(())
}

// === the agent ===

fn start_agent() -> Result<Child> {
    start(AGENT)
}

fn start(binary: &str) -> Result<Child> {
    Command::new(binary)
        .args(["--socket", SOCKET, "run", "--config", CONFIG, "--cgroup", CGROUP])
        .stdin(Stdio::null())
        .spawn()
        .with_context(|| format!("starting {binary}"))
}

fn wait_ready(agent: &mut Child) -> Result<()> {
    let start = Instant::now();
    loop {
        if let Some(status) = agent.try_wait()? {
            bail!("the agent ended before it was ready: {status}");
        }
        let answer =
            Command::new(AGENT).args(["--socket", SOCKET, "-o", "json", "status"]).output();
        let answer = answer.context("asking the agent for its status")?;
        let status = serde_json::from_slice::<Value>(&answer.stdout).unwrap_or_default();
        if status["ready"] == true {
            return check_programs(&status);
        }
        if start.elapsed() > PATIENCE {
            let error = String::from_utf8_lossy(&answer.stderr);
            bail!("the agent is not ready after {PATIENCE:?}: {status} {error}");
        }
        thread::sleep(Duration::from_millis(100));
    }
}

fn check_programs(status: &Value) -> Result<()> {
    let programs = status["programs"].as_array().context("status names no programs")?;
    let attached = programs.iter().filter(|program| program["attached"] == true).count();
    ensure!(attached == 16 && programs.len() == 16, "programs attached: {}", status["programs"]);
    Ok(())
}

fn stop(agent: &mut Child) -> Result<()> {
    sys::terminate(agent)?;
    let start = Instant::now();
    loop {
        if let Some(status) = agent.try_wait()? {
            ensure!(status.success(), "the agent ended with {status}");
            return Ok(());
        }
        ensure!(start.elapsed() < PATIENCE, "the agent still runs {PATIENCE:?} after SIGTERM");
        thread::sleep(Duration::from_millis(20));
    }
}

// === connecting ===

/// Connects from inside the cgroup: every connect is answered by one of `names`, each of them
/// answers at least once, and the application sees the address that it dialled.
fn expect_all(assertion: &str, address: &str, names: &[&str]) -> Result<()> {
    let lines = connect(CGROUP, address, CONNECTS)?;
    ensure!(lines.len() == CONNECTS, "{assertion}: {} of {CONNECTS} answers", lines.len());
    let mut seen = BTreeSet::new();
    for line in &lines {
        let name = line.strip_prefix(&format!("{} ", address.trim_start_matches("udp/")));
        match name.filter(|name| names.contains(name)) {
            Some(name) => seen.insert(name),
            None => bail!("{assertion}: {address} gave `{line}`, expected `{address} NAME`"),
        };
    }
    ensure!(seen.len() == names.len(), "{assertion}: of {names:?} only {seen:?} answered");
    ok(&format!("{assertion} ({address}, {CONNECTS} connects)"));
    Ok(())
}

/// Connects once, and it fails with this error number.
fn expect_error(assertion: &str, cgroup: &str, address: &str, number: i32) -> Result<()> {
    let lines = connect(cgroup, address, 1)?;
    ensure!(
        lines == [format!("errno {number}")],
        "{assertion}: {address} gave {lines:?}, expected errno {number}"
    );
    ok(&format!("{assertion} ({address})"));
    Ok(())
}

/// Runs [`client`] as a process of its own, and returns what it printed.
fn connect(cgroup: &str, address: &str, count: usize) -> Result<Vec<String>> {
    let output = Command::new("/proc/self/exe")
        .args(["client", cgroup, address, &count.to_string()])
        .output()
        .context("starting the client")?;
    Ok(String::from_utf8(output.stdout)?.lines().map(str::to_owned).collect())
}

/// Connects `count` times and prints a line for each: `PEER NAME`, or `errno NUMBER` when the
/// connect fails. With `udp/` before the address it sends a datagram instead, and PEER is where the
/// answer came from. The cgroup that counts is the socket's at its creation, so the process enters it
/// first.
fn client(cgroup: &str, address: &str, count: &str) -> Result<()> {
    if cgroup != OUTSIDE {
        fs::write(Path::new(cgroup).join("cgroup.procs"), "0").context("entering the cgroup")?;
    }
    if let Some(address) = address.strip_prefix("udp/") {
        return (0..count.parse()?).try_for_each(|_: u32| send(address.parse()?));
    }
    let address: SocketAddr = address.parse()?;
    for _ in 0..count.parse()? {
        match TcpStream::connect_timeout(&address, Duration::from_secs(5)) {
            Ok(mut stream) => {
                let peer = stream.peer_addr()?;
                let mut name = String::new();
                stream.set_read_timeout(Some(Duration::from_secs(5)))?;
                stream.read_to_string(&mut name)?;
                println!("{peer} {name}");
            }
            Err(error) => println!("errno {}", error.raw_os_error().unwrap_or_default()),
        }
    }
    Ok(())
}

/// Sends a datagram, and prints who answers.
fn send(address: SocketAddr) -> Result<()> {
    let socket = UdpSocket::bind(if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" })?;
    socket.set_read_timeout(Some(Duration::from_secs(5)))?;
    let mut buffer = [0; 64];
    match socket.send_to(b"who", address).and_then(|_| socket.recv_from(&mut buffer)) {
        Ok((length, peer)) => println!("{peer} {}", String::from_utf8_lossy(&buffer[..length])),
        Err(error) => println!("errno {}", error.raw_os_error().unwrap_or_default()),
    }
    Ok(())
}

/// The system calls that the standard library does not have.
mod sys {
    #![expect(unsafe_code, reason = "raw system calls; nothing else in this program needs them")]

    use std::ffi::CString;
    use std::io;
    use std::net::UdpSocket;
    use std::os::fd::AsRawFd;
    use std::process::Child;
    use std::ptr;

    use anyhow::{Context, Result};

    fn check(result: libc::c_int) -> io::Result<()> {
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    pub(super) fn mount(source: &str, target: &str, kind: &str) -> Result<()> {
        let [source, place, kind] =
            [CString::new(source)?, CString::new(target)?, CString::new(kind)?];
        // SAFETY: three strings that end in NUL and outlive the call; no data.
        let result =
            unsafe { libc::mount(source.as_ptr(), place.as_ptr(), kind.as_ptr(), 0, ptr::null()) };
        check(result).with_context(|| format!("mounting {target}"))
    }

    pub(super) fn loopback_up() -> Result<()> {
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        // SAFETY: `ifreq` is plain data, for which zeroes are a value.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in request.ifr_name.iter_mut().zip(*b"lo") {
            *to = from.cast_signed();
        }
        request.ifr_ifru.ifru_flags = libc::c_short::try_from(libc::IFF_UP)?;
        // SAFETY: SIOCSIFFLAGS reads an `ifreq`, which outlives the call.
        let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &request) };
        Ok(check(result)?)
    }

    pub(super) fn terminate(child: &Child) -> Result<()> {
        let pid = libc::pid_t::try_from(child.id())?;
        // SAFETY: no memory is involved. The process was not waited for, so its id is its own.
        let result = unsafe { libc::kill(pid, libc::SIGTERM) };
        check(result).context("ending the agent")
    }

    /// Returns only when that failed.
    pub(super) fn power_off() -> io::Error {
        // SAFETY: no memory is involved; there are no file systems to be written back.
        let result = unsafe { libc::reboot(libc::RB_POWER_OFF) };
        match check(result) {
            Ok(()) => io::Error::other("reboot(2) returned"),
            Err(error) => error,
        }
    }
}
