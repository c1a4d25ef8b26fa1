//! Can this node run the agent? Each question is asked of the kernel itself, by probing, and never
//! of its version number: distributions move features between versions.

pub mod cgroup;
pub mod hooks;
mod kernel;
pub mod memory;
pub mod mounts;
mod privileges;

use std::path::Path;

use serde::{Deserialize, Serialize};

use mounts::Mounts;

/// The answer to one question. `check -o json` is a list of these.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, Debug)]
pub struct Check {
    /// Short name.
    pub name: String,
    /// Whether it is as it should be.
    pub ok: bool,
    /// Whether the agent cannot run without it.
    pub required: bool,
    /// What was found.
    pub detail: String,
    /// What to do about it; empty when there is nothing to do.
    pub advice: String,
}

/// Asks everything, in the order in which somebody would repair it. `cgroup` is the one that is to
/// be balanced, when one is named.
#[must_use]
pub fn run(cgroup: Option<&Path>) -> Vec<Check> {
    let mut checks = privileges::checks();
    let mounts = match Mounts::read() {
        Ok(mounts) => mounts,
        Err(error) => {
            checks.push(Check::bad(
                "mounts",
                format!("/proc/self/mountinfo: {error}"),
                "mount procfs at /proc",
            ));
            Mounts::default()
        }
    };
    checks.extend(cgroup::checks(&mounts, cgroup));
    checks.extend(kernel::checks(&mounts));
    checks.extend(hooks::checks(&mounts, cgroup));
    checks.push(memory::check());
    checks
}

/// Whether nothing that is required is missing.
#[must_use]
pub fn passed(checks: &[Check]) -> bool {
    checks.iter().all(|check| check.ok || !check.required)
}

// === impl Check ===

impl Check {
    /// Required, and there.
    pub(crate) fn good(name: impl Into<String>, detail: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            ok: true,
            required: true,
            detail: detail.into(),
            advice: String::new(),
        }
    }

    /// Required, and missing.
    pub(crate) fn bad(
        name: impl Into<String>,
        detail: impl Into<String>,
        advice: impl Into<String>,
    ) -> Self {
        Self {
            name: name.into(),
            ok: false,
            required: true,
            detail: detail.into(),
            advice: advice.into(),
        }
    }

    /// The agent can do without it.
    pub(crate) fn optional(self) -> Self {
        Self { required: false, ..self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_required_fails() {
        let missing = Check::bad("x", "missing", "install it");
        assert!(passed(&[Check::good("y", ""), missing.clone().optional()]));
        assert!(!passed(&[Check::good("y", ""), missing]));
    }

    /// Whatever this machine lacks, each question gets an answer, and a bad one an advice.
    #[test]
    fn every_question_is_answered() {
        let checks = run(None);
        for check in &checks {
            assert!(!check.detail.is_empty(), "{check:?}");
            assert!(check.ok || !check.advice.is_empty(), "{check:?}");
        }
        let mut names: Vec<_> = checks.iter().map(|check| &check.name).collect();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), checks.len(), "a name twice");
    }
}
