//! Unmodified programs reach the endpoints of a service through the address of the service. Each
//! test ends with its control: with the agent stopped the same program must fail.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use mesh_tests::server::Kind;
use mesh_tests::{Builder, Node, Service, check, process};

const NAMES: [&str; 3] = ["a", "b", "c"];
const PLACES: [&str; 3] = ["10.0.0.1:8080", "10.0.0.2:8080", "10.0.0.3:8080"];

/// Three backends of one kind behind 10.96.0.10.
fn three(kind: Kind, port: u16) -> Builder {
    let service = Service::new("app").address("10.96.0.10").port(port, 8080);
    let service = PLACES.iter().fold(service, |service, place| service.endpoint(place));
    let servers = NAMES.iter().zip(PLACES);
    servers
        .fold(Node::builder(), |node, (name, place)| node.server(kind, name, place))
        .service(service)
}

#[test]
fn curl_and_nginx() -> Result<()> {
    check::balanced(&mut three(Kind::Nginx, 80).start()?, &NAMES, |node| {
        let mut curl = node.command("curl");
        curl.args(["--silent", "--show-error", "--max-time", "5", "http://10.96.0.10/"]);
        process::stdout(curl)
    })
}

#[test]
fn redis_cli_and_redis_server() -> Result<()> {
    check::balanced(&mut three(Kind::Redis, 6379).start()?, &NAMES, |node| {
        let mut redis = node.command("redis-cli");
        redis.args(["-h", "10.96.0.10", "get", "who"]);
        process::stdout(redis)
    })
}

#[test]
fn python_blocking() -> Result<()> {
    check::balanced(&mut three(Kind::Plain, 80).start()?, &NAMES, |node| {
        python(node, "blocking.py")
    })
}

#[test]
fn python_asyncio() -> Result<()> {
    check::balanced(&mut three(Kind::Plain, 80).start()?, &NAMES, |node| {
        python(node, "asyncio_client.py")
    })
}

#[test]
fn a_static_binary() -> Result<()> {
    let mut node = three(Kind::Plain, 80).start()?;
    let program = build_static(node.directory())?;
    check::balanced(&mut node, &NAMES, |node| {
        let mut command = node.command(&program);
        command.arg("10.96.0.10:80");
        process::stdout(command)
    })
}

fn programs() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("programs")
}

fn python(node: &Node, script: &str) -> Result<String> {
    let mut python = node.command("python3");
    python.arg(programs().join(script)).args(["10.96.0.10", "80"]);
    process::stdout(python)
}

/// Builds the static client with the compiler that built this test.
fn build_static(directory: &Path) -> Result<PathBuf> {
    let program = directory.join("static_client");
    // Cargo tells where it is itself; the compiler of the same toolchain is beside it.
    let cargo = std::env::var_os("CARGO").map(PathBuf::from);
    let beside = cargo.map(|cargo| cargo.with_file_name("rustc")).filter(|rustc| rustc.is_file());
    let mut rustc = Command::new(beside.unwrap_or_else(|| "rustc".into()));
    rustc.args(["--edition", "2024", "-Ctarget-feature=+crt-static", "-Copt-level=1", "-o"]);
    rustc.arg(&program).arg(programs().join("static_client.rs"));
    process::stdout(rustc).context("cannot build the static client")?;
    let image = std::fs::read(&program)?;
    let interpreter = b"ld-linux";
    ensure!(
        !image.windows(interpreter.len()).any(|window| window == interpreter),
        "the static client asks for a dynamic linker"
    );
    Ok(program)
}
