//! Where things are: the checkout, the target directory, and what is put there.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::Value;

use crate::process;

/// The target triple of the kernel programs.
pub(crate) const BPF_TARGET: &str = "bpfel-unknown-none";

/// The paths of this checkout. Nothing is written outside `target`.
#[derive(Debug)]
pub(crate) struct Workspace {
    /// The checkout.
    pub root: PathBuf,
    /// Cargo's target directory.
    pub target: PathBuf,
}

impl Workspace {
    /// Asks cargo, which knows about `CARGO_TARGET_DIR` and configuration files.
    pub(crate) fn find() -> Result<Self> {
        let mut cargo = process::cargo();
        cargo.args(["metadata", "--no-deps", "--format-version=1", "--offline"]);
        // Not the caller's directory: that may be another workspace.
        cargo.current_dir(env!("CARGO_MANIFEST_DIR"));
        let metadata: Value = serde_json::from_str(&process::output(&mut cargo)?)
            .context("`cargo metadata` did not answer in JSON")?;
        let path = |key: &str| {
            let path = metadata.get(key).and_then(Value::as_str).map(PathBuf::from);
            path.with_context(|| format!("`cargo metadata` did not name {key}"))
        };
        Ok(Self { root: path("workspace_root")?, target: path("target_directory")? })
    }

    /// Where tools are installed: never into the user's own cargo directory.
    pub(crate) fn tools(&self) -> PathBuf {
        self.target.join("tools")
    }

    /// The linker of the kernel programs.
    pub(crate) fn bpf_linker(&self) -> PathBuf {
        self.tools().join("bin/bpf-linker")
    }

    /// The proxy that the benchmarks compare with, inside its wheel.
    pub(crate) fn envoy(&self) -> PathBuf {
        self.tools().join("envoy/envoy/_bin/envoy")
    }

    /// Where the fuzzers and what runs under the sanitizer are built, and where the fuzzers keep what they found.
    pub(crate) fn fuzz(&self) -> PathBuf {
        self.target.join("fuzz")
    }

    /// What is released.
    pub(crate) fn dist(&self) -> PathBuf {
        self.target.join("dist")
    }

    /// Where the benchmarks keep what they measured.
    pub(crate) fn measured(&self) -> PathBuf {
        self.target.join("bench")
    }

    /// Where the kernel programs are built. A target directory of their own: another compiler
    /// builds them, and cargo would otherwise rebuild everything at each change of compiler.
    pub(crate) fn ebpf(&self) -> PathBuf {
        self.target.join("ebpf")
    }

    /// The object that the agent embeds.
    pub(crate) fn ebpf_object(&self) -> PathBuf {
        self.ebpf().join("mesh-ebpf.o")
    }

    /// Where downloaded test kernels are kept.
    pub(crate) fn kernels(&self) -> PathBuf {
        self.target.join("kernels")
    }

    /// The binaries of a build for the host, with cargo's own rules for the directory.
    pub(crate) fn binaries(&self, profile: Profile) -> PathBuf {
        self.target.join(profile.directory())
    }

    /// The static binaries of a build for the host.
    pub(crate) fn static_binaries(&self, profile: Profile) -> PathBuf {
        self.target.join(host_target()).join(profile.directory())
    }
}

/// How something is compiled.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Profile {
    /// Cargo's `dev`.
    Dev,
    /// Cargo's `release`.
    Release,
}

impl Profile {
    /// The directory cargo uses for it.
    fn directory(self) -> &'static Path {
        Path::new(match self {
            Self::Dev => "debug",
            Self::Release => "release",
        })
    }

    /// The flag that selects it.
    pub(crate) fn flag(self) -> &'static str {
        match self {
            Self::Dev => "--profile=dev",
            Self::Release => "--profile=release",
        }
    }
}

/// The triple of builds that name one: static ones, for which musl is not needed since the gnu target
/// links statically too, and those with flags that build scripts must not have.
pub(crate) fn host_target() -> String {
    format!("{}-unknown-linux-gnu", std::env::consts::ARCH)
}
