//! A program that is linked statically, as Go and musl programs are: nothing that is preloaded into
//! a C library can balance it. Built by the test that uses it.

use std::io::Write;
use std::net::TcpStream;

fn main() -> std::io::Result<()> {
    let address = std::env::args().nth(1).ok_or(std::io::ErrorKind::InvalidInput)?;
    let mut stream = TcpStream::connect(address)?;
    stream.write_all(b"who\n")?;
    std::io::copy(&mut stream, &mut std::io::stdout()).map(drop)
}
