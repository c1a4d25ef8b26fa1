//! Checks against servers that answer well, and against those that do not.

use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicU64, Ordering};

use ::http::{HeaderMap, HeaderValue};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::Instant;

use super::*;

/// What a busy machine needs at the most for what is quick.
const PATIENCE: Duration = Duration::from_secs(10);

/// For what never ends by itself.
const SHORT: Duration = Duration::from_millis(300);

fn probe(check: &HealthCheck) -> Probe {
    Probe::new(check, &ServiceName::new("s"), &Commands::none("none"))
}

fn page() -> HttpCheck {
    HttpCheck {
        path: "/healthz?deep=1".parse().expect("a path"),
        host: None,
        expect: vec![200..=399],
        headers: HeaderMap::new(),
        http2: false,
        tls: None,
    }
}

fn http(check: HttpCheck) -> Probe {
    probe(&HealthCheck::Http(Arc::new(check)))
}

fn http2() -> Probe {
    http(HttpCheck { http2: true, ..page() })
}

fn grpc() -> Probe {
    let check = GrpcCheck { service: "orders".into(), host: None, tls: None };
    probe(&HealthCheck::Grpc(Arc::new(check)))
}

/// A server that does this with every visitor.
async fn server<F>(serve: impl Fn(TcpStream) -> F + Send + 'static) -> SocketAddr
where
    F: Future<Output = io::Result<()>> + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a listener");
    let address = listener.local_addr().expect("bound");
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(serve(stream));
        }
    });
    address
}

/// A server that reads the head of a request, and then sends these bytes and closes.
async fn says(answer: &'static [u8]) -> SocketAddr {
    server(move |mut stream| async move {
        head(&mut stream).await?;
        stream.write_all(answer).await
    })
    .await
}

/// Reads up to the empty line.
async fn head(stream: &mut TcpStream) -> io::Result<String> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await?);
    }
    Ok(String::from_utf8_lossy(&head).into_owned())
}

/// Why the endpoint is not well.
async fn complaint(probe: &Probe, address: SocketAddr, timeout: Duration) -> String {
    match probe.run(address, timeout, async {}).await {
        Err(Failure::Endpoint(text)) => text,
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_says_nothing_about_the_endpoint() {
    let local = |number| matches!(io::Error::from_raw_os_error(number).into(), Failure::Local(_));
    assert!(local(libc::EMFILE) && local(libc::ENOBUFS));
    // The node's clients cannot get there either.
    assert!(!local(libc::ECONNREFUSED) && !local(libc::ENETUNREACH) && !local(libc::EPERM));
    // No local port is left towards it, or no address of its family is here.
    assert!(!local(libc::EADDRNOTAVAIL));
}

/// Whoever only wants to know whether somebody listens does not bother who does.
#[tokio::test]
async fn a_program_never_sees_that_it_is_connected_to() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let address = listener.local_addr().expect("address");
    for _ in 0..10 {
        let checked = probe(&HealthCheck::Tcp).run(address, PATIENCE, async {}).await;
        assert_eq!(checked, Ok(()));
    }
    // All that came before would be there before this one.
    let mut visitor = TcpStream::connect(address).await.expect("connected");
    visitor.write_all(b"x").await.expect("written");
    let (mut seen, _) = listener.accept().await.expect("a visitor");
    let mut said = [0];
    seen.read_exact(&mut said).await.expect("it is the one that says something");
    assert_eq!(&said, b"x");
    drop(listener);
    let checked = probe(&HealthCheck::Tcp).run(address, PATIENCE, async {}).await;
    assert!(
        matches!(&checked, Err(Failure::Endpoint(why)) if why.contains("refused")),
        "{checked:?}"
    );
}

#[tokio::test]
async fn a_page_is_asked_for_as_it_is_written() {
    let (sender, mut heads) = tokio::sync::mpsc::unbounded_channel();
    let address = server(move |mut stream| {
        let sender = sender.clone();
        async move {
            let _ = sender.send(head(&mut stream).await?);
            stream.write_all(b"HTTP/1.1 204 No Content\r\n\r\n").await
        }
    })
    .await;
    assert_eq!(http(page()).run(address, PATIENCE, async {}).await, Ok(()));
    let asked = heads.recv().await.expect("a request");
    assert!(asked.starts_with("GET /healthz?deep=1 HTTP/1.1\r\n"), "{asked}");
    assert!(asked.contains(&format!("host: {address}\r\n")), "{asked}");
    assert!(
        asked.contains("user-agent: mesh-agent/") && asked.contains("connection: close"),
        "{asked}"
    );

    let mut headers = HeaderMap::new();
    headers.insert("x-probe", HeaderValue::from_static("node a"));
    headers.insert("user-agent", HeaderValue::from_static("mine"));
    let host = Some("orders.example:81".parse().expect("a host"));
    let named = http(HttpCheck { host, headers, ..page() });
    assert_eq!(named.run(address, PATIENCE, async {}).await, Ok(()));
    let asked = heads.recv().await.expect("a request");
    assert!(asked.contains("host: orders.example:81\r\n"), "{asked}");
    assert!(
        asked.contains("x-probe: node a\r\n") && asked.contains("user-agent: mine\r\n"),
        "{asked}"
    );
}

#[tokio::test]
async fn the_status_decides() {
    let check =
        |expect: &[RangeInclusive<u16>]| http(HttpCheck { expect: expect.to_vec(), ..page() });
    let answer = says(b"HTTP/1.1 301 Moved\r\nlocation: /x\r\ncontent-length: 0\r\n\r\n").await;
    assert_eq!(check(&[200..=399]).run(answer, PATIENCE, async {}).await, Ok(()));
    let text = complaint(&check(&[200..=200, 204..=299]), answer, PATIENCE).await;
    assert!(text.contains("GET /healthz?deep=1 was answered with 301"), "{text}");
    let broken = says(b"HTTP/1.1 500 Internal Server Error\r\ncontent-length: 4\r\n\r\noops").await;
    let text = complaint(&http(page()), broken, PATIENCE).await;
    assert!(text.contains("500 Internal Server Error"), "{text}");
    assert_eq!(check(&[200..=200, 500..=500]).run(broken, PATIENCE, async {}).await, Ok(()));
    // What comes before the answer is none (RFC 9110, 15.2).
    let early =
        says(b"HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n");
    assert_eq!(http(page()).run(early.await, PATIENCE, async {}).await, Ok(()));
    let old = says(b"HTTP/1.0 200 OK\r\n\r\nall of it until the end").await;
    assert_eq!(http(page()).run(old, PATIENCE, async {}).await, Ok(()));
}

#[tokio::test]
async fn what_is_no_answer() {
    for probe in [http(page()), http2(), grpc()] {
        let closes = server(|_| async { Ok(()) }).await;
        let text = complaint(&probe, closes, PATIENCE).await;
        assert!(!text.contains("no answer within"), "{probe:?}: {text}");
        let garbage = server(|mut stream| async move {
            stream.write_all(&[0xa5; 4_096]).await?;
            stream.read_u8().await.map(drop)
        });
        let text = complaint(&probe, garbage.await, PATIENCE).await;
        assert!(!text.contains("no answer within"), "{probe:?}: {text}");
        let text = complaint(&probe, "127.0.0.1:1".parse().expect("an address"), PATIENCE).await;
        assert!(text.contains("refused"), "{text}");
    }
    let cut = says(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nthis").await;
    complaint(&http(page()), cut, PATIENCE).await;
    let text = complaint(&grpc(), says(b"HTTP/1.1 200 OK\r\n\r\n").await, PATIENCE).await;
    assert!(text.contains("HTTP/2"), "{text}");
}

/// Whoever takes its time is given up when the time is over, whatever it does meanwhile.
#[tokio::test]
async fn what_takes_too_long() {
    let silent = server(|mut stream| async move {
        tokio::io::copy(&mut stream, &mut tokio::io::sink()).await.map(drop)
    })
    .await;
    let drips = server(|mut stream| async move {
        stream.write_all(b"HTTP/1.1 200 OK\r\n").await?;
        for _ in 0..10_000 {
            stream.write_all(b"x: y\r\n").await?;
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Ok(())
    })
    .await;
    for (probe, address) in
        [(http(page()), silent), (http2(), silent), (grpc(), silent), (http(page()), drips)]
    {
        let begin = Instant::now();
        let text = complaint(&probe, address, SHORT).await;
        assert_eq!(text, "no answer within 300ms", "{probe:?}");
        assert!(begin.elapsed() < PATIENCE);
    }
    assert_eq!(Probe::Tcp.run(silent, PATIENCE, async {}).await, Ok(()));
}

/// A head or a body without an end is read no further than to a bound; then the connection is reset, so the
/// server can send no more than what is on its way.
#[tokio::test]
async fn what_has_no_end() {
    static SENT: AtomicU64 = AtomicU64::new(0);
    static BLOCK: [u8; 65_536] = [b'x'; 65_536];
    let endless = |begin: &'static [u8]| {
        server(move |mut stream| async move {
            head(&mut stream).await?;
            stream.write_all(begin).await?;
            // A gigabyte.
            for _ in 0..16_384 {
                stream.write_all(&BLOCK).await?;
                SENT.fetch_add(65_536, Ordering::Relaxed);
            }
            Ok(())
        })
    };
    let body = endless(b"HTTP/1.1 200 OK\r\ncontent-length: 1073741824\r\n\r\n").await;
    assert_eq!(http(page()).run(body, PATIENCE, async {}).await, Ok(()));
    let line = endless(b"HTTP/1.1 200 OK\r\nx: ").await;
    let text = complaint(&http(page()), line, PATIENCE).await;
    assert!(text.contains("too large"), "{text}");
    // What two sockets hold: no more than a few megabytes each.
    assert!(SENT.load(Ordering::Relaxed) < 64 << 20, "{}", SENT.load(Ordering::Relaxed));
}

/// An endpoint that speaks HTTP/2, and sends answers before the answer without an end.
#[tokio::test]
async fn what_has_no_end_over_http2() {
    static SENT: AtomicU64 = AtomicU64::new(0);
    // SETTINGS; then HEADERS of stream 1 that end the head, with `:status: 103` as a literal.
    const SETTINGS: [u8; 9] = [0, 0, 0, 4, 0, 0, 0, 0, 0];
    const EARLY: [u8; 14] = [0, 0, 5, 1, 4, 0, 0, 0, 1, 0x08, 3, b'1', b'0', b'3'];
    let early = server(|mut stream| async move {
        // The preface, the settings and the request are on their way.
        stream.read_u8().await?;
        stream.write_all(&SETTINGS).await?;
        let block = EARLY.repeat(1_000);
        for _ in 0..10_000 {
            stream.write_all(&block).await?;
            SENT.fetch_add(block.len() as u64, Ordering::Relaxed);
        }
        Ok(())
    })
    .await;
    for probe in [http2(), grpc()] {
        let text = complaint(&probe, early, PATIENCE).await;
        assert!(text.contains("HTTP/2"), "{probe:?}: {text}");
    }
    assert!(SENT.load(Ordering::Relaxed) < 64 << 20, "{}", SENT.load(Ordering::Relaxed));
}

/// What an endpoint says of itself is kept as far as people read it.
#[test]
fn words_are_bounded() {
    let Failure::Endpoint(text) = Failure::said(&"ü".repeat(10_000)) else {
        panic!("another kind")
    };
    assert_eq!(text.chars().count(), WORDS + 1);
    assert_eq!(Failure::said("short"), Failure::Endpoint("short".to_owned()));
}

/// The time that a check waits for its turn is not the endpoint's.
#[tokio::test]
async fn waiting_for_a_turn_is_not_held_against_the_endpoint() {
    let address = says(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await;
    let turn = tokio::time::sleep(SHORT * 2);
    assert_eq!(http(page()).run(address, SHORT, turn).await, Ok(()));
}

/// Serves one visitor on a thread of its own, which goes on while this one sleeps.
fn apart<T: Send + 'static>(
    serve: impl FnOnce(std::net::TcpStream) -> io::Result<T> + Send + 'static,
) -> SocketAddr {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a listener");
    let address = listener.local_addr().expect("bound");
    std::thread::spawn(move || listener.accept().and_then(|(visitor, _)| serve(visitor)));
    address
}

/// The thread of the checks sleeps, as if the process were stopped, once a check is under way.
fn sleep_soon(time: Duration) {
    tokio::spawn(async move {
        tokio::time::sleep(SHORT / 10).await;
        std::thread::sleep(time);
    });
}

/// The endpoint answers in time, and then waits for what the check did not say, since it slept.
#[tokio::test]
async fn time_slept_through_is_not_held_against_the_endpoint() {
    use std::io::{Read as _, Write as _};
    // SETTINGS, its acknowledgement, and HEADERS of stream 1 that end it, with `:status: 200`.
    const SETTINGS: [u8; 9] = [0, 0, 0, 4, 0, 0, 0, 0, 0];
    const PING: [u8; 17] = [0, 0, 8, 6, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8];
    const ANSWER: [u8; 10] = [0, 0, 1, 1, 5, 0, 0, 0, 1, 0x88];
    let address = apart(|mut visitor| {
        visitor.write_all(&SETTINGS)?;
        std::thread::sleep(SHORT / 3);
        visitor.write_all(&PING)?;
        // The answer comes after that of the ping, and takes some time.
        let mut heard = Vec::new();
        let answered = |heard: &[u8]| heard.windows(8).any(|part| *part == PING[9..]);
        while !answered(&heard) {
            let mut part = [0; 256];
            let read = visitor.read(&mut part)?;
            heard.extend_from_slice(part.get(..read).unwrap_or_default());
        }
        std::thread::sleep(SHORT / 3);
        visitor.write_all(&ANSWER)?;
        visitor.read(&mut [0; 256])
    });
    sleep_soon(4 * SHORT);
    assert_eq!(http2().run(address, SHORT, async {}).await, Ok(()));
}

/// The endpoint hangs up on who says nothing for so long: that is no verdict, and asked again it is well. One
/// that hangs up on everybody is not.
#[tokio::test]
async fn what_fails_while_this_slept_is_asked_again() {
    let slept = 4 * SHORT;
    let impatient = |mut stream: std::net::TcpStream| {
        use std::io::Read as _;
        stream.set_read_timeout(Some(SHORT))?;
        // The whole request, and then a gap that nobody fills.
        while stream.read(&mut [0; 64])? > 0 {}
        Ok(())
    };
    let address = apart(impatient);
    sleep_soon(slept);
    let result = http(page()).run(address, PATIENCE, async {}).await;
    assert!(matches!(result, Err(Failure::Paused(_))), "{result:?}");
    let result = http(page()).run(apart(impatient), PATIENCE, async {}).await;
    assert!(matches!(result, Err(Failure::Endpoint(_))), "control: {result:?}");

    // Who is silent has its time, and then is asked once more.
    let silent = server(|mut stream| async move {
        tokio::io::copy(&mut stream, &mut tokio::io::sink()).await.map(drop)
    })
    .await;
    sleep_soon(slept);
    let result = http(page()).run(silent, SHORT, async {}).await;
    assert!(matches!(result, Err(Failure::Paused(_))), "{result:?}");
    sleep_soon(slept);
    let result = http(page()).insist(silent, SHORT).await;
    assert_eq!(result, Err(Failure::Endpoint("no answer within 300ms".to_owned())));
    // Nobody listens, whenever that is heard.
    sleep_soon(slept);
    let nobody = "127.0.0.1:1".parse().expect("an address");
    let turn = tokio::time::sleep(slept);
    let result = http(page()).run(nobody, PATIENCE, turn).await;
    assert!(matches!(result, Err(Failure::Endpoint(_))), "{result:?}");
}
