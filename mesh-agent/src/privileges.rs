//! What the agent may do: as little as it needs, whoever starts it.

use rustix::thread::{
    CapabilitySet, capabilities, clear_ambient_capability_set, remove_capability_from_bounding_set,
    set_capabilities,
};

/// A capability that the agent needs (`capabilities(7)`).
#[derive(Clone, Copy, Debug)]
pub struct Capability {
    /// Its name.
    pub name: &'static str,
    /// What for.
    pub purpose: &'static str,
    /// Whether the agent cannot run without it.
    pub required: bool,
    /// Whether `CAP_SYS_ADMIN` includes it.
    pub implied: bool,
    /// Its bit.
    pub set: CapabilitySet,
}

/// All that it needs, and what for. The kernel's own tests are `bpf_capable()`, `bpf_net_capable()`,
/// `perfmon_capable()`.
pub const NEEDED: [Capability; 6] = [
    Capability {
        name: "CAP_BPF",
        purpose: "makes maps and loads programs",
        required: true,
        implied: true,
        set: CapabilitySet::BPF,
    },
    Capability {
        name: "CAP_NET_ADMIN",
        purpose: "attaches programs to a cgroup, ends connections",
        required: true,
        implied: true,
        set: CapabilitySet::NET_ADMIN,
    },
    Capability {
        name: "CAP_PERFMON",
        purpose: "attaches the programs that see connections end",
        required: true,
        implied: true,
        set: CapabilitySet::PERFMON,
    },
    Capability {
        name: "CAP_SYS_ADMIN",
        purpose: "takes over maps by their numbers, enters network namespaces, names others' programs",
        required: true,
        implied: false,
        set: CapabilitySet::SYS_ADMIN,
    },
    Capability {
        name: "CAP_SYS_PTRACE",
        purpose: "finds network namespaces, and who holds a connection, in /proc",
        required: false,
        implied: false,
        set: CapabilitySet::SYS_PTRACE,
    },
    Capability {
        name: "CAP_DAC_READ_SEARCH",
        purpose: "the same, and reads service files whoever they belong to",
        required: false,
        implied: false,
        set: CapabilitySet::DAC_READ_SEARCH,
    },
];

/// What a port below 1,024 takes besides.
pub const LOW_PORT: CapabilitySet = CapabilitySet::NET_BIND_SERVICE;

/// What it takes to put a process into a cgroup that was delegated to another user, or a socket into
/// another's directory.
pub const OTHERS_FILES: CapabilitySet = CapabilitySet::DAC_OVERRIDE;

/// What this process has of a set.
#[must_use]
pub fn has(set: CapabilitySet) -> bool {
    capabilities(None).is_ok_and(|sets| sets.effective.contains(set))
}

/// The names, for people and for a unit's `CapabilityBoundingSet=`.
#[must_use]
pub fn names() -> String {
    NEEDED.map(|capability| capability.name).join(" ")
}

/// Gives up everything that is not needed, and what is in `besides`, for this thread and all that it will
/// start. To be called before there are others.
///
/// # Errors
///
/// What the kernel says; then nothing, or not all of it, was given up.
pub fn confine(besides: CapabilitySet) -> std::io::Result<()> {
    let needed = NEEDED.iter().fold(besides, |set, capability| set | capability.set);
    let mut sets = capabilities(None)?;
    for capability in CapabilitySet::all().difference(needed).iter() {
        // Without CAP_SETPCAP there is nothing to be given up to whoever is executed, and this process
        // executes nothing; a kernel does not know the newest of these.
        if remove_capability_from_bounding_set(capability).is_err() {
            break;
        }
    }
    clear_ambient_capability_set()?;
    sets.permitted &= needed;
    sets.effective &= needed;
    sets.inheritable &= needed;
    Ok(set_capabilities(None, sets)?)
}
