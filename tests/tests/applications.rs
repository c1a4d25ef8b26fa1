//! Unmodified programs reach the endpoints of a service through the address of the service. Each
//! test ends with its control: with the agent stopped the same program must fail.

use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use mesh_tests::server::Kind;
use mesh_tests::{Builder, Node, Service, check, process};
use object::Endianness;
use object::elf::PT_INTERP;
use object::read::elf::ElfFile64;

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

/// Nothing that is preloaded into a C library can balance such a program; Go makes the same kind.
#[test]
fn a_static_binary() -> Result<()> {
    // Built by `cargo xtask test`.
    let program = process::binary("mesh-static-client")?;
    ensure!(is_static(&std::fs::read(&program)?)?, "{} is not static", program.display());
    check::balanced(&mut three(Kind::Plain, 80).start()?, &NAMES, |node| {
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

/// Whether an executable asks for no dynamic linker.
fn is_static(image: &[u8]) -> Result<bool> {
    let file = ElfFile64::<Endianness>::parse(image)?;
    let mut headers = file.elf_program_headers().iter();
    Ok(headers.all(|header| header.p_type.get(file.endian()) != PT_INTERP))
}
