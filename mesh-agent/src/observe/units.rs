//! Which unit a cgroup is part of: what stays the same when its processes and containers are started
//! again. That is a Kubernetes pod, or a systemd service or scope, or else the cgroup by its name.
//!
//! The kernel knows cgroups by number, and only the file system knows their names, so this walks over the
//! balanced cgroup and is told by inotify(7) when cgroups are made. A cgroup that has not been seen yet is
//! a client of its own, for milliseconds.

use std::collections::{HashMap, HashSet};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use futures_util::StreamExt as _;
use inotify::{Inotify, WatchMask, Watches};
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::clients::{WALK, walk};
use crate::check::cgroup::Cgroup;
use crate::dataplane::units::Units;
use crate::text::chain;

/// What happens in this time is one change.
const SETTLE: Duration = Duration::from_millis(5);

/// It is looked again after so long, whatever was heard.
const AGAIN: Duration = Duration::from_secs(30);

/// After a walk there is none for so many times what it took.
const REST: u32 = 10;

/// Room for hundreds of events.
const BUFFER: usize = 16_384;

/// The part of a cgroup's place that names its unit.
#[must_use]
pub fn unit_of(cgroup: &Path) -> &Path {
    let mut service = None;
    for place in cgroup.ancestors() {
        let Some(name) = place.file_name().and_then(|name| name.to_str()) else { continue };
        // The outermost: containers are below it.
        if is_pod(name) {
            return place;
        }
        // The innermost: a user's services are below those of the system.
        if service.is_none() && (name.ends_with(".service") || name.ends_with(".scope")) {
            service = Some(place);
        }
    }
    service.unwrap_or(cgroup)
}

/// The name of a pod's cgroup, as the kubelet makes it: `pod` and its UID, as it is or between what
/// systemd wants of the name of a slice.
fn is_pod(name: &str) -> bool {
    let slice = name.strip_suffix(".slice").and_then(|name| name.rsplit('-').next());
    let uid = slice.unwrap_or(name).strip_prefix("pod");
    uid.is_some_and(|uid| {
        uid.len() >= 32 && uid.chars().all(|c| c.is_ascii_hexdigit() || c == '-' || c == '_')
    })
}

/// The key of a unit: the same on every node and after every start (FNV-1a).
#[must_use]
pub fn key_of(unit: &Path) -> u64 {
    unit.as_os_str().as_encoded_bytes().iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

/// Keeps the keys of all cgroups below `balanced` in the kernel, from when they are wanted until `cancel`,
/// and says when they are there for the first time.
pub async fn follow(
    units: Units,
    balanced: PathBuf,
    mut wanted: watch::Receiver<bool>,
    there: watch::Sender<bool>,
    cancel: CancellationToken,
) {
    let wait = cancel.run_until_cancelled(wanted.wait_for(|wanted| *wanted));
    if !matches!(wait.await, Some(Ok(_))) {
        return cancel.cancelled().await;
    }
    let mut eyes = Eyes { units, balanced, watches: None, seen: HashSet::new() };
    let (mut ear, mut deaf) = match Inotify::init() {
        Ok(inotify) => {
            eyes.watches = Some(inotify.watches());
            (inotify.into_event_stream(vec![0; BUFFER]).ok(), None)
        }
        Err(error) => (None, Some(format!("inotify: {error}"))),
    };
    let mut told = None;
    loop {
        let begin = Instant::now();
        let looked = tokio::task::spawn_blocking(move || (eyes.look(), eyes)).await;
        let (result, back) =
            looked.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()));
        eyes = back;
        let problem = result.err().or_else(|| deaf.take());
        if problem.is_some() && problem != told {
            tracing::warn!(
                problem,
                "not all cgroups are known by their units: for hashes by unit these clients are told \
                 apart by their cgroups"
            );
            told = problem;
        }
        // Nobody may wait for it.
        there.send_replace(true);
        let rest = (begin.elapsed() * REST).max(SETTLE);
        let heard = async {
            match &mut ear {
                // What it says does not matter.
                Some(ear) => drop(ear.next().await),
                None => std::future::pending().await,
            }
            tokio::time::sleep(rest).await;
        };
        if cancel.run_until_cancelled(tokio::time::timeout(AGAIN, heard)).await.is_none() {
            return;
        }
    }
}

/// What looks at the hierarchy.
struct Eyes {
    units: Units,
    balanced: PathBuf,
    watches: Option<Watches>,
    /// The cgroups that are watched.
    seen: HashSet<u64>,
}

impl Eyes {
    /// Looks at all cgroups. Those that are made in one while it is not watched yet are seen by the next
    /// look, which follows at once. What is wrong is told; what could be done was done.
    fn look(&mut self) -> Result<(), String> {
        loop {
            let (new, keys, result) = self.look_once()?;
            let held = self.units.hold(&keys).map_err(|error| chain(&error));
            if new == 0 || result.is_err() || held.is_err() {
                return result.and(held);
            }
        }
    }

    #[expect(clippy::type_complexity, reason = "for the caller alone")]
    fn look_once(&mut self) -> Result<(usize, HashMap<u64, u64>, Result<(), String>), String> {
        let top = Cgroup::open(&self.balanced).map_err(|error| chain(&error))?;
        let found = walk(&self.balanced, HashSet::from([NOBODY]), WALK);
        let found = found.ok_or_else(|| format!("{} is no cgroup", self.balanced.display()))?;
        let mut result = match found.len() >= WALK {
            true => Err(format!("there are more than {WALK} cgroups")),
            false => Ok(()),
        };
        self.seen.retain(|id| found.contains_key(id));
        let mut new = 0;
        for (id, path) in &found {
            let Some(watches) = self.watches.as_mut().filter(|_| !self.seen.contains(id)) else {
                continue;
            };
            let inside = Path::new(&**path).strip_prefix(&top.path).unwrap_or(Path::new(""));
            match watches.add(top.directory.join(inside), MASK) {
                Ok(_) => {
                    self.seen.insert(*id);
                    new += 1;
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => result = Err(format!("watching cgroups: {error}")),
            }
        }
        let key = |path: &str| key_of(unit_of(Path::new(path)));
        Ok((new, found.into_iter().map(|(id, path)| (id, key(&path))).collect(), result))
    }
}

/// No cgroup has this number, so a walk that looks for it sees all.
const NOBODY: u64 = 0;

const MASK: WatchMask =
    WatchMask::CREATE.union(WatchMask::DELETE).union(WatchMask::MOVE).union(WatchMask::ONLYDIR);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_unit_is_what_lasts() {
        let uid = "0f3e8a5c-1d2b-4c3d-9e8f-112233445566";
        let pod = format!("/kubepods/burstable/pod{uid}");
        let slice = uid.replace('-', "_");
        let slice = format!(
            "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{slice}.slice"
        );
        for (cgroup, unit) in [
            (format!("{pod}/4bf1e"), &*pod),
            (pod.clone(), &*pod),
            (format!("{slice}/cri-containerd-4bf1e.scope"), &*slice),
            (format!("{slice}/cri-containerd-4bf1e.scope/init"), &*slice),
            ("/system.slice/orders.service".into(), "/system.slice/orders.service"),
            ("/system.slice/orders.service/worker".into(), "/system.slice/orders.service"),
            (
                "/user.slice/user-1000.slice/user@1000.service/app.slice/shop.service".into(),
                "/user.slice/user-1000.slice/user@1000.service/app.slice/shop.service",
            ),
            ("/machine.slice/db.scope/payload".into(), "/machine.slice/db.scope"),
            ("/trial/worker".into(), "/trial/worker"),
            ("/podium".into(), "/podium"),
            ("/".into(), "/"),
        ] {
            assert_eq!(unit_of(Path::new(&cgroup)), Path::new(unit), "{cgroup}");
        }
    }

    /// Another key would move every client when the agent is exchanged.
    #[test]
    fn keys_never_change() {
        assert_eq!(key_of(Path::new("")), 0xcbf2_9ce4_8422_2325);
        assert_eq!(key_of(Path::new("foobar")), 0x8594_4171_f739_67e8);
    }
}
