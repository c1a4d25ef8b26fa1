//! What processes have left behind for their subreaper (prctl(2)), which both the runner and the keeper are.

use std::fs;
use std::io;
use std::thread::sleep;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, WaitOptions, getpgid, kill_process, waitpid};

/// How long it is looked again by who has other things to do, and by who has not: what is killed may take a while to
/// be gone on a busy machine.
pub(super) const MOMENT: Duration = Duration::from_millis(16);
pub(super) const END: Duration = Duration::from_secs(1);

/// After how long it is looked again.
const STEP: Duration = Duration::from_millis(1);

/// The children of this process: of each thread, a list (`CONFIG_PROC_CHILDREN`).
///
/// # Errors
///
/// When the kernel does not say.
pub(super) fn all() -> io::Result<Vec<i32>> {
    let mut found = Vec::new();
    for task in fs::read_dir("/proc/self/task")? {
        let list = fs::read_to_string(task?.path().join("children"))?;
        found.extend(list.split_whitespace().filter_map(|id| id.parse::<i32>().ok()));
    }
    Ok(found)
}

/// Kills those that are not to be spared, by their number and that of their process group. What they had
/// started comes to this process in turn, so it is looked for again, until nothing is left, at most for so long.
pub(super) fn kill(most: Duration, spares: impl Fn(i32) -> bool) {
    let begin = Instant::now();
    loop {
        let mut any = false;
        let ids = all().unwrap_or_default().into_iter().filter(|id| !spares(*id));
        for id in ids.filter_map(Pid::from_raw) {
            // A child that was not waited for keeps its number.
            let group = getpgid(Some(id)).map_or(0, Pid::as_raw_pid);
            if spares(group) {
                continue;
            }
            any = true;
            let _ = kill_process(id, Signal::KILL);
            let _ = waitpid(Some(id), WaitOptions::NOHANG);
        }
        if !any || begin.elapsed() >= most {
            return;
        }
        sleep(STEP);
    }
}
