//! Which unit a cgroup is part of: what stays the same when its processes and containers are started
//! again. That is a Kubernetes pod, or a systemd service or scope, or else the cgroup by its name.
//!
//! The kernel knows cgroups by number, and only the file system knows their names, so this walks over the
//! balanced cgroup and is told by inotify(7) when cgroups are made. A cgroup that has not been seen yet is
//! a client of its own, for milliseconds.

use std::collections::{HashMap, HashSet};
use std::io;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures_util::{FutureExt as _, StreamExt as _};
use inotify::{EventStream, Inotify, WatchDescriptor, WatchMask, Watches};
use tokio::sync::{Notify, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::clients::{WALK, Walked, walk};
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

/// The part of a cgroup's place that names its unit, without what differs by the cgroup namespace that it is
/// seen from.
#[must_use]
pub fn unit_of(cgroup: &Path) -> &Path {
    let mut components = cgroup.components();
    while let Some(Component::RootDir | Component::ParentDir) = components.clone().next() {
        components.next();
    }
    let cgroup = components.as_path();
    let mut service = None;
    for place in cgroup.ancestors() {
        let Some(name) = place.file_name().and_then(|name| name.to_str()) else { continue };
        // Containers are below it.
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

/// How [`follow`] is asked, and answers.
pub struct Signals {
    /// Whether anybody wants to know.
    pub wanted: watch::Receiver<bool>,
    /// That the balanced cgroup is another one now.
    pub again: Arc<Notify>,
    /// That it was looked for the first time.
    pub there: watch::Sender<bool>,
}

/// Keeps the keys of all cgroups below `balanced` in the kernel, from when they are wanted until `cancel`.
pub async fn follow(
    units: Units,
    balanced: PathBuf,
    mut signals: Signals,
    cancel: CancellationToken,
) {
    let wait = cancel.run_until_cancelled(signals.wanted.wait_for(|wanted| *wanted));
    if !matches!(wait.await, Some(Ok(_))) {
        return cancel.cancelled().await;
    }
    let mut eyes = Eyes { units, balanced, watches: None, seen: HashMap::new() };
    let (mut ear, deaf) = match listen(&mut eyes) {
        Ok(ear) => (Some(ear), None),
        Err(error) => (None, Some(format!("inotify: {error}"))),
    };
    let mut told = None;
    loop {
        let begin = Instant::now();
        let looked = tokio::task::spawn_blocking(move || (eyes.look(), eyes)).await;
        let (Look { more, problem }, back) =
            looked.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()));
        eyes = back;
        let problem = problem.or_else(|| deaf.clone());
        if problem.is_some() && problem != told {
            tracing::warn!(
                problem,
                "not all cgroups are known by their units: for hashes by unit these clients are told \
                 apart by their cgroups"
            );
        }
        told = problem;
        // Nobody may wait for it.
        signals.there.send_replace(true);
        let rest = (begin.elapsed() * REST).max(SETTLE);
        let heard = async {
            match &mut ear {
                _ if more => {}
                // What it says does not matter.
                Some(ear) => drop(ear.next().await),
                None => std::future::pending().await,
            }
        };
        let waited = async {
            tokio::select! {
                () = heard => {}
                () = signals.again.notified() => {}
                () = tokio::time::sleep(AGAIN) => {}
            }
            tokio::time::sleep(rest).await;
        };
        if cancel.run_until_cancelled(waited).await.is_none() {
            return;
        }
        // All that has been said meanwhile is seen by one look.
        while let Some(Some(_)) = ear.as_mut().and_then(|ear| ear.next().now_or_never()) {}
    }
}

fn listen(eyes: &mut Eyes) -> io::Result<EventStream<Vec<u8>>> {
    let inotify = Inotify::init()?;
    eyes.watches = Some(inotify.watches());
    inotify.into_event_stream(vec![0; BUFFER])
}

/// What looks at the hierarchy.
struct Eyes {
    units: Units,
    balanced: PathBuf,
    watches: Option<Watches>,
    /// The cgroups that are watched. The kernel does not end the watch of one that is removed.
    seen: HashMap<u64, WatchDescriptor>,
}

/// What came of looking.
struct Look {
    /// There may be more to see: a cgroup was found that was not watched before, and others may have been
    /// made in it.
    more: bool,
    /// What was in the way. What could be done was done.
    problem: Option<String>,
}

impl Eyes {
    /// Looks at all cgroups, twice if there are new ones: mostly nothing is made in them meanwhile.
    fn look(&mut self) -> Look {
        match self.look_once() {
            Look { more: true, problem: None } => self.look_once(),
            look => look,
        }
    }

    fn look_once(&mut self) -> Look {
        let failed = |problem| Look { more: false, problem: Some(problem) };
        let top = match Cgroup::open(&self.balanced) {
            Ok(top) => top,
            Err(error) => return failed(chain(&error)),
        };
        let Some(Walked { found, whole }) = walk(&self.balanced, HashSet::from([NOBODY]), WALK)
        else {
            return failed(format!("{} is no cgroup", self.balanced.display()));
        };
        let mut problem =
            (!whole).then(|| format!("not all cgroups could be looked at; at most {WALK} are"));
        let mut more = false;
        if let Some(watches) = &mut self.watches {
            self.seen.retain(|id, watch| {
                let stays = !whole || found.contains_key(id);
                if !stays {
                    // It may have ended by itself after all.
                    let _ = watches.remove(watch.clone());
                }
                stays
            });
            for (id, path) in &found {
                if self.seen.contains_key(id) {
                    continue;
                }
                let inside = Path::new(&**path).strip_prefix(&top.path).unwrap_or(Path::new(""));
                match watches.add(top.directory.join(inside), MASK) {
                    Ok(watch) => {
                        self.seen.insert(*id, watch);
                        more = true;
                    }
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                    Err(error) => problem = Some(format!("watching cgroups: {error}")),
                }
            }
        }
        let key = |path: &str| key_of(unit_of(Path::new(path)));
        let keys = found.into_iter().map(|(id, path)| (id, key(&path))).collect();
        if let Err(error) = self.units.hold(&keys, whole) {
            problem = Some(chain(&error));
        }
        Look { more, problem }
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
            ("/".into(), ""),
            // The same, from another cgroup namespace.
            ("/../../system.slice/orders.service".into(), "/system.slice/orders.service"),
            (format!("/../..{pod}/4bf1e"), &*pod),
        ] {
            let unit = unit.strip_prefix('/').unwrap_or(unit);
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
