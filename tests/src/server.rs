//! Named backends: servers that tell their name to whoever asks, so that a test knows who answered.

use std::fs;
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::node::Node;
use crate::process::{self, Echo, Process, until};
use crate::sys::netns;

/// What a backend is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// This crate's own: any connection that sends a line, or an HTTP request, gets the name.
    Plain,
    /// The same, which thinks about each line for so many milliseconds.
    Slow(u16),
    /// nginx: every page is the name.
    Nginx,
    /// Python's `http.server`: the page `/` is the name.
    Python,
    /// redis-server: the key `who` is the name.
    Redis,
    /// dnsmasq: the text record of `who.test` is the name.
    Dnsmasq,
    /// iperf3, which does not tell its name.
    Iperf,
    /// A server for connections that are kept ([`crate::long`]).
    Long,
    /// A server of QUIC, of this crate: what it sends is the name.
    Quic,
}

/// Starts a backend in the node's namespace, outside its cgroup, and waits until it serves. Its
/// address is added to the namespace's loopback interface.
///
/// # Errors
///
/// A program is missing, or does not serve within a bounded time.
pub(crate) fn start(node: &Node, kind: Kind, name: &str, place: SocketAddr) -> Result<Process> {
    node.add_address(place.ip())?;
    let directory = node.directory().join(name);
    fs::create_dir_all(&directory)?;
    let (ip, port) = (place.ip().to_string(), place.port().to_string());
    let command = match kind {
        Kind::Plain => {
            let mut command = node.outside(process::binary("mesh-server")?);
            command.args([name, &place.to_string()]);
            command
        }
        Kind::Slow(delay) => {
            let mut command = node.outside(process::binary("mesh-server")?);
            command.args([name, &place.to_string(), "--delay", &delay.to_string()]);
            command
        }
        Kind::Nginx => {
            let file = directory.join("nginx.conf");
            fs::write(&file, nginx_conf(name, place, &directory))?;
            let mut command = node.outside("nginx");
            command.args(["-e", "stderr", "-p"]).arg(&directory).arg("-c").arg(file);
            command
        }
        Kind::Python => {
            fs::write(directory.join("index.html"), format!("{name}\n"))?;
            let mut command = node.outside("python3");
            command
                .args(["-m", "http.server", &port, "--bind", &ip, "--directory"])
                .arg(&directory);
            command
        }
        Kind::Redis => {
            let mut command = node.outside("redis-server");
            command.args(["--bind", &ip, "--port", &port, "--save", "", "--appendonly", "no"]);
            command.args(["--daemonize", "no", "--protected-mode", "no", "--dir"]).arg(&directory);
            command
        }
        Kind::Dnsmasq => {
            let mut command = node.outside("dnsmasq");
            command.args(["--no-daemon", "--conf-file=/dev/null", "--no-resolv", "--no-hosts"]);
            command.args(["--user=root", "--bind-interfaces", &format!("--listen-address={ip}")]);
            command.args([format!("--port={port}"), format!("--txt-record=who.test,{name}")]);
            command.arg(format!("--pid-file={}", directory.join("dnsmasq.pid").display()));
            command
        }
        Kind::Iperf => {
            let mut command = node.outside("iperf3");
            command.args(["--server", "--bind", &ip, "--port", &port, "--forceflush"]);
            command
        }
        Kind::Long => {
            let mut command = node.outside(process::binary("mesh-long")?);
            command.args(["serve", name, &place.to_string()]);
            command
        }
        Kind::Quic => {
            let mut command = node.outside(process::binary("mesh-quic")?);
            command.args(["serve", name, &place.to_string()]);
            command
        }
    };
    // What servers say about each request is of no use in a failed test's output.
    let mut server = Process::spawn(name, command, Echo::Off)?;
    until(&format!("{name} to serve on {place}"), Duration::from_secs(20), || {
        if let Some(status) = server.ended()? {
            bail!("{name} ended ({status}) instead of serving:\n{}", server.log().tail());
        }
        let connected = netns::inside(node.netns(), || TcpStream::connect(place))?;
        Ok(connected.ok())
    })?;
    if kind == Kind::Redis {
        let mut command = node.outside("redis-cli");
        command.args(["-h", &ip, "-p", &port, "set", "who", name]);
        process::stdout(command).context("cannot name the redis server")?;
    }
    Ok(server)
}

fn nginx_conf(name: &str, place: SocketAddr, directory: &Path) -> String {
    let directory = directory.display();
    format!(
        "daemon off; master_process off; pid {directory}/nginx.pid; error_log stderr;\n\
         events {{}}\n\
         http {{\n\
             access_log off; client_body_temp_path {directory}/body; proxy_temp_path {directory}/p;\n\
             fastcgi_temp_path {directory}/f; uwsgi_temp_path {directory}/u;\n\
             scgi_temp_path {directory}/s;\n\
             server {{ listen {place}; location / {{ return 200 \"{name}\\n\"; }} }}\n\
         }}\n"
    )
}
