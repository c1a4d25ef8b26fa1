//! Each table against a whole example, so that what people see changes only on purpose.

use super::super::output::WIDTH;
use super::*;
use crate::api::types::{
    BackendCounts, Candidate, Counters, Failures, Input, LastError, Map, Program, Refused, Source,
    Step,
};

const PLAIN: Style = Style { wide: false, colour: false, width: WIDTH };
const WIDE: Style = Style { wide: true, ..PLAIN };

fn now() -> SystemTime {
    humantime::parse_rfc3339("2026-01-10T00:03:00Z").expect("time")
}

fn assert_table(shown: &str, expected: &str) {
    let expected = expected.trim_start_matches('\n');
    assert_eq!(shown, expected, "\n{shown}");
}

fn service(name: &str, frontends: &[&str]) -> Service {
    Service {
        name: name.into(),
        source: "files /etc/mesh/services.d".into(),
        balance: "random".into(),
        frontends: frontends
            .iter()
            .map(|address| Frontend {
                address: (*address).into(),
                port: 80,
                protocol: "tcp".into(),
            })
            .collect(),
        backends: BackendCounts { total: 12, healthy: 3 },
        active: 0,
        opened: 0,
        failed: 0,
        failures: Failures::default(),
        refused: Vec::new(),
        problems: Vec::new(),
    }
}

#[test]
fn services_are_short_and_wide() {
    let mut shadowed = service("web", &["10.96.0.11"]);
    shadowed.problems.push("10.96.0.10:80/tcp is taken by service orders".into());
    let list = [service("orders", &["10.96.0.10", "fd00:96::10"]), shadowed];
    assert_table(
        &services(&list, PLAIN),
        "
NAME    BALANCE  HEALTHY  FRONTENDS             SOURCE
orders  random   3/12     10.96.0.10:80/tcp +1  files /etc/mesh/services.d
web     random   3/12     10.96.0.11:80/tcp     files /etc/mesh/services.d
web: 10.96.0.10:80/tcp is taken by service orders
",
    );
    assert!(services(&list, WIDE).contains("10.96.0.10:80/tcp [fd00:96::10]:80/tcp"));
}

fn input(by: &str, state: &str, dated: bool) -> Input {
    let since = dated.then(|| "2026-01-10T00:00:00Z".to_owned());
    Input { by: by.into(), state: state.into(), reason: "why".into(), since }
}

#[test]
fn backends_fit_the_width() {
    let backend = Backend {
        service: "orders".into(),
        port: 80,
        protocol: "tcp".into(),
        address: "10.0.0.1:8080".into(),
        state: "unhealthy".into(),
        reason: "connection refused".into(),
        weight: 100,
        zone: Some("eu-west-1a".into()),
        active: 1,
        opened: 7,
        failed: 2,
        failures: Failures { refused: 2, ..Failures::default() },
        latency_us: None,
        since: "2026-01-10T00:00:00Z".into(),
        inputs: vec![input("checks", "unhealthy", true), input("kernel", "suspected", false)],
    };
    assert_table(
        &backends(std::slice::from_ref(&backend), PLAIN, now()),
        "
SERVICE  PORT    ADDRESS        STATE      WEIGHT  OPENED  ACTIVE  FAILED  AGE  REASON
orders   80/tcp  10.0.0.1:8080  unhealthy  100     7       1       2       3m   connection refused
",
    );
    assert_table(
        &backends(std::slice::from_ref(&backend), WIDE, now()),
        "
SERVICE  PORT    ADDRESS        STATE      WEIGHT  OPENED  ACTIVE  FAILED  AGE  REFUSED  TIMEOUT  UNREACHABLE  RESET  LATENCY  ZONE        REASON
orders   80/tcp  10.0.0.1:8080  unhealthy  100     7       1       2       3m   2        0        0            0      -        eu-west-1a  checks unhealthy for 3m (why); kernel suspected (why)
",
    );
    let long = Backend {
        service: "a-service-with-a-long-name.in-a-namespace.svc.cluster.local".into(),
        address: "[2001:db8:1111:2222:3333:4444:5555:6666]:65535".into(),
        reason: "no answer within 300 ms, three times in a row, most lately a second ago".into(),
        opened: u64::MAX,
        weight: 65_535,
        port: 65_535,
        ..backend.clone()
    };
    for width in [40, 80, 100] {
        let shown = backends(&[long.clone(), backend.clone()], Style { width, ..PLAIN }, now());
        let fits = |line: &str| line.chars().count() <= usize::from(width);
        assert!(shown.lines().all(fits), "{shown}");
        assert_eq!(shown.lines().count(), 3, "{shown}");
        // Columns stay columns: each begins where its header does.
        let places = |line: &str, word: &str| line.split(word).next().map(|s| s.chars().count());
        let mut lines = shown.lines();
        let age = places(lines.next().expect("a header"), "AGE");
        assert!(lines.all(|line| places(line, "3m ") == age), "{shown}");
    }
}

#[test]
fn status_names_everything_that_is_wrong() {
    let shown = status(
        &Status {
            version: "0.1.0".into(),
            node: "node-a".into(),
            zone: Some("eu-west-1a".into()),
            ready: false,
            reasons: vec!["the source files /etc/mesh/services.d was never read".into()],
            pid: 42,
            checks: Checks {
                passed: 9,
                failed: 2,
                unmade: 1,
                unjudged: 3,
                late: 0,
                longest_delay_us: 900,
            },
            cgroup: "/sys/fs/cgroup/web.slice".into(),
            programs: vec![Program {
                name: "mesh_connect4".into(),
                hook: "connect4".into(),
                id: Some(7),
                attached: true,
            }],
            sources: vec![Source {
                name: "files /etc/mesh/services.d".into(),
                state: "error".into(),
                services: 3,
                error: Some("/etc/mesh/services.d/a.yaml:3:9: port 0; expected 1 to 65535".into()),
            }],
            maps: vec![Map { name: "SLOTS".into(), used: 512, size: 1024, max: 2048 }],
            memory: Memory { anonymous: 6_500_000, maps: 13 << 20 },
            counters: Counters {
                balanced: 10,
                refused: vec![Refused { reason: "no-port".into(), count: 2 }],
                ..Counters::default()
            },
            audit: None,
            last_error: Some(LastError {
                time: "2026-01-10T00:00:00Z".into(),
                error: "waiting for running programs: membarrier failed".into(),
            }),
        },
        PLAIN,
        now(),
    );
    assert_table(
        &shown,
        "
node        node-a (zone eu-west-1a)
agent       0.1.0 (pid 42)
ready       no
reason      the source files /etc/mesh/services.d was never read
cgroup      /sys/fs/cgroup/web.slice
last error  3m ago: waiting for running programs: membarrier failed
memory      6.2 MiB of the agent, 13.0 MiB of maps

PROGRAM        HOOK      ATTACHED
mesh_connect4  connect4  yes

SOURCE                      STATE  SERVICES  ERROR
files /etc/mesh/services.d  error  3         /etc/mesh/services.d/a.yaml:3:9: port 0; expected 1
                                             to 65535

MAP    USED  SIZE  MAX   FULL
SLOTS  512   1024  2048  25%

CONNECTS                   COUNT
balanced                   10
refused: no-port           2
retries                    0
no flow record             0
collisions                 0
all ejected                0
spared by the share        0
datagram records given up  0
no room for affinity       0
events lost                0

HEALTH CHECKS      COUNT
passed             9
failed             2
could not be made  1
not judged         3
late               0
",
    );
}

#[test]
fn explanations_and_checks_read_as_text() {
    let explained = Explanation {
        client: None,
        frontend: "10.96.0.10:80/tcp".into(),
        service: Some("orders".into()),
        algorithm: Some("random".into()),
        steps: vec![Step { step: "table".into(), detail: "2 slots".into() }],
        candidates: vec![Candidate {
            address: "10.0.0.1:8080".into(),
            state: "healthy".into(),
            score: 1.0 / 3.0,
        }],
        answer: Some(Answer::Backend { backend: "10.0.0.1:8080".into() }),
    };
    assert_table(
        &explanation(&explained, PLAIN),
        "
frontend   10.96.0.10:80/tcp
service    orders
algorithm  random
answer     10.0.0.1:8080

STEP   DETAIL
table  2 slots

CANDIDATE      STATE    PROBABILITY
10.0.0.1:8080  healthy  33.33%
",
    );
    let missing = Check::bad("cgroup2", "not mounted", "mount it");
    assert_table(
        &checks(&[Check::good("kernel", "6.1"), missing], PLAIN),
        "
RESULT  CHECK    DETAIL
ok      kernel   6.1
fail    cgroup2  not mounted
                 → mount it
",
    );
}
