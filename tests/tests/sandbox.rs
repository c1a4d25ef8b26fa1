//! The node of the tests itself, without an agent: what the other tests rely on.

use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use mesh_tests::server::Kind;
use mesh_tests::sys::socket::monotonic_nanos;
use mesh_tests::{Node, check, process};

/// Every way to connect reaches a backend at its own address, and says whose.
#[test]
fn clients_learn_who_answers() -> Result<()> {
    let node = Node::builder()
        .backend("four", "10.0.0.1:8080")
        .backend("six", "[fd00::1]:8080")
        .start_without_agent()?;
    for way in ["blocking", "nonblocking", "uring", "fast-open", "mptcp", "mapped"] {
        let outcome = check::ask(&node, way, "10.0.0.1:8080")?;
        ensure!(outcome.clone().name().context(way)? == "four", "{way}: {outcome:?}");
        let outcome = check::ask(&node, way, "[fd00::1]:8080")?;
        ensure!(outcome.clone().name().context(way)? == "six", "{way}: {outcome:?}");
    }
    Ok(())
}

/// Nothing answers at an address that is not a backend's: there is no route that could lead out.
#[test]
fn no_way_leads_out() -> Result<()> {
    let node = Node::builder().start_without_agent()?;
    for address in ["10.96.0.10:80", "[fd00:96::10]:80", "198.51.100.1:80"] {
        let error = check::ask(&node, "blocking", address)?.error;
        ensure!(error.as_deref() == Some("connect: ENETUNREACH"), "{address}: {error:?}");
    }
    Ok(())
}

#[test]
fn real_servers_tell_their_names() -> Result<()> {
    let node = Node::builder()
        .server(Kind::Nginx, "nginx", "10.0.0.1:80")
        .server(Kind::Python, "python", "10.0.0.2:80")
        .server(Kind::Redis, "redis", "10.0.0.3:6379")
        .backend("plain", "10.0.0.4:80")
        .start_without_agent()?;
    for (name, url) in [
        ("nginx", "http://10.0.0.1/"),
        ("python", "http://10.0.0.2/"),
        ("plain", "http://10.0.0.4/"),
    ] {
        let mut curl = node.command("curl");
        curl.args(["--silent", "--show-error", "--max-time", "5", url]);
        ensure!(process::stdout(curl)? == name);
    }
    let mut redis = node.command("redis-cli");
    redis.args(["-h", "10.0.0.3", "get", "who"]);
    ensure!(process::stdout(redis)? == "redis");
    Ok(())
}

/// Inside means: in the node's cgroup. Outside means: not.
#[test]
fn processes_run_where_they_should() -> Result<()> {
    let node = Node::builder().start_without_agent()?;
    let own = node.cgroup().place()?;
    let cgroup = |mut command: std::process::Command| {
        process::stdout({
            command.arg("/proc/self/cgroup");
            command
        })
    };
    ensure!(cgroup(node.command("cat"))?.contains(&own));
    ensure!(!cgroup(node.outside("cat"))?.contains(&own));
    Ok(())
}

#[test]
fn nothing_is_left_behind() -> Result<()> {
    let node = Node::builder().backend("a", "10.0.0.1:8080").start_without_agent()?;
    let (cgroup, directory) = (node.cgroup().path().to_owned(), node.directory().to_owned());
    ensure!(cgroup.exists() && directory.exists());
    let mut forgotten = node.command("sleep");
    let mut forgotten = forgotten.arg("60").spawn()?;
    drop(node);
    ensure!(!cgroup.exists() && !directory.exists());
    ensure!(!forgotten.wait()?.success(), "what was forgotten in the cgroup is ended");
    Ok(())
}

/// With fast open allowed, the question travels in the SYN once the client has the server's cookie.
#[test]
fn fast_open_is_fast_open() -> Result<()> {
    let node = Node::builder().backend("a", "10.0.0.1:8080").start_without_agent()?;
    ensure!(!check::ask(&node, "fast-open", "10.0.0.1:8080")?.question_in_syn);
    node.sysctl("net/ipv4/tcp_fastopen", "3")?;
    check::ask(&node, "fast-open", "10.0.0.1:8080")?.name()?;
    let outcome = check::ask(&node, "fast-open", "10.0.0.1:8080")?;
    ensure!(outcome.question_in_syn && outcome.backend.as_deref() == Some("a"), "{outcome:?}");
    Ok(())
}

#[test]
fn one_socket_connects_twice() -> Result<()> {
    let node = Node::builder()
        .backend("a", "10.0.0.1:8080")
        .backend("b", "10.0.0.2:8080")
        .start_without_agent()?;
    let [before, after] = check::reconnect(&node, "10.0.0.1:8080", "10.0.0.2:8080")?;
    ensure!(before.peer == Some("10.0.0.1:8080".parse()?), "{before:?}");
    ensure!(after.peer == Some("10.0.0.2:8080".parse()?), "{after:?}");
    ensure!(after.name()? == "b");
    Ok(())
}

/// A storm ends with its standard input, and counts what failed.
#[test]
fn a_storm_tells_what_came_of_it() -> Result<()> {
    let mut node = Node::builder().backend("a", "10.0.0.1:8080").start_without_agent()?;
    let started = monotonic_nanos();
    let storm = check::Storm::start(&node, "10.0.0.1:8080")?;
    sleep(Duration::from_millis(300));
    node.kill_server("a")?;
    let killed = monotonic_nanos();
    sleep(Duration::from_millis(100));
    let (report, connects) = storm.finish()?;
    let answered = report.by_backend.get("a").copied().unwrap_or_default();
    ensure!(answered > 0 && connects.len() as u64 == answered, "{report:?}");
    ensure!(report.failed.contains_key("connect: ECONNREFUSED"), "{report:?}");
    ensure!(report.connects == answered + report.failed.values().sum::<u64>(), "{report:?}");
    // When a busy machine lets the client note the end, nobody knows.
    let sane = connects.iter().all(|c| started < c.start && c.start < c.end && c.start < killed);
    ensure!(sane && connects.is_sorted_by_key(|connect| connect.start));
    Ok(())
}
