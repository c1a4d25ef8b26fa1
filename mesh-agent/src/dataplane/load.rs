//! Loading the kernel programs and making their maps, or taking over those that are pinned.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::os::fd::AsFd as _;
use std::sync::Arc;

use aya::maps::{MapData, RingBuf};
use aya::programs::{BtfTracePoint, CgroupSock, CgroupSockAddr, Program, ProgramError};
use aya::{Btf, Ebpf, EbpfError, EbpfLoader, VerifierLogLevel};
use mesh_common::datagram::IDLE_SECONDS;
use mesh_common::{ABI_VERSION, Limits, Settings};
use object::{Object as _, ObjectSection as _, ObjectSymbol as _};

use super::btf::{self, BtfError};
use super::clock;
use super::exclusions::Exclusions;
use super::grace::Grace;
use super::kernel::{KernelMaps, OpenError};
use super::opened::Opened;
use super::pindir::{MAPS, PinDir, PinError};
use super::pins::Pins;
use super::programs::{self, LoadedProgram, PROGRAMS, Programs, TRACERS, Tracer};
use super::records::Records;
use super::sys::attached::Hook;
use super::units::Units;
use crate::text::chain;

/// The kernel object, or nothing in a binary that was built without it.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/mesh-ebpf.o"));

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
    /// Nothing can be pinned, or what is pinned is something else.
    #[error(transparent)]
    Pin(#[from] PinError),
}

/// How to load.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Lets the programs log refusals, which costs about 100 ns and 2,000 instructions each.
    pub log: bool,
    /// What the maps hold.
    pub limits: Limits,
    /// Whether balancing ends with the agent, however that is told to end.
    pub detach: bool,
}

/// Everything that a loaded object consists of, by who owns it.
pub struct Loaded {
    /// The programs.
    pub programs: Programs,
    /// Whether they were there.
    pub are_kept: bool,
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

/// Loads the programs and makes the maps, without attaching anything; or takes over what is pinned: the
/// maps, and the programs if they are those of this build.
///
/// # Errors
///
/// When the kernel, the container or the binary lacks something. What is attached is so still.
pub fn load(options: Options, pins: &Arc<PinDir>) -> Result<Loaded, LoadError> {
    let object = object(OBJECT)?;
    let maps = Opened::at(pins.directory());
    let parsed = aya_obj::Object::parse(object)
        .map_err(|error| LoadError::Maps(Box::new(EbpfError::ParseError(error))))?;
    let there = maps.compare(&parsed)?;
    drop(parsed);
    let values = Values::now(options);
    let identity = values.identity(object);
    let known = if there == MAPS.len() { attached(&maps)? } else { 0 };
    let former = programs::pinned(pins)?;
    // Those that log have a map of their own, which is not pinned.
    let are_kept = known == identity && former.len() == programs::names().count() && !options.log;
    let (loaded, former, ebpf) = if are_kept {
        (former, BTreeMap::new(), None)
    } else {
        let mut ebpf = load_object(object, options, &values, Some(pins))?;
        let loaded = descriptors(&mut ebpf)?;
        (loaded, former, options.log.then_some(ebpf))
    };
    for map in MAPS {
        let data = maps.data(map)?;
        pins.keep(map, data.fd().as_fd())?;
    }
    let limits = maps.limits(options.limits)?;
    let records = Records::open(&maps, limits)?;
    let kernel = KernelMaps::open(&maps, limits)?;
    let grace = Grace::open(&maps)?;
    let exclusions = Exclusions::open(&maps)?;
    let affinity = Pins::open(&maps)?;
    let units = Units::open(&maps)?;
    let events = maps.typed("EVENTS", RingBuf::try_from)?;
    let settings = maps.mapped("SETTINGS")?;
    let mut programs = Programs::new(Arc::clone(pins), loaded, former, identity, settings);
    programs.ebpf = ebpf;
    Ok(Loaded {
        programs,
        are_kept,
        maps: kernel,
        grace,
        records,
        exclusions,
        pins: affinity,
        units,
        events,
    })
}

/// Loads the programs and makes the maps, and lets go of them again.
///
/// # Errors
///
/// When the kernel, the container or the binary lacks something.
pub fn probe() -> Result<(), LoadError> {
    let (object, options) = (object(OBJECT)?, Options::default());
    load_object(object, options, &Values::now(options), None).map(drop)
}

/// Which programs the former agent said were attached.
fn attached(maps: &Opened) -> Result<u64, OpenError> {
    let settings = maps.mapped::<Settings>("SETTINGS")?;
    Ok(settings.get(0).map_or(0, |settings| settings.programs.load()))
}

/// What the programs are given when they are loaded. It depends on nothing that can change before the node
/// is started anew, when the pins are gone, but for what is asked for.
#[derive(Clone, Copy, Hash)]
struct Values {
    /// Level 0 lets the verifier prune every log statement.
    level: u8,
    idle: u64,
    half_life: u64,
}

impl Values {
    fn now(options: Options) -> Self {
        Self {
            level: if options.log { aya_log::Level::Debug as u8 } else { 0 },
            idle: clock::units(IDLE_SECONDS),
            half_life: clock::half_life(),
        }
    }

    /// What tells programs of this build, loaded with this, from others; never 0.
    fn identity(&self, object: &[u8]) -> u64 {
        let mut hasher = DefaultHasher::new();
        (object, self).hash(&mut hasher);
        hasher.finish().max(1)
    }
}

/// Loads the object over the maps that are pinned; makes and pins the others.
fn load_object(
    object: &[u8],
    options: Options,
    values: &Values,
    pins: Option<&PinDir>,
) -> Result<Ebpf, LoadError> {
    let places = btf::places()?;
    let salt = fastrand::u64(..);
    let limits = options.limits;
    let mut loader = EbpfLoader::new();
    for (map, entries) in
        [("FRONTENDS", limits.frontends), ("AFFINITY", limits.pins), ("OVERFLOW", limits.records)]
    {
        loader.map_max_entries(map, entries);
    }
    for (map, pins) in MAPS.into_iter().zip(std::iter::repeat(pins)) {
        if let Some(pins) = pins {
            loader.map_pin_path(map, pins.path(map));
        }
    }
    let mut ebpf = loader
        .verifier_log_level(VerifierLogLevel::STATS)
        .override_global(aya_log::LEVEL, &values.level, false)
        .override_global("SALT", &salt, true)
        .override_global("DATAGRAM_IDLE", &values.idle, true)
        .override_global("HALF_LIFE", &values.half_life, true)
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
    Ok(ebpf)
}

/// The programs of a loaded object, by descriptors of their own.
fn descriptors(ebpf: &mut Ebpf) -> Result<BTreeMap<&'static str, LoadedProgram>, LoadError> {
    let mut programs = BTreeMap::new();
    for name in programs::names() {
        let failed = |source| LoadError::Program { program: name, source: Box::new(source) };
        let program = ebpf.program(name).ok_or(ProgramError::NotLoaded).map_err(failed)?;
        let id = program.info().map_err(failed)?.id();
        let fd = program.fd().map_err(failed)?.as_fd().try_clone_to_owned();
        let fd = fd.map_err(|error| failed(ProgramError::IOError(error)))?;
        programs.insert(name, LoadedProgram { fd, id });
    }
    Ok(programs)
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
