//! What the README says under Limits of sockets that are not as others: it is so.

use std::process::Command;

use anyhow::{Result, ensure};
use mesh_tests::{Node, Service, check, process};

const ONE: &str = "10.0.0.1:8080";

fn node() -> Result<Node> {
    let app = |name: &str, address: &str| {
        let app = Service::new(name).address(address).port(80, 8080).udp(53, 8080);
        app.endpoint("10.0.0.1")
    };
    let node = Node::builder().backend("a", ONE).virtual_ips("10.96.0.0/16");
    let node = node.service(app("one", "10.96.0.1"));
    node.service(app("two", "10.96.0.2")).start()
}

/// What a script prints; `balanced` or not, it runs in the node's namespace.
fn python(mut command: Command, script: &str) -> Result<String> {
    let begin = "import errno, socket as s, struct\n\
        def told(f, *a):\n  \
          try: return f(*a)\n  \
          except OSError as e: return errno.errorcode.get(e.errno, 'timeout')\n";
    command.args(["-c", &format!("{begin}{script}")]);
    Ok(process::stdout(command)?.trim_end().to_owned())
}

/// `IP_RECVERR`: what the kernel queues there is of the packet, and has the endpoint's address.
#[test]
fn the_error_queue_names_the_endpoint() -> Result<()> {
    let mut node = node()?;
    // Nobody listens there any more: ICMP says so.
    node.kill_server("a")?;
    let script = "c = s.socket(s.AF_INET, s.SOCK_DGRAM)\n\
        c.setsockopt(0, 11, 1)\n\
        c.settimeout(5)\n\
        c.connect(('10.96.0.1', 53))\n\
        c.send(b'who')\n\
        print(told(c.recv, 9), c.getpeername()[0])\n\
        print(c.recvmsg(99, 99, s.MSG_ERRQUEUE)[3][0])\n";
    let said = python(node.command("python3"), script)?;
    let lines: Vec<&str> = said.lines().collect();
    let [before, queued] = lines[..] else { anyhow::bail!("{said}") };
    ensure!(before == "ECONNREFUSED 10.96.0.1", "{said}");
    ensure!(queued == "10.0.0.1", "{said}");
    Ok(())
}

/// To the kernel a connection goes to the endpoint, so two services with one endpoint are one destination.
#[test]
fn a_source_port_counts_once_for_each_endpoint() -> Result<()> {
    let node = node()?;
    let script = "def from_one_port(address):\n  \
          c = s.socket()\n  \
          c.setsockopt(s.SOL_SOCKET, s.SO_REUSEADDR, 1)\n  \
          c.bind(('10.0.0.1', 7777))\n  \
          held.append(c)\n  \
          return c.connect((address, 80))\n\
        held = []\n\
        print(told(from_one_port, '10.96.0.1'), told(from_one_port, '10.96.0.2'))\n";
    let said = python(node.command("python3"), script)?;
    ensure!(said == "None EADDRNOTAVAIL", "{said}");

    // Nor is another endpoint drawn when the ports to one are used up.
    let both = Service::new("one").address("10.96.0.1").port(80, 8080).key("balance: round-robin");
    let both = both.endpoint("10.0.0.1").endpoint("10.0.0.2");
    node.add_address("10.0.0.2".parse()?)?;
    node.agent.write_services("test.yaml", &Service::file(&[both]))?;
    node.agent.until_places("one", &[ONE, "10.0.0.2:8080"])?;
    node.sysctl("net/ipv4/ip_local_port_range", "40000 40000")?;
    let script = "l = s.socket(); l.bind(('10.0.0.2', 8080)); l.listen()\n\
        held = [s.socket() for i in range(5)]\n\
        print(*sorted(str(told(c.connect, ('10.96.0.1', 80))) for c in held))\n\
        print(sorted({c.getsockname()[1] for c in held} - {0}))\n";
    let said = python(node.command("python3"), script)?;
    // One port for each endpoint; three are refused by the kernel after their endpoint was drawn.
    let expected = "EADDRNOTAVAIL EADDRNOTAVAIL EADDRNOTAVAIL None None\n[40000]";
    ensure!(said == expected, "{said}");
    Ok(())
}

/// They are not balanced, and do not reach the service's endpoint: they go wherever the route leads.
#[test]
fn other_protocols_pass() -> Result<()> {
    let node = node()?;
    let script = "l = s.socket(s.AF_INET, s.SOCK_DGRAM, 136)\n\
        l.bind(('10.0.0.1', 8080)); l.settimeout(0.3)\n\
        c = s.socket(s.AF_INET, s.SOCK_DGRAM, 136)\n\
        print(told(c.sendto, b'lite', ('10.96.0.1', 53)), told(l.recv, 9))\n\
        print(told(c.connect, ('10.96.0.1', 53)))\n\
        p = s.socket(s.AF_INET, s.SOCK_DGRAM, 1)\n\
        print(told(p.sendto, bytes([8] + [0] * 7), ('10.96.0.1', 0)))\n\
        print(told(p.connect, ('10.96.0.1', 80)))\n";
    let before = node.agent.refused_by_reason()?;
    node.sysctl("net/ipv4/ping_group_range", "0 2147483647")?;
    // There is no route.
    let said = python(node.command("python3"), script)?;
    let outside = python(node.outside("python3"), script)?;
    ensure!(said == outside, "balanced {said}, not balanced {outside}");
    ensure!(said.starts_with("ENETUNREACH"), "{said}");
    ensure!(node.agent.refused_by_reason()? == before, "nothing is refused");
    // The control: what is balanced does reach it.
    ensure!(check::who(&node, "10.96.0.1:80")? == "a");
    Ok(())
}
