//! What the kernel can do, by probing: each probe makes the map, or loads the program, and lets it
//! go again.

use std::error::Error;
use std::fs;
use std::path::Path;

use aya::maps::{Array, MapData, MapType};
use aya::programs::ProgramType;
use aya::sys::{BpfHelper, is_helper_supported, is_map_supported, is_program_supported};
use aya_obj::generated::BPF_F_MMAPABLE;

use super::mounts::Mounts;
use super::{Check, memory};
use crate::dataplane::load::{self, LoadError};
use crate::dataplane::programs;

/// Maps that the agent makes.
const MAPS: [(MapType, &str); 4] = [
    (MapType::Hash, "hash"),
    (MapType::LpmTrie, "LPM trie"),
    (MapType::ArrayOfMaps, "array of maps"),
    (MapType::RingBuf, "ring buffer"),
];

/// Helpers that the connect programs call. `bpf_set_retval` (for these hooks since Linux 6.1) is the youngest, and
/// younger than the getpeername hooks (5.8), which cannot be probed without attaching.
const HELPERS: [(BpfHelper, &str); 3] = [
    (BpfHelper::BPF_FUNC_set_retval, "bpf_set_retval"),
    (BpfHelper::BPF_FUNC_get_socket_cookie, "bpf_get_socket_cookie"),
    (BpfHelper::BPF_FUNC_skc_to_tcp_sock, "bpf_skc_to_tcp_sock"),
];

const TOO_OLD: &str = "run Linux 6.1 or newer, with CONFIG_BPF_SYSCALL and CONFIG_CGROUP_BPF";
const DENIED: &str = "needs CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN in the first user namespace, and in a \
                      container a seccomp profile that allows bpf";

/// Everything about the kernel, and the programs in this binary.
pub(super) fn checks(mounts: &Mounts) -> Vec<Check> {
    let mut checks =
        vec![Check::good("kernel", release()).optional(), btf(), bpffs(mounts), programs()];
    checks.extend(MAPS.map(|(kind, name)| probed(&format!("map: {name}"), is_map_supported(kind))));
    checks.push(mappable());
    checks.push(probed("program: connect", is_program_supported(ProgramType::CgroupSockAddr)));
    checks.extend(HELPERS.map(|(helper, name)| {
        probed(&format!("helper: {name}"), is_helper_supported(ProgramType::CgroupSockAddr, helper))
    }));
    checks
}

/// The kernel's release, for people.
pub(super) fn release() -> String {
    fs::read_to_string("/proc/sys/kernel/osrelease")
        .map_or_else(|_| "unknown".into(), |release| release.trim().to_owned())
}

/// What a probe says. A probe that fails is not a probe that says no.
fn probed<E: Error>(name: &str, answer: Result<bool, E>) -> Check {
    match answer {
        Ok(true) => Check::good(name, "supported"),
        Ok(false) => Check::bad(name, "not supported by this kernel", TOO_OLD),
        Err(error) => Check::bad(name, format!("cannot be probed: {}", cause(&error)), DENIED),
    }
}

/// What is at the bottom of an error: what the kernel said.
fn cause(error: &dyn Error) -> String {
    let mut cause = error;
    while let Some(next) = cause.source() {
        cause = next;
    }
    cause.to_string()
}

/// Arrays that the agent maps into its memory (Linux 5.5).
fn mappable() -> Check {
    const NAME: &str = "map: mapped array";
    match Array::<MapData, u64>::create(1, BPF_F_MMAPABLE) {
        Ok(_) => Check::good(NAME, "supported"),
        Err(error) => {
            let advice = if is_map_supported(MapType::Array).is_ok() { TOO_OLD } else { DENIED };
            Check::bad(NAME, cause(&error), advice)
        }
    }
}

/// Type information of the kernel: the programs that see connections end read the kernel's sockets.
fn btf() -> Check {
    let path = Path::new("/sys/kernel/btf/vmlinux");
    match fs::metadata(path) {
        Ok(_) => Check::good("BTF", path.display().to_string()),
        Err(error) => Check::bad(
            "BTF",
            format!("{}: {error}", path.display()),
            "run a kernel with CONFIG_DEBUG_INFO_BTF, as all distributions build it",
        ),
    }
}

/// Where programs and maps can be pinned, so that balancing goes on without the agent.
fn bpffs(mounts: &Mounts) -> Check {
    let check = match mounts.points("bpf").next() {
        Some(point) => Check::good("bpffs", format!("mounted at {}", point.display())),
        None => Check::bad(
            "bpffs",
            "not mounted",
            "the agent mounts it at /sys/fs/bpf; where that is not writable, as in a container, mount it \
             before: mount -t bpf bpf /sys/fs/bpf",
        ),
    };
    check.optional()
}

/// The kernel programs inside this binary: loaded, which is what the kernel's verifier says to
/// them, and let go again.
fn programs() -> Check {
    const NAME: &str = "kernel programs";
    if let Some(limit) = memory::limit().filter(|limit| !limit.is_enough()) {
        let detail = format!("not tried, since this command might be killed: {limit}");
        return Check::bad(NAME, detail, memory::ADVICE).optional();
    }
    match load::probe() {
        Ok(()) => {
            let names: Vec<_> = programs::detached().iter().map(|program| program.name).collect();
            Check::good(NAME, names.join(", "))
        }
        Err(error @ (LoadError::NoObject | LoadError::Abi { .. })) => Check::bad(
            NAME,
            error.to_string(),
            "build the agent with `cargo xtask build --release`",
        ),
        Err(error) => {
            Check::bad(NAME, error.to_string(), "mend what the other lines of this table name")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_probe_that_fails_is_not_a_no() {
        let denied = probed("x", Err(std::io::Error::from(std::io::ErrorKind::PermissionDenied)));
        assert!(!denied.ok);
        assert_eq!(denied.advice, DENIED);
        assert_eq!(probed::<std::io::Error>("x", Ok(false)).advice, TOO_OLD);
    }
}
