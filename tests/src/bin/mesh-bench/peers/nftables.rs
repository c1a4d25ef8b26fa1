//! Address translation by the kernel, with the rules that kube-proxy's nftables mode writes
//! (KEP-3866): a verdict map from address, protocol and port to a chain of the service, which draws
//! a chain of an endpoint, which translates.
//!
//! What is left out costs a connect nothing or makes these rules cheaper: firewalls, node ports,
//! affinity, masquerading of what was marked. One thing is written otherwise: the map in a
//! service's chain has a name here. To give a map without a name its number, the kernel looks at
//! all others, which takes a quarter of an hour for 60,000; a look-up in either is the same.

use std::fmt::Write as _;
use std::fs;
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};
use mesh_tests::{Node, process};

use crate::scene::{BACKENDS, PORT, SERVICE_RANGE, TARGET_PORT, address};

/// Where clients have their connections from: not a backend's address, which kube-proxy would mark
/// for masquerading.
const CLIENT: &str = "10.0.0.9";

/// Loading takes longer than in proportion: the kernel looks through all maps for each.
const LIMIT: Duration = Duration::from_secs(1_800);

/// Loads rules for so many services into the node's namespace.
///
/// # Errors
///
/// `nft` is not installed, or does not load them.
pub fn load(node: &Node, services: u32) -> Result<()> {
    node.add_address(CLIENT.parse()?)?;
    // The address is translated after a route was found for it. Without translation nobody is there.
    let mut route = node.outside("ip");
    route.args(["route", "add", SERVICE_RANGE, "dev", "lo", "src", CLIENT]);
    process::stdout(route)?;
    let file = node.directory().join("rules.nft");
    fs::write(&file, rules(services))?;
    let mut nft = node.outside("nft");
    nft.arg("-f").arg(&file);
    let output = process::run_within(nft, LIMIT)?;
    let message = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "nft: {}: {}", output.status, message.trim());
    Ok(())
}

/// Which version is installed.
///
/// # Errors
///
/// None is.
pub fn version() -> Result<String> {
    let mut nft = Command::new("nft");
    nft.arg("--version");
    process::stdout(nft)
}

fn rules(services: u32) -> String {
    let mut rules = String::from(
        "table ip kube-proxy {\n\
         chain mark-for-masquerade { meta mark set meta mark or 0x4000; }\n",
    );
    let mut frontends = Vec::new();
    for number in 0..services {
        // The first one takes datagrams too.
        let protocols: &[_] = if number == 0 { &["tcp", "udp"] } else { &["tcp"] };
        for protocol in protocols {
            let name = format!("{number}-{protocol}");
            service(&mut rules, &name, protocol);
            frontends
                .push(format!("{} . {protocol} . {PORT} : goto service-{name}", address(number)));
        }
    }
    let frontends = frontends.join(",\n");
    // Writing to a string cannot fail.
    let _ = write!(
        rules,
        "map service-ips {{\n\
         type ipv4_addr . inet_proto . inet_service : verdict;\n\
         elements = {{ {frontends} }}\n\
         }}\n\
         chain services {{ ip daddr . meta l4proto . th dport vmap @service-ips; }}\n\
         chain nat-output {{ type nat hook output priority -100; jump services; }}\n\
         }}\n"
    );
    rules
}

/// The chains of a service and of its endpoints.
fn service(rules: &mut String, name: &str, protocol: &str) {
    let mut verdicts = Vec::new();
    for (number, ip) in BACKENDS.iter().enumerate() {
        // Writing to a string cannot fail.
        let _ = writeln!(
            rules,
            "chain endpoint-{name}-{number} {{ ip saddr {ip} jump mark-for-masquerade; \
             meta l4proto {protocol} dnat to {ip}:{TARGET_PORT}; }}"
        );
        verdicts.push(format!("{number} : goto endpoint-{name}-{number}"));
    }
    let (count, verdicts) = (verdicts.len(), verdicts.join(", "));
    // Writing to a string cannot fail.
    let _ = writeln!(
        rules,
        "map endpoints-{name} {{ typeof numgen random mod {count} : verdict; size {count}; \
         elements = {{ {verdicts} }} }}\n\
         chain service-{name} {{ numgen random mod {count} vmap @endpoints-{name}; }}"
    );
}
