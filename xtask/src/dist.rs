//! What is released: one static binary, and a tarball with what belongs to it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::host::{self, Linkage};
use crate::process;
use crate::setup::{self, Group};
use crate::workspace::{Profile, Workspace, host_target};

/// What is copied as it is, and where to.
const FILES: [(&str, &str); 6] = [
    ("README.md", "README.md"),
    ("LICENSE-APACHE", "LICENSE-APACHE"),
    ("LICENSE-MIT", "LICENSE-MIT"),
    ("deploy/mesh-agent.service", "mesh-agent.service"),
    ("deploy/agent.yaml", "agent.yaml"),
    ("deploy/services.d/example.yaml", "services.d/example.yaml"),
];

/// Shells, and how the script for each is called where the shell looks for it.
const SHELLS: [(&str, &str); 3] =
    [("bash", "mesh-agent"), ("zsh", "_mesh-agent"), ("fish", "mesh-agent.fish")];

/// Makes the tarball in the target directory, and returns its path.
///
/// # Errors
///
/// When the build fails, or a file cannot be written.
pub(crate) fn run(workspace: &Workspace, yes: bool) -> Result<PathBuf> {
    let compiler = setup::ensure(workspace, &[Group::Build], yes)?;
    let agent = host::build_agent(workspace, &compiler, Profile::Release, Linkage::Static)?;
    let tarball = pack(workspace, &agent, &workspace.dist())?;
    check(&agent)?;
    Ok(tarball)
}

/// The same with the agent that the tests use, which is neither optimised nor static: for whether all that
/// belongs to a release is there.
///
/// # Errors
///
/// As [`run`].
pub(crate) fn draft(workspace: &Workspace, yes: bool) -> Result<PathBuf> {
    let compiler = setup::ensure(workspace, &[Group::Build], yes)?;
    let agent = host::build_agent(workspace, &compiler, Profile::Dev, Linkage::Dynamic)?;
    pack(workspace, &agent, &workspace.dist().join("draft"))
}

/// Puts all that is released into a directory below another, and that into a tarball.
fn pack(workspace: &Workspace, agent: &Path, dist: &Path) -> Result<PathBuf> {
    let name = format!("mesh-agent-{}-{}", env!("CARGO_PKG_VERSION"), host_target());
    let directory = dist.join(&name);
    if directory.exists() {
        fs::remove_dir_all(&directory)?;
    }
    for (from, to) in FILES {
        copy(&workspace.root.join(from), &directory.join(to))?;
    }
    copy(agent, &directory.join("mesh-agent"))?;
    for (shell, file) in SHELLS {
        let script = process::output(Command::new(agent).args(["completions", shell]))?;
        let path = directory.join("completions").join(shell).join(file);
        create_parent(&path)?;
        fs::write(&path, script).with_context(|| format!("cannot write {}", path.display()))?;
    }
    let man = directory.join("man");
    fs::create_dir_all(&man)?;
    process::run(Command::new(agent).arg("man").arg(&man))?;
    ensure!(man.join("mesh-agent.8").is_file(), "no manual page was written");

    let tarball = dist.join(format!("{name}.tar.gz"));
    let mut tar = Command::new("tar");
    // The same bytes for the same files.
    tar.args(["--sort=name", "--owner=0", "--group=0", "--numeric-owner", "--mtime=@0", "-czf"]);
    tar.arg(&tarball).arg("-C").arg(dist).arg(&name);
    process::run(&mut tar)?;
    Ok(tarball)
}

/// The binary needs nothing of the machine that it is brought to.
fn check(binary: &Path) -> Result<()> {
    let bytes = fs::read(binary)?;
    let elf = object::File::parse(&*bytes).context("the agent is no ELF file")?;
    use object::Object as _;
    let needed = elf.section_by_name(".interp").is_none();
    ensure!(needed, "{} needs a dynamic loader", binary.display());
    let version = process::output(Command::new(binary).args(["--version"]))?;
    ensure!(version.contains(env!("CARGO_PKG_VERSION")), "it says {version:?}");
    Ok(())
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    create_parent(to)?;
    fs::copy(from, to).with_context(|| format!("cannot copy {}", from.display()))?;
    Ok(())
}

fn create_parent(path: &Path) -> Result<()> {
    let parent = path.parent().context("a path has a parent")?;
    fs::create_dir_all(parent).with_context(|| format!("cannot make {}", parent.display()))
}
