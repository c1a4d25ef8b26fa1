//! What is said about service files that are refused: `testdata/service-files.txt`.

use std::time::Duration;

use mesh_agent::config::{MAX_ADDRESSES, MAX_BACKENDS, MAX_PORTS, parse_services};
use mesh_agent::model::{
    EjectionPolicy, Ending, Fallback, Health, HealthCheck, HealthPolicy, Locality, Pace, Service,
    ServiceName, Tls, Trust, WhenAllUnhealthy,
};
use mesh_common::affinity::By;

/// A case: what it shows, the file, the lines that are expected.
struct Case {
    title: String,
    file: String,
    expected: Vec<String>,
}

fn cases() -> Vec<Case> {
    let mut cases: Vec<Case> = Vec::new();
    for line in include_str!("testdata/service-files.txt").lines() {
        if let Some(title) = line.strip_prefix("== ") {
            cases.push(Case { title: title.into(), file: String::new(), expected: Vec::new() });
        } else if let Some(case) = cases.last_mut() {
            match line.strip_prefix("-- ") {
                Some(expected) => case.expected.push(expected.into()),
                None => case.file.extend([line, "\n"]),
            }
        }
    }
    cases
}

#[test]
fn refusals_name_the_place_and_what_was_expected() {
    let cases = cases();
    assert!(!cases.is_empty());
    let mut wrong = String::new();
    for case in cases {
        let said: Vec<String> = match parse_services(case.file.as_bytes()) {
            Ok(services) => vec![format!("accepted: {services:?}")],
            Err(problems) => problems.iter().map(|problem| problem.line("f.yaml")).collect(),
        };
        if said != case.expected {
            wrong.push_str(&format!("== {}\n-- {}\n\n", case.title, said.join("\n-- ")));
        }
    }
    assert!(wrong.is_empty(), "said, but not expected:\n{wrong}");
}

#[test]
fn garbage_is_refused_in_few_words() {
    let mut state = 1_u32;
    let garbage: Vec<u8> = std::iter::repeat_with(|| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        b' ' + state.to_be_bytes()[0] % 95
    })
    .take(1 << 20)
    .collect();
    let one_word = vec![b'x'; 1 << 20];
    for file in [garbage, one_word] {
        let problems = parse_services(&file).expect_err("garbage");
        let said: usize = problems.iter().map(|problem| problem.line("f.yaml").len()).sum();
        assert!(said < 300, "{problems:?}");
        assert_eq!(problems[0].at.map(|at| at.line), Some(1));
    }
}

#[test]
fn a_mistake_that_repeats_is_told_a_few_times() {
    let file = format!("services: [{}]", "{}, ".repeat(100_000));
    let problems = parse_services(file.as_bytes()).expect_err("empty services");
    assert_eq!(problems.len(), 21);
    assert_eq!(problems[20].line("f.yaml"), "f.yaml: and 399980 more problems");
}

#[test]
fn every_supported_key_is_read() {
    let file = br#"
services:
- name: orders
  addresses: [10.96.0.10, "fd00:96::10"]
  ports:
  - {name: http, port: 80, target: 8080}
  - {port: 443, protocol: tcp}
  balance: random
  health: {tcp: , interval: 2s, timeout: 50ms, rise: 1, fall: 4}
  ejection: {failures: 127, failure-rate: 30%, samples: 50, base: 100ms, max: 6days, share: 100%}
  when-all-unhealthy: refuse
  drain-timeout: 5m
  affinity: {by: namespace, timeout: 5m}
  locality: {}
  slow-start: 30s
  fallback: {service: idle, below: 60%}
  endpoints: &servers
  - {address: "::ffff:10.0.0.1", weight: 0, zone: eu-west-1a, node: n1, priority: 9}
  - {address: "fd00::1", port: 81}
- {name: idle, address: 10.96.0.11, ports: [{port: 1}], endpoints: []}
"#;
    let services = parse_services(file).expect("a valid file");
    let orders = &services[0];
    let addresses: Vec<_> = orders.addresses.iter().map(ToString::to_string).collect();
    assert_eq!(addresses, ["10.96.0.10", "fd00:96::10"]);
    let ports: Vec<_> = orders.ports.iter().map(|p| (&*p.name, p.port, p.target)).collect();
    assert_eq!(ports, [("http", 80, 8080), ("", 443, 443)]);
    let Health::Checked(health) = &orders.health else { panic!("{:?}", orders.health) };
    assert_eq!(
        (&health.check, health.port, health.pace),
        (&HealthCheck::Tcp, None, Pace::default())
    );
    let times = (health.interval.as_millis(), health.timeout.as_millis());
    assert_eq!((times, health.rise, health.fall), ((2000, 50), 1, 4));
    let longest = Duration::from_secs(6 * 86_400);
    let base = Duration::from_millis(100);
    let ejection =
        EjectionPolicy { failures: 127, rate: 30, samples: 50, base, max: longest, share: 100 };
    assert_eq!(orders.ejection, Some(ejection));
    assert_eq!(orders.when_all_unhealthy, WhenAllUnhealthy::Refuse);
    let minutes = |minutes: u64| Some(Duration::from_secs(60 * minutes));
    assert_eq!(orders.drain_timeout, minutes(5));
    let affinity = orders.affinity.expect("affinity");
    assert_eq!((affinity.by, Some(affinity.timeout)), (By::Namespace, minutes(5)));
    assert_eq!(orders.slow_start, Some(Duration::from_secs(30)));
    assert_eq!(orders.locality, Some(Locality { threshold: 70 }));
    assert_eq!(orders.fallback, Some(Fallback { below: 60, back: 60 }));
    let behind = orders.fallback_service.as_ref().map(ServiceName::as_str);
    assert_eq!(behind, Some("idle"));
    let near = &orders.endpoints[0];
    assert_eq!((near.node.as_deref(), near.priority), (Some("n1"), 9));
    let endpoints: Vec<_> = orders
        .endpoints
        .iter()
        .map(|e| (e.address.to_string(), e.port, e.weight, e.zone.as_deref()))
        .collect();
    assert_eq!(
        endpoints,
        [("10.0.0.1".into(), None, 0, Some("eu-west-1a")), ("fd00::1".into(), Some(81), 100, None)]
    );
    assert!(services[1].endpoints.is_empty());
    assert_eq!(services[1].health, Health::Default);
    assert!(parse_services(b"services: []").expect("valid").is_empty());
}

#[test]
fn ejection_is_on_unless_it_is_off() {
    let with = |line: &str| -> Service {
        let file = format!(
            "services:\n- name: a\n  address: 10.96.0.1\n  ports: [{{port: 1}}]\n  endpoints: []\n  \
             {line}\n"
        );
        parse_services(file.as_bytes()).expect("a valid file").remove(0)
    };
    let default = EjectionPolicy::default;
    let seconds = Duration::from_secs;
    let expected = EjectionPolicy {
        failures: 1,
        rate: 50,
        samples: 20,
        base: seconds(1),
        max: seconds(60),
        share: 50,
    };
    assert_eq!(default(), expected);
    for (line, expected) in [
        ("", Some(default())),
        ("ejection: {}", Some(default())),
        ("ejection: {failures: 5}", Some(EjectionPolicy { failures: 5, ..default() })),
        ("ejection: {base: 60s}", Some(EjectionPolicy { base: seconds(60), ..default() })),
        ("ejection: {max: 1s}", Some(EjectionPolicy { max: seconds(1), ..default() })),
        (
            "ejection: {failures: 5, failure-rate: 5%, samples: 1000}",
            Some(EjectionPolicy { failures: 5, rate: 5, samples: 1000, ..default() }),
        ),
        ("ejection: {share: 1%}", Some(EjectionPolicy { share: 1, ..default() })),
        ("ejection: {share: \"20%\"}", Some(EjectionPolicy { share: 20, ..default() })),
        ("ejection: off", None),
        ("ejection: \"off\"", None),
        ("ejection: false", None),
    ] {
        assert_eq!(with(line).ejection, expected, "{line}");
    }
}

#[test]
fn limits_are_named() {
    let list = |count: usize, item: fn(usize) -> String| {
        (0..count).map(item).collect::<Vec<_>>().join(", ")
    };
    let file = |addresses: usize, ports: usize, endpoints: usize| {
        let addresses = list(addresses, |i| format!("10.96.0.{i}"));
        let ports = list(ports, |i| format!("{{port: {}}}", i + 1));
        let endpoints = list(endpoints, |i| format!("{{address: 10.0.0.{i}}}"));
        let text = format!(
            "services:\n- name: a\n  addresses: [{addresses}]\n  ports: [{ports}]\n  \
             endpoints: [{endpoints}]\n"
        );
        parse_services(text.as_bytes())
    };
    let most = MAX_BACKENDS / MAX_PORTS;
    assert_eq!(file(MAX_ADDRESSES, MAX_PORTS, most).map(|s| s.len()), Ok(1));
    for (result, limit) in [
        (file(MAX_ADDRESSES, 65_536, 0), "65536 ports; the limit of one service is 1024: split it"),
        (file(MAX_ADDRESSES + 1, 1, 0), "65 addresses; the limit of one service is 64: split it"),
        (
            file(1, MAX_PORTS, most + 1),
            "1024 ports × 65 endpoints are 66560 backends; the limit of one service is 65536: \
             split it",
        ),
    ] {
        let problems = result.expect_err("above the limit");
        assert_eq!(problems.iter().map(|p| &*p.text).collect::<Vec<_>>(), [limit]);
    }
}

/// The one service of a file, with this health.
fn health(text: &str) -> HealthPolicy {
    let file = format!(
        "services: [{{name: a, address: 10.96.0.10, ports: [{{port: 80}}], endpoints: [], health: {text}}}]"
    );
    let mut services = parse_services(file.as_bytes()).expect("a valid file");
    match services.remove(0).health {
        Health::Checked(policy) => policy,
        other => panic!("{other:?}"),
    }
}

#[test]
fn every_kind_of_check() {
    let HealthCheck::Http(page) = health("{http: }").check else { panic!("another check") };
    assert_eq!((page.path.as_str(), &page.host, page.http2), ("/", &None, false));
    assert_eq!((&*page.expect, page.headers.len(), &page.tls), (&[200..=399][..], 0, &None));
    let all = "{http: {path: /a?b=c, host: 'x.example:81', expect: [200, 301-302], http2: true, \
               headers: {X-Probe: 'a b', accept: '*/*'}}, port: 9090, probe: always, timeout: 1s}";
    let policy = health(all);
    assert_eq!(
        (policy.port, policy.pace, policy.timeout),
        (Some(9090), Pace::Always, policy.interval)
    );
    let HealthCheck::Http(page) = policy.check else { panic!("another check") };
    assert_eq!(page.path.as_str(), "/a?b=c");
    assert_eq!(page.host.as_ref().map(ToString::to_string).as_deref(), Some("x.example:81"));
    assert_eq!((&*page.expect, page.http2), (&[200..=200, 301..=302][..], true));
    let headers: Vec<_> =
        page.headers.iter().map(|(name, value)| (name.as_str(), value.as_bytes())).collect();
    assert_eq!(headers, [("x-probe", &b"a b"[..]), ("accept", &b"*/*"[..])]);
    let HealthCheck::Http(page) = health("{https: {}}").check else { panic!("another check") };
    assert_eq!(page.tls, Some(Tls { server_name: None, trust: Trust::System }));
    let text = "{https: {verify: false, server-name: x.example}}";
    let HealthCheck::Http(page) = health(text).check else { panic!("another check") };
    let tls = page.tls.as_ref().expect("TLS");
    assert_eq!((&tls.trust, tls.server_name.is_some()), (&Trust::Anybody, true));
    let HealthCheck::Grpc(call) = health("{grpc: {}, background: 5m}").check else {
        panic!("another")
    };
    assert_eq!((&*call.service, &call.tls), ("", &None));
    let HealthCheck::Grpc(call) = health("{grpc: {service: orders, tls: {}}}").check else {
        panic!("another")
    };
    assert_eq!((&*call.service, call.tls.is_some()), ("orders", true));
    let policy = health("{command: {run: [/bin/sh, -c, exit 1]}, interval: 3s}");
    let HealthCheck::Command(command) = &policy.check else { panic!("another check") };
    assert_eq!(command.run, ["/bin/sh", "-c", "exit 1"]);
    assert_eq!(policy.timeout, policy.interval, "a program takes time to start");
    let off = b"services: [{name: a, address: 10.96.0.10, ports: [{port: 80}], endpoints: [], health: off}]";
    assert_eq!(parse_services(off).expect("a valid file")[0].health, Health::Off);
    assert_eq!(health("{tcp: {}}").ending, Ending::Never);
    assert_eq!(health("{tcp: {}, end-connections: silent}").ending, Ending::Silent(Ending::AFTER));
    let all = health("{tcp: {}, end-connections: all, end-after: 1m}").ending;
    assert_eq!(all, Ending::All(Duration::from_secs(60)));
    // A default that is longer than the interval gives way.
    let quick = health("{tcp: {}, interval: 100ms}");
    assert_eq!((quick.timeout, quick.interval), (quick.interval, Duration::from_millis(100)));
}

/// What a check needs from a file is looked at when the definition is read, and is said with its place.
#[test]
fn certificates_are_read_with_the_definition() {
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("ca.pem");
    let said = || {
        let file = format!(
            "services:\n- {{name: a, address: 10.96.0.10, ports: [{{port: 80}}], endpoints: [],\n   \
             health: {{https: {{ca: {}}}}}}}\n",
            file.display()
        );
        match parse_services(file.as_bytes()) {
            Ok(_) => None,
            Err(problems) => Some(
                problems.iter().map(|problem| problem.line("f")).collect::<Vec<_>>().join("\n"),
            ),
        }
    };
    let missing = said().expect("no file");
    assert!(missing.starts_with("f:3:25: ") && missing.contains("No such file"), "{missing}");
    std::fs::write(&file, "certificates").expect("written");
    assert!(said().expect("no certificate").contains("it has no certificate"));
    std::fs::write(&file, "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
        .expect("written");
    let damaged = said().expect("no certificate");
    assert!(damaged.contains("expected certificates in PEM"), "{damaged}");
    std::fs::remove_file(&file).expect("removed");
    std::fs::create_dir(&file).expect("made");
    assert!(said().expect("a directory").contains("it is no file"));
}
