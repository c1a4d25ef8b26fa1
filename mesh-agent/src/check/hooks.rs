//! Programs of others on the hooks that this project uses: two balancers on one hook both rewrite
//! the address, and whoever looks for a fault should know of both.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::{fs, io};

use aya::programs::loaded_programs;

use super::Check;
use super::cgroup::Cgroup;
use super::mounts::Mounts;
use crate::dataplane::sys::attached::{Hook, program_ids};

/// How the names of this project's programs begin.
const OWN: &str = "mesh_";

/// One line for the cgroup and all its ancestors. Never required: others may be there with good
/// reason.
pub(super) fn checks(mounts: &Mounts, named: Option<&Path>) -> Option<Check> {
    let named = named.or_else(|| mounts.points("cgroup2").next())?;
    // What is wrong with the directory is said by its own check.
    let cgroup = Cgroup::find(named, mounts).ok()?;
    let top = mounts.holding(&cgroup.directory)?.point.clone();
    let name = "other programs";
    let check = match attached(&cgroup.directory, &top) {
        Ok(found) => judge(name, &cgroup.directory, found, &names()),
        Err(error) => Check::bad(
            name,
            format!("{} cannot be asked: {error}", cgroup.directory.display()),
            "run as root, or with CAP_NET_ADMIN",
        ),
    };
    Some(check.optional())
}

/// An agent's own programs are as they should be; others are named.
fn judge(name: &str, directory: &Path, found: Found, names: &HashMap<u32, String>) -> Check {
    let (own, others): (Found, Found) = found
        .into_iter()
        .partition(|((_, id), _)| names.get(id).is_some_and(|name| name.starts_with(OWN)));
    match (own.is_empty(), others.is_empty()) {
        (true, true) => Check::good(name, format!("none on {} and above", directory.display())),
        (false, true) => {
            Check::good(name, format!("only an agent's own: {}", describe(&own, names)))
        }
        (_, false) => Check::bad(
            name,
            describe(&others, names),
            "make sure that they leave the addresses of your services alone; `bpftool cgroup tree` \
             shows them",
        ),
    }
}

/// A cgroup directory and a program's id, with the hooks where it is attached there.
type Found = BTreeMap<(PathBuf, u32), Vec<Hook>>;

/// What is attached to `directory` and its ancestors up to `top`.
fn attached(directory: &Path, top: &Path) -> io::Result<Found> {
    let mut found = Found::new();
    for directory in directory.ancestors().take_while(|ancestor| ancestor.starts_with(top)) {
        for hook in Hook::ALL {
            let ids = match program_ids(directory, hook) {
                Ok(ids) => ids,
                // A hook that this kernel does not have holds nobody's program.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => continue,
                Err(error) => return Err(error),
            };
            for id in ids {
                found.entry((directory.to_path_buf(), id)).or_default().push(hook);
            }
        }
    }
    Ok(found)
}

/// The programs of this project that balance sockets of this cgroup or of one inside it: those on
/// it, on its ancestors and on its descendants. Empty without `CAP_SYS_ADMIN`, which tells names.
///
/// # Errors
///
/// When the table of mounts cannot be read, or a cgroup cannot be asked.
pub fn ours(directory: &Path) -> io::Result<Vec<(PathBuf, u32)>> {
    let mounts = Mounts::read()?;
    let Some(top) = mounts.holding(directory).map(|mount| mount.point.clone()) else {
        return Ok(Vec::new());
    };
    let names = names();
    let own = |id: &u32| names.get(id).is_some_and(|name| name.starts_with("mesh_connect"));
    let mut found: Vec<_> = attached(directory, &top)?.into_keys().collect();
    for child in inside(directory) {
        let ids = program_ids(&child, Hook::Connect4).unwrap_or_default();
        found.extend(ids.into_iter().map(|id| (child.clone(), id)));
    }
    found.retain(|(_, id)| own(id));
    Ok(found)
}

/// Programs of others that see what is dialled before these do, and may have made something else of it: what
/// is attached below a cgroup runs first, then what was attached to it before (`compute_effective_progs` of
/// `kernel/bpf/cgroup.c`).
#[must_use]
pub fn before(directory: &Path, ours: &[(Hook, u32)]) -> Vec<String> {
    let rewriting = |hook: &Hook| {
        matches!(hook, Hook::Connect4 | Hook::Connect6 | Hook::SendMsg4 | Hook::SendMsg6)
    };
    let mut found = Found::new();
    let children: Vec<PathBuf> = inside(directory).collect();
    for &(hook, id) in ours.iter().filter(|(hook, _)| rewriting(hook)) {
        let attached = program_ids(directory, hook).unwrap_or_default();
        for other in attached.into_iter().take_while(|other| *other != id) {
            found.entry((directory.to_owned(), other)).or_default().push(hook);
        }
        for child in &children {
            for other in program_ids(child, hook).unwrap_or_default() {
                found.entry((child.clone(), other)).or_default().push(hook);
            }
        }
    }
    if found.is_empty() {
        return Vec::new();
    }
    let names = names();
    found.iter().map(|one| describe_one(one, &names)).collect()
}

/// All cgroups below this one. They come and go meanwhile.
fn inside(directory: &Path) -> impl Iterator<Item = PathBuf> {
    let mut left = vec![directory.to_owned()];
    let mut found = Vec::new();
    while let Some(directory) = left.pop() {
        let Ok(entries) = fs::read_dir(&directory) else { continue };
        let children = entries.filter_map(Result::ok);
        for child in children.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())) {
            left.push(child.path());
            found.push(child.path());
        }
    }
    found.into_iter()
}

/// The names of the loaded programs by id; empty without `CAP_SYS_ADMIN`.
fn names() -> HashMap<u32, String> {
    loaded_programs()
        .filter_map(Result::ok)
        .filter_map(|program| Some((program.id(), program.name_as_str()?.to_owned())))
        .collect()
}

fn describe(found: &Found, names: &HashMap<u32, String>) -> String {
    let lines: Vec<_> = found.iter().map(|one| describe_one(one, names)).collect();
    lines.join("; ")
}

fn describe_one(
    ((directory, id), hooks): (&(PathBuf, u32), &Vec<Hook>),
    names: &HashMap<u32, String>,
) -> String {
    let name = names.get(id).map_or("(name unknown)", String::as_str);
    let hooks: Vec<_> = hooks.iter().map(|hook| hook.name()).collect();
    format!("{name} (id {id}) at {} of {}", hooks.join(", "), directory.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_named_once_with_all_their_hooks() {
        let found = Found::from([
            (("/c".into(), 7), vec![Hook::Connect4, Hook::Connect6]),
            (("/c/web".into(), 9), vec![Hook::GetPeerName4]),
        ]);
        let names = HashMap::from([(7, "cil_sock4".to_owned())]);
        assert_eq!(
            describe(&found, &names),
            "cil_sock4 (id 7) at connect4, connect6 of /c; \
             (name unknown) (id 9) at getpeername4 of /c/web"
        );
    }

    #[test]
    fn our_own_are_no_cause_for_concern() {
        let found = Found::from([(("/c".into(), 7), vec![Hook::Connect4])]);
        let judged = |name: &str| {
            let names = HashMap::from([(7, name.to_owned())]);
            judge("x", Path::new("/c"), found.clone(), &names).ok
        };
        assert!(judged("mesh_connect4"));
        assert!(!judged("cil_sock4_connect"));
    }
}
