//! A named server: whoever sends a line, an HTTP request or a datagram gets its name.
//!
//! `mesh-server NAME ADDRESS:PORT…`

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Parser;
use mesh_tests::sys::socket::allow_fast_open;

/// Tells its name to whoever asks.
#[derive(Parser)]
struct Server {
    /// Its name.
    name: String,
    /// How long it thinks about each question, in milliseconds. As many as ask are thought about at once.
    #[arg(long, default_value_t = 0)]
    delay: u64,
    /// Where it listens.
    #[arg(required = true)]
    addresses: Vec<SocketAddr>,
}

/// Threads that accept on each listener: one silent client does not keep the others waiting.
const THREADS: usize = 4;

/// The same for a server that thinks about its answers.
const THINKERS: usize = 128;

/// A client that says nothing for this long is let go.
const SILENCE: Duration = Duration::from_secs(2);

fn main() -> Result<()> {
    let Server { name, delay, addresses } = Server::parse();
    let delay = Duration::from_millis(delay);
    let threads = if delay.is_zero() { THREADS } else { THINKERS };
    let listeners = addresses.iter().map(|address| {
        let listener = TcpListener::bind(address)
            .with_context(|| format!("{name} cannot listen on {address}"))?;
        allow_fast_open(&listener, 64)?;
        let datagrams = UdpSocket::bind(address)
            .with_context(|| format!("{name} cannot take datagrams on {address}"))?;
        Ok((listener, datagrams))
    });
    let listeners = listeners.collect::<Result<Vec<_>>>()?;
    thread::scope(|scope| {
        for (listener, datagrams) in &listeners {
            scope.spawn(|| serve_datagrams(datagrams, &name));
            for _ in 0..threads {
                scope.spawn(|| serve(listener, &name, delay));
            }
        }
    });
    Ok(())
}

fn serve(listener: &TcpListener, name: &str, delay: Duration) {
    for stream in listener.incoming().flatten() {
        // A client that goes away, or a health check that says nothing, is its own affair.
        let _ = answer(stream, name, delay);
    }
}

fn serve_datagrams(socket: &UdpSocket, name: &str) {
    let mut buffer = [0; 2048];
    loop {
        // An error is that of an answer that nobody took.
        if let Ok((_, from)) = socket.recv_from(&mut buffer) {
            let _ = socket.send_to(name.as_bytes(), from);
        }
    }
}

fn answer(mut stream: TcpStream, name: &str, delay: Duration) -> io::Result<()> {
    stream.set_read_timeout(Some(SILENCE))?;
    let (mut buffer, mut filled) = ([0; 4096], 0);
    loop {
        let count = stream.read(&mut buffer[filled..])?;
        filled += count;
        let request = &buffer[..filled];
        if count == 0 || filled == buffer.len() {
            return Ok(());
        }
        if request.starts_with(b"GET ") {
            if request.ends_with(b"\r\n\r\n") {
                let length = name.len() + 1;
                return write!(
                    stream,
                    "HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{name}\n"
                );
            }
        } else if request.ends_with(b"\n") {
            thread::sleep(delay);
            return writeln!(stream, "{name}");
        }
    }
}
