//! Running other programs, and saying what is going on.
//!
//! Everything said here goes to stderr: stdout belongs to what is run last (`bench --json` is read
//! by machines).

use std::env;
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// Runs a command to its end; its output is shown (on stderr) as it comes.
///
/// # Errors
///
/// When it cannot be started or does not succeed; the error quotes the command.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let status = command
        .stdin(Stdio::null())
        .stdout(io::stderr())
        .status()
        .with_context(|| format!("cannot start `{}`", quote(command)))?;
    if !status.success() {
        bail!("`{}` failed ({status}); what it said is above", quote(command));
    }
    Ok(())
}

/// Runs a command and returns what it wrote to stdout.
///
/// # Errors
///
/// When it cannot be started or does not succeed; the error carries its stderr.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot start `{}`", quote(command)))?;
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        bail!("`{}` failed ({}): {}", quote(command), output.status, stderr.trim());
    }
    String::from_utf8(output.stdout)
        .with_context(|| format!("`{}` wrote something that is not UTF-8", quote(command)))
}

/// Becomes another program, so that its exit status and the terminal's signals are its own.
///
/// # Errors
///
/// Only returns when that failed.
pub(crate) fn exec(command: &mut Command) -> Result<()> {
    let error = command.exec();
    Err(error).with_context(|| format!("cannot start `{}`", quote(command)))
}

/// Announces a long step, runs it, and says how long it took.
///
/// # Errors
///
/// Those of the step, with its name in front.
pub(crate) fn step<T>(what: &str, f: impl FnOnce() -> Result<T>) -> Result<T> {
    eprintln!("==> {what}");
    let start = Instant::now();
    let result = f().with_context(|| format!("{what} failed"))?;
    eprintln!("    {what}: done in {}", seconds(start.elapsed()));
    Ok(result)
}

/// Does the same with several things, all at the same time.
///
/// # Errors
///
/// That of the first thing that fails; the others come to their end before.
pub(crate) fn at_once<T: Send>(
    things: impl IntoIterator<Item = T>,
    f: impl Fn(T) -> Result<()> + Sync,
) -> Result<()> {
    let f = &f;
    thread::scope(|scope| {
        let begun: Vec<_> = things.into_iter().map(|thing| scope.spawn(move || f(thing))).collect();
        let results = begun.into_iter().map(|one| match one.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        });
        results.collect::<Vec<_>>().into_iter().collect()
    })
}

/// A duration as people read it.
pub(crate) fn seconds(duration: Duration) -> String {
    format!("{:.1} s", duration.as_secs_f64())
}

/// The path of an executable in `PATH` or where administrators' tools live.
pub(crate) fn which(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .map(|directory| directory.join(program))
        .find(|file| is_executable(file))
}

fn is_executable(file: &Path) -> bool {
    fs::metadata(file).is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

/// Whether this process is root. `/proc/self` belongs to the effective user.
///
/// # Errors
///
/// When `/proc` is not mounted.
pub(crate) fn is_root() -> Result<bool> {
    let meta = fs::metadata("/proc/self").context("cannot read /proc/self: is /proc mounted?")?;
    Ok(meta.uid() == 0)
}

/// Fails when not root.
///
/// # Errors
///
/// Says what needs root, and how to get it.
pub(crate) fn require_root(what: &str) -> Result<()> {
    if !is_root()? {
        bail!(
            "{what} needs root (it loads kernel programs and makes namespaces and cgroups); \
             run it as root, for instance `sudo -E env PATH=\"$PATH\" cargo xtask …`"
        );
    }
    Ok(())
}

/// The cargo that runs this program, without what `cargo run` put into the environment for this
/// program alone.
pub(crate) fn cargo() -> Command {
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    clean(&mut cargo);
    cargo
}

/// Removes the library path that `cargo run` set for this program: it names the host toolchain's
/// libraries, which another toolchain must not load.
pub(crate) fn clean(command: &mut Command) {
    command.env_remove("LD_LIBRARY_PATH");
}

/// A command as one would type it.
fn quote(command: &Command) -> String {
    let mut text = command.get_program().to_string_lossy().into_owned();
    for argument in command.get_args().map(OsStr::to_string_lossy) {
        text.push(' ');
        if argument.is_empty() || argument.contains(|c: char| c.is_whitespace() || c == '\'') {
            text.push_str(&format!("{argument:?}"));
        } else {
            text.push_str(&argument);
        }
    }
    text
}
