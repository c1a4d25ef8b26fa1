//! What this process may do (`capabilities(7)`), and how much memory it may lock.

use std::fs;

use super::Check;

/// A capability that matters here.
struct Capability {
    /// Its bit.
    number: u32,
    name: &'static str,
    required: bool,
    /// Whether `CAP_SYS_ADMIN` includes it.
    implied: bool,
    /// What it is for.
    purpose: &'static str,
}

const SYS_ADMIN: u32 = 21;

/// The numbers are those of `linux/capability.h`. The kernel's own tests are `bpf_capable()`,
/// `bpf_net_capable()` and `perfmon_capable()`.
const CAPABILITIES: [Capability; 5] = [
    Capability {
        number: 39,
        name: "CAP_BPF",
        required: true,
        implied: true,
        purpose: "creates maps and loads programs",
    },
    Capability {
        number: 12,
        name: "CAP_NET_ADMIN",
        required: true,
        implied: true,
        purpose: "attaches programs to a cgroup",
    },
    Capability {
        number: 38,
        name: "CAP_PERFMON",
        required: true,
        implied: true,
        purpose: "attaches the programs that see connections end",
    },
    Capability {
        number: SYS_ADMIN,
        name: "CAP_SYS_ADMIN",
        required: false,
        implied: false,
        purpose: "names the programs of others, enters network namespaces for the audit",
    },
    Capability {
        number: 24,
        name: "CAP_SYS_RESOURCE",
        required: false,
        implied: false,
        purpose: "raises the limit of locked memory before Linux 5.11",
    },
];

/// Capabilities and the limit of locked memory.
pub(super) fn checks() -> Vec<Check> {
    let mut checks = match fs::read_to_string("/proc/self/status").map(|text| effective(&text)) {
        Ok(Some(set)) => capabilities(set),
        Ok(None) | Err(_) => vec![Check::bad(
            "capabilities",
            "/proc/self/status does not say",
            "mount procfs at /proc",
        )],
    };
    checks.push(memlock(
        &fs::read_to_string("/proc/self/limits").unwrap_or_default(),
        &super::kernel::release(),
    ));
    checks
}

fn effective(status: &str) -> Option<u64> {
    let hex = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(hex.trim(), 16).ok()
}

fn capabilities(set: u64) -> Vec<Check> {
    let has = |number: u32| set >> number & 1 == 1;
    CAPABILITIES
        .iter()
        .map(|capability| {
            let Capability { name, purpose, .. } = *capability;
            let check = if has(capability.number) {
                Check::good(name, format!("there: {purpose}"))
            } else if capability.implied && has(SYS_ADMIN) {
                Check::good(name, format!("by CAP_SYS_ADMIN: {purpose}"))
            } else {
                let advice = if capability.required {
                    "run as root, or give the service AmbientCapabilities=CAP_BPF CAP_NET_ADMIN \
                     CAP_PERFMON; containers need the same under securityContext.capabilities"
                } else {
                    "only needed for the purpose named"
                };
                Check::bad(name, format!("missing: {purpose}"), advice)
            };
            if capability.required { check } else { check.optional() }
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

    fn required_missing(set: u64) -> Vec<String> {
        capabilities(set)
            .into_iter()
            .filter(|check| check.required && !check.ok)
            .map(|check| check.name)
            .collect()
    }

    #[test]
    fn sys_admin_stands_for_the_newer_ones() {
        assert_eq!(required_missing(0), ["CAP_BPF", "CAP_NET_ADMIN", "CAP_PERFMON"]);
        assert_eq!(required_missing(1 << 39 | 1 << 38), ["CAP_NET_ADMIN"]);
        assert!(required_missing(1 << 39 | 1 << 38 | 1 << 12).is_empty());
        assert!(required_missing(1 << SYS_ADMIN).is_empty());
    }

    #[test]
    fn the_effective_set_is_read() {
        let status = "CapPrm:\t00000000000000ff\nCapEff:\t0000008000001000\n";
        assert_eq!(effective(status), Some(1 << 39 | 1 << 12));
        assert_eq!(effective("Name: x\n"), None);
    }

    #[test]
    fn memlock_matters_on_old_kernels_only() {
        let limits = "Max locked memory         65536                65536                bytes\n";
        assert!(memlock(limits, "6.1.0-13-cloud-amd64").ok);
        assert!(!memlock(limits, "5.10.0").ok);
        assert!(memlock("Max locked memory unlimited unlimited bytes\n", "5.10.0").ok);
    }
}
