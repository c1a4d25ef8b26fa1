//! Asks who answers, as `blocking.py` does, without any library of the machine: nothing that is preloaded
//! into a C library can see it connect, and programs made by Go are of the same kind.
//!
//! `cargo xtask test` links it statically. It has no dependencies, so that this takes a second.

use std::error::Error;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

/// No step takes longer.
const LIMIT: Duration = Duration::from_secs(10);

fn main() -> Result<(), Box<dyn Error>> {
    let address: SocketAddr =
        std::env::args().nth(1).ok_or("usage: mesh-static-client ADDRESS:PORT")?.parse()?;
    let mut stream = TcpStream::connect_timeout(&address, LIMIT)?;
    stream.set_read_timeout(Some(LIMIT))?;
    let peer = stream.peer_addr()?;
    if peer != address {
        return Err(format!("getpeername says {peer}").into());
    }
    stream.write_all(b"who\n")?;
    let mut name = String::new();
    BufReader::new(stream).read_line(&mut name)?;
    println!("{}", name.trim());
    Ok(())
}
