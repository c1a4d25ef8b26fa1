//! Unmodified programs that send datagrams reach the endpoints of a service through its address, of
//! both families. Each test ends with its control: with the agent stopped the same program must fail.

use std::net::UdpSocket;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use mesh_tests::server::Kind;
use mesh_tests::sys::netns;
use mesh_tests::{Builder, Node, Service, check, process};

const NAMES: [&str; 3] = ["a", "b", "c"];
const ADDRESSES: [&str; 2] = ["10.96.0.53", "fd00:96::53"];

fn place(four: bool, number: usize, port: u16) -> String {
    if four { format!("10.0.0.{number}:{port}") } else { format!("[fd00::{number}]:{port}") }
}

/// Three backends of one kind behind the port, of one family.
fn three(kind: Kind, four: bool, port: u16) -> Builder {
    let app = Service::new("app").address(ADDRESSES[usize::from(!four)]).udp(port, 5353);
    let app = (1..=3).fold(app, |app, n| app.endpoint(&place(four, n, 5353)));
    let node = (1..=3).zip(NAMES);
    node.fold(Node::builder(), |node, (n, name)| node.server(kind, name, &place(four, n, 5353)))
        .service(app)
}

#[test]
fn dig_and_dnsmasq() -> Result<()> {
    for (four, address) in [true, false].into_iter().zip(ADDRESSES) {
        check::balanced(&mut three(Kind::Dnsmasq, four, 53).start()?, &NAMES, |node| {
            let mut dig = node.command("dig");
            dig.args(["+short", "+time=2", "+tries=1", &format!("@{address}"), "who.test", "TXT"]);
            Ok(process::stdout(dig)?.trim_matches('"').to_owned())
        })?;
    }
    Ok(())
}

/// Sockets that are not connected, with control messages, many datagrams in one call, and a partner who
/// has to stay the same.
fn quic(four: bool, address: &str) -> Result<()> {
    check::balanced(&mut three(Kind::Quic, four, 443).start()?, &NAMES, |node| {
        let mut quic = node.command(process::binary("mesh-quic")?);
        quic.args(["ask", address]);
        process::stdout(quic)
    })
}

#[test]
fn quic_over_ipv4() -> Result<()> {
    quic(true, "10.96.0.53:443")
}

#[test]
fn quic_over_ipv6() -> Result<()> {
    quic(false, "[fd00:96::53]:443")
}

/// Its control connection and its datagrams go to one server each, so there is but one.
#[test]
fn iperf_with_datagrams() -> Result<()> {
    for (four, address) in [true, false].into_iter().zip(ADDRESSES) {
        let place = place(four, 1, 5353);
        let app = Service::new("app").address(address).udp(5201, 5353).port(5201, 5353);
        let node = Node::builder().server(Kind::Iperf, "a", &place).service(app.endpoint(&place));
        let mut node = node.start()?;
        let run = |node: &Node| -> Result<serde_json::Value> {
            let mut iperf = node.command("iperf3");
            iperf.args(["--client", address, "--udp", "--bitrate", "5M", "--time", "1", "--json"]);
            iperf.args(["--connect-timeout", "2000"]);
            let report: serde_json::Value = serde_json::from_str(&process::stdout(iperf)?)?;
            ensure!(report["error"].is_null(), "{}", report["error"]);
            Ok(report)
        };
        let report = run(&node)?;
        let received = report["end"]["sum_received"]["packets"].as_u64().unwrap_or_default();
        ensure!(received > 10, "{report}");
        let backends: Vec<serde_json::Value> = node.agent.json(&["backends", "app"])?;
        ensure!(backends.iter().all(|b| b["opened"].as_u64() >= Some(1)), "{backends:?}");
        node.agent.stop()?;
        ensure!(run(&node).is_err(), "control: it works with the agent stopped");
    }
    Ok(())
}

/// A program that only sends: what it sends arrives at a backend.
#[test]
fn logger_to_syslog() -> Result<()> {
    for (four, address) in [true, false].into_iter().zip(ADDRESSES) {
        let place = place(four, 1, 5514);
        let app = Service::new("app").address(address).udp(514, 5514).endpoint(&place);
        let mut node = Node::builder().service(app).start()?;
        let place: std::net::SocketAddr = place.parse()?;
        node.add_address(place.ip())?;
        let socket = netns::inside(node.netns(), || UdpSocket::bind(place))??;
        socket.set_read_timeout(Some(Duration::from_secs(5)))?;
        let log = |node: &Node, message: &str| {
            let mut logger = node.command("logger");
            logger.args(["--server", address, "--port", "514", "--udp", message]);
            process::stdout(logger)
        };
        log(&node, "a message of the test")?;
        let mut buffer = [0; 2048];
        let length = socket.recv(&mut buffer)?;
        let line = String::from_utf8_lossy(&buffer[..length]).into_owned();
        ensure!(line.contains("a message of the test"), "{line}");
        node.agent.stop()?;
        // It may fail, or not notice.
        let _ = log(&node, "another one");
        socket.set_read_timeout(Some(Duration::from_millis(300)))?;
        if socket.recv(&mut buffer).is_ok() {
            bail!("control: it arrives with the agent stopped");
        }
    }
    Ok(())
}
