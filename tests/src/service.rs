//! Service definitions, as the YAML that a person would write.

use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};

/// A service in the making.
#[derive(Clone, Debug, Default)]
pub struct Service {
    name: String,
    addresses: Vec<String>,
    /// What clients dial, where endpoints listen, and the protocol.
    ports: Vec<(u16, u16, &'static str)>,
    extra: Vec<String>,
    /// Each with its other keys, as `, key: value`.
    endpoints: Vec<(String, String)>,
}

impl Service {
    /// A service of this name, without anything yet.
    #[must_use]
    pub fn new(name: &str) -> Self {
        Self { name: name.to_owned(), ..Self::default() }
    }

    /// An address that clients dial.
    #[must_use]
    pub fn address(mut self, address: &str) -> Self {
        self.addresses.push(address.to_owned());
        self
    }

    /// A port, and where endpoints listen that name no port themselves.
    #[must_use]
    pub fn port(mut self, port: u16, target: u16) -> Self {
        self.ports.push((port, target, "tcp"));
        self
    }

    /// The same for datagrams.
    #[must_use]
    pub fn udp(mut self, port: u16, target: u16) -> Self {
        self.ports.push((port, target, "udp"));
        self
    }

    /// An endpoint: `ip`, `ip:port` or `[ip]:port`.
    #[must_use]
    pub fn endpoint(mut self, endpoint: &str) -> Self {
        self.endpoints.push((endpoint.to_owned(), String::new()));
        self
    }

    /// An endpoint with a weight.
    #[must_use]
    pub fn weighted(mut self, endpoint: &str, weight: u32) -> Self {
        self.endpoints.push((endpoint.to_owned(), format!(", weight: {weight}")));
        self
    }

    /// An endpoint with other keys, as `key: value, key: value`.
    #[must_use]
    pub fn endpoint_with(mut self, endpoint: &str, keys: &str) -> Self {
        self.endpoints.push((endpoint.to_owned(), format!(", {keys}")));
        self
    }

    /// An endpoint that takes no new connection while another one is usable.
    #[must_use]
    pub fn drained(mut self, endpoint: &str) -> Self {
        self.endpoints.push((endpoint.to_owned(), ", drain: true".to_owned()));
        self
    }

    /// TCP health checks, every `interval_ms`, with two passes to rise and two failures to fall.
    #[must_use]
    pub fn checked_every(self, interval_ms: u32) -> Self {
        let timeout = interval_ms.min(200);
        self.key(&format!(
            "health: {{tcp: {{}}, probe: always, interval: {interval_ms}ms, timeout: {timeout}ms, \
             rise: 2, fall: 2}}"
        ))
    }

    /// When endpoints are ejected: the value of the key, such as `off` or `{failures: 3}`.
    #[must_use]
    pub fn ejection(self, value: &str) -> Self {
        self.key(&format!("ejection: {value}"))
    }

    /// Any other key of the service, as `key: value`.
    #[must_use]
    pub fn key(mut self, line: &str) -> Self {
        self.extra.push(line.to_owned());
        self
    }

    /// A service file of these services.
    #[must_use]
    pub fn file(services: &[Self]) -> String {
        if services.is_empty() {
            return "services: []\n".to_owned();
        }
        services.iter().fold("services:\n".to_owned(), |file, service| file + &service.yaml())
    }

    fn yaml(&self) -> String {
        let mut out = format!("- name: {}\n", self.name);
        let addresses: Vec<_> = self.addresses.iter().map(|a| format!("\"{a}\"")).collect();
        // Writing to a string cannot fail.
        let _ = match &addresses[..] {
            [one] => writeln!(out, "  address: {one}"),
            more => writeln!(out, "  addresses: [{}]", more.join(", ")),
        };
        out.push_str("  ports:\n");
        for (port, target, protocol) in &self.ports {
            let more = if *protocol == "tcp" { "" } else { ", protocol: udp" };
            let _ = writeln!(out, "  - {{port: {port}, target: {target}{more}}}");
        }
        for line in &self.extra {
            let _ = writeln!(out, "  {line}");
        }
        if self.endpoints.is_empty() {
            out.push_str("  endpoints: []\n");
        } else {
            out.push_str("  endpoints:\n");
        }
        for (endpoint, more) in &self.endpoints {
            let _ = writeln!(out, "  - {{{}{more}}}", place(endpoint));
        }
        out
    }
}

/// `address` and, where the text has one, `port`.
fn place(endpoint: &str) -> String {
    match endpoint.parse::<SocketAddr>() {
        Ok(place) => format!("address: \"{}\", port: {}", place.ip(), place.port()),
        Err(_) => {
            debug_assert!(endpoint.parse::<IpAddr>().is_ok(), "{endpoint} is not an endpoint");
            format!("address: \"{endpoint}\"")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_what_people_write() {
        let service = Service::new("orders")
            .address("10.96.0.10")
            .port(80, 8080)
            .key("when-all-unhealthy: refuse")
            .ejection("{failures: 3, share: 20%}")
            .endpoint("10.0.0.1")
            .weighted("[fd00::1]:81", 5);
        let expected = "\
services:
- name: orders
  address: \"10.96.0.10\"
  ports:
  - {port: 80, target: 8080}
  when-all-unhealthy: refuse
  ejection: {failures: 3, share: 20%}
  endpoints:
  - {address: \"10.0.0.1\"}
  - {address: \"fd00::1\", port: 81, weight: 5}
";
        assert_eq!(Service::file(&[service]), expected);
    }
}
