//! Who is not touched: cgroups and network namespaces that the agent file excludes, by the kernel's
//! numbers for them. They can be made, removed and made again, so it is looked again each second.

use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;

use mesh_common::{Settings, Word};

use super::kernel::OpenError;
use super::opened::Opened;
use super::sys::Mapped;
use crate::audit::namespaces;
use crate::check::cgroup::Cgroup;
use crate::config::Exclude;

/// The numbers in the kernel.
pub struct Exclusions {
    settings: Mapped<Settings>,
    /// What was not found when it was last looked, and is told once.
    missing: BTreeSet<PathBuf>,
}

impl Exclusions {
    /// Opens the map.
    ///
    /// # Errors
    ///
    /// When it is missing or has another layout.
    pub fn open(maps: &Opened) -> Result<Self, OpenError> {
        Ok(Self { settings: maps.mapped("SETTINGS")?, missing: BTreeSet::new() })
    }

    /// Looks for them, and tells the programs. What is not there excludes nobody, until it is.
    ///
    /// Entering namespaces changes the calling thread, so it must not be one of a runtime: a thread of
    /// its own does that.
    pub fn refresh(&mut self, exclude: &Exclude) {
        let mut missing = BTreeSet::new();
        let mut find = |paths: &[PathBuf], id: &dyn Fn(&PathBuf) -> Option<u64>| -> Vec<u64> {
            let found = paths.iter().filter_map(|path| {
                let id = id(path);
                if id.is_none() {
                    missing.insert(path.clone());
                }
                id
            });
            found.collect()
        };
        let cgroups = find(&exclude.cgroups, &|path| {
            let cgroup = Cgroup::open(path).ok()?;
            Some(std::fs::metadata(cgroup.directory).ok()?.ino())
        });
        let namespaces = find(&exclude.namespaces, &|path| namespaces::cookie_of(path).ok());
        for path in missing.difference(&self.missing) {
            tracing::warn!(
                path = %path.display(),
                "what the agent file excludes is not there, or not what it should be; nobody is \
                 excluded by it until it is"
            );
        }
        self.missing = missing;
        let Some(settings) = self.settings.get(0) else { return };
        let write = |words: &[Word], ids: &[u64]| {
            let ids = ids.iter().copied().chain(std::iter::repeat(0));
            words.iter().zip(ids).for_each(|(word, id)| word.store(id));
        };
        write(&settings.cgroups, &cgroups);
        write(&settings.namespaces, &namespaces);
        let any = !cgroups.is_empty() || !namespaces.is_empty();
        settings.excludes.store(any.into());
    }
}
