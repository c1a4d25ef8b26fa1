//! QUIC, as applications speak it: sockets that are not connected, control messages with each datagram,
//! and many packets for each connection.
//!
//! `mesh-quic serve NAME ADDRESS:PORT` sends its name to whoever opens a stream and sends something;
//! `mesh-quic ask ADDRESS:PORT` prints it, after as much was sent there and back as needs many packets.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use clap::Parser;
use quinn::crypto::rustls::QuicClientConfig;
use quinn::rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use quinn::rustls::{self, RootCertStore};
use quinn::{ClientConfig, Endpoint, Incoming, ServerConfig};

/// Whose certificate it is, whatever the address.
const HOST: &str = "mesh.test";

/// How much is sent there, and comes back behind the name.
const MUCH: usize = 100_000;

/// How long all of it may take.
const PATIENCE: Duration = Duration::from_secs(8);

/// Tells its name over QUIC, or asks for it.
#[derive(Parser)]
enum Quic {
    /// Serves.
    Serve {
        /// Its name.
        name: String,
        /// Where it listens.
        address: SocketAddr,
    },
    /// Asks.
    Ask {
        /// Where.
        address: SocketAddr,
    },
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    match Quic::parse() {
        Quic::Serve { name, address } => serve(name, address).await,
        Quic::Ask { address } => {
            let name =
                tokio::time::timeout(PATIENCE, ask(address)).await.context("no answer")??;
            println!("{name}");
            Ok(())
        }
    }
}

async fn serve(name: String, address: SocketAddr) -> Result<()> {
    let (certificate, key) = identity();
    let config = ServerConfig::with_single_cert(vec![certificate], key.into())?;
    let endpoint = Endpoint::server(config, address)?;
    // Tells that it serves; nobody is answered here.
    let _ready = TcpListener::bind(address)?;
    while let Some(incoming) = endpoint.accept().await {
        let name = name.clone();
        tokio::spawn(async move {
            if let Err(error) = answer(incoming, &name).await {
                eprintln!("{error:#}");
            }
        });
    }
    Ok(())
}

async fn answer(incoming: Incoming, name: &str) -> Result<()> {
    let connection = incoming.await?;
    let (mut send, mut receive) = connection.accept_bi().await?;
    let sent = receive.read_to_end(MUCH).await?;
    send.write_all(name.as_bytes()).await?;
    send.write_all(b"\n").await?;
    send.write_all(&sent).await?;
    send.finish()?;
    connection.closed().await;
    Ok(())
}

async fn ask(address: SocketAddr) -> Result<String> {
    let unbound = match address {
        SocketAddr::V4(_) => SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), 0),
        SocketAddr::V6(_) => SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), 0),
    };
    let endpoint = Endpoint::client(unbound)?;
    let mut roots = RootCertStore::empty();
    roots.add(identity().0)?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let tls = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(roots)
        .with_no_client_auth();
    let config = ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls)?));
    let connection = endpoint.connect_with(config, address, HOST)?.await?;
    ensure!(connection.remote_address() == address, "{}", connection.remote_address());
    let (mut send, mut receive) = connection.open_bi().await?;
    send.write_all(&vec![b'.'; MUCH]).await?;
    send.finish()?;
    let answer = receive.read_to_end(MUCH + 1_000).await?;
    connection.close(0u32.into(), b"");
    endpoint.wait_idle().await;
    let name = answer.split(|byte| *byte == b'\n').next().unwrap_or_default();
    ensure!(answer.len() == name.len() + 1 + MUCH, "{} bytes came back", answer.len());
    Ok(String::from_utf8(name.to_vec())?)
}

/// A certificate and its key: those of every test.
fn identity() -> (CertificateDer<'static>, PrivatePkcs8KeyDer<'static>) {
    let certificate = include_bytes!("../../programs/quic-cert.der");
    let key = include_bytes!("../../programs/quic-key.der");
    (CertificateDer::from(&certificate[..]), PrivatePkcs8KeyDer::from(&key[..]))
}
