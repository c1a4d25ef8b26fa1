//! Which version's pins are in force, when an agent of another map layout takes over.
//!
//! `v<N>` is in force. The one that takes over makes `v<M>_next` and leaves `v<N>` as it is, until every hook
//! has its program. Then it renames `v<N>` to `v<N>_former`, `v<M>_next` to `v<M>`, and removes the former
//! one. Whoever ends in between leaves one of these:
//!
//! | there is | in force |
//! | --- | --- |
//! | `v<N>`, perhaps a `_next` | `v<N>`; hooks that have other programs get theirs again |
//! | a `_former` and a `_next` | all hooks have theirs: the `_next` |
//! | `v<M>` and a `_former` | `v<M>` |
//!
//! Nothing is written to the tables of the one before the other is in force, so going back loses nothing.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use mesh_common::ABI_VERSION;

use super::{Kind, PinError};

/// How the name of a directory ends that is not in force yet, or not any more.
const NEXT: &str = "_next";
const FORMER: &str = "_former";

/// What is in force.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum InForce {
    Nothing,
    Ours,
    Other(u32),
}

/// The version that a directory's name stands for, when it is in force.
#[must_use]
pub fn version(name: &str) -> Option<u32> {
    let number = name.strip_prefix('v')?;
    number.bytes().all(|byte| byte.is_ascii_digit()).then(|| number.parse().ok())?
}

/// The same, in force or not.
#[must_use]
pub fn any_version(name: &str) -> Option<u32> {
    let name = name.strip_suffix(NEXT).or_else(|| name.strip_suffix(FORMER)).unwrap_or(name);
    version(name)
}

/// The directory of a version.
pub(super) fn of(root: &Path, version: u32) -> PathBuf {
    root.join(format!("v{version}"))
}

/// The directory of this version while it is not in force.
pub(super) fn next(root: &Path) -> PathBuf {
    root.join(format!("v{ABI_VERSION}{NEXT}"))
}

/// What there is below a directory, by versions; only what holds pins of this project.
#[derive(Default)]
struct Survey {
    plain: Vec<(u32, PathBuf)>,
    next: Vec<(u32, PathBuf)>,
    former: Vec<(u32, PathBuf)>,
    /// Plain ones of which no program was ever attached, or none is any more.
    unused: Vec<PathBuf>,
}

impl Survey {
    fn of(root: &Path) -> io::Result<Self> {
        let mut survey = Self::default();
        for entry in fs::read_dir(root)? {
            let entry = entry?;
            let (name, path) = (entry.file_name().to_string_lossy().into_owned(), entry.path());
            let Some(version) = any_version(&name) else { continue };
            if !entry.file_type()?.is_dir() {
                continue;
            }
            let kinds: Vec<Kind> = pins(&path)?.into_iter().map(|(kind, _)| kind).collect();
            if kinds.is_empty() {
                continue;
            }
            let is_used = kinds.contains(&Kind::Link);
            if name.ends_with(NEXT) {
                survey.next.push((version, path));
            } else if name.ends_with(FORMER) {
                survey.former.push((version, path));
            } else if version == ABI_VERSION || is_used {
                survey.plain.push((version, path));
            } else {
                survey.unused.push(path);
            }
        }
        Ok(survey)
    }

    /// What is in force without a name that says so, because somebody ended between two renames.
    fn unnamed(&mut self) -> Option<(u32, PathBuf)> {
        if !self.plain.is_empty() || self.former.is_empty() {
            return None;
        }
        // The former one, should the other have been removed by hand.
        if self.next.is_empty() { &mut self.former } else { &mut self.next }.pop()
    }
}

/// This project's pins in a directory, and what they stand for.
fn pins(directory: &Path) -> io::Result<Vec<(Kind, PathBuf)>> {
    let mut pins = Vec::new();
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let kind = Kind::of_name(&entry.file_name().to_string_lossy());
        if entry.file_type()?.is_file() {
            pins.extend(kind.map(|kind| (kind, entry.path())));
        }
    }
    Ok(pins)
}

/// What is in force, with its version, for somebody who only looks. Nothing when nothing is pinned.
///
/// # Errors
///
/// When the system refuses.
pub fn in_force(root: &Path) -> io::Result<Option<(u32, PathBuf)>> {
    let mut survey = Survey::of(root)?;
    Ok(survey.unnamed().or_else(|| survey.plain.pop()))
}

/// Ends what somebody else has begun, and says what is in force. The caller has the lock.
///
/// # Errors
///
/// When the system refuses, or two are in force, which none of this project's agents does.
pub(super) fn settle(root: &Path) -> Result<InForce, PinError> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| PinError::Io { path, source }
    };
    let mut survey = Survey::of(root).map_err(failed(root))?;
    if let Some((version, path)) = survey.unnamed() {
        let to = of(root, version);
        // An empty one may be there.
        let _ = fs::remove_dir(&to);
        fs::rename(&path, &to).map_err(failed(&path))?;
        survey.plain.push((version, to));
    }
    let rest = survey.next.iter().chain(&survey.former).map(|(_, path)| path);
    rest.chain(&survey.unused).for_each(|path| sweep(path));
    match *survey.plain.as_slice() {
        [] => Ok(InForce::Nothing),
        [(ABI_VERSION, _)] => Ok(InForce::Ours),
        [(version, _)] => Ok(InForce::Other(version)),
        [..] => {
            let other = survey.plain.into_iter().find(|(version, _)| *version != ABI_VERSION);
            let (version, path) = other.unwrap_or_default();
            let why = "another version's are there as well".to_owned();
            Err(PinError::OtherVersion { path, version, why })
        }
    }
}

/// Has this version's pins be in force instead of another's: all hooks have its programs.
///
/// # Errors
///
/// When the system refuses; then the other's are in force still.
pub(super) fn swap(root: &Path, former: &Path) -> Result<PathBuf, PinError> {
    let mut gone = former.as_os_str().to_owned();
    gone.push(FORMER);
    let (gone, ours) = (PathBuf::from(gone), of(root, ABI_VERSION));
    let rename = |from: &Path, to: &Path| {
        // Empty ones are nobody's; what is not is in the way.
        let _ = fs::remove_dir(to);
        fs::rename(from, to).map_err(|source| match source.kind() {
            io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::AlreadyExists => PinError::Wrong {
                path: to.to_owned(),
                found: "something of somebody else".to_owned(),
                expected: "nothing".to_owned(),
            },
            _ => PinError::Io { path: from.to_owned(), source },
        })
    };
    rename(former, &gone)?;
    if let Err(error) = rename(&next(root), &ours) {
        rename(&gone, former)?;
        return Err(error);
    }
    sweep(&gone);
    Ok(ours)
}

/// Removes this project's pins from a directory, links first, and the directory when nothing else is in it.
pub(super) fn sweep(directory: &Path) {
    let mut pins = pins(directory).unwrap_or_default();
    pins.sort_by_key(|(kind, _)| *kind != Kind::Link);
    for (_, pin) in pins {
        let _ = fs::remove_file(pin);
    }
    let _ = fs::remove_dir(directory);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_say_which_version() {
        let versions =
            ["v7", "v70_next", "v8_former", "v", "v7x", "7", "v-1", "v_next"].map(any_version);
        assert_eq!(versions, [Some(7), Some(70), Some(8), None, None, None, None, None]);
        assert_eq!(["v7", "v7_next"].map(version), [Some(7), None]);
    }

    /// Wherever the one that takes over ends, one version is in force afterwards, and nothing else is left.
    #[test]
    fn each_moment_of_a_swap_leads_to_one_version() {
        const OTHER: u32 = ABI_VERSION + 1;
        let (ours, other) = (format!("v{ABI_VERSION}"), format!("v{OTHER}"));
        let cases: [(&[&str], InForce); 10] = [
            (&[], InForce::Nothing),
            (&["other"], InForce::Other(OTHER)),
            (&["other", "ours_next"], InForce::Other(OTHER)),
            (&["other_former", "ours_next"], InForce::Ours),
            (&["other_former", "ours"], InForce::Ours),
            (&["ours", "other_next"], InForce::Ours),
            (&["other_former"], InForce::Other(OTHER)),
            // Its agent ended before it attached anything.
            (&["other unused"], InForce::Nothing),
            (&["ours unused"], InForce::Ours),
            (&["other unused", "ours"], InForce::Ours),
        ];
        for (there, expected) in cases {
            let root = tempfile::tempdir().expect("temporary directory");
            for name in there {
                let (name, pins) = match name.strip_suffix(" unused") {
                    Some(name) => (name, &["SETTINGS"] as &[_]),
                    None => (*name, &["SETTINGS", "mesh_connect4_link"] as &[_]),
                };
                let name = name.replace("ours", &ours).replace("other", &other);
                fs::create_dir(root.path().join(&name)).expect("a directory");
                for pin in pins {
                    fs::write(root.path().join(&name).join(pin), "").expect("a file");
                }
            }
            let seen = in_force(root.path()).expect("looked at").map(|(version, _)| version);
            let version = match expected {
                InForce::Nothing => None,
                InForce::Ours => Some(ABI_VERSION),
                InForce::Other(version) => Some(version),
            };
            assert_eq!(seen, version, "{there:?}");
            assert_eq!(settle(root.path()).expect("settled"), expected, "{there:?}");
            assert_eq!(settle(root.path()).expect("settled"), expected, "{there:?}, again");
            let left = fs::read_dir(root.path()).expect("a directory").count();
            assert_eq!(left, usize::from(expected != InForce::Nothing), "{there:?}");
        }
    }

    /// What is not of this project neither keeps an agent from its work nor goes.
    #[test]
    fn what_is_foreign_does_not_matter() {
        let root = tempfile::tempdir().expect("temporary directory");
        for name in ["v3", "v4_former", "v5_next"] {
            fs::create_dir(root.path().join(name)).expect("a directory");
            fs::write(root.path().join(name).join("foreign"), "").expect("a file");
        }
        fs::write(root.path().join("v6"), "").expect("a file");
        assert_eq!(settle(root.path()).expect("settled"), InForce::Nothing);
        assert_eq!(fs::read_dir(root.path()).expect("a directory").count(), 4);
    }

    #[test]
    fn a_swap_leaves_nothing_of_the_former_one() {
        let root = tempfile::tempdir().expect("temporary directory");
        let former = of(root.path(), ABI_VERSION + 1);
        for path in [&former, &next(root.path())] {
            fs::create_dir(path).expect("a directory");
            fs::write(path.join("SETTINGS"), "").expect("a file");
        }
        let now = swap(root.path(), &former).expect("swapped");
        let names: Vec<_> = fs::read_dir(root.path()).expect("a directory").flatten().collect();
        assert!(names.iter().map(fs::DirEntry::path).eq([now]), "{names:?}");
    }
}
