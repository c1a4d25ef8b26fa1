//! Finding a compiler for the kernel programs.
//!
//! Two kinds serve. A distribution's rustc that comes with a built `core` for the BPF target
//! (Debian: `rustc-web` with `libstd-rust-web-dev-bpf`) needs neither a nightly toolchain nor
//! sources. Elsewhere rustup's nightly builds `core` itself, from its `rust-src` component.

use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::process;
use crate::workspace::BPF_TARGET;

/// The LLVM that the linker is built with ([`crate::setup`]). Bitcode of a newer one is not read.
pub(crate) const LLVM: u32 = 22;

/// The oldest compiler that builds the workspace (`rust-version` in `Cargo.toml`).
const OLDEST: (u32, u32) = (1, 95);

/// A compiler for the BPF target.
#[derive(Debug)]
pub(crate) enum Compiler {
    /// A rustc whose sysroot holds `core` for the target.
    Prebuilt {
        /// The rustc.
        rustc: PathBuf,
        /// What it says about itself.
        version: Version,
    },
    /// Rustup's nightly with `rust-src`, which builds `core`.
    Nightly {
        /// What it says about itself.
        version: Version,
    },
}

impl Compiler {
    /// Finds one; otherwise says for each place why what is there does not serve.
    pub(crate) fn find() -> Result<Self, Vec<String>> {
        let mut reasons = Vec::new();
        for find in [prebuilt, nightly] {
            match find() {
                Ok(compiler) => return Ok(compiler),
                Err(reason) => reasons.push(format!("{reason:#}")),
            }
        }
        Err(reasons)
    }
}

impl fmt::Display for Compiler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Prebuilt { rustc, version } => {
                write!(f, "{} {version}, with a built core for {BPF_TARGET}", rustc.display())
            }
            Self::Nightly { version } => {
                write!(f, "rustup's nightly {version}, which builds core from rust-src")
            }
        }
    }
}

fn prebuilt() -> Result<Compiler> {
    // By its path: what `rustc` means in `PATH` is rustup's choice.
    let rustc = PathBuf::from("/usr/bin/rustc");
    if !rustc.exists() {
        anyhow::bail!("{} does not exist", rustc.display());
    }
    let library = sysroot(&mut Command::new(&rustc))?.join("lib/rustlib").join(BPF_TARGET);
    if !has_core(&library.join("lib")) {
        anyhow::bail!("{} has no core for {BPF_TARGET}", rustc.display());
    }
    let version = Version::of(&mut Command::new(&rustc))?;
    version.check(&rustc.display().to_string())?;
    Ok(Compiler::Prebuilt { rustc, version })
}

fn nightly() -> Result<Compiler> {
    if process::which("rustup").is_none() {
        anyhow::bail!("there is no rustup");
    }
    let rustc = || {
        let mut rustup = Command::new("rustup");
        rustup.args(["run", "nightly", "rustc"]);
        rustup
    };
    let sysroot = sysroot(&mut rustc()).context("rustup has no usable nightly toolchain")?;
    if !sysroot.join("lib/rustlib/src/rust/library/core/Cargo.toml").exists() {
        anyhow::bail!("rustup's nightly toolchain is without its component rust-src");
    }
    let version = Version::of(&mut rustc())?;
    version.check("rustup's nightly")?;
    Ok(Compiler::Nightly { version })
}

fn sysroot(rustc: &mut Command) -> Result<PathBuf> {
    process::clean(rustc);
    Ok(process::output(rustc.args(["--print", "sysroot"]))?.trim_end().into())
}

fn has_core(directory: &Path) -> bool {
    let Ok(entries) = directory.read_dir() else { return false };
    entries.flatten().any(|entry| {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        name.starts_with("libcore-") && name.ends_with(".rlib")
    })
}

/// Versions of a compiler.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Version {
    rust: (u32, u32),
    llvm: u32,
}

impl Version {
    fn of(rustc: &mut Command) -> Result<Self> {
        process::clean(rustc);
        let text = process::output(rustc.arg("-vV"))?;
        Self::parse(&text).with_context(|| format!("cannot read the compiler's version: {text}"))
    }

    fn parse(text: &str) -> Option<Self> {
        let value = |key: &str| text.lines().find_map(|line| line.strip_prefix(key));
        let mut rust = value("release: ")?.split('.').map_while(|part| part.parse().ok());
        Some(Self {
            rust: (rust.next()?, rust.next()?),
            llvm: value("LLVM version: ")?.split('.').next()?.parse().ok()?,
        })
    }

    fn check(self, name: &str) -> Result<()> {
        if self.rust < OLDEST {
            anyhow::bail!("{name} is {self}, and the workspace needs {}.{}", OLDEST.0, OLDEST.1);
        }
        if self.llvm > LLVM {
            anyhow::bail!("{name} is {self}, and the linker reads LLVM {LLVM} at most");
        }
        Ok(())
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{} (LLVM {})", self.rust.0, self.rust.1, self.llvm)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_and_compared_as_numbers() {
        let version = |release: &str, llvm: &str| {
            Version::parse(&format!("rustc x\nrelease: {release}\nLLVM version: {llvm}\n"))
                .expect("a version")
        };
        assert!(version("1.96.0", "22.1.2").check("rustc").is_ok());
        assert!(version("1.100.0-nightly", "22.1.2").check("rustc").is_ok());
        assert!(version("1.85.0", "19.1.7").check("rustc").is_err());
        assert!(version("1.99.0", "23.0.0").check("rustc").is_err());
        assert_eq!(Version::parse("release: x\n"), None);
    }
}
