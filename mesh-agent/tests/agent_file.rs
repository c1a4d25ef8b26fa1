//! The agent file: defaults, every key, and what is said about what is refused.

use std::path::Path;
use std::time::Duration;

use mesh_agent::commands::Account;
use mesh_agent::config::{Config, ConfigError, Exclude, Source};
use mesh_agent::model::{Ending, HealthCheck, HealthPolicy, Pace};
use mesh_common::Limits;

fn refused(text: &str) -> Vec<String> {
    let problems = Config::parse(text.as_bytes()).expect_err("a refused file");
    problems.iter().map(|problem| problem.line("a")).collect()
}

#[test]
fn every_key_has_its_default() {
    let config = Config::parse(b"# nothing\n").expect("valid");
    assert_eq!(config, Config::default());
    assert!(!config.node.is_empty());
    assert_eq!(config.cgroup, None);
    assert_eq!(config.socket, Path::new("/run/mesh/agent.sock"));
    assert_eq!(config.pin_dir, Path::new("/sys/fs/bpf/mesh"));
    assert_eq!(config.sources, [Source::Files { directory: "/etc/mesh/services.d".into() }]);
}

#[test]
fn every_key_is_read() {
    let text = r#"
node: {name: node-a, zone: eu-west-1a}
cgroup: /sys/fs/cgroup
exclude: {cgroups: [/sys/fs/cgroup/a], namespaces: [/run/netns/b]}
socket: /run/a.sock
pin-dir: /sys/fs/bpf/a
virtual-ips: [10.96.0.0/16, "fd00:96::/64", 10.97.0.1]
limits: {frontends: 1000, backends: 3000, connections: 200000, affinities: 5000}
metrics: {listen: "[::1]:9000"}
canary: false
health: {tcp: {}, interval: 5s, rise: 1, end-connections: silent, end-after: 1m}
command-checks: {user: 3000000000}
sources:
- files: {directory: /a}
- files: {directory: /b}
- files:
"#;
    let config = Config::parse(text.as_bytes()).expect("valid");
    let directories = ["/a", "/b", "/etc/mesh/services.d"];
    let expected = Config {
        node: "node-a".into(),
        zone: Some("eu-west-1a".into()),
        cgroup: Some("/sys/fs/cgroup".into()),
        exclude: Exclude {
            cgroups: vec!["/sys/fs/cgroup/a".into()],
            namespaces: vec!["/run/netns/b".into()],
        },
        socket: "/run/a.sock".into(),
        pin_dir: "/sys/fs/bpf/a".into(),
        virtual_ips: ["10.96.0.0/16", "fd00:96::/64", "10.97.0.1/32"]
            .map(|net| net.parse().expect("a network"))
            .into(),
        limits: Limits { frontends: 1000, backends: 3000, pins: 5000, records: 262_144 },
        canary: false,
        health: Some(HealthPolicy {
            check: HealthCheck::Tcp,
            port: None,
            pace: Pace::default(),
            interval: Duration::from_secs(5),
            timeout: HealthPolicy::TIMEOUT,
            rise: 1,
            fall: HealthPolicy::FALL,
            ending: Ending::Silent(Duration::from_secs(60)),
        }),
        commands: Some(Account {
            name: "3000000000".into(),
            uid: 3_000_000_000,
            gid: 3_000_000_000,
        }),
        metrics: Some("[::1]:9000".parse().expect("an address")),
        sources: directories.map(|d| Source::Files { directory: d.into() }).into(),
    };
    assert_eq!(config, expected);
}

#[test]
fn refusals_name_the_place_and_what_was_expected() {
    let said = refused(
        r#"state-dir: /var/lib/mesh
nod: {}
node: {name: "a b"}
cgroup: sys/fs/cgroup
virtual-ips: [10.96.0.1/16, 0.0.0.0/0, "::/64", "::ffff:10.0.0.0/112", ten, 10.1.0.0/16, 10.1.0.0/16]
sources: [{kubernetes: {}}, {file: {}}, {}, {files: {dir: /a}}, {files: {directory: a}}]
"#,
    );
    let expected = [
        "a:1:1: `state-dir` is not supported yet; remove it (allowed in the agent file: node, cgroup, exclude, socket, pin-dir, virtual-ips, limits, metrics, canary, health, command-checks, sources)",
        "a:2:1: unknown key \"nod\"; allowed in the agent file: node, cgroup, exclude, socket, pin-dir, virtual-ips, limits, metrics, canary, health, command-checks, sources",
        "a:3:14: expected a node name of 1 to 253 visible characters; it has spaces or control characters: \"a b\"",
        "a:4:9: expected a cgroup directory that begins with /; found \"sys/fs/cgroup\"",
        "a:5:15: 10.96.0.1/16 has bits set behind its prefix; write 10.96.0.0/16",
        "a:5:29: 0.0.0.0/0 covers every address, so every other connect would be refused; expected a prefix of your own",
        "a:5:40: ::/64 covers IPv4-mapped addresses; write IPv4 networks as IPv4",
        "a:5:49: ::ffff:10.0.0.0/112 covers IPv4-mapped addresses; write IPv4 networks as IPv4",
        "a:5:72: expected a network such as 10.96.0.0/16 or \"fd00:96::/64\"; found \"ten\"",
        "a:5:90: 10.1.0.0/16 is here twice; keep one",
        "a:6:12: `kubernetes` is not supported yet; remove it (allowed in a source: files)",
        "a:6:30: unknown key \"file\"; allowed in a source: files",
        "a:6:41: the kind of source is missing; expected files: {directory: …}",
        "a:6:54: unknown key \"dir\"; allowed in files: directory",
        "a:6:85: expected a directory that begins with /; found \"a\"",
    ];
    assert_eq!(said, expected);
    assert_eq!(
        refused(r#"virtual-ips: [127.0.0.0/8, 127.0.0.53, 126.0.0.0/7, "::1", "::/96"]"#),
        [
            "a:1:15: 127.0.0.0/8 covers loopback addresses, so every other connect to them would be refused; expected a range outside 127.0.0.0/8",
            "a:1:28: 127.0.0.53/32 covers loopback addresses, so every other connect to them would be refused; expected a range outside 127.0.0.0/8",
            "a:1:40: 126.0.0.0/7 covers loopback addresses, so every other connect to them would be refused; expected a range outside 127.0.0.0/8",
            "a:1:53: ::1/128 covers loopback addresses, so every other connect to them would be refused; expected a range outside ::1/128",
            "a:1:60: ::/96 covers loopback addresses, so every other connect to them would be refused; expected a range outside ::1/128",
        ]
    );
    // Link-local IPv4 addresses are services' on many nodes.
    assert_eq!(
        refused(
            r#"virtual-ips: [169.254.0.0/16, 239.0.0.0/8, 0.0.0.0/32, "fe80::/64", "ff02::/16", "::"]"#
        ),
        [
            "a:1:31: 239.0.0.0/8 covers multicast addresses, which no service can have, so all that is sent to them would be refused; expected a range outside 224.0.0.0/4",
            "a:1:44: 0.0.0.0/32 covers unspecified addresses, which no service can have, so all that is sent to them would be refused; expected a range outside 0.0.0.0/8",
            "a:1:56: fe80::/64 covers link-local addresses, which no service can have, so all that is sent to them would be refused; expected a range outside fe80::/10",
            "a:1:69: ff02::/16 covers multicast addresses, which no service can have, so all that is sent to them would be refused; expected a range outside ff00::/8",
            "a:1:82: ::/128 covers unspecified addresses, which no service can have, so all that is sent to them would be refused; expected a range outside ::/128",
        ]
    );
    assert_eq!(
        refused("limits: {frontends: 3, backends: many, connections: 65535, entries: 1}"),
        [
            "a:1:21: frontends: expected a number from 16 to 2097152; found \"3\"",
            "a:1:34: backends: expected a number from 16 to 2097152; found \"many\"",
            "a:1:53: connections: expected a number from 65536 to 4194304; found \"65535\"",
            "a:1:60: unknown key \"entries\"; allowed in limits: frontends, backends, connections, affinities",
        ]
    );
    assert_eq!(
        refused("sources: [{files: {directory: /a}}, {files: {directory: /a}}]"),
        ["a:1:37: the directory \"/a\" is here twice; keep one"]
    );
    assert_eq!(
        refused("command-checks: {user: root, group: x}"),
        [
            "a:1:24: root is root, or in its group, who may do everything; expected a user other than root",
            "a:1:30: unknown key \"group\"; allowed in command-checks: user",
        ]
    );
    assert_eq!(
        refused("command-checks: {user: no.such.user}"),
        ["a:1:24: there is no user no.such.user in /etc/passwd; expected a user other than root"]
    );
}

#[test]
fn errors_are_one_line_with_the_file() {
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("agent.yaml");
    let missing = Config::load(Some(&file)).expect_err("no such file");
    assert!(matches!(missing, ConfigError::Read { .. }));
    let missing = missing.to_string();
    assert!(
        missing.contains("agent.yaml") && missing.ends_with("or leave out --config"),
        "{missing}"
    );

    std::fs::write(&file, "a: 1\nb: 2\n").expect("written");
    let invalid = Config::load(Some(&file)).expect_err("unknown keys").to_string();
    let place = format!("{}:1:1: unknown key \"a\"", file.display());
    assert!(invalid.starts_with(&place), "{invalid}");
    assert!(invalid.ends_with(" (and 1 more problem)"), "{invalid}");
}

#[test]
fn metrics_are_had_at_an_address_or_nowhere() {
    let listen = |text: &str| Config::parse(text.as_bytes()).map(|config| config.metrics);
    let usual = Config::default().metrics;
    assert_eq!(usual, "127.0.0.1:9464".parse().ok());
    for text in ["metrics: {}", "metrics: {listen: 127.0.0.1:9464}"] {
        assert_eq!(listen(text), Ok(usual), "{text}");
    }
    assert_eq!(listen("metrics: {listen: none}"), Ok(None));
    const EXPECTED: &str =
        "expected an address and port such as 127.0.0.1:9464 or \"[::1]:9464\", or none";
    for (text, end) in [
        ("localhost:9464", "; found \"localhost:9464\""),
        (":9464", "; found \":9464\""),
        ("127.0.0.1", "; found \"127.0.0.1\""),
        ("127.0.0.1:0", "; port 0 is none that can be found"),
    ] {
        let said = refused(&format!("metrics: {{listen: \"{text}\"}}"));
        assert_eq!(said, [format!("a:1:19: {EXPECTED}{end}")]);
    }
    let said = refused("metrics: {port: 9464}");
    assert_eq!(said, ["a:1:11: unknown key \"port\"; allowed in metrics: listen"]);
}
