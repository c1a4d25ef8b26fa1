//! `run`: from the agent file and the flags to a configuration that the agent can start with.

use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::thread::CapabilitySet;
use tokio::runtime::Runtime;
use tracing_subscriber::EnvFilter;

use super::args::RunArgs;
use super::failure::Failure;
use super::output;
use crate::agent;
use crate::check::cgroup::Cgroup;
use crate::check::mounts::Mounts;
use crate::commands::Runner;
use crate::config::Config;
use crate::dataplane::load::Options;
use crate::privileges;
use crate::text::chain;

/// How many files the agent has open before it checks any endpoint, with some to spare.
const FILES: u64 = 64;

/// How long threads may take to end.
const ENDING: Duration = Duration::from_secs(1);

/// Runs the agent until it is told to stop.
pub(super) fn run(
    args: RunArgs,
    socket: Option<PathBuf>,
    pins: Option<PathBuf>,
) -> Result<(), Failure> {
    let (log_refusals, detach) = (args.log_refusals, args.detach_on_exit);
    let config = config(args, socket, pins)?;
    let options = Options { log: log_refusals, limits: config.limits, detach };
    log(options);
    super::need_files(FILES)?;
    // While it may still become another user.
    let runner = match &config.commands {
        None => Err("no user is named for them".to_owned()),
        Some(account) => Runner::start(account).map_err(|error| {
            format!(
                "commands cannot be run as {}: {error}; give the agent CAP_SETUID, CAP_SETGID and CAP_KILL, or leave \
                 `command-checks` out of the agent file",
                account.name
            )
        }),
    };
    if let (Err(why), Some(_)) = (&runner, &config.commands) {
        tracing::error!("{why}");
    }
    // Before there are other threads, each of which would keep what it has.
    let low = config.metrics.is_some_and(|listen| listen.port() < 1_024);
    let mut besides = if low { privileges::LOW_PORT } else { CapabilitySet::empty() };
    if [config.cgroup.as_deref(), config.socket.parent()].into_iter().flatten().any(is_foreign) {
        besides |= privileges::OTHERS_FILES;
    }
    if let Err(error) = privileges::confine(besides) {
        tracing::warn!(%error, "privileges that are not needed could not be given up");
    }
    let runtime = Runtime::new().map_err(|error| Failure::no_runtime(&error))?;
    let result = runtime.block_on(agent::run(config, options, runner));
    // A thread that hangs in a dead file system must not keep the process.
    runtime.shutdown_timeout(ENDING);
    result.map_err(|error| Failure::failed(chain(error.as_ref())))
}

/// Whether something belongs to another user, as a cgroup that was delegated.
fn is_foreign(path: &Path) -> bool {
    let own = rustix::process::geteuid().as_raw();
    std::fs::metadata(path).is_ok_and(|metadata| metadata.uid() != own)
}

/// The configuration of this run: flags win over the file. Its `cgroup` is there.
fn config(
    args: RunArgs,
    socket: Option<PathBuf>,
    pins: Option<PathBuf>,
) -> Result<Config, Failure> {
    if args.state_dir.is_some() {
        return Err(Failure::failed(
            "`--state-dir` is not supported yet: this version keeps nothing on disk; leave it out",
        ));
    }
    let mut config = Config::load(args.config.as_deref()).map_err(Failure::failed)?;
    let take = |flag: Option<PathBuf>, value: &mut PathBuf| {
        if let Some(flag) = flag {
            *value = flag;
        }
    };
    take(socket, &mut config.socket);
    take(pins, &mut config.pin_dir);
    let named = args.cgroup.or(config.cgroup.take()).ok_or_else(|| no_cgroup(&mount_point()))?;
    config.cgroup = Some(Cgroup::open(&named).map_err(Failure::failed)?.directory);
    Ok(config)
}

/// Says what naming the root means, and how to name less.
fn no_cgroup(mount: &Path) -> Failure {
    let mount = mount.display();
    Failure::failed(format!(
        "no cgroup is named, and there is no default: every socket created below it is balanced. \
         Name one, like `run --cgroup {mount}/web.slice`, or `cgroup:` in the agent file; `run \
         --cgroup {mount}` takes over every program of this node"
    ))
}

fn mount_point() -> PathBuf {
    let mounts = Mounts::read().unwrap_or_default();
    mounts.points("cgroup2").next().unwrap_or(Path::new("/sys/fs/cgroup")).to_path_buf()
}

/// Logs to standard error; `RUST_LOG` says how much.
fn log(options: Options) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| {
        EnvFilter::new(if options.log { "info,mesh_ebpf=debug" } else { "info" })
    });
    // A second call, as in tests, keeps the first subscriber.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(output::wants_colour(&io::stderr()))
        .with_target(false)
        .try_init();
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(config: PathBuf, cgroup: Option<PathBuf>) -> RunArgs {
        RunArgs {
            config: Some(config),
            cgroup,
            state_dir: None,
            log_refusals: false,
            detach_on_exit: false,
        }
    }

    #[test]
    fn flags_win_and_the_cgroup_must_be_one() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let file = directory.path().join("agent.yaml");
        std::fs::write(&file, "pin-dir: /file\nsocket: /file.sock\n").expect("file");

        let failure = config(args(file.clone(), None), None, None).expect_err("no cgroup");
        let message = failure.message().expect("a message");
        assert!(message.contains("--cgroup") && message.contains("every program"), "{message}");

        let plain = directory.path().to_path_buf();
        let failure = config(args(file.clone(), Some(plain)), None, None).expect_err("no cgroup2");
        let message = failure.message().expect("a message");
        assert!(message.contains("not a cgroup2 directory"), "{message}");

        let state = RunArgs { state_dir: Some("/x".into()), ..args(file.clone(), None) };
        let failure = config(state, None, None).expect_err("not supported yet");
        assert!(failure.message().expect("a message").contains("--state-dir"));

        let mount = mount_point();
        let config = config(args(file, Some(mount.clone())), None, Some("/flag".into()))
            .expect("cgroup2 is mounted");
        assert_eq!(config.cgroup, Some(mount));
        assert_eq!(config.pin_dir, Path::new("/flag"));
        assert_eq!(config.socket, Path::new("/file.sock"));
    }
}
