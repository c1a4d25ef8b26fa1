//! A named server whose port can be closed and opened again, and that can be rude.

use std::io::{self, BufRead, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::ValueEnum as _;
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
    /// It accepts, and never answers.
    Hang,
    /// It answers that it is broken: a line with [`BROKEN`], a page with this status.
    Broken,
    /// It thinks for [`THOUGHT`], and answers.
    Think,
    /// It thinks ten times as long.
    Ponder,
    /// It answers bytes without any meaning.
    Garbage,
    /// It answers a page whose head never ends.
    Head,
    /// It answers a page of 1 GiB.
    Body,
}

/// What a server answers that is broken.
pub const BROKEN: &str = "500";

/// How long one thinks that takes its time: long against what a connect takes, and so short that ten times
/// as long is no reason to give up.
pub const THOUGHT: Duration = Duration::from_millis(20);

/// What is sent of an answer that never ends: as much as anybody reads, up to this.
const ENDLESS: usize = 1 << 30;

/// Threads that accept.
const THREADS: usize = 4;

/// A client that says nothing for this long is let go.
const SILENCE: Duration = Duration::from_secs(1);

/// How long a reset waits after an answer, so that the answer is read before.
const READING: Duration = Duration::from_millis(1);

/// Serves until standard input ends. A line `close` or `open` there does that to the port, and says
/// so; the name of a manner is how connections are treated from then on.
///
/// # Errors
///
/// It cannot listen.
pub fn run(name: &str, place: SocketAddr, manner: Manner) -> Result<()> {
    let manner = Arc::new(Mutex::new(manner));
    let mut open = Some(Open::new(name, place, &manner)?);
    say("open")?;
    for line in io::stdin().lock().lines() {
        match &*line? {
            "close" => {
                open.take().context("it is closed already")?.close();
                say("closed")?;
            }
            "open" => {
                open = Some(Open::new(name, place, &manner)?);
                say("open")?;
            }
            other => {
                let Ok(new) = Manner::from_str(other, false) else { bail!("{other} is no order") };
                *locked(&manner) = new;
                say(other)?;
            }
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
    fn new(name: &str, place: SocketAddr, manner: &Arc<Mutex<Manner>>) -> Result<Self> {
        let listener = Arc::new(listen(place).with_context(|| format!("{name} at {place}"))?);
        let kept = Arc::new(Mutex::new(Vec::new()));
        let threads = (0..THREADS).map(|_| {
            let (listener, kept) = (Arc::clone(&listener), Arc::clone(&kept));
            let (name, manner) = (name.to_owned(), Arc::clone(manner));
            thread::spawn(move || {
                while let Ok((stream, _)) = listener.accept() {
                    let manner = *locked(&manner);
                    if let Some(delay) = manner.thinks() {
                        // As many as ask are thought about at once.
                        let name = name.clone();
                        thread::spawn(move || serve_after(delay, stream, &name));
                        continue;
                    }
                    // A client that goes away is its own affair.
                    if let Ok(Some(stream)) = serve(stream, &name, manner) {
                        keep(&mut locked(&kept), stream);
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
    if manner == Manner::Hang {
        return Ok(Some(stream));
    }
    stream.set_read_timeout(Some(SILENCE))?;
    stream.set_write_timeout(Some(SILENCE))?;
    let asked = question(&mut stream)?;
    match manner {
        Manner::Reset => {
            SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
            return Ok(None);
        }
        _ if asked == Question::None => {}
        Manner::Broken => answer(&mut stream, asked, "500 Internal Server Error", BROKEN)?,
        Manner::Garbage => {
            let bytes: Vec<u8> = std::iter::repeat_with(|| fastrand::u8(..)).take(4096).collect();
            stream.write_all(&bytes)?;
        }
        Manner::Head => endless(&mut stream, "HTTP/1.1 200 OK\r\nx: ")?,
        Manner::Body => {
            let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {ENDLESS}\r\n\r\n");
            endless(&mut stream, &head)?;
        }
        _ => answer(&mut stream, asked, "200 OK", name)?,
    }
    match manner {
        Manner::Keep => return Ok(Some(stream)),
        Manner::AnswerReset => {
            thread::sleep(READING);
            SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
        }
        _ => {}
    }
    Ok(None)
}

/// What a client wants.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Question {
    /// Nothing: it has gone.
    None,
    /// A line.
    Line,
    /// A page.
    Page,
}

fn question(stream: &mut TcpStream) -> io::Result<Question> {
    let (mut buffer, mut filled) = ([0; 4096], 0);
    loop {
        let count = stream.read(&mut buffer[filled..])?;
        filled += count;
        let read = &buffer[..filled];
        if filled == 0 {
            return Ok(Question::None);
        }
        if !read.starts_with(b"GET ") {
            return Ok(Question::Line);
        }
        // What is not read would reset the connection when it is closed.
        if count == 0 || read.ends_with(b"\r\n\r\n") || filled == buffer.len() {
            return Ok(Question::Page);
        }
    }
}

fn answer(stream: &mut TcpStream, asked: Question, status: &str, text: &str) -> io::Result<()> {
    if asked == Question::Line {
        return writeln!(stream, "{text}");
    }
    let length = text.len() + 1;
    let head = format!("HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close");
    stream.write_all(format!("{head}\r\n\r\n{text}\n").as_bytes())
}

fn endless(stream: &mut TcpStream, begin: &str) -> io::Result<()> {
    static PIECE: [u8; 1 << 16] = [b'x'; 1 << 16];
    stream.write_all(begin.as_bytes())?;
    (0..ENDLESS / PIECE.len()).try_for_each(|_| stream.write_all(&PIECE))
}

fn serve_after(delay: Duration, stream: TcpStream, name: &str) {
    thread::sleep(delay);
    // A client that goes away is its own affair.
    let _ = serve(stream, name, Manner::Plain);
}

/// Keeps a connection, and lets go of those that have ended.
fn keep(kept: &mut Vec<TcpStream>, stream: TcpStream) {
    kept.retain_mut(is_open);
    kept.push(stream);
}

/// Whether the client has not closed it. What it says is read, and not heard.
fn is_open(stream: &mut TcpStream) -> bool {
    if stream.set_nonblocking(true).is_err() {
        return false;
    }
    loop {
        match stream.read(&mut [0; 256]) {
            Ok(0) => return false,
            Ok(_) => {}
            Err(error) => return error.kind() == io::ErrorKind::WouldBlock,
        }
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
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
            Self::Hang => "hang",
            Self::Broken => "broken",
            Self::Think => "think",
            Self::Ponder => "ponder",
            Self::Garbage => "garbage",
            Self::Head => "head",
            Self::Body => "body",
        }
    }

    /// For how long it thinks before it answers.
    const fn thinks(self) -> Option<Duration> {
        match self {
            Self::Think => Some(THOUGHT),
            Self::Ponder => THOUGHT.checked_mul(10),
            _ => None,
        }
    }
}
