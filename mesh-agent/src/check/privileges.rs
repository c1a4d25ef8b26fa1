//! What this process may do (`capabilities(7)`), and how much memory it may lock.

use std::fs;

use rustix::thread::CapabilitySet;

use super::Check;
use crate::privileges::{self, Capability, NEEDED};

/// Capabilities and the limit of locked memory.
pub(super) fn checks() -> Vec<Check> {
    let mut checks = capabilities(privileges::has);
    checks.push(
        Check::good("least privileges", format!("user root with {}", privileges::names()))
            .optional(),
    );
    checks.push(memlock(
        &fs::read_to_string("/proc/self/limits").unwrap_or_default(),
        &super::kernel::release(),
    ));
    checks
}

fn capabilities(has: impl Fn(CapabilitySet) -> bool) -> Vec<Check> {
    NEEDED
        .iter()
        .map(|capability| {
            let Capability { name, purpose, required, implied, set } = *capability;
            let check = if has(set) {
                Check::good(name, format!("there: {purpose}"))
            } else if implied && has(CapabilitySet::SYS_ADMIN) {
                Check::good(name, format!("by CAP_SYS_ADMIN: {purpose}"))
            } else {
                let advice = if required {
                    "run as root with what `least privileges` names, as deploy/mesh-agent.service does; \
                     containers need the same under securityContext.capabilities"
                } else {
                    "only needed for the purpose named"
                };
                Check::bad(name, format!("missing: {purpose}"), advice)
            };
            if required { check } else { check.optional() }
        })
        .collect()
}

/// Before Linux 5.11 maps count as locked memory. Nothing can be probed here without using it up,
/// so this one, and this one only, goes by version, and is never required.
fn memlock(limits: &str, release: &str) -> Check {
    let soft = limits
        .lines()
        .find_map(|line| line.strip_prefix("Max locked memory"))
        .and_then(|rest| rest.split_whitespace().next())
        .unwrap_or("unknown");
    let check = if soft == "unlimited" {
        Check::good("memlock", "unlimited")
    } else if version(release).is_some_and(|version| version >= (5, 11)) {
        Check::good("memlock", format!("{soft} bytes: not counted by this kernel"))
    } else {
        Check::bad(
            "memlock",
            format!("{soft} bytes: this kernel counts maps against it"),
            "ulimit -l unlimited, or LimitMEMLOCK=infinity in the unit",
        )
    };
    check.optional()
}

fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn required_missing(there: CapabilitySet) -> Vec<String> {
        capabilities(|set| there.contains(set))
            .into_iter()
            .filter(|check| check.required && !check.ok)
            .map(|check| check.name)
            .collect()
    }

    #[test]
    fn sys_admin_stands_for_the_newer_ones() {
        let all = ["CAP_BPF", "CAP_NET_ADMIN", "CAP_PERFMON", "CAP_SYS_ADMIN"];
        assert_eq!(required_missing(CapabilitySet::empty()), all);
        let most = CapabilitySet::BPF | CapabilitySet::PERFMON | CapabilitySet::NET_ADMIN;
        assert_eq!(required_missing(most), ["CAP_SYS_ADMIN"]);
        assert!(required_missing(CapabilitySet::SYS_ADMIN).is_empty());
    }

    #[test]
    fn memlock_matters_on_old_kernels_only() {
        let limits = "Max locked memory         65536                65536                bytes\n";
        assert!(memlock(limits, "6.1.0-13-cloud-amd64").ok);
        assert!(!memlock(limits, "5.10.0").ok);
        assert!(memlock("Max locked memory unlimited unlimited bytes\n", "5.10.0").ok);
    }
}
