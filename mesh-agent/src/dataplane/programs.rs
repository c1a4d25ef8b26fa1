//! The kernel programs, and what keeps them attached. Both are pinned, so they stay when the agent ends.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use mesh_common::Settings;

use super::pindir::{self, LINK, PinDir, PinError};
use super::sys::attached::{Hook, program_ids};
use super::sys::{Mapped, links};

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
pub struct Tracer(pub(super) &'static str);

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

/// All names.
pub(super) fn names() -> impl Iterator<Item = &'static str> {
    PROGRAMS.map(|(name, _)| name).into_iter().chain(TRACERS.map(|(name, _)| name))
}

/// Why a program is not attached.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
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
        "attaching {program} to {hook}: {source}; `mesh-agent check` says what this kernel or container \
         lacks"
    )]
    Trace {
        /// Its name.
        program: &'static str,
        /// What it hangs on.
        hook: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A program could not be attached.
    #[error(
        "attaching {program} to {}: {source}; is it a cgroup2 directory, and do other programs there \
         forbid more (see `mesh-agent check`)?",
        path.display()
    )]
    Attach {
        /// Its name.
        program: &'static str,
        /// The cgroup.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It could not be pinned.
    #[error(transparent)]
    Pin(#[from] PinError),
}

/// A program that is loaded.
#[derive(Debug)]
pub(super) struct LoadedProgram {
    pub(super) fd: OwnedFd,
    /// The kernel's number for it.
    pub(super) id: u32,
}

/// The loaded programs.
pub struct Programs {
    pins: Arc<PinDir>,
    programs: BTreeMap<&'static str, LoadedProgram>,
    /// What is pinned by their names, and attached until they are.
    former: BTreeMap<&'static str, LoadedProgram>,
    links: BTreeMap<&'static str, OwnedFd>,
    /// What differs between builds and what they were loaded with.
    identity: u64,
    settings: Mapped<Settings>,
    /// Only while the programs log.
    pub(super) ebpf: Option<aya::Ebpf>,
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

/// What was done to a hook, to undo it.
enum Change {
    /// The program of its link was replaced.
    Updated,
    /// There is another link in place of this one, if there was one.
    Made(Option<OwnedFd>),
}

impl Programs {
    /// These programs, of which none may be attached yet, or all that are pinned.
    pub(super) fn new(
        pins: Arc<PinDir>,
        programs: BTreeMap<&'static str, LoadedProgram>,
        former: BTreeMap<&'static str, LoadedProgram>,
        identity: u64,
        settings: Mapped<Settings>,
    ) -> Self {
        let links = BTreeMap::new();
        Self { pins, programs, former, links, identity, settings, ebpf: None }
    }

    /// The kernel's numbers for all programs that may be attached: these, and those that they replace.
    ///
    /// # Errors
    ///
    /// As [`known`].
    pub fn ids(&self) -> Result<Vec<u32>, PinError> {
        let mut ids = known(&self.pins)?;
        ids.extend(self.programs.values().map(|program| program.id));
        Ok(ids)
    }

    /// Whether a former agent's programs are attached to this cgroup.
    ///
    /// # Errors
    ///
    /// As [`known`], and when there is no such cgroup.
    pub fn are_in_force(&self, cgroup: &Path) -> Result<bool, AttachError> {
        let failed = |source| AttachError::Cgroup { path: cgroup.to_owned(), source };
        let id = fs::metadata(cgroup).map_err(failed)?.ino();
        for name in PROGRAMS.map(|(name, _)| link_name(name)) {
            let Some(link) = self.pins.get_in_force(&name)? else { continue };
            let failed = |source| PinError::Io { path: self.pins.path(&name), source };
            if links::look(link.as_fd()).map_err(failed)?.cgroup == Some(id) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Attaches all programs to a cgroup: sockets that are created below it from then on are
    /// balanced. What is attached already stays; what is attached of another build is replaced, hook by
    /// hook: any mix of them is correct. After an error, what was attached before is so still.
    ///
    /// Whatever ends records comes before what makes them, and what shows the peer before that, so that
    /// no balanced socket shows its backend.
    ///
    /// # Errors
    ///
    /// When the directory is no cgroup, or the kernel refuses.
    pub fn attach(&mut self, cgroup: &Path) -> Result<Attachment, AttachError> {
        self.attach_watched(cgroup, |_| {})
    }

    /// The same; `between` is told the name of each program when it is in force, before the next one is.
    ///
    /// # Errors
    ///
    /// As [`Programs::attach`].
    pub fn attach_watched(
        &mut self,
        cgroup: &Path,
        mut between: impl FnMut(&'static str),
    ) -> Result<Attachment, AttachError> {
        let failed = |source| AttachError::Cgroup { path: cgroup.to_owned(), source };
        let opened = File::open(cgroup).map_err(failed)?;
        // The kernel's id of a cgroup is the number of its directory.
        let id = opened.metadata().map_err(failed)?.ino();
        if !self.former.is_empty() {
            self.say(0);
        }
        let mut changes = Vec::new();
        let mut note = |name, change: Option<Change>| {
            changes.extend(change.map(|change| (name, change)));
            between(name);
        };
        let attached = self.attach_all(cgroup, &opened, id, &mut note).and_then(|()| {
            let pin =
                |(name, program): (&&str, &LoadedProgram)| self.pins.put(name, program.fd.as_fd());
            self.programs.iter().try_for_each(pin)?;
            Ok(self.pins.begin()?)
        });
        if let Err(error) = attached {
            self.undo(changes);
            return Err(error);
        }
        self.say(self.identity);
        self.former.clear();
        let number = |name| self.programs.get(name).map_or(0, |program| program.id);
        let ids = PROGRAMS.map(|(name, hook)| (name, hook, number(name))).into();
        let tracers = TRACERS.map(|(name, tracer)| (name, tracer, number(name))).into();
        Ok(Attachment { cgroup: cgroup.to_owned(), ids, tracers })
    }

    /// Notes which programs are attached, for the agent that comes after this one.
    fn say(&self, identity: u64) {
        if let Some(settings) = self.settings.get(0) {
            settings.programs.store(identity);
        }
    }

    fn attach_all(
        &mut self,
        path: &Path,
        cgroup: &File,
        id: u64,
        note: &mut impl FnMut(&'static str, Option<Change>),
    ) -> Result<(), AttachError> {
        for (program, tracer) in TRACERS {
            let failed = |source| AttachError::Trace { program, hook: tracer.describe(), source };
            note(program, self.trace_one(program, failed)?);
        }
        for (program, hook) in PROGRAMS.into_iter().rev() {
            let failed = |source| AttachError::Attach { program, path: path.to_owned(), source };
            note(program, self.attach_one(program, hook, cgroup, id, failed)?);
        }
        Ok(())
    }

    /// The link of a program, if there is one.
    fn link(&mut self, name: &'static str) -> Result<Option<OwnedFd>, AttachError> {
        match self.links.remove(name) {
            Some(link) => Ok(Some(link)),
            None => Ok(self.pins.get_in_force(&link_name(name))?),
        }
    }

    /// Such a link cannot get another program: the new one is attached beside the old one, for a moment.
    /// Whatever both see, one of them accounts for.
    fn trace_one(
        &mut self,
        name: &'static str,
        failed: impl Fn(io::Error) -> AttachError,
    ) -> Result<Option<Change>, AttachError> {
        let there = self.link(name)?;
        let program = self.program(name).map_err(&failed)?;
        if let Some(link) = &there {
            let known = links::look(link.as_fd()).map_err(&failed)?;
            if known.program == program.id {
                self.pins.keep(&link_name(name), link.as_fd())?;
                self.links.extend(there.map(|link| (name, link)));
                return Ok(None);
            }
        }
        let link = links::trace(program.fd.as_fd()).map_err(&failed)?;
        // What was there before ends when all others have been replaced, too.
        self.pins.put(&link_name(name), link.as_fd())?;
        self.links.insert(name, link);
        Ok(Some(Change::Made(there)))
    }

    fn attach_one(
        &mut self,
        name: &'static str,
        hook: Hook,
        cgroup: &File,
        id: u64,
        failed: impl Fn(io::Error) -> AttachError,
    ) -> Result<Option<Change>, AttachError> {
        let there = self.link(name)?;
        let program = self.program(name).map_err(&failed)?;
        if let Some(link) = &there {
            let known = links::look(link.as_fd()).map_err(&failed)?;
            if known.cgroup == Some(id) {
                self.pins.keep(&link_name(name), link.as_fd())?;
                let same = known.program == program.id;
                if !same {
                    links::update(link.as_fd(), program.fd.as_fd()).map_err(&failed)?;
                }
                self.links.extend(there.map(|link| (name, link)));
                return Ok((!same).then_some(Change::Updated));
            }
        }
        // There was none, or it is on a cgroup that was removed, or is not the one any more.
        let link = links::attach(program.fd.as_fd(), hook, cgroup.as_fd()).map_err(&failed)?;
        self.pins.put(&link_name(name), link.as_fd())?;
        self.links.insert(name, link);
        Ok(Some(Change::Made(there)))
    }

    /// Programs that somebody else has put others in place of: the name of each, and the number of what is
    /// attached instead.
    pub fn replaced(&self) -> Vec<(&'static str, u32)> {
        let other = |(name, link): (&&'static str, &OwnedFd)| {
            let ours = self.programs.get(name)?.id;
            let known = links::look(link.as_fd()).ok().filter(|known| known.cgroup.is_some())?;
            (known.program != ours).then_some((*name, known.program))
        };
        self.links.iter().filter_map(other).collect()
    }

    fn program(&self, name: &str) -> io::Result<&LoadedProgram> {
        self.programs.get(name).ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    /// Has what was attached before be so again, as far as there was something.
    fn undo(&mut self, changes: Vec<(&'static str, Change)>) {
        // What is pinned of another version stays where it is, and this one's pins go.
        let is_elsewhere = self.pins.former().is_some();
        for (name, change) in changes.into_iter().rev() {
            let undone = match (change, self.links.get(name), self.former.get(name)) {
                (Change::Updated, Some(link), Some(former)) => {
                    links::update(link.as_fd(), former.fd.as_fd())
                        .map_err(|error| error.to_string())
                }
                // A former agent that ended while it replaced them has not pinned what it attached.
                (Change::Updated, ..) => Err("nobody knows it any more".to_owned()),
                (Change::Made(Some(former)), ..) if !is_elsewhere => {
                    let put = self.pins.put(&link_name(name), former.as_fd());
                    self.links.insert(name, former);
                    put.map_err(|error| error.to_string())
                }
                (Change::Made(_), ..) => {
                    self.pins.remove(&link_name(name));
                    self.links.remove(name);
                    Ok(())
                }
            };
            if let Err(error) = undone {
                tracing::warn!(program = name, "its former program is not attached again: {error}");
            }
        }
        if is_elsewhere {
            return;
        }
        for (name, former) in &self.former {
            if let Err(error) = self.pins.put(name, former.fd.as_fd()) {
                tracing::warn!(program = name, "its former program is not pinned again: {error}");
            }
        }
    }

    /// Detaches all of them and removes their pins. Connections that are open stay as they are.
    pub fn detach(&mut self) {
        self.say(0);
        for (name, _) in PROGRAMS {
            self.pins.remove(&link_name(name));
            self.links.remove(name);
        }
        for (name, _) in TRACERS {
            self.pins.remove(&link_name(name));
            self.links.remove(name);
        }
        for name in names() {
            self.pins.remove(name);
        }
    }

    /// Starts to hand what the programs log to `tracing`; nothing unless they were loaded to log.
    ///
    /// # Errors
    ///
    /// When the log map cannot be opened.
    pub fn logger(&mut self) -> anyhow::Result<Option<aya_log::EbpfLogger<&'static dyn log::Log>>> {
        Ok(self.ebpf.as_mut().map(aya_log::EbpfLogger::init).transpose()?)
    }
}

fn link_name(program: &str) -> String {
    format!("{program}{LINK}")
}

/// The kernel's numbers for all programs that are this agent's: those that are pinned, and those that
/// links keep attached.
///
/// # Errors
///
/// When a pin is something else, or cannot be looked at.
pub fn known(pins: &PinDir) -> Result<Vec<u32>, PinError> {
    let mut ids: Vec<u32> = pinned(pins)?.values().map(|program| program.id).collect();
    for name in names().map(link_name) {
        let Some(link) = pins.get_in_force(&name)? else { continue };
        let failed = |source| PinError::Io { path: pins.path(&name), source };
        ids.push(links::look(link.as_fd()).map_err(failed)?.program);
    }
    Ok(ids)
}

/// The id of the cgroup that what is pinned in a directory is attached to, if it is to any.
///
/// # Errors
///
/// When the pin is something else, or cannot be looked at.
pub fn cgroup(directory: &Path) -> Result<Option<u64>, PinError> {
    let name = link_name("mesh_connect4");
    let Some(link) = pindir::get(directory, &name)? else { return Ok(None) };
    let failed = |source| PinError::Io { path: directory.join(&name), source };
    Ok(links::look(link.as_fd()).map_err(failed)?.cgroup)
}

/// The programs that are pinned, as far as they are.
pub(super) fn pinned(pins: &PinDir) -> Result<BTreeMap<&'static str, LoadedProgram>, PinError> {
    let mut programs = BTreeMap::new();
    for name in names() {
        let Some(fd) = pins.get_in_force(name)? else { continue };
        let id = links::program_id(fd.as_fd());
        let id = id.map_err(|source| PinError::Io { path: pins.path(name), source })?;
        programs.insert(name, LoadedProgram { fd, id });
    }
    Ok(programs)
}

// === impl Attachment ===

impl Attachment {
    /// Each program, and whether it is attached now. A cgroup that was removed has none, also when
    /// another one has its name. Nobody but the agent can detach the tracers while it runs.
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

    /// The programs and their hooks at the cgroup, by the kernel's numbers.
    pub fn hooks(&self) -> Vec<(Hook, u32)> {
        self.ids.iter().map(|&(_, hook, id)| (hook, id)).collect()
    }

    /// Whether all of them are attached now.
    pub fn is_whole(&self) -> bool {
        self.states().into_iter().all(|state| state.attached)
    }
}

/// All programs, of which none is attached.
#[must_use]
pub fn detached() -> Vec<ProgramState> {
    let hooks = PROGRAMS.map(|(name, hook)| (name, format!("cgroup/{}", hook.name())));
    let tracers = TRACERS.map(|(name, tracer)| (name, tracer.describe()));
    let all = hooks.into_iter().chain(tracers);
    all.map(|(name, hook)| ProgramState { name, hook, id: None, attached: false }).collect()
}
