//! The commands that ask the agent.

use std::path::{Path, PathBuf};
use std::time::SystemTime;

use mesh_common::{ABI_VERSION, Reason};
use serde::Serialize;

use super::args::{DrainArgs, ExplainArgs};
use super::failure::Failure;
use super::output::{self, Output};
use super::tables;
use crate::api::client::{Client, ClientError};
use crate::api::server::{DrainQuery, ExplainQuery, View as _, ViewError};
use crate::api::types::{self, Answer};
use crate::config::Config;
use crate::engine::Handle;
use crate::{inspect, text};

/// How many open files a question takes, with some to spare.
const FILES: u64 = 16;

/// The socket to use: the one that was named, or the one of the agent file. A file that cannot be
/// read does not matter here: whoever asks need not be allowed to read it.
pub(super) fn socket(named: Option<PathBuf>, config: Option<&Path>) -> PathBuf {
    named.unwrap_or_else(|| Config::load(config).unwrap_or_default().socket)
}

/// Asks one question.
pub(super) fn ask<T>(
    named: Option<PathBuf>,
    question: impl AsyncFnOnce(&Client) -> Result<T, ClientError>,
) -> Result<T, Failure> {
    let client = Client::new(&socket(named, None));
    Ok(block_on(question(&client))??)
}

/// Runs a future to its end. One thread is enough to wait for one answer.
pub(super) fn block_on<F: Future>(future: F) -> Result<F::Output, Failure> {
    super::need_files(FILES)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::no_runtime(&error))?;
    Ok(runtime.block_on(future))
}

/// Asks the agent, or looks at what it has left in the kernel if none runs.
fn ask_or_look<T>(
    named: Option<PathBuf>,
    pins: Option<PathBuf>,
    question: impl AsyncFnOnce(&Client) -> Result<T, ClientError>,
    looking: impl AsyncFnOnce(Handle) -> Result<T, ViewError>,
) -> Result<T, Failure> {
    let client = Client::new(&socket(named, None));
    let silent = match block_on(question(&client))? {
        Err(silent @ (ClientError::NotRunning { .. } | ClientError::NoSocket { .. })) => silent,
        answer => return Ok(answer?),
    };
    let config = match pins {
        Some(pin_dir) => Config { pin_dir, ..Config::default() },
        None => Config::load(None).map_err(|error| {
            Failure::NoAgent(format!(
                "{silent}; {error}; --pin-dir says where the agent has left its maps"
            ))
        })?,
    };
    let directory = config.pin_dir.clone();
    match block_on(inspect::ask(config, looking))? {
        Ok(found) => {
            output::complain(&format!(
                "no agent runs: this is what the kernel holds, from {}",
                directory.display()
            ));
            Ok(found)
        }
        Err(error) if error.is::<ViewError>() => Err(Failure::failed(error)),
        Err(error) => Err(Failure::NoAgent(format!("{silent}; {}", text::chain(error.as_ref())))),
    }
}

pub(super) fn status(named: Option<PathBuf>, output: &Output) -> Result<(), Failure> {
    let status = ask(named, Client::status)?;
    output.print(&status, |status, style| tables::status(status, style, SystemTime::now()))
}

pub(super) fn audit(named: Option<PathBuf>, output: &Output) -> Result<(), Failure> {
    let audit = ask(named, Client::audit)?;
    output.print(&audit, tables::audit)
}

pub(super) fn services(
    named: Option<PathBuf>,
    pins: Option<PathBuf>,
    name: Option<&str>,
    output: &Output,
) -> Result<(), Failure> {
    let asked = async |client: &Client| client.services(name).await;
    let services = ask_or_look(named, pins, asked, async |handle: Handle| {
        let mut services = handle.services().await?;
        services.retain(|service| name.is_none_or(|name| service.name == name));
        if let Some(name) = name.filter(|_| services.is_empty()) {
            return Err(ViewError::no_service(name));
        }
        // What an agent would say about them that has not heard of its sources.
        services.iter_mut().for_each(|service| service.problems.clear());
        Ok(services)
    })?;
    if services.is_empty() && output.is_for_people() {
        output::complain("no services: `mesh-agent status` says what the sources hold");
        return Ok(());
    }
    output.print(&services, |services, style| tables::services(services, style))
}

pub(super) fn backends(
    named: Option<PathBuf>,
    pins: Option<PathBuf>,
    service: Option<&str>,
    output: &Output,
) -> Result<(), Failure> {
    let asked = async |client: &Client| client.backends(service).await;
    let backends = ask_or_look(named, pins, asked, async |handle: Handle| {
        handle.backends(service.map(str::to_owned)).await
    })?;
    if backends.is_empty() && output.is_for_people() {
        output::complain("no backends: `mesh-agent services` lists the services");
        return Ok(());
    }
    output.print(&backends, |backends, style| tables::backends(backends, style, SystemTime::now()))
}

pub(super) fn connections(
    named: Option<PathBuf>,
    pins: Option<PathBuf>,
    service: Option<&str>,
    output: &Output,
) -> Result<(), Failure> {
    let asked = async |client: &Client| client.connections(service).await;
    let connections = ask_or_look(named, pins, asked, async |handle: Handle| {
        handle.connections(service.map(str::to_owned)).await
    })?;
    if connections.is_empty() && output.is_for_people() {
        output::complain("no open connections");
        return Ok(());
    }
    output.print(&connections, |connections, style| tables::connections(connections, style))
}

pub(super) fn drain(
    named: Option<PathBuf>,
    args: DrainArgs,
    drain: bool,
    output: &Output,
) -> Result<(), Failure> {
    let DrainArgs { service, address: (address, port) } = args;
    let query = DrainQuery { service, address, port, drain };
    let backends = ask(named, async |client: &Client| client.drain(&query).await)?;
    output.print(&backends, |backends, style| tables::backends(backends, style, SystemTime::now()))
}

pub(super) fn forget(
    named: Option<PathBuf>,
    service: Option<&str>,
    output: &Output,
) -> Result<(), Failure> {
    let names = ask(named, async |client: &Client| client.forget(service).await)?;
    output.print(&names, |names, _| match names.as_slice() {
        [] => "nothing is held\n".to_owned(),
        names => names.iter().map(|name| format!("{name} is no longer held\n")).collect(),
    })
}

pub(super) fn explain(
    named: Option<PathBuf>,
    pins: Option<PathBuf>,
    args: ExplainArgs,
    output: &Output,
) -> Result<(), Failure> {
    let from = args.from.map(absolute).transpose()?;
    let query = ExplainQuery { address: args.address, protocol: args.protocol.into(), from };
    let asked = async |client: &Client| client.explain(&query).await;
    let explanation = ask_or_look(named, pins, asked, async |handle: Handle| {
        handle.explain(query.clone()).await
    })?;
    output.print(&explanation, tables::explanation)?;
    // That an address is nobody's is the answer to a question, but not to the one that was meant.
    let unknown = |answer: &Answer| matches!(answer, Answer::Refused { reason, .. } if reason == Reason::NoService.name());
    if explanation.answer.as_ref().is_some_and(|answer| !unknown(answer)) {
        return Ok(());
    }
    Err(Failure::failed(match explanation.service {
        Some(service) => format!(
            "{} of service {service} would not be balanced: the steps say why",
            explanation.frontend
        ),
        None => format!(
            "{} is no service: `mesh-agent services -o wide` lists what is",
            explanation.frontend
        ),
    }))
}

/// A directory is relative to this process, and the agent works elsewhere. A number is a process.
fn absolute(from: String) -> Result<String, Failure> {
    if from.parse::<u32>().is_ok() {
        return Ok(from);
    }
    std::path::absolute(&from)
        .map(|path| path.to_string_lossy().into_owned())
        .map_err(|error| Failure::failed(format!("--from {from:?}: {error}; name a directory")))
}

/// What `version -o json` prints.
#[derive(Serialize)]
struct Versions {
    version: &'static str,
    abi: u32,
    /// `null` when no agent answers, which is no failure here.
    agent: Option<types::Version>,
}

pub(super) fn version(named: Option<PathBuf>, output: &Output) -> Result<(), Failure> {
    let client = Client::new(&socket(named, None));
    let agent = block_on(client.version())?;
    let silent = agent.as_ref().err().map(ToString::to_string);
    let versions =
        Versions { version: env!("CARGO_PKG_VERSION"), abi: ABI_VERSION, agent: agent.ok() };
    output.print(&versions, |versions, _| {
        let mut out = format!("mesh-agent {} (maps {})\n", versions.version, versions.abi);
        match (&versions.agent, silent) {
            (Some(agent), _) => tables::line(
                &mut out,
                format_args!("running: {} (maps {}, pid {})", agent.version, agent.abi, agent.pid),
            ),
            (None, silent) => {
                tables::line(&mut out, format_args!("running: {}", silent.unwrap_or_default()));
            }
        }
        out
    })
}
