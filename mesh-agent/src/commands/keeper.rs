//! The process that starts the runner as another user, and starts it again when it was ended: by a command, which
//! has the same user, or for want of memory. It does nothing else, and has no other right.

use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context as _, bail};
use rustix::io::Errno;
use rustix::process::{self, WaitOptions, getpid, set_child_subreaper, setsid};
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, clear_ambient_capability_set, set_capabilities,
    set_no_new_privs,
};

use super::{COMMAND, RIGHTS, children};
use crate::dataplane::sys::inherited;

/// What passes before it is started again.
const PAUSE: Duration = Duration::from_secs(1);

/// Keeps a runner for a user, and its group, until that ends by itself: when the agent does.
///
/// # Errors
///
/// When it cannot be started, or ends by an error of its own.
pub fn keep(uid: u32, gid: u32) -> anyhow::Result<()> {
    // Without the terminal of who started the agent, into which commands could type.
    setsid()?;
    set_child_subreaper(Some(getpid()))?;
    inherited::keep()?;
    set_no_new_privs(true)?;
    clear_ambient_capability_set()?;
    let permitted = capabilities(None)?.permitted & RIGHTS;
    let inheritable = CapabilitySet::empty();
    set_capabilities(None, CapabilitySets { permitted, effective: permitted, inheritable })?;
    loop {
        let mut runner = Command::new("/proc/self/exe");
        runner.arg0("mesh-agent").arg(COMMAND).env_clear().current_dir("/");
        // Without other groups, when this is root: the standard library sees to that, and the runner looks.
        runner.uid(uid).gid(gid).stdout(Stdio::null());
        runner.stdin(Stdio::from(io::stdin().as_fd().try_clone_to_owned()?));
        let runner = runner.spawn().context("starting the process that runs commands")?;
        let ended = wait(&runner).context("waiting for the process that runs commands")?;
        children::kill(children::END, |_| false);
        match ended.signal() {
            Some(_) => {}
            None if ended.success() => return Ok(()),
            // It has said why, and would say so again.
            None => bail!("the process that runs commands has ended: {ended}"),
        }
        eprintln!("the process that runs commands has ended ({ended}), and is started again");
        sleep(PAUSE);
    }
}

/// Waits for the runner to end, and meanwhile ends what a former one has left behind: what is killed may take a while
/// to be gone, and only then what it had started comes to this process.
fn wait(runner: &Child) -> io::Result<ExitStatus> {
    let runner = i32::try_from(runner.id()).map_err(io::Error::other)?;
    // What came here while nobody waited.
    children::kill(children::MOMENT, |id| id == runner);
    loop {
        match process::wait(WaitOptions::empty()) {
            Ok(Some((child, status))) if child.as_raw_pid() == runner => {
                return Ok(ExitStatus::from_raw(status.as_raw()));
            }
            Ok(_) => children::kill(children::MOMENT, |id| id == runner),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}
