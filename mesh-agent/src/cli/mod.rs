//! The command line: what a person types and reads.
//!
//! Every command ends with one of four exit statuses ([`failure::Failure`]), and writes what was
//! asked for to standard output and everything else to standard error, so that output can be piped.

mod args;
mod ask;
mod check;
mod cleanup;
mod events;
pub mod failure;
mod output;
mod run;
mod tables;

use std::path::Path;
use std::process::ExitCode;

use clap::{CommandFactory as _, Parser as _};

use self::args::{Cli, Command};
use self::failure::Failure;
use self::output::{Output, Style};
use crate::{canary, commands};

/// The exit status of wrong usage; clap has the same.
const WRONG_USAGE: u8 = 2;

/// Parses the arguments of this process and does what they say.
#[must_use]
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            if let Some(command) = args::later(&error) {
                output::complain(&format!(
                    "`{command}` is not in this version; `mesh-agent --help` lists what is"
                ));
                return ExitCode::from(WRONG_USAGE);
            }
            // Help and the version come here too; what is wrong usage ends with status 2.
            error.exit();
        }
    };
    match execute(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            if let Some(message) = failure.message() {
                output::complain(message);
            }
            failure.exit_code()
        }
    }
}

/// Refuses to begin with too few open files: the runtime panics where it cannot have those that
/// it needs.
fn need_files(least: u64) -> Result<(), Failure> {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    match limit {
        Some(limit) if limit < least => Err(Failure::failed(format!(
            "this process may open {limit} files and needs {least} at the least: raise the limit, \
             see `ulimit -n`"
        ))),
        _ => Ok(()),
    }
}

/// Writes a manual page of section 8 for this program, and one for each of its commands.
fn manual(directory: &Path) -> Result<(), Failure> {
    let mut command = Cli::command();
    command.build();
    let pages =
        std::iter::once(&command).chain(command.get_subcommands().filter(|c| !c.is_hide_set()));
    for page in pages {
        let name = page.get_display_name().unwrap_or("mesh-agent").to_owned();
        let path = directory.join(format!("{name}.8"));
        let mut text = Vec::new();
        clap_mangen::Man::new(page.clone())
            .section("8")
            .render(&mut text)
            .and_then(|()| std::fs::write(&path, text))
            .map_err(|error| Failure::failed(format!("{}: {error}", path.display())))?;
    }
    Ok(())
}

fn execute(cli: Cli) -> Result<(), Failure> {
    let Cli { socket, pin_dir: pins, output: format, command } = cli;
    let output = Output::new(format, Style::of_stdout(format));
    match command {
        Command::Run(args) => run::run(args, socket, pins),
        Command::Check(args) => check::check(&args, &output),
        Command::Cleanup(args) => cleanup::cleanup(&args, socket, pins, &output),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "mesh-agent", &mut script);
            output::write(&script)
        }
        Command::Canary { address } => {
            let said =
                canary::connect(address).map_err(|error| Failure::failed(format!("{error:#}")))?;
            output::write(said.as_bytes())
        }
        Command::RunCommands { uid, gid } => {
            let result = match uid.zip(gid) {
                Some((uid, gid)) => commands::keep(uid, gid),
                None => commands::run(),
            };
            result.map_err(|error| Failure::failed(format!("commands: {error:#}")))
        }
        Command::Man { directory } => manual(&directory),
        Command::Status => ask::status(socket, &output),
        Command::Audit => ask::audit(socket, &output),
        Command::Services { name } => ask::services(socket, pins, name.as_deref(), &output),
        Command::Backends { service } => ask::backends(socket, pins, service.as_deref(), &output),
        Command::Connections { service } => {
            ask::connections(socket, pins, service.as_deref(), &output)
        }
        Command::Drain(args) => ask::drain(socket, args, true, &output),
        Command::Undrain(args) => ask::drain(socket, args, false, &output),
        Command::Forget(args) => ask::forget(socket, args.service.as_deref(), &output),
        Command::Events(args) => events::events(socket, &args, &output),
        Command::Explain(args) => ask::explain(socket, pins, args, &output),
        Command::Version => ask::version(socket, &output),
    }
}
