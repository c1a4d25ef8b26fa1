//! Envoy with its TCP filter, and its defaults otherwise.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::process::Command;

use anyhow::{Context as _, Result};
use mesh_tests::{Node, process};

use crate::scene::{BACKENDS, PORT, TARGET_PORT, address};

/// Where xtask says that it is.
const BINARY_VARIABLE: &str = "MESH_ENVOY_BIN";

/// What runs it in the node, with one service.
///
/// # Errors
///
/// It is not installed, or its file cannot be written.
pub fn command(node: &Node) -> Result<Command> {
    let ip = address(0);
    node.add_address(ip.parse()?)?;
    let endpoints: Vec<_> = BACKENDS
        .iter()
        .map(|ip| format!("{{endpoint: {{address: {}}}}}", socket(ip, TARGET_PORT)))
        .collect();
    let text = format!(
        "static_resources:\n\
         \x20 listeners:\n\
         \x20 - name: service\n\
         \x20   address: {}\n\
         \x20   filter_chains:\n\
         \x20   - filters:\n\
         \x20     - name: envoy.filters.network.tcp_proxy\n\
         \x20       typed_config:\n\
         \x20         \"@type\": type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy\n\
         \x20         stat_prefix: service\n\
         \x20         cluster: backends\n\
         \x20 clusters:\n\
         \x20 - name: backends\n\
         \x20   type: STATIC\n\
         \x20   lb_policy: RANDOM\n\
         \x20   load_assignment:\n\
         \x20     cluster_name: backends\n\
         \x20     endpoints: [{{lb_endpoints: [{}]}}]\n",
        socket(&ip, PORT),
        endpoints.join(", ")
    );
    let file = node.directory().join("envoy.yaml");
    fs::write(&file, text)?;
    // In the node's cgroup, with which it ends however this process does.
    let mut command = node.command(binary()?);
    // Without a second one to hand over to, which would need shared memory.
    command.args(["--disable-hot-restart", "--log-level", "warning", "-c"]).arg(file);
    Ok(command)
}

/// Which version is installed.
///
/// # Errors
///
/// None is.
pub fn version() -> Result<String> {
    let mut envoy = Command::new(binary()?);
    envoy.arg("--version");
    let text = process::stdout(envoy)?;
    // "… version: COMMIT/VERSION/…", after a path.
    let version = text.split(" version: ").nth(1).and_then(|version| version.split('/').nth(1));
    let version = version.with_context(|| format!("envoy printed {text:?}"))?;
    Ok(format!("Envoy {version}"))
}

fn socket(ip: &str, port: u16) -> String {
    format!("{{socket_address: {{address: {ip}, port_value: {port}}}}}")
}

fn binary() -> Result<OsString> {
    env::var_os(BINARY_VARIABLE).with_context(|| {
        format!("{BINARY_VARIABLE} does not say where Envoy is: run `cargo xtask bench`")
    })
}
