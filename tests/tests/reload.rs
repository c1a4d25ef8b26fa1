//! Service files that change while the agent runs: what is complete and good applies at once,
//! anything else leaves the last good state.

use std::fs;
use std::io::Write;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use mesh_tests::{Node, Service, check};

const VIP: &str = "10.96.0.10:80";
const A: &str = "10.0.0.1:8080";
const B: &str = "10.0.0.2:8080";

fn app(endpoints: &[&str]) -> String {
    let service = Service::new("app").address("10.96.0.10").port(80, 8080);
    let service = endpoints.iter().fold(service, |service, endpoint| service.endpoint(endpoint));
    Service::file(&[service])
}

/// Backends a and b run; the file says that a alone is the service's endpoint.
fn node() -> Result<Node> {
    let node = Node::builder().backend("a", A).backend("b", B).start_without_agent()?;
    node.agent.write_services("test.yaml", &app(&[A]))?;
    let mut node = node;
    node.agent.start()?;
    ensure!(check::who(&node, VIP)? == "a");
    Ok(node)
}

#[test]
fn replaced_in_one_step() -> Result<()> {
    let mut node = node()?;
    node.agent.write_services("test.yaml", &app(&[A, B]))?;
    node.agent.until_places("app", &[A, B])?;
    check::balanced(&mut node, &["a", "b"], |node| check::who(node, VIP))
}

/// The agent is told long before its next periodic look at the directory.
#[test]
fn applies_soon() -> Result<()> {
    let mut node = node()?;
    let mut times = Vec::new();
    for endpoint in [B, A].repeat(5) {
        let started = Instant::now();
        node.agent.write_services("test.yaml", &app(&[endpoint]))?;
        node.agent.until_places("app", &[endpoint])?;
        times.push(started.elapsed());
    }
    times.sort();
    ensure!(times[times.len() / 2] < Duration::from_millis(250), "{times:?}");
    check::balanced(&mut node, &["a"], |node| check::who(node, VIP))
}

/// A file that is written in place is not read before its writer has closed it.
#[test]
fn half_written() -> Result<()> {
    let mut node = node()?;
    let text = app(&[B]);
    let (first, rest) = text.split_at(text.find("endpoints").context("a service has endpoints")?);
    let mut file = fs::File::create(node.agent.services_directory().join("test.yaml"))?;
    file.write_all(first.as_bytes())?;
    for _ in 0..10 {
        ensure!(check::who(&node, VIP)? == "a", "half a file was applied");
        sleep(Duration::from_millis(50));
    }
    file.write_all(rest.as_bytes())?;
    drop(file);
    node.agent.until_places("app", &[B])?;
    check::balanced(&mut node, &["b"], |node| check::who(node, VIP))
}

/// A file that was closed although it is not complete is bad, and changes nothing.
#[test]
fn cut_off() -> Result<()> {
    let mut node = node()?;
    let text = app(&[B]);
    let half = &text[..text.find("  endpoints").context("a service has endpoints")?];
    fs::write(node.agent.services_directory().join("test.yaml"), half)?;
    node.agent.until_error(&["test.yaml:2:", "endpoints"])?;
    ensure!(check::who(&node, VIP)? == "a");
    node.agent.write_services("test.yaml", &text)?;
    node.agent.until_places("app", &[B])?;
    node.agent.until_no_error()?;
    check::balanced(&mut node, &["b"], |node| check::who(node, VIP))
}

#[test]
fn a_deleted_file_takes_its_services_along() -> Result<()> {
    let mut node = node()?;
    let other = Service::new("other").address("10.96.0.11").port(80, 8080).endpoint(B);
    node.agent.write_services("other.yaml", &Service::file(&[other]))?;
    node.agent.until_places("other", &[B])?;
    fs::remove_file(node.agent.services_directory().join("other.yaml"))?;
    node.agent.until_gone("other")?;
    let error = check::ask(&node, "blocking", "10.96.0.11:80")?.error;
    ensure!(error.as_deref() == Some("connect: ENETUNREACH"), "{error:?}");
    check::balanced(&mut node, &["a"], |node| check::who(node, VIP))
}

/// A directory that is gone (an unmounted volume, a slip of the hand) is not the wish to have no
/// services.
#[test]
fn a_deleted_directory() -> Result<()> {
    let mut node = node()?;
    fs::remove_dir_all(node.agent.services_directory())?;
    node.agent.until_error(&["services.d"])?;
    for _ in 0..10 {
        ensure!(check::who(&node, VIP)? == "a", "the services went with the directory");
        sleep(Duration::from_millis(50));
    }
    fs::create_dir(node.agent.services_directory())?;
    node.agent.write_services("test.yaml", &app(&[B]))?;
    node.agent.until_places("app", &[B])?;
    node.agent.until_no_error()?;
    check::balanced(&mut node, &["b"], |node| check::who(node, VIP))
}

/// Thirty changes in three seconds, half of them in place; the last one is what holds.
#[test]
fn ten_changes_a_second() -> Result<()> {
    let mut node = node()?;
    let file = node.agent.services_directory().join("test.yaml");
    for round in 0..15 {
        let started = Instant::now();
        node.agent
            .write_services("test.yaml", &app(if round % 2 == 0 { &[A, B] } else { &[A] }))?;
        check::who(&node, VIP).context("a connect between two changes")?;
        sleep(Duration::from_millis(100).saturating_sub(started.elapsed()));
        let started = Instant::now();
        fs::write(&file, app(&[B]))?;
        check::who(&node, VIP).context("a connect between two changes")?;
        sleep(Duration::from_millis(100).saturating_sub(started.elapsed()));
    }
    node.agent.until_places("app", &[B])?;
    check::balanced(&mut node, &["b"], |node| check::who(node, VIP))
}

/// The directory is a symbolic link that is replaced (releases, git-sync), while what it was stays.
#[test]
fn a_directory_link_that_is_replaced() -> Result<()> {
    let node = Node::builder().backend("a", A).backend("b", B).start_without_agent()?;
    let directory = node.agent.services_directory();
    let [first, second, next] =
        ["first", "second", "next"].map(|name| directory.with_file_name(name));
    fs::remove_dir_all(&directory)?;
    for (release, endpoint) in [(&first, A), (&second, B)] {
        fs::create_dir(release)?;
        fs::write(release.join("test.yaml"), app(&[endpoint]))?;
    }
    std::os::unix::fs::symlink("first", &directory)?;
    let mut node = node;
    node.agent.start()?;
    ensure!(check::who(&node, VIP)? == "a");
    std::os::unix::fs::symlink("second", &next)?;
    fs::rename(&next, &directory)?;
    node.agent.until_places("app", &[B])?;
    ensure!(check::who(&node, VIP)? == "b");
    // What is written there from now on applies, and nothing that is written to the former one.
    fs::write(first.join("test.yaml"), app(&[A]))?;
    node.agent.write_services("test.yaml", &app(&[A, B]))?;
    node.agent.until_places("app", &[A, B])?;
    check::balanced(&mut node, &["a", "b"], |node| check::who(node, VIP))
}
