//! A cgroup whose processes may use so much memory, in whichever hierarchy limits memory on this machine.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::cgroup;

/// Dropped, it is gone; its processes must have ended.
#[derive(Debug)]
pub struct Limited(PathBuf);

impl Limited {
    /// With a limit in bytes.
    ///
    /// # Errors
    ///
    /// Memory can be limited in no hierarchy of this machine.
    pub fn new(name: &str, bytes: u64) -> Result<Self> {
        let (top, file) = top()?;
        let limited = Self(top.join(format!("mesh-test-memory-{}-{name}", std::process::id())));
        fs::create_dir(&limited.0).with_context(|| format!("making {}", limited.0.display()))?;
        let file = limited.0.join(file);
        fs::write(&file, bytes.to_string()).with_context(|| format!("{}", file.display()))?;
        // Nothing is spared by swapping; where there is none, there is no such file.
        let _ = fs::write(limited.0.join("memory.swap.max"), "0");
        Ok(limited)
    }

    /// The most that its processes have used at a time so far, in bytes.
    ///
    /// # Errors
    ///
    /// The kernel does not say: version 2 does from Linux 5.19 on.
    pub fn peak(&self) -> Result<u64> {
        let files = ["memory.peak", "memory.max_usage_in_bytes"].map(|name| self.0.join(name));
        let file = files.iter().find(|file| file.exists()).context("no file says so")?;
        let text = fs::read_to_string(file).with_context(|| format!("{}", file.display()))?;
        Ok(text.trim().parse()?)
    }

    /// Has a command begin in there: `starts` makes one for the program that it is given.
    #[must_use]
    pub fn confine(&self, command: &Command, starts: impl Fn(&str) -> Command) -> Command {
        let mut shell = starts("/bin/sh");
        shell.args(["-c", "echo $$ > \"$0\" && exec \"$@\""]).arg(self.0.join("cgroup.procs"));
        shell.arg(command.get_program()).args(command.get_args());
        shell
    }
}

/// Where cgroups with a limit can be made, and the file that has it.
fn top() -> Result<(PathBuf, &'static str)> {
    let table = fs::read_to_string("/proc/self/mountinfo").context("/proc is not mounted")?;
    let points = table.lines().filter(|line| line.contains(" - cgroup "));
    let mut points = points.filter_map(|line| line.split(' ').nth(4).map(PathBuf::from));
    if let Some(point) = points.find(|point| point.join("memory.limit_in_bytes").exists()) {
        return Ok((point, "memory.limit_in_bytes"));
    }
    let unified = cgroup::mount_point()?;
    let file = unified.join("cgroup.subtree_control");
    let controllers = fs::read_to_string(&file).with_context(|| format!("{}", file.display()))?;
    if !controllers.split_whitespace().any(|one| one == "memory") {
        bail!("memory cannot be limited here: `echo +memory > {}`", file.display());
    }
    Ok((unified, "memory.max"))
}

impl Drop for Limited {
    fn drop(&mut self) {
        for _ in 0..50 {
            // A process that has ended is in there for a moment longer.
            if fs::remove_dir(&self.0).is_ok() {
                return;
            }
            sleep(Duration::from_millis(100));
        }
        eprintln!("{} could not be removed", self.0.display());
    }
}
