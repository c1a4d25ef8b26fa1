//! Checks against real listeners.

use std::time::Duration;

use super::*;
use crate::model::{Ending, HealthCheck, HttpCheck, Pace};
use tokio::net::TcpListener;

fn policy() -> HealthPolicy {
    HealthPolicy {
        check: HealthCheck::Tcp,
        port: None,
        pace: Pace::Always,
        interval: Duration::from_millis(20),
        timeout: Duration::from_millis(500),
        rise: 2,
        fall: 2,
        ending: Ending::Never,
    }
}

fn life(number: u64) -> Life {
    Life { number, state: State::Unknown }
}

async fn verdict(findings: &mut mpsc::UnboundedReceiver<Finding>) -> Verdict {
    let finding = tokio::time::timeout(Duration::from_secs(30), findings.recv()).await;
    match finding.expect("in time").expect("a finding") {
        Finding::Verdict(verdict) => verdict,
        Finding::Trouble(_, trouble) => panic!("{trouble:?}"),
    }
}

/// A real listener goes away and comes back.
#[tokio::test]
async fn follows_a_listener() {
    let (sender, mut findings) = mpsc::unbounded_channel();
    let cancel = CancellationToken::new();
    let (monitor, task) = Monitor::new(CONCURRENCY, Commands::none("none"), sender, cancel.clone());
    let task = tokio::spawn(task);
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let address = listener.local_addr().expect("address");
    let service = ServiceName::new("s");
    let plan = Plan { policy: policy(), targets: BTreeMap::from([(address, life(1))]) };
    monitor.set(service.clone(), Some(plan));
    assert_eq!(verdict(&mut findings).await.state, State::Healthy);
    drop(listener);
    let down = verdict(&mut findings).await;
    assert_eq!(down.state, State::Unhealthy);
    assert!(down.reason.contains("refused"), "{}", down.reason);
    let _listener = TcpListener::bind(address).await.expect("bind again");
    assert_eq!(verdict(&mut findings).await.state, State::Healthy);
    monitor.set(service, None);
    cancel.cancel();
    task.await.expect("ended in order");
    assert_eq!(findings.recv().await, None);
}

/// Where this process never runs in time, a silent endpoint is found all the same: each of its checks fails after
/// steps that were late.
#[tokio::test]
async fn a_silent_endpoint_of_a_machine_that_is_too_busy_is_unhealthy() {
    const STEP: Duration = Duration::from_millis(5);
    let (sender, mut findings) = mpsc::unbounded_channel();
    let cancel = CancellationToken::new();
    let (monitor, task) = Monitor::new(CONCURRENCY, Commands::none("none"), sender, cancel.clone());
    tokio::spawn(task);
    // Nobody accepts, and nobody answers.
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let address = listener.local_addr().expect("address");
    let check = HttpCheck {
        path: "/".parse().expect("a path"),
        host: None,
        expect: vec![200..=200],
        headers: ::http::HeaderMap::new(),
        http2: false,
        tls: None,
    };
    let check = HealthCheck::Http(check.into());
    let policy = HealthPolicy { check, timeout: 8 * STEP, ..policy() };
    tokio::spawn(async {
        loop {
            std::thread::sleep(4 * STEP);
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    });
    monitor.set(
        ServiceName::new("s"),
        Some(Plan { policy, targets: BTreeMap::from([(address, life(1))]) }),
    );
    let found = verdict(&mut findings).await;
    assert_eq!(found.state, State::Unhealthy);
    assert!(found.reason.contains("no answer within 40ms, also when"), "{}", found.reason);
    let checks = monitor.tally().read();
    assert_eq!(checks.unjudged, u64::from(probe::UNJUDGED), "{checks:?}");
    assert!(checks.failed >= 2, "{checks:?}");
    cancel.cancel();
}

/// A shorter interval applies at once, and an endpoint's new life starts from nothing.
#[tokio::test]
async fn follows_a_new_plan() {
    let (sender, mut findings) = mpsc::unbounded_channel();
    let cancel = CancellationToken::new();
    let (monitor, task) = Monitor::new(CONCURRENCY, Commands::none("none"), sender, cancel.clone());
    tokio::spawn(task);
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let address = listener.local_addr().expect("address");
    let service = ServiceName::new("s");
    let slow = HealthPolicy { interval: Duration::from_secs(3600), ..policy() };
    let plan =
        |policy, number| Some(Plan { policy, targets: BTreeMap::from([(address, life(number))]) });
    let mut next = async |life| {
        let verdict = verdict(&mut findings).await;
        assert_eq!(verdict.life, life);
        verdict.state
    };
    monitor.set(service.clone(), plan(slow.clone(), 1));
    assert_eq!(next(1).await, State::Healthy);
    drop(listener);
    monitor.set(service.clone(), plan(policy(), 1));
    assert_eq!(next(1).await, State::Unhealthy, "before the hour is over");
    monitor.set(service, plan(slow, 2));
    // Its first life would say nothing new.
    let _listener = TcpListener::bind(address).await.expect("bind again");
    assert_eq!(next(2).await, State::Healthy);
    cancel.cancel();
}
