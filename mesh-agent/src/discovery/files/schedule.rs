//! What is believed when. No I/O; the time is given.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::directory::{Listed, Stamp};

/// How long nothing may have been removed before removals are believed. `rm -rf` removes the files
/// of a directory first and the directory after them, without such a pause.
const SETTLE: Duration = Duration::from_millis(150);

/// The same in a directory that has just taken the place of another: it may be filled file by file.
const SETTLE_REPLACED: Duration = Duration::from_secs(2);

/// However often files are removed, the first removal waits no longer than this many settle times.
const SETTLE_MOST: u32 = 10;

/// How long a file must have been still before a listing alone makes it be read.
const STILL: Duration = Duration::from_millis(250);

/// Why a file that a listing shows changed may be read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Trust {
    /// All files are known to be whole.
    Whole,
    /// A file whose last change is older than [`STILL`] is; writers that are at it will be heard.
    Old,
    /// One that looks the same in two regular listings is: whatever is to be heard was
    /// not.
    Still,
}

/// A file that changed and is not believed yet.
#[derive(Debug)]
struct Candidate {
    stamp: Option<Stamp>,
    since: Instant,
    wait: Duration,
}

#[derive(Debug)]
pub(super) struct Schedule {
    /// From one regular listing to the next.
    rescan: Duration,
    /// What each file looked like when it was read.
    read: HashMap<Arc<str>, Option<Stamp>>,
    candidates: HashMap<Arc<str>, Candidate>,
    removals: BTreeSet<Arc<str>>,
    /// First and last removal of those.
    removals_at: Option<(Instant, Instant)>,
    /// When the directory took the place of another.
    replaced: Option<Instant>,
}

// === impl Schedule ===

impl Schedule {
    pub(super) fn new(rescan: Duration) -> Self {
        Self {
            rescan,
            read: HashMap::new(),
            candidates: HashMap::new(),
            removals: BTreeSet::new(),
            removals_at: None,
            replaced: None,
        }
    }

    /// Whether to read a file now that a listing shows.
    pub(super) fn look(&mut self, file: &Listed, trust: Trust, now: Instant) -> bool {
        if self.read.get(&file.name) == Some(&file.stamp) {
            self.candidates.remove(&file.name);
            return false;
        }
        // A link to nowhere is never whole: it may be in the middle of a swap.
        let whole = file.stamp.is_some()
            && match trust {
                Trust::Whole => true,
                Trust::Old => file.age.is_some_and(|age| age >= STILL),
                Trust::Still => false,
            };
        let wait = if trust == Trust::Still { self.rescan } else { STILL };
        let candidate = self.candidates.entry(Arc::clone(&file.name)).or_insert(Candidate {
            stamp: file.stamp,
            since: now,
            wait,
        });
        if candidate.stamp != file.stamp {
            *candidate = Candidate { stamp: file.stamp, since: now, wait: candidate.wait };
        }
        let due = now.saturating_duration_since(candidate.since) >= candidate.wait;
        if whole || due {
            self.candidates.remove(&file.name);
        }
        whole || due
    }

    /// Only these files are there: what is not waits no longer to be read.
    pub(super) fn keep(&mut self, present: &HashSet<Arc<str>>) {
        self.candidates.retain(|name, _| present.contains(name));
    }

    /// A file was read and looked like this.
    pub(super) fn read(&mut self, name: Arc<str>, stamp: Option<Stamp>) {
        self.candidates.remove(&name);
        self.read.insert(name, stamp);
    }

    /// A file was written to while it was read.
    pub(super) fn changing(&mut self, name: Arc<str>, stamp: Option<Stamp>, now: Instant) {
        self.candidates.insert(name, Candidate { stamp, since: now, wait: STILL });
    }

    /// Whether a file waits to be believed.
    pub(super) fn is_looking(&self) -> bool {
        !self.candidates.is_empty()
    }

    /// Whether a listing is due for one that waits.
    pub(super) fn look_due(&self, now: Instant) -> bool {
        self.candidates.values().any(|candidate| candidate.since + candidate.wait <= now)
    }

    /// A name is gone.
    pub(super) fn vanished(&mut self, name: Arc<str>, now: Instant) {
        self.candidates.remove(&name);
        // A listing repeats what is known; only news begins the wait anew.
        if self.removals.insert(name) {
            let first = self.removals_at.map_or(now, |(first, _)| first);
            self.removals_at = Some((first, now));
        }
    }

    /// A name is there.
    pub(super) fn appeared(&mut self, name: &str) {
        if self.removals.remove(name) && self.removals.is_empty() {
            self.removals_at = None;
        }
    }

    /// The directory took the place of another.
    pub(super) fn replaced(&mut self, now: Instant) {
        self.replaced = Some(now);
    }

    /// Whether the removals have settled.
    pub(super) fn removals_due(&self, now: Instant) -> bool {
        self.removals_at().is_some_and(|at| at <= now)
    }

    /// The names whose removal has settled, which wait no longer.
    pub(super) fn take_removals(&mut self) -> BTreeSet<Arc<str>> {
        self.removals_at = None;
        std::mem::take(&mut self.removals)
    }

    /// A removal was believed.
    pub(super) fn removed(&mut self, name: &str) {
        self.read.remove(name);
    }

    /// The directory is gone: nothing that was waited for means anything.
    pub(super) fn forget_pending(&mut self) {
        self.take_removals();
        self.candidates.clear();
    }

    /// When to look next, apart from the regular listing.
    pub(super) fn next(&self) -> Option<Instant> {
        let looks = self.candidates.values().map(|candidate| candidate.since + candidate.wait);
        looks.chain(self.removals_at()).min()
    }

    fn removals_at(&self) -> Option<Instant> {
        let (first, last) = self.removals_at?;
        let filled =
            self.replaced.is_some_and(|at| first.saturating_duration_since(at) < SETTLE_REPLACED);
        let settle = if filled { SETTLE_REPLACED } else { SETTLE };
        Some((last + settle).min(first + settle * SETTLE_MOST))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::discovery::files::directory::survey;

    const RESCAN: Duration = Duration::from_secs(5);
    const MS: Duration = Duration::from_millis(1);

    /// A file as it is on the disk, then with another content, then with another one.
    fn three_looks() -> [Listed; 3] {
        let directory = tempfile::tempdir().expect("a directory");
        ["", "1", "22"].map(|text| {
            std::fs::write(directory.path().join("a.yaml"), text).expect("written");
            survey(directory.path()).expect("listed").files.remove(0)
        })
    }

    fn aged(mut file: Listed, age: Duration) -> Listed {
        file.age = Some(age);
        file
    }

    #[test]
    fn a_listing_alone_is_believed_when_the_file_is_still() {
        let [one, two, three] = three_looks();
        let mut schedule = Schedule::new(RESCAN);
        let start = Instant::now();
        // Old: by its age, or by having been looked at twice.
        let one = aged(one, STILL);
        assert!(schedule.look(&one, Trust::Old, start));
        schedule.read(Arc::clone(&one.name), one.stamp);
        assert!(!schedule.look(&one, Trust::Whole, start), "it was read");
        let two = aged(two, MS);
        assert!(!schedule.look(&two, Trust::Old, start));
        assert_eq!(schedule.next(), Some(start + STILL));
        let three = aged(three, MS);
        assert!(!schedule.look(&three, Trust::Still, start + STILL), "it changed meanwhile");
        assert!(schedule.look(&three, Trust::Still, start + STILL * 2));
        assert!(!schedule.is_looking());
    }

    #[test]
    fn what_was_not_heard_must_be_still_from_one_regular_listing_to_the_next() {
        let [one, two, _] = three_looks();
        let mut schedule = Schedule::new(RESCAN);
        let start = Instant::now();
        let (one, two) = (aged(one, RESCAN), aged(two, RESCAN));
        assert!(!schedule.look(&one, Trust::Still, start), "whatever its age");
        assert!(!schedule.look(&two, Trust::Still, start + RESCAN), "it changed meanwhile");
        assert!(schedule.look(&two, Trust::Still, start + RESCAN * 2));
    }

    #[test]
    fn what_is_not_there_is_not_waited_for() {
        let [one, ..] = three_looks();
        let mut schedule = Schedule::new(RESCAN);
        assert!(!schedule.look(&aged(one, MS), Trust::Old, Instant::now()));
        schedule.keep(&HashSet::new());
        assert_eq!(schedule.next(), None);
    }

    #[test]
    fn a_link_to_nowhere_waits_even_in_a_swap() {
        let mut schedule = Schedule::new(RESCAN);
        let file = Listed { name: "a.yaml".into(), stamp: None, age: None };
        assert!(!schedule.look(&file, Trust::Whole, Instant::now()));
    }

    #[test]
    fn removals_settle_together_and_not_for_ever() {
        let mut schedule = Schedule::new(RESCAN);
        let start = Instant::now();
        schedule.vanished("a.yaml".into(), start);
        schedule.vanished("b.yaml".into(), start + MS * 100);
        schedule.vanished("b.yaml".into(), start + MS * 120);
        assert!(!schedule.removals_due(start + SETTLE));
        assert!(schedule.removals_due(start + MS * 100 + SETTLE));
        schedule.appeared("a.yaml");
        assert_eq!(schedule.take_removals().into_iter().collect::<Vec<_>>(), ["b.yaml".into()]);
        assert_eq!(schedule.next(), None);

        for i in 0..=SETTLE_MOST {
            schedule.vanished(i.to_string().into(), start + SETTLE * i);
        }
        assert!(schedule.removals_due(start + SETTLE * SETTLE_MOST));

        schedule.take_removals();
        schedule.replaced(start);
        schedule.vanished("a.yaml".into(), start + MS);
        assert!(!schedule.removals_due(start + SETTLE * 2));
        assert!(schedule.removals_due(start + MS + SETTLE_REPLACED));
    }
}
