//! Active checks of every kind, against real servers.

use std::cell::RefCell;
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use mesh_tests::certified::Certified;
use mesh_tests::process::{Echo, Process, binary, until};
use mesh_tests::sys::netns;
use mesh_tests::{Node, Service, check};

/// The server that clients meet, whatever its checks say.
const APP: &str = "10.0.0.1:8080";

/// nginx, in every way that it speaks, and gRPC's own server.
const HTTP: u16 = 8081;
const HTTP2: u16 = 8082;
const HTTPS: u16 = 8443;
const GRPC: u16 = 9000;

fn nginx(node: &Node, files: &Certified) -> Result<Process> {
    let directory = node.directory().join("nginx");
    fs::create_dir_all(&directory)?;
    let at = directory.display();
    let pages = "location = /ok { return 200 \"ok\\n\"; }\n\
                 location = /moved { return 302 /ok; }\n\
                 location = /header { if ($http_x_probe != node) { return 403; } return 204; }\n\
                 location / { return 500; }";
    let named = "server_name orders.example;";
    let conf = format!(
        "daemon off; master_process off; pid {at}/nginx.pid; error_log stderr;\nevents {{}}\nhttp {{\n\
         access_log off; client_body_temp_path {at}/b; proxy_temp_path {at}/p;\n\
         fastcgi_temp_path {at}/f; uwsgi_temp_path {at}/u; scgi_temp_path {at}/s;\n\
         ssl_certificate {cert}; ssl_certificate_key {key};\n\
         server {{ listen 10.0.0.1:{HTTP}; listen 10.0.0.1:{HTTP2} http2;\n\
             listen 10.0.0.1:{HTTPS} ssl http2; {pages} }}\n\
         server {{ listen 10.0.0.1:{HTTP}; {named} location / {{ return 200 \"by name\\n\"; }} }}\n\
         }}\n",
        cert = files.certificate.display(),
        key = files.key.display(),
    );
    let file = directory.join("nginx.conf");
    fs::write(&file, conf)?;
    let mut command = node.outside("nginx");
    command.args(["-e", "stderr", "-p"]).arg(&directory).arg("-c").arg(file);
    Process::spawn("nginx", command, Echo::On)
}

/// What is checked, and what has to be found: whether it is well, and words of the reason.
struct Case {
    health: String,
    well: bool,
    why: &'static str,
}

fn well(health: &str) -> Case {
    Case { health: health.to_owned(), well: true, why: "checks pass" }
}

fn ill(health: &str, why: &'static str) -> Case {
    Case { health: health.to_owned(), well: false, why }
}

fn cases(files: &Certified) -> Vec<Case> {
    let ca = files.authority.display();
    vec![
        well("tcp: {}"),
        well(&format!("http: {{path: /ok}}, port: {HTTP}")),
        well(&format!("http: {{path: /moved}}, port: {HTTP}")),
        ill(
            &format!("http: {{path: /moved, expect: 200}}, port: {HTTP}"),
            "was answered with 302 Found",
        ),
        ill(&format!("http: {{path: /broken}}, port: {HTTP}"), "GET /broken was answered with 500"),
        well(&format!("http: {{path: /broken, expect: [200, 500-599]}}, port: {HTTP}")),
        well(&format!("http: {{path: /broken, host: orders.example}}, port: {HTTP}")),
        well(&format!("http: {{path: /header, headers: {{x-probe: node}}}}, port: {HTTP}")),
        ill(&format!("http: {{path: /header}}, port: {HTTP}"), "403 Forbidden"),
        well(&format!("http: {{path: /ok, http2: true}}, port: {HTTP2}")),
        ill(&format!("http: {{path: /broken, http2: true}}, port: {HTTP2}"), "500"),
        ill(&format!("http: {{path: /ok, http2: true}}, port: {HTTP}"), "HTTP/2"),
        well(&format!("https: {{path: /ok, ca: {ca}}}, port: {HTTPS}")),
        well(&format!("https: {{path: /ok, ca: {ca}, http2: true}}, port: {HTTPS}")),
        well(&format!(
            "https: {{path: /ok, ca: {ca}, server-name: orders.example}}, port: {HTTPS}"
        )),
        ill(
            &format!("https: {{path: /ok, ca: {ca}, server-name: x.example}}, port: {HTTPS}"),
            "x.example",
        ),
        ill(&format!("https: {{path: /ok}}, port: {HTTPS}"), "UnknownIssuer"),
        well(&format!("https: {{path: /ok, verify: false}}, port: {HTTPS}")),
        ill(&format!("https: {{path: /ok, verify: false}}, port: {HTTP}"), "TLS"),
        well(&format!("grpc: {{}}, port: {GRPC}")),
        well(&format!("grpc: {{service: orders}}, port: {GRPC}")),
        ill(&format!("grpc: {{service: stock}}, port: {GRPC}"), "does not know that name"),
        ill(&format!("grpc: {{}}, port: {HTTP2}"), "does not speak gRPC"),
        ill("http: {}, port: 1", "refused"),
    ]
}

#[test]
fn real_servers() -> Result<()> {
    let mut node = Node::builder().backend("a", APP).start_without_agent()?;
    let files = Certified::new(node.directory(), &["10.0.0.1", "orders.example"])?;
    let _nginx = nginx(&node, &files)?;
    let mut command = node.outside(binary("mesh-grpc")?);
    command.args([format!("10.0.0.1:{GRPC}").as_str(), "orders"]);
    let mut grpc = Process::spawn("grpc", command, Echo::On)?;
    let cases = cases(&files);
    let service = |(at, case): (usize, &Case)| {
        Service::new(&format!("s{at}"))
            .address(&format!("10.96.0.{}", at + 10))
            .port(80, 8080)
            .endpoint("10.0.0.1")
            .key(&format!(
                "health: {{{}, probe: always, interval: 200ms, timeout: 200ms, rise: 1, fall: 2}}",
                case.health
            ))
    };
    let services: Vec<Service> = cases.iter().enumerate().map(service).collect();
    node.agent.write_services("test.yaml", &Service::file(&services))?;
    node.agent.start()?;
    for (at, Case { health, well, why }) in cases.iter().enumerate() {
        let state = if *well { "healthy" } else { "unhealthy" };
        let last = RefCell::new(None);
        let found = node.agent.until_backends(&format!("s{at}"), |backends| {
            let one = backends.first().map(|one| (one.state.clone(), one.reason.clone()));
            let is_it =
                one.as_ref().is_some_and(|(found, reason)| found == state && reason.contains(why));
            last.replace(one);
            is_it
        });
        found.with_context(|| format!("{health}: found {last:?}, not {state} ({why})"))?;
    }
    // What a server says of itself is followed.
    let serving = cases.iter().position(|case| case.health.starts_with("grpc: {service: orders}"));
    let name = format!("s{}", serving.context("a case")?);
    grpc.signal(libc::SIGUSR1)?;
    node.agent.until_backends(&name, |backends| {
        backends.iter().all(|one| one.state == "unhealthy" && one.reason.contains("NOT_SERVING"))
    })?;
    grpc.signal(libc::SIGUSR2)?;
    node.agent
        .until_backends(&name, |backends| backends.iter().all(|one| one.state == "healthy"))?;
    check::balanced(&mut node, &["a"], |node| check::who(node, "10.96.0.10:80"))
}

/// A backend that counts who connects, in the node's namespace.
fn counting(node: &Node, place: &str) -> Result<Arc<AtomicUsize>> {
    node.add_address(place.parse::<std::net::SocketAddr>()?.ip())?;
    let place = place.to_owned();
    let listener = netns::inside(node.netns(), || TcpListener::bind(&place))??;
    let count = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&count);
    std::thread::spawn(move || {
        while let Ok((mut visitor, _)) = listener.accept() {
            counted.fetch_add(1, Ordering::Relaxed);
            let mut said = [0; 64];
            if let Ok(len @ 1..) = visitor.read(&mut said) {
                // Who only checks asks for a page.
                let is_check = said.get(..len).is_some_and(|said| said.starts_with(b"GET "));
                let answer: &[u8] =
                    if is_check { b"HTTP/1.1 204 No Content\r\n\r\n" } else { b"counting\n" };
                let _ = visitor.write_all(answer);
            }
        }
    });
    Ok(count)
}

/// Endpoints of a service that nobody on this node uses are left alone, until somebody does.
#[test]
fn checked_when_used() -> Result<()> {
    let app = |name: &str, address: &str, endpoint: &str, probe: &str| {
        Service::new(name).address(address).port(80, 8080).endpoint(endpoint).key(&format!(
            "health: {{http: {{}}, interval: 100ms, timeout: 100ms, probe: {probe}}}"
        ))
    };
    let mut node = Node::builder()
        .service(app("lazy", "10.96.0.10", "10.0.0.1", "when-used"))
        .service(app("always", "10.96.0.11", "10.0.0.2", "always"))
        .start_without_agent()?;
    let lazy = counting(&node, "10.0.0.1:8080")?;
    let always = counting(&node, "10.0.0.2:8080")?;
    node.agent.start()?;
    for service in ["lazy", "always"] {
        node.agent
            .until_backends(service, |backends| backends.iter().all(|b| b.state == "healthy"))?;
    }
    let reach = |count: &AtomicUsize, wanted: usize| {
        until(&format!("{wanted} checks"), Duration::from_secs(30), || {
            Ok((count.load(Ordering::Relaxed) >= wanted).then_some(()))
        })
    };
    // While 20 checks of the one are made, the other has one in all, or two if the first came before the
    // agent was told what is used.
    let before = lazy.load(Ordering::Relaxed);
    reach(&always, always.load(Ordering::Relaxed) + 20)?;
    let meanwhile = lazy.load(Ordering::Relaxed) - before;
    ensure!(meanwhile <= 1, "{meanwhile} checks of a service that nobody uses");
    let begin = Instant::now();
    ensure!(check::who(&node, "10.96.0.10:80")? == "counting");
    reach(&lazy, before + 10)?;
    println!("checked {:?} after the first connect", begin.elapsed());
    Ok(())
}
