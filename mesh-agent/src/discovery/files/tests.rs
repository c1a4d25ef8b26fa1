//! The source on real directories: every way in which files and directories come and go.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{Files, RESCAN, start};
use crate::discovery::{Event, SourceState};

/// How long is waited for what must happen.
const PATIENCE: Duration = Duration::from_secs(10);

/// Longer than removals settle and than fresh files wait.
const A_WHILE: Duration = Duration::from_millis(600);

/// A running source and what it has told so far.
struct Bench {
    root: TempDir,
    directory: PathBuf,
    events: mpsc::Receiver<Event>,
    /// Ports of the defined services, by `file/service`.
    ports: BTreeMap<String, u16>,
    state: Option<SourceState>,
    changes: usize,
    _stop: DropGuard,
}

/// A file that defines services, each with its port.
fn file(services: &[(&str, u16)]) -> String {
    let mut text = String::from("services:\n");
    for (name, port) in services {
        text += &format!(
            "- {{name: {name}, address: 10.96.0.1, ports: [{{port: {port}}}], endpoints: []}}\n"
        );
    }
    text
}

impl Bench {
    /// A source on a directory that holds these files.
    async fn with(files: &[(&str, &str)]) -> Self {
        let mut bench = Self::on(RESCAN, |directory| {
            fs::create_dir(directory).expect("created");
            for (name, text) in files {
                fs::write(directory.join(name), text).expect("written");
            }
        });
        bench.until(|bench| bench.state.as_ref().is_some_and(|state| state.ready)).await;
        bench
    }

    fn on(rescan: Duration, prepare: impl FnOnce(&PathBuf)) -> Self {
        let root = tempfile::tempdir().expect("a directory");
        let directory = root.path().join("services.d");
        prepare(&directory);
        let (sender, events) = mpsc::channel(1);
        let cancel = CancellationToken::new();
        start(Files::new(3, directory.clone(), sender, rescan), cancel.clone());
        let (ports, state, changes) = (BTreeMap::new(), None, 0);
        Self { root, directory, events, ports, state, changes, _stop: cancel.drop_guard() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// Writes a file the way careful programs do: beside it, then renamed.
    fn replace(&self, name: &str, text: &str) {
        let beside = self.path(&format!("{name}.tmp"));
        fs::write(&beside, text).expect("written");
        fs::rename(beside, self.path(name)).expect("renamed");
    }

    fn take(&mut self, event: Event) {
        match event {
            Event::State(state) => self.state = Some(state),
            Event::Changed { upserts, removed } => {
                self.changes += 1;
                let key = |item: &str, name: &dyn std::fmt::Display| {
                    format!("{}/{name}", item.rsplit('/').next().unwrap_or_default())
                };
                for (origin, name) in removed {
                    let gone = self.ports.remove(&key(&origin.item, &name));
                    assert!(gone.is_some(), "{name} was removed without having been there");
                }
                for (origin, service) in upserts {
                    assert_eq!(origin.source, 3);
                    self.ports.insert(key(&origin.item, &service.name), service.ports[0].port);
                }
            }
        }
    }

    /// Takes events until something holds.
    async fn until(&mut self, holds: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !holds(self) {
            let left = deadline.saturating_duration_since(Instant::now());
            let event = timeout(left, self.events.recv()).await.unwrap_or_else(|_| {
                panic!("it did not happen; defined: {:?}, state: {:?}", self.ports, self.state)
            });
            self.take(event.expect("the source runs"));
        }
    }

    async fn until_ports(&mut self, expected: &[(&str, u16)]) {
        let expected: BTreeMap<_, _> = expected.iter().map(|(k, v)| ((*k).into(), *v)).collect();
        self.until(|bench| bench.ports == expected).await;
    }

    async fn until_error(&mut self, part: &str) {
        self.until(|bench| bench.errors().contains(part)).await;
    }

    async fn until_no_error(&mut self) {
        self.until(|bench| bench.errors().is_empty()).await;
    }

    fn errors(&self) -> String {
        self.state.as_ref().map(|state| state.errors.join("\n")).unwrap_or_default()
    }

    /// Takes events for a while, and makes sure that no definition changes.
    async fn nothing_changes_for(&mut self, time: Duration) {
        let before = self.changes;
        let deadline = Instant::now() + time;
        while let Ok(event) =
            timeout(deadline.saturating_duration_since(Instant::now()), self.events.recv()).await
        {
            self.take(event.expect("the source runs"));
        }
        assert_eq!(self.changes, before, "defined now: {:?}", self.ports);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_is_read_completely_before_it_is_ready() {
    let (one, two) = (file(&[("a", 1), ("b", 2)]), file(&[("c", 3)]));
    let bench =
        Bench::with(&[("1.yaml", &one), ("2.yml", &two), ("bad.yaml", "x"), (".h.yaml", "x")])
            .await;
    let expected = [("1.yaml/a", 1), ("1.yaml/b", 2), ("2.yml/c", 3)];
    assert_eq!(bench.ports, expected.map(|(k, v)| (k.into(), v)).into());
    let place = format!("{}:1:1: expected a service file", bench.path("bad.yaml").display());
    assert!(bench.errors().starts_with(&place), "{}", bench.errors());
    let name = format!("files {}", bench.directory.display());
    assert_eq!(bench.state.as_ref().map(|state| (state.source, &state.name)), Some((3, &name)));
}

/// Fresh files wait until they are still; what is heard of meanwhile waits no longer, also when it never is.
#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_goes_on_changing_is_no_reason_to_wait() {
    // No regular listing comes to help.
    let mut bench = Bench::on(PATIENCE * 10, |directory| {
        fs::create_dir(directory).expect("created");
        fs::write(directory.join("x.yaml"), file(&[("a", 1)])).expect("written");
    });
    let started = Instant::now();
    for port in (1..1_000).cycle() {
        bench.replace("x.yaml", &file(&[("a", port)]));
        if let Ok(event) = timeout(Duration::from_millis(10), bench.events.recv()).await {
            bench.take(event.expect("the source runs"));
        }
        if bench.state.as_ref().is_some_and(|state| state.ready) {
            break;
        }
        assert!(started.elapsed() < PATIENCE, "not ready, and nothing is in the way");
    }
    assert!(bench.ports.contains_key("x.yaml/a"), "{:?}", bench.ports);
}

#[tokio::test(flavor = "multi_thread")]
async fn replacing_by_rename_applies_at_once() {
    let mut bench = Bench::with(&[("x.yaml", &file(&[("a", 1), ("gone", 2)]))]).await;
    bench.replace("x.yaml", &file(&[("a", 7), ("new", 3)]));
    let before = bench.changes;
    bench.until_ports(&[("x.yaml/a", 7), ("x.yaml/new", 3)]).await;
    assert_eq!(bench.changes, before + 1, "one change is one message");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_is_not_read_while_it_is_written() {
    let mut bench = Bench::with(&[("x.yaml", &file(&[("a", 1), ("b", 2)]))]).await;
    // Every prefix here is a valid file.
    let mut writer = fs::File::create(bench.path("x.yaml")).expect("opened");
    writer.write_all(file(&[("a", 1)]).as_bytes()).expect("written");
    bench.nothing_changes_for(A_WHILE).await;
    writer
        .write_all(file(&[("b", 9)]).split_once('\n').expect("lines").1.as_bytes())
        .expect("written");
    drop(writer);
    bench.until_ports(&[("x.yaml/a", 1), ("x.yaml/b", 9)]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_last_good_state_outlives_a_bad_file() {
    let mut bench = Bench::with(&[("x.yaml", &file(&[("a", 1)]))]).await;
    for (bad, said) in [("", "the file is empty"), ("services: [", "not valid YAML"), ("\u{0}", "")]
    {
        fs::write(bench.path("x.yaml"), bad).expect("written");
        bench.until_error(said).await;
    }
    fs::remove_file(bench.path("x.yaml")).expect("removed");
    fs::create_dir(bench.path("x.yaml")).expect("created");
    bench.until_error("no regular file").await;
    bench.nothing_changes_for(A_WHILE).await;
    fs::remove_dir(bench.path("x.yaml")).expect("removed");
    fs::write(bench.path("x.yaml"), file(&[("a", 1), ("b", 2)])).expect("written");
    bench.until_ports(&[("x.yaml/a", 1), ("x.yaml/b", 2)]).await;
    bench.until_no_error().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_changes_a_second_are_all_seen_at_once() {
    let mut bench = Bench::with(&[("x.yaml", &file(&[("a", 1)]))]).await;
    let mut delays = Vec::new();
    for port in 100..120 {
        let text = file(&[("a", port)]);
        if port % 2 == 0 {
            bench.replace("x.yaml", &text);
        } else {
            fs::write(bench.path("x.yaml"), text).expect("written");
        }
        let start = Instant::now();
        bench.until_ports(&[("x.yaml/a", port)]).await;
        delays.push(start.elapsed());
        tokio::time::sleep(Duration::from_millis(100).saturating_sub(start.elapsed())).await;
    }
    // About a millisecond on an idle machine. Debouncing would delay each of them, a busy machine delays some.
    delays.sort_unstable();
    assert!(delays[delays.len() / 2] < Duration::from_millis(100), "{delays:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_removed_file_takes_its_services_with_it() {
    let mut bench =
        Bench::with(&[("x.yaml", &file(&[("a", 1)])), ("y.yaml", &file(&[("b", 2)]))]).await;
    fs::remove_file(bench.path("x.yaml")).expect("removed");
    bench.until_ports(&[("y.yaml/b", 2)]).await;
    // Also the last one, as long as the directory is there.
    fs::remove_file(bench.path("y.yaml")).expect("removed");
    bench.until_ports(&[]).await;
    assert_eq!(bench.errors(), "");
}

#[tokio::test(flavor = "multi_thread")]
async fn renaming_a_file_leaves_no_gap() {
    let mut bench = Bench::with(&[("x.yaml", &file(&[("a", 1)]))]).await;
    fs::rename(bench.path("x.yaml"), bench.path("y.yaml")).expect("renamed");
    bench.until_ports(&[("x.yaml/a", 1), ("y.yaml/a", 1)]).await;
    bench.until_ports(&[("y.yaml/a", 1)]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn links_are_whole_when_they_appear() {
    let mut bench = Bench::with(&[]).await;
    let outside = bench.root.path().join("outside");
    fs::write(&outside, file(&[("a", 1)])).expect("written");
    symlink(&outside, bench.path("soft.yaml")).expect("linked");
    bench.until_ports(&[("soft.yaml/a", 1)]).await;
    fs::hard_link(&outside, bench.path("hard.yaml")).expect("linked");
    bench.until_ports(&[("hard.yaml/a", 1), ("soft.yaml/a", 1)]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn deleting_the_directory_removes_nothing() {
    let (one, two) = (file(&[("a", 1)]), file(&[("b", 2)]));
    let mut bench = Bench::with(&[("x.yaml", &one), ("y.yaml", &two)]).await;
    fs::remove_dir_all(&bench.directory).expect("removed");
    bench.until_error("the directory is gone").await;
    bench.nothing_changes_for(A_WHILE).await;

    // An empty one in its place says nothing either: it is what `umount` leaves.
    fs::create_dir(&bench.directory).expect("created");
    bench.until_error("replaced by an empty one").await;
    bench.nothing_changes_for(A_WHILE).await;

    // Filled file by file, it removes only what has not come in time.
    bench.replace("x.yaml", &file(&[("a", 5)]));
    bench.until_ports(&[("x.yaml/a", 5), ("y.yaml/b", 2)]).await;
    bench.until_no_error().await;
    bench.nothing_changes_for(A_WHILE).await;
    bench.until_ports(&[("x.yaml/a", 5)]).await;
    // And it is watched.
    bench.replace("x.yaml", &file(&[("a", 6)]));
    bench.until_ports(&[("x.yaml/a", 6)]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_that_is_renamed_away_and_back_changes_nothing() {
    let mut bench = Bench::with(&[("x.yaml", &file(&[("a", 1)]))]).await;
    let away = bench.root.path().join("away");
    fs::rename(&bench.directory, &away).expect("renamed");
    bench.until_error("the directory is gone").await;
    // What happens there is not heard.
    fs::write(away.join("x.yaml"), file(&[("a", 2)])).expect("written");
    bench.nothing_changes_for(A_WHILE).await;
    fs::rename(&away, &bench.directory).expect("renamed");
    bench.until_ports(&[("x.yaml/a", 2)]).await;
    bench.until_no_error().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_that_is_exchanged_is_read_anew() {
    let mut bench = Bench::with(&[("x.yaml", &file(&[("a", 1)]))]).await;
    let (away, other) = (bench.root.path().join("away"), bench.root.path().join("other"));
    fs::create_dir(&other).expect("created");
    fs::write(other.join("y.yaml"), file(&[("b", 2)])).expect("written");
    fs::rename(&bench.directory, away).expect("renamed");
    fs::rename(other, &bench.directory).expect("renamed");
    bench.until_ports(&[("x.yaml/a", 1), ("y.yaml/b", 2)]).await;
    bench.until_ports(&[("y.yaml/b", 2)]).await;
    bench.until_no_error().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_that_is_missing_is_waited_for() {
    let mut bench = Bench::on(RESCAN, |_| {});
    bench.until_error("cannot read the directory: No such file or directory").await;
    assert_eq!(bench.state.as_ref().map(|state| state.ready), Some(false));
    fs::create_dir(&bench.directory).expect("created");
    bench.replace("x.yaml", &file(&[("a", 1)]));
    bench.until_ports(&[("x.yaml/a", 1)]).await;
    bench.until(|bench| bench.state.as_ref().is_some_and(|state| state.ready)).await;
    bench.until_no_error().await;
}

/// The layout that the kubelet makes, and its way of updating it (`AtomicWriter`).
#[tokio::test(flavor = "multi_thread")]
async fn a_config_map_is_exchanged_in_one_change() {
    let mut bench = Bench::on(RESCAN, |directory| {
        fs::create_dir_all(directory.join("..1")).expect("created");
        fs::write(directory.join("..1/x.yaml"), file(&[("a", 1), ("b", 2)])).expect("written");
        fs::write(directory.join("..1/y.yaml"), file(&[("c", 3)])).expect("written");
        fs::write(directory.join("..1/z.yaml"), file(&[("d", 4)])).expect("written");
        symlink("..1", directory.join("..data")).expect("linked");
        for name in ["x.yaml", "y.yaml", "z.yaml"] {
            symlink(format!("..data/{name}"), directory.join(name)).expect("linked");
        }
    });
    bench.until_ports(&[("x.yaml/a", 1), ("x.yaml/b", 2), ("y.yaml/c", 3), ("z.yaml/d", 4)]).await;
    fs::create_dir(bench.path("..2")).expect("created");
    fs::write(bench.path("..2/x.yaml"), file(&[("a", 1)])).expect("written");
    fs::write(bench.path("..2/y.yaml"), file(&[("b", 2), ("c", 3)])).expect("written");
    symlink("..2", bench.path("..data_tmp")).expect("linked");
    let before = bench.changes;
    fs::rename(bench.path("..data_tmp"), bench.path("..data")).expect("renamed");
    fs::remove_file(bench.path("z.yaml")).expect("removed");
    fs::remove_dir_all(bench.path("..1")).expect("removed");
    bench.until_ports(&[("x.yaml/a", 1), ("y.yaml/b", 2), ("y.yaml/c", 3), ("z.yaml/d", 4)]).await;
    assert_eq!(bench.changes, before + 1, "a service that moves between files is never undefined");
    bench.until_ports(&[("x.yaml/a", 1), ("y.yaml/b", 2), ("y.yaml/c", 3)]).await;
    assert_eq!(bench.errors(), "");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_heard_is_found() {
    let mut bench = Bench::on(Duration::from_millis(300), |directory| {
        fs::create_dir(directory).expect("created");
        let outside = directory.with_file_name("outside");
        fs::write(&outside, file(&[("a", 1)])).expect("written");
        symlink(outside, directory.join("x.yaml")).expect("linked");
    });
    bench.until_ports(&[("x.yaml/a", 1)]).await;
    // The target of a link is not watched.
    fs::write(bench.root.path().join("outside"), file(&[("a", 2)])).expect("written");
    bench.until_ports(&[("x.yaml/a", 2)]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn more_changes_than_the_kernel_queues_are_not_lost() {
    let names = ["x.yaml", "y.yaml"];
    // No regular listing in the time of a test: it would find the change too.
    let mut bench = Bench::on(Duration::from_secs(3600), |directory| {
        fs::create_dir(directory).expect("created");
        for name in names {
            fs::write(directory.join(name), file(&[("a", 1)])).expect("written");
        }
    });
    bench.until(|bench| bench.state.as_ref().is_some_and(|state| state.ready)).await;
    // The source comes to wait for its receiver, which is this test.
    for port in 2..5 {
        bench.replace("x.yaml", &file(&[("a", port)]));
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    // While it waits, the kernel's queue overflows.
    let limit = fs::read_to_string("/proc/sys/fs/inotify/max_queued_events").expect("read");
    for i in 0..limit.trim().parse::<usize>().expect("a number") + 100 {
        // In turns, since the kernel merges an event with an equal one before it.
        let name = bench.path(names[i % 2]);
        fs::OpenOptions::new().append(true).open(name).expect("opened");
    }
    bench.replace("unheard.yaml", &file(&[("b", 9)]));
    bench.until_ports(&[("unheard.yaml/b", 9), ("x.yaml/a", 4), ("y.yaml/a", 1)]).await;
}
