//! Which machine measured, and which versions of what it was compared with.

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::thread;

use anyhow::{Context as _, Result};
use serde::Serialize;

use crate::peers;

/// Where figures come from.
#[derive(Debug, Serialize)]
pub struct Machine {
    /// The processor's model.
    cpu: String,
    /// How many processors this process may use.
    cores: usize,
    /// The kernel's release.
    kernel: String,
    /// What the data plane is compared with.
    versions: Vec<String>,
}

// === impl Machine ===

impl Machine {
    /// This one, with the versions of these peers.
    ///
    /// # Errors
    ///
    /// One is not installed, or /proc is not mounted.
    pub fn with(peers: impl IntoIterator<Item = peers::Kind>) -> Result<Self> {
        let read = |path: &str| fs::read_to_string(path).with_context(|| path.to_owned());
        // Several of them may be the same program.
        let versions: BTreeSet<_> =
            peers.into_iter().map(peers::Kind::version).collect::<Result<_>>()?;
        Ok(Self {
            cpu: model(&read("/proc/cpuinfo")?),
            cores: thread::available_parallelism()?.get(),
            kernel: read("/proc/sys/kernel/osrelease")?.trim().to_owned(),
            versions: versions.into_iter().collect(),
        })
    }
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { cpu, cores, kernel, versions } = self;
        write!(f, "{cpu}, {cores} cores, Linux {kernel}")?;
        versions.iter().try_for_each(|version| write!(f, ", {version}"))
    }
}

// === functions ===

/// The processor's model, by cpuinfo; not every architecture names one.
fn model(cpuinfo: &str) -> String {
    let named = cpuinfo.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        (key.trim() == "model name").then(|| value.trim().to_owned())
    });
    named.unwrap_or_else(|| format!("{} processor", std::env::consts::ARCH))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_model_is_named_if_the_kernel_knows_it() {
        let text = "processor\t: 0\nmodel name\t: Some CPU @ 2.0GHz\nprocessor\t: 1\n";
        assert_eq!(model(text), "Some CPU @ 2.0GHz");
        assert_eq!(model("processor\t: 0\n"), format!("{} processor", std::env::consts::ARCH));
    }
}
