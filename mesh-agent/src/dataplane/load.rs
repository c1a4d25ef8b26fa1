//! Loading the kernel programs and attaching them to a cgroup.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use aya::programs::cgroup_sock_addr::CgroupSockAddrLinkId;
use aya::programs::{CgroupAttachMode, CgroupSockAddr, ProgramError};
use aya::{Ebpf, EbpfError, EbpfLoader, VerifierLogLevel};
use mesh_common::ABI_VERSION;
use object::{Object as _, ObjectSection as _, ObjectSymbol as _};

use super::kernel::{Grace, KernelMaps, OpenError};
use super::sys::attached::{Hook, program_ids};
use crate::text::chain;

/// The kernel object, or nothing in a binary that was built without it.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/mesh-ebpf.o"));

/// The programs and their hooks.
pub const PROGRAMS: [(&str, Hook); 4] = [
    ("mesh_connect4", Hook::Connect4),
    ("mesh_connect6", Hook::Connect6),
    ("mesh_peername4", Hook::GetPeerName4),
    ("mesh_peername6", Hook::GetPeerName6),
];

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
    #[error("creating the maps: {}; `mesh-agent check` says what this kernel or container lacks", chain(.0))]
    Maps(#[source] Box<EbpfError>),
    /// A map is not what it should be.
    #[error(transparent)]
    Open(#[from] OpenError),
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
}

/// The loaded programs. Dropping it detaches them.
pub struct Programs {
    ebpf: Ebpf,
    links: Vec<(&'static str, CgroupSockAddrLinkId)>,
}

/// What is attached where, to ask the kernel whether it still is.
#[derive(Clone, Debug)]
pub struct Attachment {
    cgroup: PathBuf,
    ids: Vec<(&'static str, Hook, u32)>,
}

/// Loads the programs and makes the maps, without attaching anything.
///
/// # Errors
///
/// When the kernel, the container or the binary lacks something.
pub fn load(options: Options) -> Result<(Programs, KernelMaps, Grace), LoadError> {
    let object = object(OBJECT)?;
    // Level 0 lets the verifier prune every log statement.
    let level: u8 = if options.log { aya_log::Level::Debug as u8 } else { 0 };
    let mut ebpf = EbpfLoader::new()
        .verifier_log_level(VerifierLogLevel::STATS)
        .override_global(aya_log::LEVEL, &level, false)
        .load(object)
        .map_err(|error| LoadError::Maps(Box::new(error)))?;
    for (program, _) in PROGRAMS {
        hook(&mut ebpf, program)
            .and_then(CgroupSockAddr::load)
            .map_err(|source| LoadError::Program { program, source: Box::new(source) })?;
    }
    let maps = KernelMaps::open(&mut ebpf)?;
    let grace = Grace::open(&mut ebpf)?;
    Ok((Programs { ebpf, links: Vec::new() }, maps, grace))
}

impl Programs {
    /// Attaches all programs to a cgroup: sockets that are created below it from then on are
    /// balanced. What was attached before is detached. After an error none is attached.
    ///
    /// `getpeername` comes first, so that no balanced socket shows its backend.
    ///
    /// # Errors
    ///
    /// When the directory is no cgroup, or the kernel refuses.
    pub fn attach(&mut self, cgroup: &Path) -> Result<Attachment, LoadError> {
        self.detach();
        let opened = File::open(cgroup)
            .map_err(|source| LoadError::Cgroup { path: cgroup.to_owned(), source })?;
        let mut ids = Vec::new();
        for (program, place) in PROGRAMS.into_iter().rev() {
            match self.attach_one(program, &opened) {
                Ok(id) => ids.push((program, place, id)),
                Err(source) => {
                    self.detach();
                    let path = cgroup.to_owned();
                    return Err(LoadError::Attach { program, path, source: Box::new(source) });
                }
            }
        }
        ids.reverse();
        Ok(Attachment { cgroup: cgroup.to_owned(), ids })
    }

    fn attach_one(&mut self, name: &'static str, cgroup: &File) -> Result<u32, ProgramError> {
        let program = hook(&mut self.ebpf, name)?;
        let id = program.info()?.id();
        // A link is always one of many; aya's flag for that is refused for links.
        self.links.push((name, program.attach(cgroup, CgroupAttachMode::Single)?));
        Ok(id)
    }

    /// Detaches all that is attached.
    pub fn detach(&mut self) {
        for (program, link) in self.links.drain(..) {
            let detached = hook(&mut self.ebpf, program).and_then(|hook| hook.detach(link));
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
    /// Each program with its hook, and whether it is attached now. A cgroup that was removed has
    /// none, also when another one has its name.
    pub fn states(&self) -> Vec<(&'static str, Hook, bool)> {
        let attached =
            |hook, id| program_ids(&self.cgroup, hook).is_ok_and(|attached| attached.contains(&id));
        self.ids.iter().map(|&(name, hook, id)| (name, hook, attached(hook, id))).collect()
    }

    /// Whether all of them are attached now.
    pub fn is_whole(&self) -> bool {
        self.states().into_iter().all(|(_, _, attached)| attached)
    }
}

fn hook<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut CgroupSockAddr, ProgramError> {
    ebpf.program_mut(name).ok_or(ProgramError::NotLoaded)?.try_into()
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
