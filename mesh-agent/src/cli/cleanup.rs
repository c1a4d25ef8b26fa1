//! `cleanup`: removes what an agent that is gone has left, and only that.
//!
//! That is the pins, by which the kernel goes on balancing without an agent, and the socket with its lock
//! file.

use std::fs::{self, DirEntry, File, TryLockError};
use std::io;
use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::args::CleanupArgs;
use super::failure::Failure;
use super::output::{Output, Style, clean};
use super::{ask, tables};
use crate::api::socket::Claim;
use crate::check::mounts::Mounts;
use crate::claim;
use crate::config::Config;
use crate::dataplane::{pindir, programs};

/// What was done; `cleanup -o json` prints it.
#[derive(Serialize, PartialEq, Eq, Debug, Default)]
struct Report {
    /// What was removed, in that order.
    removed: Vec<PathBuf>,
    /// What is not this project's, and was left alone.
    kept: Vec<PathBuf>,
}

pub(super) fn cleanup(
    args: &CleanupArgs,
    socket: Option<PathBuf>,
    pins: Option<PathBuf>,
    output: &Output,
) -> Result<(), Failure> {
    let socket = ask::socket(socket, args.config.as_deref());
    // Not what another file than the one that is meant might name.
    let pins = match pins {
        Some(pins) => pins,
        None => Config::load(args.config.as_deref()).map_err(Failure::failed)?.pin_dir,
    };
    let mut report = Report::default();
    // Held to the end, so that no agent starts and pins while its pins are taken away.
    let claim = claim(&socket, &mut report)?;
    let swept = sweep_pins(&pins, &mut report);
    drop(claim);
    output.print(&report, describe)?;
    swept
}

/// Makes sure that no agent runs, and removes its socket and lock file. Nothing is done where no
/// agent ever was.
fn claim(socket: &Path, report: &mut Report) -> Result<Option<Claim>, Failure> {
    if !socket.parent().is_some_and(Path::is_dir) {
        return Ok(None);
    }
    let lock = Claim::lock_path(socket);
    let left = [is_socket(socket).then(|| socket.to_path_buf()), lock.exists().then_some(lock)];
    let claim = ask::block_on(Claim::take(socket))?.map_err(Failure::failed)?;
    report.removed.extend(left.into_iter().flatten());
    Ok(Some(claim))
}

fn is_socket(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket())
}

/// Removes this project's pins below `directory`, which must be on a BPF file system: elsewhere a
/// file with one of these names is somebody's data.
fn sweep_pins(directory: &Path, report: &mut Report) -> Result<(), Failure> {
    let fail = |error: io::Error| {
        Failure::failed(format!(
            "{}: {error}; run as root, or name another with --pin-dir",
            directory.display()
        ))
    };
    let directory = match fs::canonicalize(directory) {
        Ok(directory) => directory,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(fail(error)),
    };
    let mounts = Mounts::read().map_err(fail)?;
    let kind = mounts.holding(&directory).map_or("nothing", |mount| mount.kind.as_str());
    if kind != "bpf" {
        return Err(Failure::failed(format!(
            "{} is on {kind} and not on a BPF file system, so nothing in it is a pin; name the \
             right directory with --pin-dir",
            directory.display()
        )));
    }
    // An agent that has another socket may have them.
    let lock = File::open(&directory).map_err(fail)?;
    match lock.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let pid = claim::holder(&lock);
            let who = pid.map_or_else(String::new, |pid| format!(" (process {pid})"));
            return Err(Failure::failed(format!(
                "an agent{who} has {}: stop it first",
                directory.display()
            )));
        }
        Err(TryLockError::Error(error)) => return Err(fail(error)),
    }
    // What has the name of a pin and is something else is somebody's, or damaged.
    sweep(
        &directory,
        &|directory, name| matches!(pindir::get(directory, name), Ok(Some(_))),
        report,
    )
    .map_err(fail)
}

/// Whether a file in a directory is a pin of this project, by its name and by what it is.
type IsPin<'a> = &'a dyn Fn(&Path, &str) -> bool;

/// As [`sweep_pins`], wherever `directory` is.
fn sweep(directory: &Path, is_pin: IsPin<'_>, report: &mut Report) -> io::Result<()> {
    for version in entries(directory)? {
        let is_directory = version.file_type()?.is_dir();
        if !is_directory || pindir::any_version(&version.file_name().to_string_lossy()).is_none() {
            report.kept.push(version.path());
            continue;
        }
        for pin in pins(&version.path())? {
            let name = pin.file_name().to_string_lossy().into_owned();
            if pindir::Kind::of_name(&name).is_some() && is_pin(&version.path(), &name) {
                fs::remove_file(pin.path())?;
                report.removed.push(pin.path());
            } else {
                report.kept.push(pin.path());
            }
        }
        remove_if_empty(&version.path(), report)?;
    }
    remove_if_empty(directory, report)
}

/// What is in a directory of pins, in the order in which it is removed: the links first of what makes
/// records, and those last of what ends them.
fn pins(directory: &Path) -> io::Result<Vec<DirEntry>> {
    let hooked = |name: &str| programs::PROGRAMS.iter().any(|(hook, _)| name.starts_with(hook));
    let mut pins = entries(directory)?;
    pins.sort_by_key(|pin| {
        let name = pin.file_name().to_string_lossy().into_owned();
        (pindir::Kind::of_name(&name) != Some(pindir::Kind::Link), !hooked(&name))
    });
    Ok(pins)
}

/// What is in a directory, in the order of names.
fn entries(directory: &Path) -> io::Result<Vec<DirEntry>> {
    let mut entries = fs::read_dir(directory)?.collect::<Result<Vec<_>, _>>()?;
    entries.sort_by_key(DirEntry::file_name);
    Ok(entries)
}

fn remove_if_empty(directory: &Path, report: &mut Report) -> io::Result<()> {
    match fs::remove_dir(directory) {
        Ok(()) => {
            report.removed.push(directory.to_path_buf());
            Ok(())
        }
        // What was kept is in it; or it is a mount point.
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::ResourceBusy
            ) =>
        {
            Ok(())
        }
        Err(error) => Err(error),
    }
}

fn describe(report: &Report, _: Style) -> String {
    let mut out = String::new();
    for path in &report.removed {
        tables::line(&mut out, format_args!("removed {}", shown(path)));
    }
    for path in &report.kept {
        tables::line(&mut out, format_args!("left alone {}: not of this project", shown(path)));
    }
    if report.removed.is_empty() {
        tables::line(&mut out, format_args!("nothing to remove"));
    }
    out
}

fn shown(path: &Path) -> String {
    clean(&path.to_string_lossy())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_ours_goes() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let root = directory.path().join("mesh");
        for path in ["v1/other", "vmlinux", "v2"] {
            fs::create_dir_all(root.join(path)).expect("directory");
        }
        for path in ["v1/FRONTENDS", "v1/mesh_connect4", "v1/cilium_lb", "vmlinux/SLOTS", "SLOTS"] {
            fs::write(root.join(path), "").expect("file");
        }
        let mut report = Report::default();
        sweep(&root, &|_, _| true, &mut report).expect("swept");
        let under = |paths: &[&str]| paths.iter().map(|path| root.join(path)).collect::<Vec<_>>();
        assert_eq!(report.removed, under(&["v1/mesh_connect4", "v1/FRONTENDS", "v2"]));
        assert_eq!(report.kept, under(&["SLOTS", "v1/cilium_lb", "v1/other", "vmlinux"]));
        assert!(root.join("vmlinux/SLOTS").exists());
    }

    #[test]
    fn an_empty_place_goes_whole() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let root = directory.path().join("mesh");
        fs::create_dir_all(root.join("v1")).expect("directory");
        fs::write(root.join("v1/COUNTERS"), "").expect("file");
        let mut report = Report::default();
        sweep(&root, &|_, _| true, &mut report).expect("swept");
        assert!(!root.exists() && report.kept.is_empty());
    }

    #[test]
    fn what_is_not_on_a_bpf_file_system_is_never_touched() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let pin = directory.path().join("v1/FRONTENDS");
        fs::create_dir_all(directory.path().join("v1")).expect("directory");
        fs::write(&pin, "data").expect("file");
        let failure = sweep_pins(directory.path(), &mut Report::default()).expect_err("refused");
        assert!(failure.message().is_some_and(|m| m.contains("not on a BPF file system")));
        assert!(pin.exists());
        assert_eq!(sweep_pins(&directory.path().join("none"), &mut Report::default()), Ok(()));
    }

    #[test]
    fn a_stale_socket_goes_with_its_lock() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let socket = directory.path().join("agent.sock");
        drop(std::os::unix::net::UnixListener::bind(&socket).expect("bind"));
        fs::write(Claim::lock_path(&socket), "1\n").expect("lock file");
        let mut report = Report::default();
        drop(claim(&socket, &mut report).expect("no agent"));
        assert_eq!(report.removed, [socket.clone(), Claim::lock_path(&socket)]);
        assert_eq!(fs::read_dir(directory.path()).expect("directory").count(), 0);

        let mut report = Report::default();
        drop(claim(&socket, &mut report).expect("no agent"));
        assert_eq!(report, Report::default(), "nothing was there");
    }
}
