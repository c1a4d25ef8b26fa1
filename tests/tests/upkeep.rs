//! What the agent has made outside of itself is taken away while it runs: it is seen and told, with what it means and
//! what to do, and made again wherever that can be.

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use mesh_tests::process::{self, LIMIT, until};
use mesh_tests::sys::{mounts, netns};
use mesh_tests::{Node, Service, check};

const VIP: &str = "10.96.0.10:80";

/// Where metrics are asked for, in the node's namespace.
const METRICS: &str = "127.0.0.1:9464";

/// A node, with the pins of its agent on a BPF file system of their own.
struct Scene {
    node: Node,
    /// Where that is mounted.
    point: PathBuf,
}

impl Scene {
    fn new() -> Result<Self> {
        let app = Service::new("app").address("10.96.0.10").port(80, 8080).endpoint("10.0.0.1");
        let node = Node::builder().backend("a", "10.0.0.1:8080").service(app);
        let node = node.start_without_agent()?;
        let point = node.directory().join("bpf");
        fs::create_dir(&point)?;
        let mut scene = Self { node, point };
        scene.mount("bpf", &[])?;
        let file = scene.node.agent.file();
        let pins = scene.node.agent.pins();
        let yaml = fs::read_to_string(&file)?;
        let [former, now] =
            [&pins, &scene.pins()].map(|pins| format!("pin-dir: {}", pins.display()));
        fs::write(&file, yaml.replace(&former, &now))?;
        scene.node.agent.stays = true;
        scene.node.agent.start()?;
        scene.until_well()?;
        Ok(scene)
    }

    fn pins(&self) -> PathBuf {
        self.point.join("mesh")
    }

    /// Runs a program with the mounts of the node's namespace.
    fn inside(&self, program: &str, arguments: &[&str]) -> Result<()> {
        let mut command = self.node.namespace().pinning(program);
        command.args(arguments).arg(&self.point);
        process::stdout(command).map(drop)
    }

    fn mount(&self, kind: &str, options: &[&str]) -> Result<()> {
        self.inside("mount", &[&["-t", kind], options, &[kind]].concat())
    }

    /// Works on the files that are seen there.
    fn on<T: Send>(&self, work: impl FnOnce(&Path) -> std::io::Result<T> + Send) -> Result<T> {
        let pins = self.pins();
        Ok(mounts::inside(self.node.namespace().mounts(), || work(&pins))??)
    }

    /// The pins that are there, each with its inode.
    fn pinned(&self) -> Result<Vec<(String, u64)>> {
        self.on(|pins| {
            let mut found = Vec::new();
            for version in fs::read_dir(pins)? {
                for pin in fs::read_dir(version?.path())? {
                    let pin = pin?;
                    let name = pin.file_name().to_string_lossy().into_owned();
                    found.push((name, pin.metadata()?.ino()));
                }
            }
            found.sort();
            Ok(found)
        })
    }

    fn count(&self) -> usize {
        self.pinned().map_or(0, |pinned| pinned.len())
    }

    /// What `/metrics` says of something.
    fn metric(&self, of: &str) -> Result<bool> {
        let ask = || -> Result<String> {
            let mut stream = TcpStream::connect(METRICS.parse::<SocketAddr>()?)?;
            stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n")?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            Ok(answer)
        };
        let answer = netns::inside(self.node.netns(), ask)??;
        let name = format!("mesh_in_place{{of=\"{of}\"}} ");
        let line = answer.lines().find_map(|line| line.strip_prefix(&name));
        Ok(line.with_context(|| format!("no {name} in {answer}"))? == "1")
    }

    /// The only thing that `status` has to say contains all these texts. Connects are balanced, so it is ready.
    fn until_told(&self, texts: &[&str]) -> Result<()> {
        let mut last = String::new();
        until("what is wrong to be told", LIMIT, || {
            let status = self.node.agent.status()?;
            ensure!(status.ready, "{status:?}");
            last = format!("{:?}", status.reasons);
            let [reason] = &status.reasons[..] else { return Ok(None) };
            Ok(texts.iter().all(|text| reason.contains(text)).then_some(()))
        })
        .with_context(|| format!("{texts:?}; last: {last}"))?;
        ensure!(!self.metric("pins")? && self.metric("socket")?, "the metrics say otherwise");
        ensure!(check::who(&self.node, VIP)? == "a");
        Ok(())
    }

    fn until_well(&self) -> Result<()> {
        let mut last = Vec::new();
        until("nothing to be wrong", LIMIT, || {
            last = self.node.agent.status()?.reasons;
            Ok(last.is_empty().then_some(()))
        })
        .with_context(|| format!("{last:?}"))?;
        ensure!(self.metric("pins")? && self.metric("socket")?, "the metrics say otherwise");
        Ok(())
    }

    /// Whether balancing outlives the agent. Then nothing is left.
    fn finish(mut self, outlives: bool) -> Result<()> {
        self.node.agent.kill()?;
        let answer = check::who(&self.node, VIP);
        ensure!(answer.is_ok() == outlives, "{answer:?}");
        let pins = self.pins().to_string_lossy().into_owned();
        let cleaned = self.node.agent.mesh(&["--pin-dir", &pins, "cleanup"])?;
        ensure!(cleaned.status.success() || !outlives, "{cleaned:?}");
        ensure!(check::who(&self.node, VIP).is_err(), "the control: who answered was led there");
        Ok(())
    }
}

/// Unmounted, it would end with the agent; mounted again, it would not.
#[test]
fn an_unmounted_file_system() -> Result<()> {
    let scene = Scene::new()?;
    let before = scene.count();
    ensure!(before > 10, "{before}");
    scene.inside("umount", &["-l"])?;
    let pins = scene.pins();
    let mount = format!("`mount -t bpf bpf {}`", scene.point.display());
    scene.until_told(&[&pins.to_string_lossy(), "and ends with it", &mount])?;
    ensure!(!pins.exists(), "a directory was made where nothing can be pinned");
    scene.mount("bpf", &[])?;
    scene.until_well()?;
    ensure!(scene.count() == before, "{} of {before}", scene.count());
    scene.finish(true)
}

/// The control: while it is told, it is true.
#[test]
fn what_is_told_of_an_unmounted_file_system_is_true() -> Result<()> {
    let scene = Scene::new()?;
    scene.inside("umount", &["-l"])?;
    scene.until_told(&["and ends with it"])?;
    scene.finish(false)
}

/// Under another one, which is read-only at first; then what was hidden is seen again.
#[test]
fn a_file_system_that_is_mounted_over() -> Result<()> {
    let scene = Scene::new()?;
    let before = scene.pinned()?;
    scene.mount("bpf", &["-o", "ro"])?;
    scene.until_told(&["read-only", "and ends with it", "mount -o remount,rw"])?;
    scene.inside("mount", &["-o", "remount,rw"])?;
    scene.until_well()?;
    ensure!(scene.count() == before.len() && scene.pinned()? != before, "others of them");
    scene.inside("umount", &["-l"])?;
    // The agent has them again when one that is removed comes back.
    scene.on(|pins| {
        let version = fs::read_dir(pins)?.next().expect("a version")?.path();
        fs::remove_file(version.join("COUNTERS"))
    })?;
    until("the former pins to be kept up", LIMIT, || {
        Ok((scene.count() == before.len()).then_some(()))
    })?;
    scene.until_well()?;
    // And by another kind of file system.
    scene.mount("tmpfs", &[])?;
    scene.until_told(&["is on tmpfs", "and ends with it", "mount -t bpf"])?;
    scene.inside("umount", &["-l"])?;
    scene.until_well()?;
    scene.finish(true)
}

/// All pins are there, but nobody can change them.
#[test]
fn a_file_system_that_becomes_read_only() -> Result<()> {
    let scene = Scene::new()?;
    let before = scene.pinned()?;
    scene.inside("mount", &["-o", "remount,ro"])?;
    scene.until_told(&["read-only", "also without this agent", "mount -o remount,rw"])?;
    scene.inside("mount", &["-o", "remount,rw"])?;
    scene.until_well()?;
    ensure!(scene.pinned()? == before, "they were as they should be");
    scene.finish(true)
}

/// Single pins, one that is another's by now, and the directory, which another one takes the place of.
#[test]
fn pins_and_their_directory() -> Result<()> {
    let scene = Scene::new()?;
    let before = scene.pinned()?;
    let until_whole = |former: &[(String, u64)], changed: &[&str]| -> Result<()> {
        let mut last = Vec::new();
        until("the pins to be made again", LIMIT, || {
            last = scene.pinned().unwrap_or_default();
            let is_whole = last.len() == former.len()
                && last.iter().zip(former).all(|((name, number), (same, then))| {
                    let is_new = changed.is_empty() || changed.contains(&name.as_str());
                    name == same && (number != then) == is_new
                });
            Ok(is_whole.then_some(()))
        })
        .with_context(|| format!("{last:?}, and before {former:?}"))
    };
    // A pin that has the name of another.
    scene.on(|pins| {
        let version = fs::read_dir(pins)?.next().expect("a version")?.path();
        fs::remove_file(version.join("SLOTS"))?;
        fs::rename(version.join("COUNTERS"), version.join("FLOWS"))
    })?;
    until_whole(&before, &["SLOTS", "COUNTERS", "FLOWS"])?;
    let before = scene.pinned()?;
    let aside = scene.point.join("aside");
    scene.on(|pins| {
        fs::rename(pins, &aside)?;
        fs::create_dir(pins)
    })?;
    until_whole(&before, &[])?;
    scene.until_well()?;
    scene.on(|_| fs::remove_dir_all(&aside))?;
    // In a directory in which others may write, nothing is pinned.
    scene.on(|pins| {
        fs::remove_dir_all(pins)?;
        fs::create_dir(pins)?;
        let everybody = std::os::unix::fs::PermissionsExt::from_mode(0o777);
        fs::set_permissions(pins, everybody)
    })?;
    scene.until_told(&["by somebody else", "and ends with it", "chmod go-w"])?;
    scene.on(|pins| fs::remove_dir(pins))?;
    until_whole(&before, &[])?;
    scene.until_well()?;
    scene.finish(true)
}

/// Another process has the lock of the directory that was put there.
#[test]
fn a_directory_that_another_agent_has() -> Result<()> {
    let scene = Scene::new()?;
    let before = scene.count();
    let pins = scene.pins();
    let lock = scene.on(|_| {
        fs::rename(&pins, scene.point.join("aside"))?;
        fs::create_dir(&pins)?;
        let lock = fs::File::open(&pins)?;
        lock.lock()?;
        Ok(lock)
    })?;
    scene.until_told(&["another agent", "and ends with it", "stop one of both"])?;
    ensure!(scene.count() == 0, "it is not this agent's");
    drop(lock);
    scene.until_well()?;
    ensure!(scene.count() == before);
    scene.on(|_| fs::remove_dir_all(scene.point.join("aside")))?;
    scene.finish(true)
}

/// The socket, its lock, the directory of both; and what somebody else puts there.
#[test]
fn the_socket() -> Result<()> {
    let scene = Scene::new()?;
    let socket = scene.node.agent.socket();
    let lock = socket.with_added_extension("lock");
    let until_there = || {
        until("the socket to be made again", LIMIT, || {
            Ok((scene.node.agent.status().is_ok() && lock.exists()).then_some(()))
        })
    };
    fs::remove_file(&socket)?;
    until_there()?;
    fs::remove_file(&lock)?;
    until_there()?;
    fs::remove_file(&socket)?;
    fs::remove_file(&lock)?;
    until_there()?;
    ensure!(scene.node.agent.log()?.has(&["the socket, or its lock, was removed"]));
    scene.until_well()?;
    // A second agent is still told who has it.
    let second = process::run(scene.node.agent.run_command()?)?;
    let said = String::from_utf8_lossy(&second.stderr);
    ensure!(said.contains("an agent already answers"), "{said}");

    // Nobody can ask by it now, but the metrics tell.
    fs::remove_file(&socket)?;
    let other = UnixListener::bind(&socket)?;
    let (mut pins, mut reached) = (false, true);
    until("it to be told", LIMIT, || {
        (pins, reached) = (scene.metric("pins")?, scene.metric("socket")?);
        Ok((!reached).then_some(()))
    })?;
    ensure!(pins, "the pins are there");
    drop(other);
    until_there()?;
    scene.until_well()?;
    scene.finish(true)
}
