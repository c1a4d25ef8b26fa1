//! A Debian that systemd boots, as people have it: a BPF file system and cgroup2 mounted by systemd, services on
//! their usual ports, few open files, a firewall that drops what comes in, no IPv6, and an agent of this project that
//! runs already. The end-to-end tests run there as a service.
//!
//! It boots in a container (systemd-nspawn), in a mount namespace and a cgroup of its own, so nothing of it
//! reaches this machine but processor time.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::host::{self, Parts};
use crate::leftovers::Leftovers;
use crate::process;
use crate::setup::{self, Group};
use crate::workspace::Workspace;

/// The release of Debian, and the packages that the tests need there.
const RELEASE: &str = "bookworm";
const PACKAGES: [&str; 18] = [
    "systemd",
    "systemd-sysv",
    "dbus",
    "iproute2",
    "nftables",
    "python3",
    "python3-prometheus-client",
    "ca-certificates",
    "curl",
    "nginx-light",
    "redis-server",
    "redis-tools",
    "dnsmasq-base",
    "bind9-dnsutils",
    "iperf3",
    "bsdutils",
    "libfaketime",
    "procps",
];

/// What a container needs beyond the usual, to run the agent and its tests.
const CAPABILITIES: &str = "CAP_BPF,CAP_PERFMON,CAP_NET_ADMIN,CAP_SYS_ADMIN,CAP_SYS_PTRACE,CAP_SYS_RESOURCE,\
                            CAP_DAC_READ_SEARCH";
const SYSTEM_CALLS: &str = "bpf perf_event_open";

/// What is on its BPF file system in any case: of the kernel, and of the agent that runs there.
const EXPECTED: [&str; 3] = ["maps.debug", "progs.debug", "mesh"];

/// Where the guest writes what came of the tests.
const OUT: &str = "/out";

/// Runs a guest: `$1` is the cgroup's name, what follows the command. A shell does this, so that the cgroup also goes
/// away when a terminal interrupts it. The mount namespace ends with it.
const CONFINED: &str = r#"
mount=$(findmnt --noheadings --output TARGET --types cgroup2 | head -n 1)
cgroup="$mount/$1"
# Where a hierarchy of version 1 is systemd's, a guest has one there too.
other="/sys/fs/cgroup/systemd/$1"
shift
mkdir "$cgroup"
remove() {
    echo 1 >"$cgroup/cgroup.kill"
    for _ in 1 2 3 4 5 6 7 8 9 10; do
        find "$cgroup" -depth -type d -exec rmdir {} + 2>/dev/null && break
        sleep 0.5
    done
    [ ! -d "$other" ] || find "$other" -depth -type d -exec rmdir {} +
}
trap 'remove' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP
mount -t bpf bpf /sys/fs/bpf
sh -c 'echo 0 >"$0/cgroup.procs"; exec "$@"' "$cgroup" "$@" &
wait $!
"#;

/// What the service runs. Of each program what it says is in a file of its own; the status is in `status`.
const TESTS: &str = r#"#!/bin/sh
# Beside a firewall and without IPv6, as some hosts are, and inside a cgroup that an agent balances already.
nft add table inet host '{ chain input { type filter hook input priority 0; policy drop; }; }'
sysctl -q -w net.ipv6.conf.all.disable_ipv6=1 net.ipv4.conf.all.rp_filter=1
failed=0
mesh-agent status >/out/host-agent 2>&1 || failed=1
# A guest of a machine whose memory controller is in a hierarchy of version 1 has none.
grep -qw memory /sys/fs/cgroup/cgroup.controllers && limits=1 || limits=0
[ $limits = 0 ] || echo +memory >/sys/fs/cgroup/cgroup.subtree_control
for program in $PROGRAMS; do
    name=$(basename "$program" | sed 's/-[0-9a-f]*$//')
    if [ "$name" = memory ] && [ $limits = 0 ]; then
        echo "memory NOT RUN: this machine gives its guests no memory controller" >>/out/list
    elif "$program" --test-threads 4 >"/out/$name" 2>&1; then
        echo "$name passed" >>/out/list
    else
        echo "$name FAILED" >>/out/list
        failed=1
    fi
done
mesh-agent status >>/out/host-agent 2>&1 || failed=1
ls -A /sys/fs/bpf >/out/pins
echo $failed >/out/status
systemctl --no-block poweroff
"#;

/// Boots it, and runs the end-to-end tests, or only some of their programs.
///
/// # Errors
///
/// When it cannot be made or does not boot, when a test fails there, or something is left on this machine.
pub(crate) fn run(workspace: &Workspace, programs: &[String], yes: bool) -> Result<()> {
    process::require_root("`cargo xtask guest`")?;
    let groups = [Group::Build, Group::Show, Group::Test, Group::Guest];
    let compiler = setup::ensure(workspace, &groups, yes)?;
    host::build_other(workspace, &compiler)?;
    let binaries = host::build(workspace, &compiler, Parts::Tests)?;
    host::build_static_client(workspace)?;
    let tests = host::end_to_end_tests(workspace)?;
    let chosen: Vec<PathBuf> = tests
        .into_iter()
        .filter(|(name, _)| programs.is_empty() || programs.contains(name))
        .map(|(_, program)| program)
        .collect();
    if chosen.is_empty() {
        bail!("there is no such test program: {}", programs.join(", "));
    }
    let root = workspace.target.join("guest/root");
    if !root.join("etc/os-release").exists() {
        process::step("making a Debian", || make(&root))?;
    }
    let out = workspace.target.join("guest/out");
    if out.exists() {
        fs::remove_dir_all(&out)?;
    }
    fs::create_dir_all(&out)?;
    install(workspace, &root, &binaries, &chosen)?;
    let before = Leftovers::now(&workspace.target)?;
    let booted = process::step("running the tests in it", || boot(workspace, &root, &out));
    let judged = judge(&out);
    booted.and(judged).and(before.assert_none_since())
}

/// Makes the guest's root directory. A half-made one has another name.
fn make(root: &Path) -> Result<()> {
    let scratch = root.with_extension("new");
    if scratch.exists() {
        fs::remove_dir_all(&scratch)?;
    }
    fs::create_dir_all(&scratch)?;
    let mut debootstrap = Command::new("debootstrap");
    debootstrap.arg("--variant=minbase").arg(format!("--include={}", PACKAGES.join(",")));
    process::run(debootstrap.arg(RELEASE).arg(&scratch))?;
    fs::rename(&scratch, root).with_context(|| format!("cannot make {}", root.display()))
}

/// Puts the agent there as its unit says, and the service that runs the tests.
fn install(workspace: &Workspace, root: &Path, binaries: &Path, tests: &[PathBuf]) -> Result<()> {
    let write = |path: &str, text: &str| {
        let path = root.join(path);
        let parent = path.parent().context("a path has a parent")?;
        fs::create_dir_all(parent)?;
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
    };
    host::copy_if_other(&binaries.join("mesh-agent"), &root.join("usr/bin/mesh-agent"))?;
    let deploy = workspace.root.join("deploy");
    let unit = fs::read_to_string(deploy.join("mesh-agent.service"))?;
    write("etc/systemd/system/mesh-agent.service", &unit)?;
    write("etc/mesh/agent.yaml", &fs::read_to_string(deploy.join("agent.yaml"))?)?;
    fs::create_dir_all(root.join("etc/mesh/services.d"))?;
    write("usr/local/bin/mesh-tests", TESTS)?;
    let programs: Vec<_> = tests.iter().map(|test| test.display().to_string()).collect();
    let tests = format!(
        "[Unit]\nAfter=mesh-agent.service\nWants=mesh-agent.service\n\
         [Service]\nType=exec\nExecStart=/bin/sh /usr/local/bin/mesh-tests\n\
         Environment=PROGRAMS=\"{}\"\nEnvironment=MESH_AGENT_BIN={}/mesh-agent\n\
         Environment=MESH_TEST_BIN_DIR={}\n",
        programs.join(" "),
        binaries.display(),
        binaries.display()
    );
    write("etc/systemd/system/mesh-tests.service", &tests)?;
    let wanted = root.join("etc/systemd/system/multi-user.target.wants");
    fs::create_dir_all(&wanted)?;
    for unit in ["mesh-agent.service", "mesh-tests.service"] {
        let link = wanted.join(unit);
        drop(fs::remove_file(&link));
        std::os::unix::fs::symlink(format!("/etc/systemd/system/{unit}"), link)?;
    }
    Ok(())
}

fn boot(workspace: &Workspace, root: &Path, out: &Path) -> Result<()> {
    let name = format!("mesh-test-guest-{}", std::process::id());
    let mut guest = Command::new("unshare");
    guest.args(["--mount", "--propagation", "private", "sh", "-euc", CONFINED, "sh", &name]);
    guest.args(["systemd-nspawn", "--quiet", "--register=no", "--keep-unit", "--private-network"]);
    guest.arg("--console=pipe").arg(format!("--machine={name}"));
    guest.arg("-D").arg(root).arg("--volatile=overlay");
    guest.arg(format!("--capability={CAPABILITIES}"));
    guest.arg(format!("--system-call-filter={SYSTEM_CALLS}"));
    guest.arg("--bind=/sys/fs/bpf").arg(format!("--bind={}:{OUT}", out.display()));
    guest.arg(format!("--bind-ro={}", workspace.root.display()));
    if !workspace.target.starts_with(&workspace.root) {
        guest.arg(format!("--bind-ro={}", workspace.target.display()));
    }
    // Otherwise its systemd makes its directories in the machine's root cgroup.
    guest.arg("--boot").env("SYSTEMD_NSPAWN_UNIFIED_HIERARCHY", "1");
    process::run(&mut guest)
}

/// Whether all programs passed there, and left nothing in the guest.
fn judge(out: &Path) -> Result<()> {
    let read = |name: &str| {
        fs::read_to_string(out.join(name)).with_context(|| {
            format!("the guest has not come to its end: no {name} in {}", out.display())
        })
    };
    let (status, list, pins) = (read("status")?, read("list")?, read("pins")?);
    eprint!("{list}");
    for name in list.lines().filter_map(|line| line.strip_suffix(" FAILED")) {
        eprintln!("--- {name}\n{}", read(name)?);
    }
    let left: Vec<&str> = pins.lines().filter(|name| !EXPECTED.contains(name)).collect();
    if !left.is_empty() {
        bail!("the tests left pins on the host: {}", left.join(", "));
    }
    if status.trim() != "0" {
        bail!("tests failed in the guest; the agent that runs there: {}", read("host-agent")?);
    }
    Ok(())
}
