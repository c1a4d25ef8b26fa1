//! The backends: one process that listens at all their addresses, and answers with as much as it is
//! asked for.

use std::net::SocketAddr;

use anyhow::{Context as _, Result};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

use super::BACKEND_PROCESSOR;
use crate::scene::{BACKENDS, TARGET_PORT, stay_on};

/// How long a request is. It begins with the length of its answer, of 8 bytes, lowest first.
pub const REQUEST: usize = 64;

/// At most so much is written, or read, at once.
pub const CHUNK: usize = 256 * 1024;

/// Serves until it is killed. Says `true` when it listens.
///
/// An answer begins with one byte, the backend's place in [`BACKENDS`], so that clients know who
/// answered; what was asked for follows.
///
/// # Errors
///
/// An address cannot be listened at.
pub fn serve() -> Result<()> {
    stay_on(BACKEND_PROCESSOR)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    runtime.block_on(async {
        let mut listening = Vec::new();
        for (number, ip) in (0..).zip(BACKENDS) {
            let place: SocketAddr = format!("{ip}:{TARGET_PORT}").parse()?;
            let listener = TcpListener::bind(place)
                .await
                .with_context(|| format!("cannot listen at {place}"))?;
            listening.push(tokio::spawn(accept(listener, number)));
        }
        println!("true");
        for task in listening {
            task.await??;
        }
        Ok(())
    })
}

async fn accept(listener: TcpListener, number: u8) -> Result<()> {
    loop {
        let (stream, _) = listener.accept().await?;
        tokio::spawn(async move {
            // It ends when the client closes, in peace or not: the client knows how it went.
            let _closed = answer(stream, number).await;
        });
    }
}

async fn answer(mut stream: TcpStream, number: u8) -> Result<()> {
    stream.set_nodelay(true)?;
    let mut request = [0; REQUEST];
    let mut chunk = vec![number];
    loop {
        stream.read_exact(&mut request).await?;
        let (length, _) = request.split_first_chunk().context("a request has a length")?;
        let mut left = usize::try_from(u64::from_le_bytes(*length))?.saturating_add(1);
        while left > 0 {
            chunk.resize(left.min(CHUNK), number);
            stream.write_all(&chunk).await?;
            left -= chunk.len();
        }
    }
}
