//! Loading the kernel programs and attaching them to a cgroup.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use aya::maps::{MapData, RingBuf};
use aya::programs::cgroup_sock::CgroupSockLinkId;
use aya::programs::cgroup_sock_addr::CgroupSockAddrLinkId;
use aya::programs::{
    BtfTracePoint, CgroupAttachMode, CgroupSock, CgroupSockAddr, Program, ProgramError,
};
use aya::{Btf, Ebpf, EbpfError, EbpfLoader, VerifierLogLevel};
use mesh_common::datagram::IDLE_SECONDS;
use mesh_common::{ABI_VERSION, Limits};
use object::{Object as _, ObjectSection as _, ObjectSymbol as _};

use super::btf::{self, BtfError};
use super::clock;
use super::exclusions::Exclusions;
use super::kernel::{Grace, KernelMaps, OpenError, typed};
use super::pins::Pins;
use super::records::Records;
use super::sys::attached::{Hook, program_ids};
use super::units::Units;
use crate::text::chain;

/// The kernel object, or nothing in a binary that was built without it.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/mesh-ebpf.o"));

/// The programs that are attached to the cgroup, and their hooks.
pub const PROGRAMS: [(&str, Hook); 9] = [
    ("mesh_connect4", Hook::Connect4),
    ("mesh_connect6", Hook::Connect6),
    ("mesh_sendmsg4", Hook::SendMsg4),
    ("mesh_sendmsg6", Hook::SendMsg6),
    ("mesh_peername4", Hook::GetPeerName4),
    ("mesh_peername6", Hook::GetPeerName6),
    ("mesh_recvmsg4", Hook::RecvMsg4),
    ("mesh_recvmsg6", Hook::RecvMsg6),
    ("mesh_release", Hook::SockRelease),
];

/// What the programs that see the end of a connection hang on. They run for all sockets of the
/// machine, and leave those alone that have no record.
///
/// A tracepoint with typed arguments, by its name.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Tracer(&'static str);

/// Those programs, in the order in which they are attached: what ends a record comes first.
///
/// Of most there are two that do the same: the kernel does not run one that is running on the same
/// CPU already.
pub const TRACERS: [(&str, Tracer); 7] = [
    ("mesh_destroy", Tracer("tcp_destroy_sock")),
    ("mesh_destroy_too", Tracer("tcp_destroy_sock")),
    ("mesh_error", Tracer("inet_sk_error_report")),
    ("mesh_error_too", Tracer("inet_sk_error_report")),
    ("mesh_reset", Tracer("tcp_receive_reset")),
    ("mesh_reset_too", Tracer("tcp_receive_reset")),
    ("mesh_retransmit", Tracer("tcp_retransmit_skb")),
];

impl Tracer {
    /// As people write it.
    #[must_use]
    pub fn describe(self) -> String {
        format!("tp_btf/{}", self.0)
    }
}

/// Why the data plane cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The binary carries no programs.
    #[error(
        "this binary was built without the kernel programs; build it with `cargo xtask build --release`"
    )]
    NoObject,
    /// The object is of another version.
    #[error(
        "the kernel programs have map layout {found:?} and this agent has {ABI_VERSION}; \
         build both from one checkout with `cargo xtask build --release`"
    )]
    Abi {
        /// Version of the object, when it names one.
        found: Option<u32>,
    },
    /// The maps cannot be made, or the object cannot be read.
    #[error(
        "creating the maps: {}; `mesh-agent check` says what this kernel or container lacks, and \
         smaller `limits` in the agent file take less memory",
        chain(.0)
    )]
    Maps(#[source] Box<EbpfError>),
    /// A map is not what it should be.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The kernel's types cannot be read.
    #[error(transparent)]
    Types(#[from] BtfError),
    /// They cannot be given to the kernel's verifier.
    #[error("reading the kernel's types: {0}; the kernel must be built with CONFIG_DEBUG_INFO_BTF")]
    Btf(#[source] aya::BtfError),
    /// A program was refused.
    #[error(
        "loading {program}: {}; `mesh-agent check` says what this kernel or container lacks",
        chain(.source)
    )]
    Program {
        /// Its name.
        program: &'static str,
        /// Why.
        #[source]
        source: Box<ProgramError>,
    },
    /// The cgroup cannot be opened.
    #[error("opening cgroup {}: {source}", path.display())]
    Cgroup {
        /// The directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A program that sees the end of connections could not be attached.
    #[error(
        "attaching {program} to {hook}: {}; `mesh-agent check` says what this kernel or container \
         lacks",
        chain(.source)
    )]
    Trace {
        /// Its name.
        program: &'static str,
        /// What it hangs on.
        hook: String,
        /// Why.
        #[source]
        source: Box<ProgramError>,
    },
    /// A program could not be attached.
    #[error(
        "attaching {program} to {}: {}; is it a cgroup2 directory, and do other programs there \
         forbid more (see `mesh-agent check`)?",
        path.display(), chain(.source)
    )]
    Attach {
        /// Its name.
        program: &'static str,
        /// The cgroup.
        path: PathBuf,
        /// Why.
        #[source]
        source: Box<ProgramError>,
    },
}

/// How to load.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Lets the programs log refusals, which costs about 100 ns and 2,000 instructions each.
    pub log: bool,
    /// What the maps hold.
    pub limits: Limits,
}

/// The loaded programs. Dropping it detaches them.
pub struct Programs {
    ebpf: Ebpf,
    links: Vec<(&'static str, Link)>,
    /// Program ids of the attached tracers; they stay attached.
    tracers: Vec<(&'static str, Tracer, u32)>,
}

/// What keeps a program attached to a cgroup.
enum Link {
    Addr(CgroupSockAddrLinkId),
    Sock(CgroupSockLinkId),
}

/// A program, as the kernel knows it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ProgramState {
    /// Its name.
    pub name: &'static str,
    /// What it hangs on.
    pub hook: String,
    /// The kernel's number for it, when it is loaded.
    pub id: Option<u32>,
    /// Whether it is attached.
    pub attached: bool,
}

/// What is attached where, to ask the kernel whether it still is.
#[derive(Clone, Debug)]
pub struct Attachment {
    cgroup: PathBuf,
    ids: Vec<(&'static str, Hook, u32)>,
    tracers: Vec<(&'static str, Tracer, u32)>,
}

/// Everything that a loaded object consists of, by who owns it.
pub struct Loaded {
    /// The programs.
    pub programs: Programs,
    /// The maps that the reconciler writes.
    pub maps: KernelMaps,
    /// The grace period.
    pub grace: Grace,
    /// The records of sockets.
    pub records: Records,
    /// Who is not touched.
    pub exclusions: Exclusions,
    /// What clients keep.
    pub pins: Pins,
    /// What cgroups are part of.
    pub units: Units,
    /// What the programs tell.
    pub events: RingBuf<MapData>,
}

/// Loads the programs and makes the maps, without attaching anything.
///
/// # Errors
///
/// When the kernel, the container or the binary lacks something.
pub fn load(options: Options) -> Result<Loaded, LoadError> {
    let object = object(OBJECT)?;
    let places = btf::places()?;
    // Level 0 lets the verifier prune every log statement.
    let salt = fastrand::u64(..);
    let level: u8 = if options.log { aya_log::Level::Debug as u8 } else { 0 };
    let idle = clock::units(IDLE_SECONDS);
    let half_life = clock::half_life();
    let limits = options.limits;
    let mut loader = EbpfLoader::new();
    for (map, entries) in
        [("FRONTENDS", limits.frontends), ("AFFINITY", limits.pins), ("OVERFLOW", limits.records)]
    {
        loader.map_max_entries(map, entries);
    }
    let mut ebpf = loader
        .verifier_log_level(VerifierLogLevel::STATS)
        .override_global(aya_log::LEVEL, &level, false)
        .override_global("SALT", &salt, true)
        .override_global("DATAGRAM_IDLE", &idle, true)
        .override_global("HALF_LIFE", &half_life, true)
        .override_global("SOCKET_FIELDS", &places[..], true)
        .load(object)
        .map_err(|error| LoadError::Maps(Box::new(error)))?;
    for (program, hook) in PROGRAMS {
        load_hooked(&mut ebpf, program, hook)
            .map_err(|source| LoadError::Program { program, source: Box::new(source) })?;
    }
    let btf = Btf::from_sys_fs().map_err(LoadError::Btf)?;
    for (program, tracer) in TRACERS {
        load_tracer(&mut ebpf, program, tracer, &btf)
            .map_err(|source| LoadError::Program { program, source: Box::new(source) })?;
    }
    let records = Records::open(&mut ebpf, limits)?;
    let maps = KernelMaps::open(&mut ebpf, limits)?;
    let grace = Grace::open(&mut ebpf)?;
    let exclusions = Exclusions::open(&ebpf)?;
    let pins = Pins::open(&mut ebpf)?;
    let units = Units::open(&mut ebpf)?;
    let events = typed(&mut ebpf, "EVENTS", RingBuf::try_from)?;
    let programs = Programs { ebpf, links: Vec::new(), tracers: Vec::new() };
    Ok(Loaded { programs, maps, grace, records, exclusions, pins, units, events })
}

fn load_hooked(ebpf: &mut Ebpf, name: &str, hook: Hook) -> Result<(), ProgramError> {
    match hook {
        Hook::SockRelease => of_kind::<CgroupSock>(ebpf, name)?.load(),
        _ => of_kind::<CgroupSockAddr>(ebpf, name)?.load(),
    }
}

/// A program of this kind.
fn of_kind<'e, P>(ebpf: &'e mut Ebpf, name: &str) -> Result<&'e mut P, ProgramError>
where
    &'e mut P: TryFrom<&'e mut Program, Error = ProgramError>,
{
    ebpf.program_mut(name).ok_or(ProgramError::NotLoaded)?.try_into()
}

fn load_tracer(ebpf: &mut Ebpf, name: &str, tracer: Tracer, btf: &Btf) -> Result<(), ProgramError> {
    of_kind::<BtfTracePoint>(ebpf, name)?.load(tracer.0, btf)
}

impl Programs {
    /// Attaches all programs to a cgroup: sockets that are created below it from then on are
    /// balanced. What was attached before is detached. After an error none is attached to it.
    ///
    /// Whatever ends records comes before what makes them, and what shows the peer before that, so that
    /// no balanced socket shows its backend.
    ///
    /// # Errors
    ///
    /// When the directory is no cgroup, or the kernel refuses.
    pub fn attach(&mut self, cgroup: &Path) -> Result<Attachment, LoadError> {
        self.detach();
        let opened = File::open(cgroup)
            .map_err(|source| LoadError::Cgroup { path: cgroup.to_owned(), source })?;
        self.trace()?;
        let mut ids = Vec::new();
        for (program, place) in PROGRAMS.into_iter().rev() {
            match self.attach_one(program, place, &opened) {
                Ok(id) => ids.push((program, place, id)),
                Err(source) => {
                    self.detach();
                    let path = cgroup.to_owned();
                    return Err(LoadError::Attach { program, path, source: Box::new(source) });
                }
            }
        }
        ids.reverse();
        Ok(Attachment { cgroup: cgroup.to_owned(), ids, tracers: self.tracers.clone() })
    }

    /// Attaches the programs that see connections end. They stay until this is dropped: sockets that
    /// were balanced go on to exist when the others are detached.
    fn trace(&mut self) -> Result<(), LoadError> {
        for (program, tracer) in TRACERS.into_iter().skip(self.tracers.len()) {
            let attached = attach_tracer(&mut self.ebpf, program);
            let id = attached.map_err(|source| {
                let hook = tracer.describe();
                LoadError::Trace { program, hook, source: Box::new(source) }
            })?;
            self.tracers.push((program, tracer, id));
        }
        Ok(())
    }

    fn attach_one(
        &mut self,
        name: &'static str,
        hook: Hook,
        cgroup: &File,
    ) -> Result<u32, ProgramError> {
        // A link is always one of many; aya's flag for that is refused for links.
        const MODE: CgroupAttachMode = CgroupAttachMode::Single;
        let (id, link) = if hook == Hook::SockRelease {
            let program = of_kind::<CgroupSock>(&mut self.ebpf, name)?;
            (program.info()?.id(), Link::Sock(program.attach(cgroup, MODE)?))
        } else {
            let program = of_kind::<CgroupSockAddr>(&mut self.ebpf, name)?;
            (program.info()?.id(), Link::Addr(program.attach(cgroup, MODE)?))
        };
        self.links.push((name, link));
        Ok(id)
    }

    /// Detaches all that is attached to a cgroup.
    pub fn detach(&mut self) {
        for (program, link) in self.links.drain(..) {
            let detached = match link {
                Link::Addr(link) => of_kind::<CgroupSockAddr>(&mut self.ebpf, program)
                    .and_then(|hook| hook.detach(link)),
                Link::Sock(link) => of_kind::<CgroupSock>(&mut self.ebpf, program)
                    .and_then(|hook| hook.detach(link)),
            };
            if let Err(error) = detached {
                tracing::warn!(program, %error, "could not detach");
            }
        }
    }

    /// Starts to hand what the programs log to `tracing`; only with [`Options::log`].
    ///
    /// # Errors
    ///
    /// When the log map cannot be opened.
    pub fn logger(&mut self) -> anyhow::Result<aya_log::EbpfLogger<&'static dyn log::Log>> {
        Ok(aya_log::EbpfLogger::init(&mut self.ebpf)?)
    }
}

/// The object with its layout version checked.
fn object(bytes: &[u8]) -> Result<&[u8], LoadError> {
    if bytes.is_empty() {
        return Err(LoadError::NoObject);
    }
    let found = abi(bytes);
    if found != Some(ABI_VERSION) {
        return Err(LoadError::Abi { found });
    }
    Ok(bytes)
}

// === impl Attachment ===

impl Attachment {
    /// Each program, and whether it is attached now. A cgroup that was removed has none, also when
    /// another one has its name. Nobody but the agent can detach the tracers.
    pub fn states(&self) -> Vec<ProgramState> {
        let attached =
            |hook, id| program_ids(&self.cgroup, hook).is_ok_and(|attached| attached.contains(&id));
        let hooked = self.ids.iter().map(|&(name, hook, id)| ProgramState {
            name,
            hook: format!("cgroup/{}", hook.name()),
            id: Some(id),
            attached: attached(hook, id),
        });
        let tracing = self.tracers.iter().map(|&(name, tracer, id)| ProgramState {
            name,
            hook: tracer.describe(),
            id: Some(id),
            attached: true,
        });
        hooked.chain(tracing).collect()
    }

    /// Whether all of them are attached now.
    pub fn is_whole(&self) -> bool {
        self.states().into_iter().all(|state| state.attached)
    }
}

/// Attaches a tracer, and gives the kernel's number for its program.
fn attach_tracer(ebpf: &mut Ebpf, name: &str) -> Result<u32, ProgramError> {
    let program = of_kind::<BtfTracePoint>(ebpf, name)?;
    let id = program.info()?.id();
    program.attach()?;
    Ok(id)
}

/// All programs, of which none is attached.
#[must_use]
pub fn detached() -> Vec<ProgramState> {
    let hooks = PROGRAMS.map(|(name, hook)| (name, format!("cgroup/{}", hook.name())));
    let tracers = TRACERS.map(|(name, tracer)| (name, tracer.describe()));
    let all = hooks.into_iter().chain(tracers);
    all.map(|(name, hook)| ProgramState { name, hook, id: None, attached: false }).collect()
}

/// The layout version that an object was built with: the value of its symbol `ABI`.
fn abi(elf: &[u8]) -> Option<u32> {
    let object = object::File::parse(elf).ok()?;
    let symbol = object.symbols().find(|symbol| symbol.name() == Ok("ABI"))?;
    let section = object.section_by_index(symbol.section_index()?).ok()?;
    let bytes = section.data_range(symbol.address(), 4).ok()??;
    bytes.try_into().ok().map(u32::from_le_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_object_that_is_missing_or_foreign_is_told_apart() {
        assert!(matches!(object(b""), Err(LoadError::NoObject)));
        assert!(matches!(object(b"\x7fELF"), Err(LoadError::Abi { found: None })));
    }

    /// Whatever is embedded is of this agent's version.
    #[test]
    fn the_embedded_object_is_ours() {
        assert!(matches!(object(OBJECT), Ok(_) | Err(LoadError::NoObject)));
    }
}
