//! Loading the kernel programs and making their maps, or taking over those that are pinned.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::io;
use std::num::NonZero;
use std::os::fd::AsFd as _;
use std::panic::resume_unwind;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use aya::maps::{MapData, RingBuf};
use aya::programs::{BtfTracePoint, CgroupSock, CgroupSockAddr, Program, ProgramError};
use aya::{Btf, Ebpf, EbpfError, EbpfLoader, VerifierLogLevel};
use mesh_common::datagram::IDLE_SECONDS;
use mesh_common::{ABI_VERSION, Limits, Settings};
use object::{Object as _, ObjectSection as _, ObjectSymbol as _};

use super::btf::{self, BtfError};
use super::clock;
use super::description::Description;
use super::exclusions::Exclusions;
use super::grace::Grace;
use super::handover;
use super::kernel::{KernelMaps, OpenError};
use super::opened::Opened;
use super::pindir::{LAYOUT, MAPS, PinDir, PinError};
use super::pins::Pins;
use super::programs::{self, LoadedProgram, PROGRAMS, Programs, TRACERS, Tracer};
use super::records::Records;
use super::sys::attached::Hook;
use super::sys::heap;
use super::units::Units;
use crate::check::memory;
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
    /// There is not enough memory.
    #[error("{}; {}", chain(.source), limit.advice())]
    Memory {
        /// What was in the way, perhaps.
        limit: memory::Limit,
        /// What failed.
        source: Box<LoadError>,
    },
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
    /// What the maps may hold: not always what was asked for.
    pub limits: Limits,
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
    describe(pins)?;
    let handover = handover::begin(pins)?;
    let maps = Opened::at(&pins.directory());
    let parsed = aya_obj::Object::parse(object)
        .map_err(|error| LoadError::Maps(Box::new(EbpfError::ParseError(error))))?;
    let there = maps.compare(&parsed)?;
    drop(parsed);
    let options = match &handover {
        Some(handover) => Options { limits: handover.limits(options.limits)?, ..options },
        None => options,
    };
    let values = Values::now(options);
    let identity = values.identity(object);
    let known = if there == MAPS.len() { attached(&maps)? } else { 0 };
    let former = programs::pinned(pins)?;
    // Those that log have a map of their own, which is not pinned.
    let are_kept = known == identity && former.len() == programs::names().count() && !options.log;
    let (loaded, former, ebpf) = if are_kept {
        (former, BTreeMap::new(), None)
    } else {
        let mut ebpf = load_in(memory::limit(), |one_by_one| {
            load_object(object, options, &values, Some(pins), one_by_one)
        })?;
        let loaded = descriptors(&mut ebpf)?;
        (loaded, former, options.log.then_some(ebpf))
    };
    if let Some(handover) = &handover {
        handover.copy(&maps)?;
    }
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
        limits,
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
    let limit = memory::limit();
    load_in(limit, |one_by_one| {
        load_object(object, options, &Values::now(options), None, one_by_one)
    })
    .map(drop)
}

/// Has the records be described beside the maps, for other versions.
fn describe(pins: &PinDir) -> Result<(), LoadError> {
    let (directory, ours) = (pins.directory(), Description::ours());
    let described = match Description::read(&directory)? {
        None => ours.write()?,
        Some(there) if there == ours => match pins.get(LAYOUT)? {
            Some(described) => described,
            None => ours.write()?,
        },
        Some(_) => {
            let why = "its records are others, by another build of the same version".to_owned();
            let (path, version) = (directory, ABI_VERSION);
            return Err(PinError::OtherVersion { path, version, why }.into());
        }
    };
    Ok(pins.keep(LAYOUT, described.as_fd())?)
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

/// Loads in so much memory. Who is killed for want of it cannot say so: it is said before.
fn load_in<T>(
    limit: Option<memory::Limit>,
    load: impl FnOnce(bool) -> Result<T, LoadError>,
) -> Result<T, LoadError> {
    let Some(limit) = limit else { return load(false) };
    if !limit.is_enough() {
        tracing::warn!("{}", limit.warning());
    }
    load(limit.bytes < memory::AMPLE).map_err(|error| match is_memory(&error) {
        true => LoadError::Memory { limit, source: Box::new(error) },
        false => error,
    })
}

/// Whether the kernel had no memory.
fn is_memory(error: &LoadError) -> bool {
    let mut next: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = next {
        let system = error.downcast_ref::<io::Error>();
        if system.is_some_and(|error| error.raw_os_error() == Some(libc::ENOMEM)) {
            return true;
        }
        next = error.source();
    }
    false
}

/// Loads the object over the maps that are pinned; makes and pins the others.
fn load_object(
    object: &[u8],
    options: Options,
    values: &Values,
    pins: Option<&PinDir>,
    one_by_one: bool,
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
    // It has the kernel's types too, which take as much memory as a verifier.
    drop(loader);
    heap::trim();
    load_programs(&mut ebpf, one_by_one)?;
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

/// What a program is loaded for.
#[derive(Clone, Copy)]
enum Purpose {
    Hook(Hook),
    Tracer(Tracer),
}

/// More do not help: few of the programs take long, and the verifier takes memory for each.
const THREADS: usize = 4;

/// Gives the programs to the kernel: those that take longest, and most memory, before the kernel's types are read, which the
/// others need.
fn load_programs(ebpf: &mut Ebpf, one_by_one: bool) -> Result<(), LoadError> {
    let mut there: BTreeMap<String, &mut Program> =
        ebpf.programs_mut().map(|(name, program)| (name.to_owned(), program)).collect();
    let parallel = thread::available_parallelism().map_or(1, NonZero::get).min(THREADS);
    let threads = if one_by_one { 1 } else { parallel };
    let hooked = PROGRAMS.map(|(name, hook)| (name, Purpose::Hook(hook), there.remove(name)));
    load_some(hooked.into_iter(), None, threads)?;
    heap::trim();
    let btf = Btf::from_sys_fs().map_err(LoadError::Btf)?;
    let traced = TRACERS.map(|(name, tracer)| (name, Purpose::Tracer(tracer), there.remove(name)));
    load_some(traced.into_iter(), Some(&btf), threads)
}

/// Several at a time: the verifier takes long, and looks at each by itself.
fn load_some<'p>(
    wanted: impl Iterator<Item = (&'static str, Purpose, Option<&'p mut Program>)> + Send,
    btf: Option<&Btf>,
    threads: usize,
) -> Result<(), LoadError> {
    let left = Mutex::new(wanted);
    let next = || left.lock().unwrap_or_else(PoisonError::into_inner).next();
    let work = || {
        while let Some((name, purpose, program)) = next() {
            let program = program.ok_or(ProgramError::NotLoaded);
            program
                .and_then(|program| load_one(program, purpose, btf))
                .map_err(|source| LoadError::Program { program: name, source: Box::new(source) })?;
        }
        Ok(())
    };
    thread::scope(|scope| {
        // Without a thread, this one does it all.
        let spawn = |_| thread::Builder::new().spawn_scoped(scope, work).ok();
        let workers: Vec<_> = (1..threads).filter_map(spawn).collect();
        let own = work();
        let others = workers
            .into_iter()
            .map(|worker| worker.join().unwrap_or_else(|panic| resume_unwind(panic)));
        own.and(others.collect())
    })
}

fn load_one(
    program: &mut Program,
    purpose: Purpose,
    btf: Option<&Btf>,
) -> Result<(), ProgramError> {
    match purpose {
        Purpose::Hook(Hook::SockRelease) => <&mut CgroupSock>::try_from(program)?.load(),
        Purpose::Hook(_) => <&mut CgroupSockAddr>::try_from(program)?.load(),
        Purpose::Tracer(tracer) => {
            let btf = btf.ok_or(ProgramError::NotLoaded)?;
            <&mut BtfTracePoint>::try_from(program)?.load(tracer.0, btf)
        }
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
