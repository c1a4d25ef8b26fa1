//! The oldest kernels that the programs must load on, booted in an emulator.
//!
//! A guest's only file is an initial ram disk with the agent, one of another map layout, `kernel_init` of the tests
//! crate, which does the assertions (see there), and the libraries of this machine that these need. The emulator is
//! always software (TCG), so it works inside any virtual machine.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::cpio::Archive;
use crate::host::{self, Parts};
use crate::process;
use crate::setup::{self, Group};
use crate::workspace::Workspace;

/// The series that are tried when none is named.
pub(crate) const SERIES: [&str; 2] = ["6.1", "6.12"];

/// How long a guest may take, from power on to its last line. It takes about two minutes, most of it in the
/// verifier, three times.
const LIMIT: Duration = Duration::from_secs(540);

/// What `kernel_init` writes last when every assertion held, and what it writes before the name
/// of one that did not.
const PASSED: &str = "kernel-init: passed";
const FAILED: &str = "FAILED";

/// Boots one kernel series, or all of [`SERIES`].
///
/// # Errors
///
/// When a kernel cannot be had or something does not build; when an assertion fails in the guest,
/// or the guest panics, or does not come to its end: then its console is part of the error.
pub(crate) fn run(workspace: &Workspace, series: Option<&str>, yes: bool) -> Result<()> {
    if std::env::consts::ARCH != "x86_64" {
        bail!("the test kernels are for x86_64; this machine is {}", std::env::consts::ARCH);
    }
    let compiler = setup::ensure(workspace, &[Group::Build, Group::Kernels], yes)?;
    // Not optimised: the kernel programs always are, and the agent's own speed is not the matter.
    let other = host::build_other(workspace, &compiler)?;
    let binaries = host::build(workspace, &compiler, Parts::Programs)?;
    let (agent, init) = (binaries.join("mesh-agent"), binaries.join("kernel_init"));
    fs::create_dir_all(workspace.kernels())
        .with_context(|| format!("cannot make {}", workspace.kernels().display()))?;
    let disk = workspace.kernels().join("initrd.cpio");
    write_disk(&disk, &init, &[("bin/mesh-agent", &agent), ("bin/mesh-agent-other", &other)])?;
    let chosen = series.map_or_else(|| SERIES.to_vec(), |series| vec![series]);
    let kernels =
        chosen.iter().map(|series| fetch(workspace, series)).collect::<Result<Vec<_>>>()?;
    // Each keeps one processor busy.
    process::at_once(&kernels, |kernel| {
        process::step(&format!("booting {}", kernel.package), || boot(kernel, &disk))
    })
}

fn write_disk(disk: &Path, init: &Path, programs: &[(&str, &Path)]) -> Result<()> {
    let read = |file: &Path| fs::read(file).with_context(|| format!("reading {}", file.display()));
    let mut archive = Archive::default();
    let libraries = libraries(programs.iter().map(|(_, program)| *program).chain([init]))?;
    let mut directories = BTreeSet::from(
        ["dev", "proc", "sys", "run", "etc", "var", "tmp", "bin"].map(PathBuf::from),
    );
    for library in &libraries {
        let name = library.strip_prefix("/")?;
        directories.extend(name.ancestors().skip(1).map(Path::to_owned));
    }
    // Each after the one that it is in.
    for directory in directories.iter().filter(|directory| !directory.as_os_str().is_empty()) {
        archive.directory(&directory.to_string_lossy())?;
    }
    for library in &libraries {
        let name = library.strip_prefix("/")?.to_string_lossy();
        archive.executable(&name, &read(library)?)?;
    }
    archive.executable("init", &read(init)?)?;
    for (name, program) in programs {
        archive.executable(name, &read(program)?)?;
    }
    fs::write(disk, archive.finish()?).with_context(|| format!("writing {}", disk.display()))
}

/// The libraries that programs are linked against, and what loads them, by the paths that the loader knows
/// (ldd(1)).
fn libraries<'p>(programs: impl Iterator<Item = &'p Path>) -> Result<BTreeSet<PathBuf>> {
    let mut found = BTreeSet::new();
    for program in programs {
        let listing = process::output(Command::new("ldd").arg(program))?;
        found.extend(listing.lines().filter_map(library));
    }
    Ok(found)
}

/// The path in a line of ldd's: `libc.so.6 => /lib/libc.so.6 (0x7f…)`, or `/lib64/ld-linux.so.2 (0x7f…)`. What
/// the kernel maps by itself has none.
fn library(line: &str) -> Option<PathBuf> {
    let path = line.split("=> ").last()?.split_whitespace().next()?;
    path.starts_with('/').then(|| PathBuf::from(path))
}

// === getting a kernel ===

struct Kernel {
    series: String,
    package: String,
    image: PathBuf,
}

/// Debian's newest cloud kernel of a series, from the cache or by apt.
fn fetch(workspace: &Workspace, series: &str) -> Result<Kernel> {
    let package = find_package(series)?;
    let directory = workspace.kernels().join(&package);
    let image = directory.join("vmlinuz");
    if !image.exists() {
        process::step(&format!("downloading {package}"), || {
            download(&package, &directory, &image)
        })?;
    }
    Ok(Kernel { series: series.to_owned(), package, image })
}

fn find_package(series: &str) -> Result<String> {
    let search = || {
        let mut apt = Command::new("apt-cache");
        process::output(apt.args(["search", "--names-only", "^linux-image-.*-cloud-amd64$"]))
    };
    if let Some(package) = newest(&search()?, series) {
        return Ok(package);
    }
    if process::is_root()? {
        process::run(Command::new("apt-get").args(["update", "-q"]))?;
    }
    newest(&search()?, series).with_context(|| {
        format!(
            "apt knows no cloud kernel {series}; run `apt-get update`, and if that does not help \
             add a source that has it: Debian 12 carries 6.1 and 6.12 in bookworm-security, and \
             6.12 also in bookworm-backports"
        )
    })
}

/// The newest package of a series in what `apt-cache search` printed.
fn newest(listing: &str, series: &str) -> Option<String> {
    let prefix = format!("linux-image-{series}.");
    listing
        .lines()
        .filter_map(|line| line.split(' ').next())
        .filter(|name| name.starts_with(&prefix))
        .max_by_key(|name| numbers(name))
        .map(str::to_owned)
}

/// The numbers in a name, in order: 6.12.100 is newer than 6.12.99.
fn numbers(name: &str) -> Vec<u64> {
    name.split(|c: char| !c.is_ascii_digit()).filter_map(|part| part.parse().ok()).collect()
}

fn download(package: &str, directory: &Path, image: &Path) -> Result<()> {
    let scratch = directory.join("scratch");
    if scratch.exists() {
        fs::remove_dir_all(&scratch)?;
    }
    fs::create_dir_all(&scratch)?;
    let mut apt = Command::new("apt-get");
    // Apt's own user cannot write below most target directories.
    apt.args(["download", "-q", "-o", "APT::Sandbox::User=root", package]).current_dir(&scratch);
    process::run(&mut apt)?;
    let archive = only_file(&scratch, ".deb")?;
    process::run(Command::new("dpkg-deb").arg("-x").arg(archive).arg(&scratch))?;
    let unpacked = only_file(&scratch.join("boot"), "")?;
    // Last, so that a half-made directory is not taken for a whole one.
    let kernel = scratch.join("kernel");
    fs::rename(unpacked, &kernel)?;
    fs::rename(&kernel, image)?;
    fs::remove_dir_all(&scratch)?;
    Ok(())
}

/// The file in a directory that has this ending, or that is a kernel image.
fn only_file(directory: &Path, ending: &str) -> Result<PathBuf> {
    let entries = directory.read_dir().with_context(|| format!("reading {directory:?}"))?;
    entries
        .flatten()
        .map(|entry| entry.path())
        .find(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if ending.is_empty() { name.starts_with("vmlinuz-") } else { name.ends_with(ending) }
        })
        .with_context(|| format!("the package holds nothing like {directory:?}/…{ending}"))
}

// === booting it ===

/// A running emulator; ends with its owner.
struct Guest(Child);

impl Drop for Guest {
    fn drop(&mut self) {
        // It may have ended by itself, which is how it should be.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn boot(kernel: &Kernel, disk: &Path) -> Result<()> {
    let mut qemu = Command::new("qemu-system-x86_64");
    // Two processors, which take turns: with a thread for each, one may go on with a breakpoint that the other has
    // taken out of the kernel's code long ago (jump labels), and the guest panics.
    qemu.args(["-accel", "tcg,thread=single", "-cpu", "max", "-m", "1024M", "-smp", "2"]);
    qemu.args(["-display", "none", "-nodefaults", "-no-reboot", "-serial", "stdio"]);
    // A panic reboots at once, and a reboot ends the emulator.
    qemu.args(["-append", "console=ttyS0 panic=-1 quiet"]);
    qemu.arg("-kernel").arg(&kernel.image).arg("-initrd").arg(disk);
    qemu.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::inherit());
    let mut guest = Guest(qemu.spawn().context("cannot start qemu-system-x86_64")?);
    let console = guest.0.stdout.take().context("the emulator has no console")?;

    let (sender, lines) = mpsc::channel();
    thread::spawn(move || {
        for line in BufReader::new(console).split(b'\n').map_while(Result::ok) {
            let line = String::from_utf8_lossy(&line).trim_end().to_owned();
            if sender.send(line).is_err() {
                break;
            }
        }
    });

    let end = Instant::now() + LIMIT;
    let mut console = Vec::new();
    let timed_out = loop {
        match lines.recv_timeout(end.saturating_duration_since(Instant::now())) {
            Ok(line) => {
                if line.starts_with("ok ") {
                    eprintln!("    {}: {line}", kernel.series);
                }
                console.push(line);
            }
            Err(error) => break error == mpsc::RecvTimeoutError::Timeout,
        }
    };
    let Err(reason) = judge(&console, timed_out) else { return Ok(()) };
    bail!("{reason}; the guest's console:\n    {}", console.join("\n    "));
}

/// Whether a console shows that every assertion held.
fn judge(console: &[String], timed_out: bool) -> Result<(), String> {
    if let Some(line) = console.iter().find(|line| line.starts_with(FAILED)) {
        return Err(line.clone());
    }
    if console.iter().any(|line| line.contains("Kernel panic")) {
        return Err("the guest's kernel panicked".to_owned());
    }
    if timed_out {
        return Err(format!("the guest did not end within {}", process::seconds(LIMIT)));
    }
    if !console.iter().any(|line| line.starts_with(PASSED)) {
        return Err(format!("the guest ended without the line `{PASSED}`"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_is_found_by_number_and_series() {
        let listing = "linux-image-6.1.0-9-cloud-amd64 - Linux 6.1\n\
                       linux-image-6.1.0-56-cloud-amd64 - Linux 6.1\n\
                       linux-image-6.12.99+deb12-cloud-amd64 - Linux 6.12\n\
                       linux-image-6.12.117+deb12-cloud-amd64 - Linux 6.12\n";
        assert_eq!(newest(listing, "6.1").as_deref(), Some("linux-image-6.1.0-56-cloud-amd64"));
        assert_eq!(
            newest(listing, "6.12").as_deref(),
            Some("linux-image-6.12.117+deb12-cloud-amd64")
        );
        assert_eq!(newest(listing, "5.10"), None);
    }

    #[test]
    fn libraries_are_found_where_the_loader_finds_them() {
        let path = |line| library(line).map(|path| path.display().to_string());
        let libc = "\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f1)";
        assert_eq!(path(libc).as_deref(), Some("/lib/x86_64-linux-gnu/libc.so.6"));
        let loader = "\t/lib64/ld-linux-x86-64.so.2 (0x00007f2)";
        assert_eq!(path(loader).as_deref(), Some("/lib64/ld-linux-x86-64.so.2"));
        assert_eq!(path("\tlinux-vdso.so.1 (0x00007ff)"), None);
        assert_eq!(path("\tstatically linked"), None);
    }

    #[test]
    fn only_a_whole_run_without_failure_passes() {
        let lines = |text: &str| text.lines().map(str::to_owned).collect::<Vec<_>>();
        let passed = format!("ok a\n{PASSED}, 1 assertions\n");
        assert_eq!(judge(&lines(&passed), false), Ok(()));
        assert!(judge(&lines(&passed), true).is_err());
        assert!(judge(&lines("ok a"), false).is_err());
        assert!(judge(&lines(&format!("{FAILED} b\n{passed}")), false).is_err());
        assert!(judge(&lines(&format!("[1.0] Kernel panic - x\n{passed}")), false).is_err());
    }
}
