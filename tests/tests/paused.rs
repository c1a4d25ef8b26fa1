//! The agent does not run for a while, as when the machine, its cgroup or the process is paused: nobody is unhealthy
//! for what it did not do meanwhile.

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use mesh_tests::certified::Certified;
use mesh_tests::process::{Echo, Process};
use mesh_tests::relay::Relay;
use mesh_tests::sys::{self, netns};
use mesh_tests::{Node, Service, check};
use serde_json::Value;

const VIP: &str = "10.96.0.10:80";

/// What is the far end of a slow path: a check takes three times there and back.
const SLOW: &str = "10.8.0.2:8443";
const FAST: &str = "10.0.0.1:8080";
/// Accepts, and never answers.
const SILENT: &str = "10.0.0.3:8080";

/// Each way.
const DELAY: Duration = Duration::from_millis(60);

/// Much longer than any check may take.
const PAUSE: Duration = Duration::from_millis(1_500);

fn nginx(relay: &Relay, directory: &Path) -> Result<Process> {
    fs::create_dir_all(directory)?;
    let files = Certified::new(directory, &["10.8.0.2"])?;
    let at = directory.display();
    let conf = format!(
        "daemon off; master_process off; pid {at}/nginx.pid; error_log stderr;\nevents {{}}\nhttp {{\n\
         access_log off; client_body_temp_path {at}/b; proxy_temp_path {at}/p;\n\
         fastcgi_temp_path {at}/f; uwsgi_temp_path {at}/u; scgi_temp_path {at}/s;\n\
         ssl_certificate {cert}; ssl_certificate_key {key};\n\
         server {{ listen {SLOW} ssl; location / {{ return 200 \"ok\\n\"; }} }}\n}}\n",
        cert = files.certificate.display(),
        key = files.key.display(),
    );
    let file = directory.join("nginx.conf");
    fs::write(&file, conf)?;
    let mut command = relay.machine().outside("nginx");
    command.args(["-e", "stderr", "-p"]).arg(directory).arg("-c").arg(file);
    Process::spawn("nginx", command, Echo::On)
}

fn service(name: &str, address: &str, check: &str) -> Service {
    Service::new(name).address(address).port(80, 8080).key(&format!(
        "health: {{{check}, probe: always, interval: 600ms, timeout: 600ms, rise: 1, fall: 1}}"
    ))
}

/// How the agent is paused.
enum Way {
    Stopped(u32),
    Frozen(PathBuf),
}

impl Way {
    fn set(&self, paused: bool) -> Result<()> {
        match self {
            Self::Stopped(id) => {
                let signal = if paused { libc::SIGSTOP } else { libc::SIGCONT };
                sys::process::signal(*id, signal).context("the agent")
            }
            Self::Frozen(file) => {
                fs::write(file, if paused { "1" } else { "0" }).context("cgroup.freeze")
            }
        }
    }
}

#[test]
fn who_is_well_stays_well_while_the_agent_is_paused() -> Result<()> {
    let mut node = Node::builder()
        .backend("a", FAST)
        .service(
            service("slow", "10.96.0.11", "https: {verify: false}, port: 8443")
                .endpoint("10.8.0.2"),
        )
        .service(service("app", "10.96.0.10", "tcp: {}").endpoint("10.0.0.1"))
        .start_without_agent()?;
    let relay = Relay::new(&node, DELAY)?;
    let _nginx = nginx(&relay, &node.directory().join("nginx"))?;
    node.agent.start()?;
    let well = |name: &str| {
        node.agent.until_backends(name, |all| all.iter().all(|one| one.state == "healthy"))
    };
    well("slow")?;
    well("app")?;
    let inside = node.cgroup().child("agent")?;
    let id = node.agent.id()?;
    fs::write(inside.join("cgroup.procs"), id.to_string())?;
    for way in [Way::Stopped(id), Way::Frozen(inside.join("cgroup.freeze"))] {
        for _ in 0..3 {
            way.set(true)?;
            sleep(PAUSE);
            way.set(false)?;
            for _ in 0..10 {
                for name in ["slow", "app"] {
                    let backends = node.agent.backends(name)?;
                    ensure!(backends.iter().all(|one| one.state == "healthy"), "{backends:?}");
                }
                sleep(Duration::from_millis(70));
            }
        }
    }
    let events: Vec<Value> = node.agent.json(&["events"])?;
    let ill = events.iter().filter(|one| one["kind"] == "unhealthy").collect::<Vec<_>>();
    ensure!(ill.is_empty(), "{ill:?}");
    let reasons = node.agent.status()?.reasons;
    ensure!(reasons.is_empty(), "{reasons:?}");

    // Control: who really does not answer is found all the same, pauses or none.
    node.add_address("10.0.0.3".parse()?)?;
    let _silent = netns::inside(node.netns(), || TcpListener::bind(SILENT))??;
    let silent = service("silent", "10.96.0.12", "http: {}").endpoint("10.0.0.3");
    node.agent.write_services("more.yaml", &Service::file(&[silent]))?;
    sleep(Duration::from_millis(500));
    let way = Way::Stopped(id);
    way.set(true)?;
    sleep(PAUSE);
    way.set(false)?;
    node.agent.until_backends("silent", |all| {
        all.iter().all(|one| one.state == "unhealthy" && one.reason.contains("no answer within"))
    })?;
    check::balanced(&mut node, &["a"], |node| check::who(node, VIP))
}
