//! What each file defines, and what changes when a file does. No I/O, no time.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::discovery::Origin;
use crate::model::{Service, ServiceName};

/// What one or more files changed.
#[derive(Default, Debug)]
pub(super) struct Changes {
    pub(super) upserts: Vec<(Origin, Arc<Service>)>,
    pub(super) removed: Vec<(Origin, ServiceName)>,
}

/// What all files of a directory define.
#[derive(Debug)]
pub(super) struct Definitions {
    source: usize,
    directory: PathBuf,
    files: BTreeMap<Arc<str>, File>,
    /// Errors of files by name; only of those that have any.
    errors: BTreeMap<Arc<str>, Vec<String>>,
    /// Errors about names that are no text.
    unnamed: Vec<String>,
}

/// The last good state of a file; nothing before its first one.
#[derive(Debug)]
struct File {
    origin: Origin,
    services: BTreeMap<ServiceName, Arc<Service>>,
}

// === impl Changes ===

impl Changes {
    pub(super) fn is_empty(&self) -> bool {
        self.upserts.is_empty() && self.removed.is_empty()
    }
}

// === impl Definitions ===

impl Definitions {
    pub(super) fn new(source: usize, directory: &Path) -> Self {
        Self {
            source,
            directory: directory.to_owned(),
            files: BTreeMap::new(),
            errors: BTreeMap::new(),
            unnamed: Vec::new(),
        }
    }

    /// Whether a file is known, be it good or bad.
    pub(super) fn has(&self, name: &str) -> bool {
        self.files.contains_key(name)
    }

    /// Whether no file is known.
    pub(super) fn is_empty(&self) -> bool {
        self.files.is_empty()
    }

    /// Every known file.
    pub(super) fn names(&self) -> impl Iterator<Item = &Arc<str>> {
        self.files.keys()
    }

    /// Everything that is wrong now, by file.
    pub(super) fn errors(&self) -> impl Iterator<Item = String> {
        self.errors.values().flatten().chain(&self.unnamed).cloned()
    }

    /// A file was read and defines these services, no name twice.
    pub(super) fn good(&mut self, name: &Arc<str>, services: Vec<Service>, changes: &mut Changes) {
        self.errors.remove(name);
        let file = self.file(name);
        let mut old = std::mem::take(&mut file.services);
        for service in services {
            let service = match old.remove(&service.name) {
                Some(old) if *old == service => old,
                _ => {
                    let service = Arc::new(service);
                    changes.upserts.push((file.origin.clone(), Arc::clone(&service)));
                    service
                }
            };
            file.services.insert(service.name.clone(), service);
        }
        changes.removed.extend(old.into_keys().map(|name| (file.origin.clone(), name)));
    }

    /// A file cannot be read or has errors: what it defined stays.
    pub(super) fn bad(&mut self, name: &Arc<str>, errors: Vec<String>) {
        self.file(name);
        self.errors.insert(Arc::clone(name), errors);
    }

    /// A file was removed.
    pub(super) fn gone(&mut self, name: &str, changes: &mut Changes) {
        self.errors.remove(name);
        if let Some(File { origin, services }) = self.files.remove(name) {
            changes.removed.extend(services.into_keys().map(|name| (origin.clone(), name)));
        }
    }

    /// What is wrong with names in the directory.
    pub(super) fn unnamed(&mut self, errors: Vec<String>) {
        self.unnamed = errors;
    }

    fn file(&mut self, name: &Arc<str>) -> &mut File {
        let (source, directory) = (self.source, &self.directory);
        self.files.entry(Arc::clone(name)).or_insert_with(|| {
            // The whole path: it is what a person looks for, and it sorts like the name.
            let item = directory.join(&**name).display().to_string().into();
            File { origin: Origin { source, item }, services: BTreeMap::new() }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::parse_services;

    fn services(of: &[(&str, u16)]) -> Vec<Service> {
        let one = |(name, port): &(&str, u16)| {
            format!(
                "- {{name: {name}, address: 10.96.0.1, ports: [{{port: {port}}}], endpoints: []}}\n"
            )
        };
        let text = format!("services:\n{}", of.iter().map(one).collect::<String>());
        parse_services(text.as_bytes()).expect("valid")
    }

    /// What a step changed, in short: `+name` and `-name`, each with its file.
    fn step(change: impl FnOnce(&mut Changes)) -> Vec<String> {
        let mut changes = Changes::default();
        change(&mut changes);
        let upserts = changes.upserts.iter().map(|(o, s)| format!("+{} {}", s.name, o.item));
        let removed = changes.removed.iter().map(|(o, n)| format!("-{n} {}", o.item));
        upserts.chain(removed).collect()
    }

    #[test]
    fn only_what_really_changed_is_told() {
        let mut all = Definitions::new(0, Path::new("/d"));
        let (x, y): (Arc<str>, Arc<str>) = ("x.yaml".into(), "y.yaml".into());
        let first = [("a", 1), ("b", 2)];
        assert_eq!(step(|c| all.good(&x, services(&first), c)), ["+a /d/x.yaml", "+b /d/x.yaml"]);
        assert!(step(|c| all.good(&x, services(&first), c)).is_empty());
        assert_eq!(step(|c| all.good(&y, services(&[("a", 1)]), c)), ["+a /d/y.yaml"]);
        assert_eq!(
            step(|c| all.good(&x, services(&[("b", 3), ("c", 4)]), c)),
            ["+b /d/x.yaml", "+c /d/x.yaml", "-a /d/x.yaml"]
        );
        assert_eq!(step(|c| all.gone(&x, c)), ["-b /d/x.yaml", "-c /d/x.yaml"]);
        assert!(all.has(&y) && !all.has(&x));
    }

    #[test]
    fn the_last_good_state_outlives_errors() {
        let mut all = Definitions::new(0, Path::new("/d"));
        let x: Arc<str> = "x.yaml".into();
        step(|c| all.good(&x, services(&[("a", 1)]), c));
        all.bad(&x, vec!["bad".into()]);
        assert_eq!(all.errors().collect::<Vec<_>>(), ["bad"]);
        // Back to the same state: the error goes, and nothing else happened.
        assert!(step(|c| all.good(&x, services(&[("a", 1)]), c)).is_empty());
        assert_eq!(all.errors().count(), 0);
        all.bad(&x, vec!["bad".into()]);
        assert_eq!(step(|c| all.gone(&x, c)), ["-a /d/x.yaml"]);
        assert_eq!(all.errors().count(), 0);
    }
}
