//! HAProxy in TCP mode, with its defaults.

use std::fmt::Write as _;
use std::fs;
use std::process::Command;

use anyhow::Result;
use mesh_tests::{Node, process};

use crate::scene::{BACKENDS, PORT, TARGET_PORT, address};

/// What runs it in the node, with one service.
///
/// # Errors
///
/// Its file cannot be written.
pub fn command(node: &Node) -> Result<Command> {
    let ip = address(0);
    node.add_address(ip.parse()?)?;
    let mut text = format!(
        "global\n\
         \x20 maxconn 4000\n\
         defaults\n\
         \x20 mode tcp\n\
         \x20 timeout connect 5s\n\
         \x20 timeout client 1m\n\
         \x20 timeout server 1m\n\
         frontend service\n\
         \x20 bind {ip}:{PORT}\n\
         \x20 default_backend backends\n\
         backend backends\n\
         \x20 balance random\n"
    );
    for (number, ip) in BACKENDS.iter().enumerate() {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "  server b{number} {ip}:{TARGET_PORT}");
    }
    let file = node.directory().join("haproxy.cfg");
    fs::write(&file, text)?;
    // In the node's cgroup, with which it ends however this process does.
    let mut command = node.command("haproxy");
    // In the foreground.
    command.arg("-db").arg("-f").arg(file);
    Ok(command)
}

/// Which version is installed.
///
/// # Errors
///
/// None is.
pub fn version() -> Result<String> {
    let mut haproxy = Command::new("haproxy");
    haproxy.arg("-v");
    let text = process::stdout(haproxy)?;
    let first = text.lines().next().unwrap_or_default();
    Ok(first.split(" - ").next().unwrap_or_default().to_owned())
}
