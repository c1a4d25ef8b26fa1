//! A server of gRPC's health service, by a library that the agent does not use: `mesh-grpc ADDRESS:PORT
//! SERVICE...` serves all of these until SIGUSR1, and serves again after SIGUSR2.

use std::env;
use std::net::SocketAddr;

use anyhow::{Context, Result};
use tokio::signal::unix::{SignalKind, signal};
use tonic::transport::Server;
use tonic_health::ServingStatus;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    let mut arguments = env::args().skip(1);
    let address: SocketAddr = arguments.next().context("ADDRESS:PORT")?.parse()?;
    let services: Vec<String> = arguments.collect();
    let (reporter, health) = tonic_health::server::health_reporter();
    let mut stop = signal(SignalKind::user_defined1())?;
    let mut go_on = signal(SignalKind::user_defined2())?;
    let control = async {
        let mut status = ServingStatus::Serving;
        loop {
            for service in &services {
                reporter.set_service_status(service, status).await;
            }
            status = tokio::select! {
                _ = stop.recv() => ServingStatus::NotServing,
                _ = go_on.recv() => ServingStatus::Serving,
            };
        }
    };
    tokio::select! {
        served = Server::builder().add_service(health).serve(address) => served?,
        () = control => {}
    }
    Ok(())
}
