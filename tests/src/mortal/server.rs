//! A named server whose port can be closed and opened again, and that can be rude.

use std::io::{self, BufRead, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use socket2::{Domain, Protocol, SockRef, Socket, Type};

/// How it treats a connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub enum Manner {
    /// It answers a line with its name, and closes.
    Plain,
    /// It answers, and waits for the client to close.
    Keep,
    /// It reads the question, and resets the connection.
    Reset,
    /// It answers, and then resets the connection.
    AnswerReset,
}

/// Threads that accept.
const THREADS: usize = 4;

/// A client that says nothing for this long is let go.
const SILENCE: Duration = Duration::from_secs(1);

/// How long a reset waits after an answer, so that the answer is read before.
const READING: Duration = Duration::from_millis(1);

/// Serves until standard input ends. A line `close` or `open` there does that to the port, and says
/// so.
///
/// # Errors
///
/// It cannot listen.
pub fn run(name: &str, place: SocketAddr, manner: Manner) -> Result<()> {
    let mut open = Some(Open::new(name, place, manner)?);
    say("open")?;
    for line in io::stdin().lock().lines() {
        match &*line? {
            "close" => {
                open.take().context("it is closed already")?.close();
                say("closed")?;
            }
            "open" => {
                open = Some(Open::new(name, place, manner)?);
                say("open")?;
            }
            other => bail!("{other} is no order"),
        }
    }
    Ok(())
}

fn say(word: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{word}")?;
    out.flush()
}

/// An open port.
struct Open {
    listener: Arc<TcpListener>,
    threads: Vec<JoinHandle<()>>,
}

impl Open {
    fn new(name: &str, place: SocketAddr, manner: Manner) -> Result<Self> {
        let listener = Arc::new(listen(place).with_context(|| format!("{name} at {place}"))?);
        let kept = Arc::new(Mutex::new(Vec::new()));
        let threads = (0..THREADS).map(|_| {
            let (listener, kept) = (Arc::clone(&listener), Arc::clone(&kept));
            let name = name.to_owned();
            thread::spawn(move || {
                while let Ok((stream, _)) = listener.accept() {
                    // A client that goes away is its own affair.
                    if let Ok(Some(stream)) = serve(stream, &name, manner) {
                        keep(&mut kept.lock().unwrap_or_else(PoisonError::into_inner), stream);
                    }
                }
            })
        });
        Ok(Self { threads: threads.collect(), listener })
    }

    fn close(self) {
        // Wakes those who accept. The port is closed from here on.
        let _ = SockRef::from(&*self.listener).shutdown(Shutdown::Both);
        for thread in self.threads {
            let _ = thread.join();
        }
    }
}

fn listen(place: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(place), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    socket.bind(&place.into())?;
    socket.listen(1024)?;
    Ok(socket.into())
}

/// Gives back the connection that is to stay open.
fn serve(mut stream: TcpStream, name: &str, manner: Manner) -> io::Result<Option<TcpStream>> {
    stream.set_read_timeout(Some(SILENCE))?;
    let mut buffer = [0; 64];
    let count = stream.read(&mut buffer)?;
    if manner == Manner::Reset {
        SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
        return Ok(None);
    }
    if count > 0 {
        writeln!(stream, "{name}")?;
    }
    match manner {
        Manner::Keep => return Ok(Some(stream)),
        Manner::AnswerReset => {
            thread::sleep(READING);
            SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
        }
        Manner::Plain | Manner::Reset => {}
    }
    Ok(None)
}

/// Keeps a connection, and lets go of those that have ended.
fn keep(kept: &mut Vec<TcpStream>, stream: TcpStream) {
    kept.retain(|stream| {
        let quiet = |error: &io::Error| error.kind() == io::ErrorKind::WouldBlock;
        stream.set_nonblocking(true).is_ok() && stream.peek(&mut [0]).as_ref().is_err_and(quiet)
    });
    kept.push(stream);
}

impl Manner {
    /// As it is written on a command line.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Keep => "keep",
            Self::Reset => "reset",
            Self::AnswerReset => "answer-reset",
        }
    }
}
