//! Datagram sockets and the peers that they dial themselves: what a socket is connected to it reaches,
//! whichever way it sends; what a peer answers that was dialled directly is that peer's; and a connect that
//! only looks for a route is let go on.

use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use mesh_tests::process::stdout;
use mesh_tests::{Builder, Datagrams, Node, Service, check};
use serde_json::Value;

/// A service of datagrams on port 80, at one endpoint of each address.
fn at(name: &str, addresses: [&str; 2], endpoints: [&str; 2]) -> Service {
    let service = addresses.iter().fold(Service::new(name), |service, on| service.address(on));
    endpoints.iter().fold(service.udp(80, 8080), |service, place| service.endpoint(place))
}

/// At an endpoint inside `virtual-ips`.
fn inner() -> Service {
    at("inner", ["10.96.0.10", "fd00:96::10"], ["10.96.1.1", "fd00:96::1:1"])
}

/// At an endpoint that is another service's address.
fn chain() -> Service {
    at("chain", ["10.96.0.12", "fd00:96::12"], ["10.0.0.2", "fd00::2"])
}

/// That other service.
fn chained() -> Service {
    let chained = Service::new("chained").address("10.0.0.2").address("fd00::2").udp(8080, 8080);
    chained.endpoint("10.0.0.3").endpoint("fd00::3")
}

/// Another one at the endpoint of `chain`.
fn beside() -> Service {
    at("beside", ["10.96.0.13", "fd00:96::13"], ["10.0.0.2", "fd00::2"])
}

/// And one elsewhere.
fn apart() -> Service {
    at("apart", ["10.96.0.14", "fd00:96::14"], ["10.0.0.3", "fd00::3"])
}

fn builder() -> Builder {
    Node::builder()
        .virtual_ips("10.96.0.0/16")
        .virtual_ips("fd00:96::/64")
        .backend("inside", "10.96.1.1:8080")
        .backend("two", "10.0.0.2:8080")
        .backend("three", "10.0.0.3:8080")
        .backend("inside6", "[fd00:96::1:1]:8080")
        .backend("two6", "[fd00::2]:8080")
        .backend("three6", "[fd00::3]:8080")
}

/// A family of sockets, and of the addresses that they dial.
#[derive(Clone, Copy)]
struct Family {
    socket: &'static str,
    is_four: bool,
}

const FAMILIES: [Family; 3] = [
    Family { socket: "4", is_four: true },
    // Mapped.
    Family { socket: "6", is_four: true },
    Family { socket: "6", is_four: false },
];

impl Family {
    fn open(self, node: &Node) -> Result<Datagrams> {
        let mut client = Datagrams::start(check::mesh_client(node)?)?;
        client.did(&format!("open {}", self.socket))?;
        Ok(client)
    }

    fn service(self, number: u32) -> String {
        let address = if self.is_four { "10.96.0.NN" } else { "[fd00:96::NN]" };
        format!("{}:80", address.replace("NN", &number.to_string()))
    }

    fn endpoint(self, number: u32) -> String {
        if self.is_four {
            format!("10.0.0.{number}:8080")
        } else {
            format!("[fd00::{number}]:8080")
        }
    }

    fn name(self, name: &str) -> String {
        if self.is_four { name.to_owned() } else { format!("{name}6") }
    }

    /// What lets a socket receive from anybody again. One of IPv6 keeps the peer that it had when it is
    /// disconnected, and takes nothing from anybody else (`udp6_lib_lookup2`).
    fn disconnect(self) -> String {
        if self.is_four { "disconnect".to_owned() } else { format!("open {}", self.socket) }
    }

    /// The address as the socket sees it.
    fn seen(self, address: &str) -> Result<SocketAddr> {
        let address: SocketAddr = address.parse()?;
        Ok(match address {
            SocketAddr::V4(four) if self.socket == "6" => {
                SocketAddr::new(four.ip().to_ipv6_mapped().into(), four.port())
            }
            other => other,
        })
    }

    /// A step must be answered by this backend, from this address.
    fn answered(self, client: &mut Datagrams, step: &str, name: &str, from: &str) -> Result<()> {
        let answer = client.ask(step)?;
        let expected = (self.name(name), self.seen(from)?);
        ensure!(answer == expected, "IPv{} {step}: {answer:?}, not {expected:?}", self.socket);
        Ok(())
    }
}

/// Opened, over the backends of a service.
fn opened(node: &Node, service: &str) -> Result<u64> {
    let backends: Vec<Value> = node.agent.json(&["backends", service])?;
    Ok(backends.iter().filter_map(|backend| backend["opened"].as_u64()).sum())
}

fn refused(node: &Node) -> Result<u64> {
    Ok(node.agent.refused_by_reason()?.values().sum())
}

/// A connected socket has its endpoint, and reaches it by `send`, by naming the service, and by naming the
/// endpoint: also when that is inside `virtual-ips`, or another service's address. The kernel turns a
/// `send` of a mapped socket into a datagram that names the endpoint.
#[test]
fn what_is_connected_stays_there() -> Result<()> {
    let node = builder().service(inner()).service(chain()).service(chained()).start()?;
    for family in FAMILIES {
        let mut client = family.open(&node)?;
        let inside = if family.is_four { "10.96.1.1:8080" } else { "[fd00:96::1:1]:8080" };
        for (number, endpoint, name) in [(10, inside, "inside"), (12, &family.endpoint(2), "two")] {
            let service = family.service(number);
            client.did(&format!("connect {service}"))?;
            for step in ["ask", &format!("ask {service}"), &format!("ask {endpoint}"), "ask"] {
                family.answered(&mut client, step, name, &service)?;
            }
            ensure!(client.did("peer")?.peer == Some(family.seen(&service)?), "{service}");
        }
        // Not connected any more, the same address is the other service's.
        client.did(&family.disconnect())?;
        family.answered(
            &mut client,
            &format!("ask {}", family.service(12)),
            "two",
            &family.service(12),
        )?;
        let two = family.endpoint(2);
        family.answered(&mut client, &format!("ask {two}"), "three", &two)?;
        // Connected to the endpoint of its own accord, which is a service's address: that is balanced.
        client.did(&format!("connect {two}"))?;
        family.answered(&mut client, "ask", "three", &two)?;
        family.answered(&mut client, &format!("ask {two}"), "three", &two)?;
    }
    ensure!(refused(&node)? == 0, "{:?}", node.agent.refused_by_reason()?);
    ensure!(opened(&node, "inner")? == 3, "once for each socket: {}", opened(&node, "inner")?);
    // One of IPv4 goes on with what it was given when it was connected.
    ensure!(opened(&node, "chain")? == 4, "{}", opened(&node, "chain")?);
    ensure!(opened(&node, "chained")? == 6, "{}", opened(&node, "chained")?);
    Ok(())
}

/// Sockets that were connected before the agent ran, or before the service was there, stay where they
/// are, mapped ones as those of IPv4, also when the service and the agent are gone again.
#[test]
fn what_was_connected_before_stays_there() -> Result<()> {
    let mut node = builder().service(chain()).start_without_agent()?;
    let two = |family: Family| family.endpoint(2);
    let mut clients = Vec::new();
    let mut connect = |node: &Node| -> Result<()> {
        for family in FAMILIES {
            let mut client = family.open(node)?;
            client.did(&format!("connect {}", two(family)))?;
            clients.push((family, client));
        }
        Ok(())
    };
    connect(&node)?;
    node.agent.start()?;
    connect(&node)?;
    let mut all_stay = || -> Result<()> {
        for (family, client) in &mut clients {
            family.answered(client, "ask", "two", &two(*family))?;
            family.answered(client, &format!("ask {}", two(*family)), "two", &two(*family))?;
        }
        Ok(())
    };
    all_stay()?;
    let both = Service::file(&[chain(), chained()]);
    node.agent.write_services("test.yaml", &both)?;
    node.agent.until_places("chained", &["10.0.0.3:8080", "[fd00::3]:8080"])?;
    all_stay()?;
    // Others are balanced.
    for family in FAMILIES {
        let mut client = family.open(&node)?;
        family.answered(&mut client, &format!("ask {}", two(family)), "three", &two(family))?;
    }
    ensure!(opened(&node, "chained")? == 3, "{}", opened(&node, "chained")?);
    node.agent.write_services("test.yaml", &Service::file(&[chain()]))?;
    node.agent.until_gone("chained")?;
    all_stay()?;
    node.agent.kill()?;
    all_stay()?;
    node.agent.start()?;
    ensure!(refused(&node)? == 0, "{:?}", node.agent.refused_by_reason()?);
    node.agent.stop()?;
    all_stay()
}

/// What comes from an endpoint is of whom the socket asked last there: a service, another service, or the
/// endpoint itself.
#[test]
fn an_answer_is_of_whom_was_asked() -> Result<()> {
    let mut node = builder().service(chain()).service(beside()).service(apart()).start()?;
    for family in FAMILIES {
        let (chain, beside, apart) = (family.service(12), family.service(13), family.service(14));
        let (two, three) = (family.endpoint(2), family.endpoint(3));
        let asks = |client: &mut Datagrams, name: &str, address: &str| {
            family.answered(client, &format!("ask {address}"), name, address)
        };
        // By this socket's own record, by its further ones, and by none, in any order.
        let mut client = family.open(&node)?;
        let all = [
            ("two", &chain),
            ("two", &two),
            ("two", &beside),
            ("three", &apart),
            ("three", &three),
        ];
        for first in 0..all.len() {
            client.did(&format!("open {}", family.socket))?;
            for step in 0..25 {
                let (name, address) = all[(first + step + step / 5 * (step % 3)) % 5];
                asks(&mut client, name, address)?;
            }
        }
        // What was asked elsewhere meanwhile changes nothing.
        client.did(&format!("open {}", family.socket))?;
        for (name, address) in [("two", &chain), ("two", &beside), ("three", &apart)] {
            asks(&mut client, name, address)?;
        }
        for (asked, then) in [(&chain, &three), (&two, &apart), (&beside, &apart)] {
            client.did(&format!("send {asked}"))?;
            client.did(&format!("send {then}"))?;
            // Two endpoints answer in any order.
            let mut answers = vec![client.ask("receive")?, client.ask("receive")?];
            answers.sort();
            let mut expected = vec![
                (family.name("two"), family.seen(asked)?),
                (family.name("three"), family.seen(then)?),
            ];
            expected.sort();
            ensure!(answers == expected, "asked {asked}, then {then}: {answers:?}");
        }
        // Connected, it has one peer, and sees what it is connected to.
        client.did(&format!("open {}", family.socket))?;
        client.did(&format!("connect {chain}"))?;
        for step in ["ask", &format!("ask {two}"), &format!("ask {beside}"), "ask"] {
            family.answered(&mut client, step, "two", &chain)?;
        }
        client.did(&format!("open {}", family.socket))?;
        client.did(&format!("connect {two}"))?;
        for step in ["ask", &format!("ask {chain}"), "ask"] {
            family.answered(&mut client, step, "two", &two)?;
            ensure!(client.did("peer")?.peer == Some(family.seen(&two)?), "{step}: its peer");
        }
    }
    // With the programs detached nothing is anybody else's.
    node.agent.stop()?;
    for family in FAMILIES {
        let mut client = family.open(&node)?;
        family.answered(
            &mut client,
            &format!("ask {}", family.endpoint(2)),
            "two",
            &family.endpoint(2),
        )?;
        let service = client.step(&format!("ask {}", family.service(12)))?;
        ensure!(service.backend.is_none(), "control: {service:?}");
    }
    Ok(())
}

/// Also of a socket with as many records as there can be, whose further ones change hands.
#[test]
fn an_answer_of_one_of_many_services() -> Result<()> {
    let service = |number: usize| {
        let name = format!("many-{number}");
        Service::new(&name).address(&format!("10.96.2.{number}")).udp(80, 8080)
    };
    let endpoint = |number: usize| format!("10.0.0.{}:8080", 2 + number % 2);
    let node = (1..=11)
        .fold(builder(), |node, number| node.service(service(number).endpoint(&endpoint(number))));
    let node = node.start()?;
    let mut client = FAMILIES[0].open(&node)?;
    for number in (1..=11).chain([3, 1, 11, 2]) {
        for address in [format!("10.96.2.{number}:80"), endpoint(number)] {
            let name = ["two", "three"][number % 2];
            FAMILIES[0].answered(&mut client, &format!("ask {address}"), name, &address)?;
        }
    }
    Ok(())
}

/// The namespace gets a default route, as nodes have one, towards nobody.
fn add_routes(node: &Node) -> Result<()> {
    for line in [
        "link add probe0 type veth peer name probe1",
        "link set probe0 up",
        "link set probe1 up",
        "address add 172.31.0.2/24 dev probe0",
        "-6 address add fd00:31::2/64 dev probe0 nodad",
        "route add default via 172.31.0.1",
        "-6 route add default via fd00:31::1",
    ] {
        let mut ip = node.outside("ip");
        ip.args(line.split(' '));
        stdout(ip).with_context(|| line.to_owned())?;
    }
    Ok(())
}

/// A UDP connect to a service that has no such UDP port sends nothing: it goes on as dialled, and is
/// neither counted nor told. What names its destination is refused, and so is who belongs to nobody.
#[test]
fn a_connect_that_looks_for_a_route() -> Result<()> {
    let web = Service::new("web").address("10.96.0.20").address("fd00:96::20").port(80, 8080);
    let web = web.endpoint("10.0.0.2").endpoint("fd00::2");
    let mut node = builder().service(web).service(chain()).start()?;
    let probe = |node: &Node, family: Family, port: u16| -> Result<_> {
        let mut client = family.open(node)?;
        client.step(&format!("connect {}", family.service(20).replace(":80", &format!(":{port}"))))
    };
    // Where there is no route, the kernel says so.
    for family in FAMILIES {
        let reply = probe(&node, family, 80)?;
        ensure!(reply.error.as_deref() == Some("ENETUNREACH"), "{reply:?}");
    }
    add_routes(&node)?;
    for family in FAMILIES {
        let own = if family.is_four { "172.31.0.2" } else { "fd00:31::2" };
        let own = family.seen(&SocketAddr::new(own.parse()?, 0).to_string())?.ip();
        let web = family.service(20);
        let mut client = family.open(&node)?;
        for port in [80, 53, 0] {
            let address = web.replace(":80", &format!(":{port}"));
            client.did(&format!("connect {address}"))?;
            let reply = client.did("own")?.own.context("an address")?;
            ensure!(reply.ip() == own, "{address}: own address {reply}, not {own}");
            if port != 0 {
                ensure!(client.did("peer")?.peer == Some(family.seen(&address)?), "{address}");
            }
        }
        // Connected there it sends there, mapped or not, and nobody answers.
        client.did(&format!("connect {web}"))?;
        client.did("send")?;
        client.did(&format!("send {web}"))?;
        // From a service to there, and on: what it had has ended.
        client.did(&format!("connect {}", family.service(12)))?;
        family.answered(&mut client, "ask", "two", &family.service(12))?;
        client.did(&format!("connect {web}"))?;
        ensure!(client.did("peer")?.peer == Some(family.seen(&web)?), "{web}");
        client.did("disconnect")?;
        client.did(&format!("connect {}", family.service(12)))?;
        family.answered(&mut client, "ask", "two", &family.service(12))?;
    }
    ensure!(refused(&node)? == 0, "{:?}", node.agent.refused_by_reason()?);
    let events: Vec<Value> = node.agent.json(&["events"])?;
    ensure!(events.iter().all(|event| event["kind"] != "refused"), "{events:?}");
    let backends: Vec<Value> = node.agent.json(&["backends", "chain"])?;
    ensure!(backends.iter().all(|backend| backend["active"] == 0), "{backends:?}");
    ensure!(opened(&node, "chain")? == 6, "{}", opened(&node, "chain")?);

    for family in FAMILIES {
        for (step, reason) in [
            (format!("send {}", family.service(20)), "no-port"),
            (format!("connect {}", family.service(99)), "no-service"),
            (format!("connect {}", family.service(99).replace(":80", ":0")), "no-service"),
            (format!("send {}", family.service(99)), "no-service"),
        ] {
            let before = node.agent.refused_by_reason()?;
            let reply = family.open(&node)?.step(&step)?;
            ensure!(reply.error.as_deref() == Some("ECONNREFUSED"), "{step}: {reply:?}");
            let after = node.agent.refused_by_reason()?;
            ensure!(after[reason] == before[reason] + 1, "{step}: {before:?}, then {after:?}");
        }
    }
    // `explain` says of a connect what the kernel does.
    for (address, passes) in
        [("10.96.0.20:80", true), ("10.96.0.20:0", true), ("10.96.0.99:80", false)]
    {
        let explained: Value =
            node.agent.get(&format!("/v1/explain?address={address}&protocol=udp"))?;
        let says = explained["steps"].to_string().contains("passed: a UDP connect sends nothing");
        ensure!(
            explained["answer"].is_null() == passes && says == passes,
            "{address}: {explained}"
        );
    }
    check::refused(&node, "10.96.0.20:81", "no-port")?;
    check::refused(&node, "[fd00:96::20]:81", "no-port")?;
    // With the programs detached a probe has the same answer, and nobody the other.
    node.agent.stop()?;
    for family in FAMILIES {
        ensure!(probe(&node, family, 80)?.error.is_none(), "control");
        let reply = family.open(&node)?.step(&format!("connect {}", family.service(99)))?;
        ensure!(reply.error.is_none(), "control: {reply:?}");
    }
    Ok(())
}

/// A name with several addresses: `getaddrinfo` gives them in the order in which it gives them to who is
/// not balanced.
#[test]
fn addresses_of_a_name_keep_their_order() -> Result<()> {
    let web = Service::new("web").address("10.96.0.20").port(80, 8080).endpoint("10.0.0.2");
    let node = builder().service(web).start()?;
    add_routes(&node)?;
    std::fs::write(
        node.directory().join("hosts"),
        "10.96.0.20 db.test\n198.51.100.7 db.test\n10.96.0.99 nobody.test\n198.51.100.7 nobody.test\n",
    )?;
    // Some hosts have no /etc/hosts to mount it over, so what is mounted is a directory of links to what is there.
    let script = r#"
        mkdir -p "$0/former" "$0/etc"
        mount --bind /etc "$0/former"
        for file in "$0"/former/*; do ln -sfn "$file" "$0/etc/"; done
        rm -f "$0/etc/hosts" "$0/etc/nsswitch.conf"
        cp "$0/hosts" "$0/etc/"
        echo "hosts: files" >"$0/etc/nsswitch.conf"
        mount --bind "$0/etc" /etc
        exec python3 -c "$1" "$2"
    "#;
    let order = |mut command: std::process::Command, name: &str| -> Result<String> {
        let ask = "import socket, sys; print([[a[4][0] for a in socket.getaddrinfo(sys.argv[1], port, \
                   type=socket.SOCK_STREAM)] for port in (80, None)])";
        command.args(["--mount", "sh", "-euc", script]).arg(node.directory()).args([ask, name]);
        stdout(command)
    };
    let both = "[['10.96.0.20', '198.51.100.7'], ['10.96.0.20', '198.51.100.7']]";
    let outside = order(node.outside("unshare"), "db.test")?;
    ensure!(outside.trim() == both, "not balanced: {outside}");
    let inside = order(node.command("unshare"), "db.test")?;
    ensure!(inside.trim() == both, "balanced: {inside}");
    ensure!(refused(&node)? == 0, "{:?}", node.agent.refused_by_reason()?);
    // The control: an address that is nobody's is refused, and comes last.
    let nobody = order(node.command("unshare"), "nobody.test")?;
    ensure!(nobody.starts_with("[['198.51.100.7', '10.96.0.99']"), "{nobody}");
    Ok(())
}
