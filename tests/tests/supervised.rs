//! What a service manager is told, over the socket that it names.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::net::UnixDatagram;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use mesh_tests::Node;
use mesh_tests::process::{Echo, LIMIT, Process};

/// What is read as long as it takes.
struct Told(UnixDatagram);

impl Told {
    /// Waits for a message with this line, and gives all of it.
    fn until(&self, line: &str) -> Result<String> {
        self.until_one(|text| text.lines().any(|found| found == line), &mut String::new())
            .with_context(|| format!("{line} was not said"))
    }

    /// Waits for such a message, and keeps what comes before it.
    fn until_one(&self, is_it: impl Fn(&str) -> bool, before: &mut String) -> Result<String> {
        let begin = Instant::now();
        let mut buffer = [0; 4_096];
        while begin.elapsed() < LIMIT {
            match self.0.recv(&mut buffer) {
                Ok(len) => {
                    let text = String::from_utf8_lossy(&buffer[..len]).into_owned();
                    if is_it(&text) {
                        return Ok(text);
                    }
                    before.push_str(&text);
                    before.push('\n');
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => return Err(error.into()),
            }
        }
        bail!("{} s have passed", LIMIT.as_secs())
    }

    /// Whether nothing is said for so long, within a bounded time.
    fn is_silent_for(&self, long: Duration) -> Result<bool> {
        let (begin, mut last) = (Instant::now(), Instant::now());
        while begin.elapsed() < LIMIT {
            match self.0.recv(&mut [0; 4_096]) {
                Ok(_) => last = Instant::now(),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => return Err(error.into()),
            }
            if last.elapsed() > long {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// Starts an agent whose service manager this is.
fn supervise(node: &Node) -> Result<(Told, Process)> {
    let socket = node.directory().join("notify.sock");
    let told = Told(UnixDatagram::bind(&socket)?);
    told.0.set_read_timeout(Some(Duration::from_millis(100)))?;
    let mut command = node.agent.run_command()?;
    command.env("NOTIFY_SOCKET", &socket).env("WATCHDOG_USEC", "200000");
    Ok((told, Process::spawn("supervised", command, Echo::On)?))
}

/// Nobody is told that the agent is ready while no connect has proved it: a frozen cgroup stands for whatever
/// keeps it from that.
#[test]
fn not_ready_before_it_is_proved() -> Result<()> {
    let node = Node::builder().start_without_agent()?;
    let freeze = node.cgroup().path().join("cgroup.freeze");
    fs::write(&freeze, "1")?;
    let (told, mut agent) = supervise(&node)?;
    let mut before = String::new();
    let doubts = |text: &str| text.contains("STATUS=connects are not seen to be balanced");
    let text = told.until_one(doubts, &mut before)?;
    ensure!(!before.contains("READY=1") && !text.contains("READY=1"), "{before}{text}");
    fs::write(&freeze, "0")?;
    let text = told.until("READY=1")?;
    ensure!(text.contains("STATUS=balancing "), "{text}");
    let status = agent.terminate(LIMIT)?;
    ensure!(status.success(), "{status}");
    Ok(())
}

#[test]
fn ready_alive_and_stopping() -> Result<()> {
    let node = Node::builder().start_without_agent()?;
    let (told, mut agent) = supervise(&node)?;

    let text = told.until("READY=1")?;
    let cgroup = node.cgroup().path().display().to_string();
    ensure!(text.contains(&format!("STATUS=balancing {cgroup}")), "{text}");
    ensure!(!node.attached()?.is_empty(), "ready before the programs are attached");
    for _ in 0..5 {
        told.until("WATCHDOG=1")?;
    }
    // Who is frozen is not alive. What was sent before is read first.
    agent.freeze(true)?;
    ensure!(told.is_silent_for(Duration::from_secs(1))?, "frozen, and still alive");
    agent.freeze(false)?;
    told.until("WATCHDOG=1")?;
    let status = agent.terminate(LIMIT)?;
    ensure!(status.success(), "{status}");
    told.until("STOPPING=1")?;
    Ok(())
}
