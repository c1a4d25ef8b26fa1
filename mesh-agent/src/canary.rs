//! The proof that connects are balanced: now and then a process in the balanced cgroup connects to an
//! address that is no machine's, the kernel programs lead it to the agent itself, and it says what it was
//! told there. That all parts are in place proves nothing; that a connect came back does.
//!
//! The process is this program once more. It enters the cgroup before it makes its socket, and is there
//! for some milliseconds.

use std::fs;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::io::{self, Read as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4, TcpStream};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, bail};
use mesh_common::FrontendKey;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio::process::{Child, Command};

use crate::config::Exclude;
use crate::model::ServiceName;
use crate::patience::Patience;

/// What is dialled: the dummy address of RFC 7600, which no router forwards, at a port that nobody has.
pub const ADDRESS: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(192, 0, 0, 8), 1);

/// The name of the service that it is; a source cannot define it, since it has a space.
const NAME: &str = "the agent's canary";

/// Where the agent answers, at an address of the loopback network that depends on the cgroup.
const PORT: u16 = 9465;

/// How many addresses are tried, should others have some.
const ATTEMPTS: u64 = 16;

/// How long a proof may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(5);

/// How often one is sent again that failed while this process did not run.
const AGAIN: usize = 3;

/// A cgroup of its own, where the balanced one may hold no processes because others lie below it.
const OWN: &str = "mesh-canary";

/// Bytes that are told.
const WORD: usize = 16;

/// The name of the service.
#[must_use]
pub fn name() -> ServiceName {
    ServiceName::new(NAME)
}

/// Whether it is that service.
#[must_use]
pub fn is(name: &ServiceName) -> bool {
    name.as_str() == NAME
}

/// Whether that is where canaries connect to.
pub fn is_dialled(frontend: &FrontendKey) -> bool {
    frontend.addr.ip() == IpAddr::V4(*ADDRESS.ip())
}

/// Who answers, and who is sent.
pub struct Canary {
    listener: TcpListener,
    cgroup: PathBuf,
    exclude: Exclude,
}

impl Canary {
    /// For a cgroup. The address is the same for each agent of this cgroup, so that the next one finds what
    /// it would write.
    ///
    /// # Errors
    ///
    /// When the agent cannot listen.
    pub async fn new(cgroup: &Path, exclude: &Exclude) -> anyhow::Result<Self> {
        let mut hasher = DefaultHasher::new();
        cgroup.hash(&mut hasher);
        let first = hasher.finish();
        let mut last = None;
        for attempt in 0..ATTEMPTS {
            let [.., a, b, c] = first.wrapping_add(attempt).to_be_bytes();
            // Neither the network's own address nor one that many use.
            let address = Ipv4Addr::new(127, 64 | a & 63, b, c.clamp(1, 254));
            match TcpListener::bind((address, PORT)).await {
                Ok(listener) => {
                    let (cgroup, exclude) = (cgroup.to_owned(), exclude.clone());
                    return Ok(Self { listener, cgroup, exclude });
                }
                Err(error) => last = Some(error),
            }
        }
        let error = last.map_or_else(String::new, |error| error.to_string());
        bail!(
            "the agent cannot listen on 127.0.0.0/8, port {PORT}, to prove that connects are balanced: {error}"
        )
    }

    /// Where the agent answers.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Whether whoever is sent is not balanced, because the agent file says so: then nothing can be proved.
    fn is_excluded(&self) -> bool {
        let same = |path: &PathBuf| {
            let [there, own] = [path.as_path(), Path::new("/proc/self/ns/net")].map(fs::metadata);
            matches!((there, own), (Ok(there), Ok(own)) if (there.dev(), there.ino()) == (own.dev(), own.ino()))
        };
        let above = |path: &PathBuf| {
            path.canonicalize().is_ok_and(|excluded| self.cgroup.starts_with(excluded))
        };
        self.exclude.namespaces.iter().any(same) || self.exclude.cgroups.iter().any(above)
    }

    /// Sends one, unless it is not balanced on purpose.
    ///
    /// # Errors
    ///
    /// Why it did not come back, or could not be sent.
    pub async fn prove(&self) -> anyhow::Result<()> {
        if self.is_excluded() {
            return Ok(());
        }
        let mut patience = Patience::new(PATIENCE);
        let mut result = self.prove_once(&mut patience).await;
        for _ in 0..AGAIN {
            if result.is_ok() || patience.lost().is_none() {
                break;
            }
            // Who was sent has given up while this process did not run.
            patience = Patience::new(PATIENCE);
            result = self.prove_once(&mut patience).await;
        }
        result
    }

    async fn prove_once(&self, patience: &mut Patience) -> anyhow::Result<()> {
        let word = format!("{:016x}", fastrand::u64(..));
        let proving = async {
            let answering = self.answer(word.as_bytes());
            let sent = send(&self.cgroup);
            tokio::select! {
                // Whoever connects here gets an answer; this ends when the one that was sent does.
                error = answering => Err(error),
                said = sent => said,
            }
        };
        let said = patience.wait(proving).await;
        let said = said.with_context(|| format!("no answer within {} s", PATIENCE.as_secs()))??;
        if said != word {
            bail!("somebody else answered at {ADDRESS}: it was not balanced");
        }
        Ok(())
    }

    /// Tells everybody who comes. One that was sent before, and is late, is told too.
    async fn answer(&self, word: &[u8]) -> anyhow::Error {
        loop {
            match self.listener.accept().await {
                Ok((mut stream, _)) => drop(stream.write_all(word).await),
                Err(error) => return error.into(),
            }
        }
    }
}

/// Sends a process that connects from inside a cgroup. Gives what it was told.
async fn send(cgroup: &Path) -> anyhow::Result<String> {
    let mut command = Command::new("/proc/self/exe");
    command.arg("canary").arg(ADDRESS.to_string()).env_clear().kill_on_drop(true);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().context("starting a process that connects")?;
    let pid = child.id().context("it has ended at once")?;
    let own = enter(cgroup, pid).map_err(|error| cannot_enter(cgroup, error))?;
    let said = converse(&mut child).await;
    // It is in there as long as it lives.
    let _ = child.wait().await;
    if let Some(own) = own {
        let _ = fs::remove_dir(own);
    }
    said
}

/// What to do about it.
fn cannot_enter(cgroup: &Path, error: io::Error) -> anyhow::Error {
    let advice = match error.raw_os_error() {
        Some(libc::EACCES) => {
            "it belongs to somebody else, which takes CAP_DAC_OVERRIDE; the unit has to allow that, or \
             `canary: false` in the agent file sends none"
        }
        Some(libc::EROFS) => {
            "it is read-only here; mount it writable, or `canary: false` in the agent file sends none"
        }
        _ => "`canary: false` in the agent file sends none",
    };
    anyhow::Error::new(error).context(format!("entering cgroup {}: {advice}", cgroup.display()))
}

/// Puts a process into a cgroup, or into one of its own below it, which is given.
fn enter(cgroup: &Path, pid: u32) -> io::Result<Option<PathBuf>> {
    let put = |cgroup: &Path| fs::write(cgroup.join("cgroup.procs"), pid.to_string());
    match put(cgroup) {
        Ok(()) => Ok(None),
        // Its controllers are for cgroups below it (cgroups(7), no internal processes).
        Err(error) if matches!(error.raw_os_error(), Some(libc::EBUSY | libc::EOPNOTSUPP)) => {
            let own = cgroup.join(OWN);
            match fs::create_dir(&own) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
                _ => put(&own)?,
            }
            Ok(Some(own))
        }
        Err(error) => Err(error),
    }
}

/// Lets it go on, and reads what it says.
async fn converse(child: &mut Child) -> anyhow::Result<String> {
    drop(child.stdin.take());
    let (mut said, mut complaint) = (String::new(), String::new());
    let mut stdout = child.stdout.take().context("its output")?;
    let mut stderr = child.stderr.take().context("its errors")?;
    stdout.read_to_string(&mut said).await?;
    stderr.read_to_string(&mut complaint).await?;
    if said.is_empty() {
        let complaint = complaint.trim();
        bail!("{}", complaint.strip_prefix("mesh-agent: ").unwrap_or(complaint));
    }
    Ok(said)
}

/// What the process does that is sent: waits until it is in its place, connects, and prints what it is told.
///
/// # Errors
///
/// It cannot connect, or is told nothing.
pub fn connect(address: SocketAddr) -> anyhow::Result<String> {
    io::stdin().read_to_end(&mut Vec::new())?;
    let mut stream = TcpStream::connect_timeout(&address, PATIENCE)
        .with_context(|| format!("a connect from inside the cgroup to {address} failed"))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut word = [0; WORD];
    stream.read_exact(&mut word).context("it was answered by nobody")?;
    Ok(String::from_utf8_lossy(&word).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_address_depends_on_the_cgroup_only() {
        let none = Exclude::default();
        let at = async |cgroup: &str| {
            let canary = Canary::new(Path::new(cgroup), &none).await.expect("a listener");
            canary.address().expect("bound")
        };
        let first = at("/x").await;
        assert_eq!(first, at("/x").await);
        assert!(first.ip().is_loopback() && first.port() == PORT);
        let _held = Canary::new(Path::new("/x"), &none).await.expect("a listener");
        assert_ne!(first, at("/x").await, "another one when that is taken");
    }
}
