//! The arguments, and the help that teaches them.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use crate::api::server::endpoint;
use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Args, Parser, Subcommand, ValueEnum};

const EXAMPLES: &str = "\
Examples:
  mesh-agent check                                   can this node run it?
  mesh-agent run --cgroup /sys/fs/cgroup/web.slice   balance what is started in web.slice
  mesh-agent status                                  is it ready, and if not, why?
  mesh-agent services                                what is balanced
  mesh-agent backends orders                         who answers for the service orders
  mesh-agent explain 10.96.0.10:80 --from 4711       what a connect of process 4711 would do
  mesh-agent events --follow                         what fails or is refused, as it happens
  mesh-agent services -o json | jq '.[].name'        for scripts

Exit status: 0 done; 1 failed; 2 wrong usage; 3 the agent does not answer.
Colour is used on a terminal only, and not when NO_COLOR is set.";

/// Balances connections to service addresses in the kernel, for unmodified programs.
#[derive(Parser, Debug)]
#[command(name = "mesh-agent", version, after_help = EXAMPLES, disable_help_subcommand = true)]
pub(super) struct Cli {
    /// The agent's socket [default: that of the agent file, or /run/mesh/agent.sock]
    #[arg(long, global = true, value_name = "PATH")]
    pub(super) socket: Option<PathBuf>,

    /// Where programs and maps are pinned [default: that of the agent file, or /sys/fs/bpf/mesh]
    #[arg(long, global = true, value_name = "DIR")]
    pub(super) pin_dir: Option<PathBuf>,

    /// How to print
    #[arg(short, long, global = true, value_enum, default_value_t)]
    pub(super) output: Format,

    #[command(subcommand)]
    pub(super) command: Command,
}

/// How to print.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, ValueEnum)]
pub(super) enum Format {
    /// Aligned columns, 100 wide at most
    #[default]
    Table,
    /// Everything, however wide
    Wide,
    /// JSON: RFC 3339 times, plain numbers
    Json,
    /// The same as YAML
    Yaml,
}

#[derive(Subcommand, Debug)]
pub(super) enum Command {
    /// Run the agent in the foreground
    Run(RunArgs),
    /// Say whether this node can run the agent, and what to do about what is missing
    Check(CheckArgs),
    /// Show whether the agent is ready and why not, its programs, sources and tables
    Status,
    /// Compare the kernel's records of sockets with the sockets that exist
    #[command(after_help = "\
Every connection that is balanced has a record, which the kernel programs release when it ends. The
agent compares all records with the sockets of all network namespaces once a minute; this command
does it now. A record whose connection is over (the application has not closed its socket yet) is
released when two audits in a row find it so.")]
    Audit,
    /// List services
    Services {
        /// Only this one
        name: Option<String>,
    },
    /// List backends with their state
    Backends {
        /// Only those of this service
        service: Option<String>,
    },
    /// List open connections: who holds them, where they go, for how long
    #[command(after_help = CONNECTIONS)]
    Connections {
        /// Only those of this service
        service: Option<String>,
    },
    /// Give an endpoint no new connections; those that are open go on
    #[command(after_help = DRAINING)]
    Drain(DrainArgs),
    /// Give an endpoint new connections again
    #[command(after_help = DRAINING)]
    Undrain(DrainArgs),
    /// Remove services that are held as a former agent left them, without waiting for their sources
    #[command(after_help = FORGETTING)]
    Forget(ForgetArgs),
    /// Show what rarely happens: connects refused or failed, backends taken out and back in
    Events(EventsArgs),
    /// Say what a connect would do, step by step, and why
    Explain(ExplainArgs),
    /// Remove what an agent that is gone has left: its socket and its pins, nothing of others
    Cleanup(CleanupArgs),
    /// Print the version of this program, and of the agent that runs
    Version,
    /// Print a completion script for a shell
    #[command(after_help = "Example:\n  mesh-agent completions bash \
                            > /usr/share/bash-completion/completions/mesh-agent")]
    Completions {
        /// For which shell
        shell: clap_complete::Shell,
    },
    /// Connect, as the agent has it done to prove that connects are balanced
    #[command(hide = true)]
    Canary {
        /// Where to
        address: SocketAddr,
    },
    /// Run what health checks name, for the agent that has started this
    #[command(hide = true)]
    RunCommands {
        /// Only keeps one that does, as this user
        #[arg(long, requires = "gid")]
        uid: Option<u32>,
        /// In this group
        #[arg(long, requires = "uid")]
        gid: Option<u32>,
    },
    /// Write the manual pages, for those who pack this program
    #[command(hide = true)]
    Man {
        /// Where to
        directory: PathBuf,
    },
}

const CONNECTIONS: &str = "\
Every balanced connection has a record in the kernel; its socket and the process that
holds it are looked up while you wait. CGROUP (-o wide) is that of the process that
connected, PID is who holds the socket now. A datagram socket that sends without
being connected is listed once for each service that it sends to, and its AGE is the
time since it last did.

Examples:
  mesh-agent connections orders
  mesh-agent connections -o wide
  mesh-agent connections -o json | jq -r '.[] | select(.age > 3600) | .pid'";

const DRAINING: &str = "\
While no other endpoint of the service is usable, one that drains goes on to be used. It
lasts until `undrain`, until the endpoint is not defined any more, or until the agent
ends; `drain: true` beside the endpoint in a service file lasts longer. When its ACTIVE
in `mesh-agent backends` is 0, nothing is open there that began while this agent ran.
Whether another endpoint is usable is what the health checks say.

Examples:
  mesh-agent drain orders 10.0.0.1
  mesh-agent drain orders 10.0.0.1:8081
  mesh-agent undrain orders 10.0.0.1";

const FORGETTING: &str = "\
An agent that is started on a node which balances already removes no service that was
defined before, until every source has been read without errors, and while the one that
had defined it is empty; `status` says what is held. When a source is gone for good, this removes what it had defined. Connections that
are open stay as they are.

Examples:
  mesh-agent forget orders
  mesh-agent forget --all";

/// Arguments of `forget`.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub struct ForgetArgs {
    /// The service
    pub service: Option<String>,
    /// All that are held and that no source defines
    #[arg(long)]
    pub all: bool,
}

/// Arguments of `drain` and `undrain`.
#[derive(Args, Debug)]
pub(super) struct DrainArgs {
    /// The service
    pub(super) service: String,
    /// The endpoint: its address, or one port of it
    #[arg(value_name = "ADDRESS[:PORT]", value_parser = drained)]
    pub(super) address: (IpAddr, Option<u16>),
}

fn drained(text: &str) -> Result<(IpAddr, Option<u16>), &'static str> {
    endpoint(text)
}

/// Arguments of `run`.
#[derive(Args, Debug)]
#[command(after_help = "\
Sockets created in the cgroup, or below it, are balanced when they connect from now
on. There is no default: naming the root of the hierarchy takes over every program
of the node.

Examples:
  mesh-agent run --cgroup /sys/fs/cgroup/web.slice
  mesh-agent run --config ./agent.yaml --socket /tmp/mesh.sock")]
pub(super) struct RunArgs {
    /// The agent file [default: /etc/mesh/agent.yaml, if it exists]
    #[arg(long, value_name = "FILE")]
    pub(super) config: Option<PathBuf>,
    /// The cgroup2 directory to balance; wins over the file, like the others below
    #[arg(long, value_name = "DIR")]
    pub(super) cgroup: Option<PathBuf>,
    /// Refused by name: this version keeps nothing on disk
    #[arg(long, value_name = "DIR", hide = true)]
    pub(super) state_dir: Option<PathBuf>,
    /// End balancing with the agent, also on SIGTERM
    #[arg(long)]
    pub(super) detach_on_exit: bool,
    /// Have the kernel programs log each connect that they refuse; for debugging, as it makes them
    /// slower
    #[arg(long)]
    pub(super) log_refusals: bool,
}

/// Arguments of `check`.
#[derive(Args, Debug)]
pub(super) struct CheckArgs {
    /// The agent file [default: /etc/mesh/agent.yaml, if it exists]
    #[arg(long, value_name = "FILE")]
    pub(super) config: Option<PathBuf>,
    /// The cgroup2 directory that is to be balanced
    #[arg(long, value_name = "DIR")]
    pub(super) cgroup: Option<PathBuf>,
}

/// Arguments of `events`.
#[derive(Args, Debug)]
#[command(after_help = "\
Kinds of events:
  refused     a connect was refused: no endpoint, no such service, ...
  failed      a connect to a backend failed: refused, timeout, unreachable, reset
  suspected   a backend is out for the one client whose connects failed
  ejected     a backend is out for all
  spared      a backend should be out, but too many others are
  recovered   a backend was tried, and is in again
  fallback, back   later endpoints are used because too few serve, or the first again
  ended       connections to an endpoint that was removed were ended
  healthy, unhealthy   what health checks have found
  missed      events came faster than they could be read; REASON says how many

The agent keeps the last 1,000. In a flood about 200 are told each second and the others are only
counted: `mesh-agent status` has all counts. Times are UTC.

Examples:
  mesh-agent events                              what has happened lately
  mesh-agent events --service orders -o wide     all that is known of it, nothing cut
  mesh-agent events --follow                     and go on with what happens, until Ctrl-C
  mesh-agent events --follow -o json | jq -c 'select(.kind == \"ejected\")'

With --follow the exit status is 3 when the agent stops.")]
pub(super) struct EventsArgs {
    /// Go on with what happens, until Ctrl-C or the end of the agent; with -o json one line each
    #[arg(short, long)]
    pub(super) follow: bool,
    /// Only those of this service
    #[arg(long, value_name = "NAME")]
    pub(super) service: Option<String>,
}

/// Arguments of `explain`.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  mesh-agent explain 10.96.0.10:80
  mesh-agent explain '[fd00:96::10]:80' --from 4711
  mesh-agent explain 10.96.0.10:80 --from /sys/fs/cgroup/web.slice

The exit status is 1 when the connect would not be touched.")]
pub(super) struct ExplainArgs {
    /// What is dialled: IP:PORT, an IPv6 address in brackets
    #[arg(value_name = "ADDRESS:PORT", value_parser = dialled)]
    pub(super) address: SocketAddr,
    /// Who dials: a process id, or a cgroup directory
    #[arg(long, value_name = "PID|CGROUP")]
    pub(super) from: Option<String>,
    /// With which protocol
    #[arg(long, value_enum, default_value_t)]
    pub(super) protocol: Protocol,
}

/// A transport protocol.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, ValueEnum)]
pub(super) enum Protocol {
    /// TCP
    #[default]
    Tcp,
    /// UDP
    Udp,
}

/// Arguments of `cleanup`.
#[derive(Args, Debug)]
pub(super) struct CleanupArgs {
    /// The agent file [default: /etc/mesh/agent.yaml, if it exists]
    #[arg(long, value_name = "FILE")]
    pub(super) config: Option<PathBuf>,
}

impl From<Protocol> for mesh_common::Protocol {
    fn from(protocol: Protocol) -> Self {
        match protocol {
            Protocol::Tcp => Self::Tcp,
            Protocol::Udp => Self::Udp,
        }
    }
}

/// Commands that are documented, and come with a later version.
const LATER: [&str; 4] = ["top", "register", "deregister", "heartbeat"];

/// The command of a later version that somebody typed, if that is the error.
pub(super) fn later(error: &clap::Error) -> Option<&str> {
    match error.get(ContextKind::InvalidSubcommand) {
        Some(ContextValue::String(command)) if error.kind() == ErrorKind::InvalidSubcommand => {
            LATER.contains(&command.as_str()).then_some(command)
        }
        _ => None,
    }
}

/// Reads what is dialled, and says what is wrong in words of the person who typed it.
fn dialled(text: &str) -> Result<SocketAddr, String> {
    const EXPECTED: &str = "expected IP:PORT, like 10.96.0.10:80 or [fd00:96::10]:80";
    match text.parse::<SocketAddr>() {
        Ok(address) if address.port() == 0 => Err("port 0: expected 1 to 65535".into()),
        // `::ffff:10.0.0.1` is what a program that dials 10.0.0.1 on an IPv6 socket writes.
        Ok(address) => Ok(SocketAddr::new(address.ip().to_canonical(), address.port())),
        Err(_) => Err(match text.trim_matches(['[', ']']).parse::<IpAddr>() {
            Ok(_) => format!("the port is missing: {EXPECTED}"),
            Err(_) if text.contains(|c: char| c.is_ascii_alphabetic()) && !text.contains("::") => {
                format!("names are not looked up: {EXPECTED}")
            }
            Err(_) => EXPECTED.into(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn addresses() {
        let ok = |text| dialled(text).map(|address| address.to_string());
        assert_eq!(ok("10.96.0.10:80").as_deref(), Ok("10.96.0.10:80"));
        assert_eq!(ok("[fd00:96::10]:80").as_deref(), Ok("[fd00:96::10]:80"));
        assert_eq!(ok("[::ffff:10.96.0.10]:80").as_deref(), Ok("10.96.0.10:80"));
        for (text, words) in [
            ("10.96.0.10", "port is missing"),
            ("fd00:96::10", "port is missing"),
            ("[fd00:96::10]", "port is missing"),
            ("10.96.0.10:0", "port 0"),
            ("10.96.0.10:65536", "expected IP:PORT"),
            ("orders:80", "names are not looked up"),
            ("", "expected IP:PORT"),
        ] {
            let error = dialled(text).expect_err(text);
            assert!(error.contains(words), "{text}: {error}");
        }
    }

    #[test]
    fn endpoints() {
        for (text, expected) in [
            ("10.0.0.1", Some("10.0.0.1 None")),
            ("10.0.0.1:80", Some("10.0.0.1 Some(80)")),
            ("fd00::1", Some("fd00::1 None")),
            ("[fd00::1]", Some("fd00::1 None")),
            ("[fd00::1]:80", Some("fd00::1 Some(80)")),
            ("::ffff:10.0.0.1", Some("10.0.0.1 None")),
            ("10.0.0.1:0", None),
            ("orders", None),
            ("", None),
        ] {
            let found = drained(text).map(|(address, port)| format!("{address} {port:?}"));
            assert_eq!(found.ok().as_deref(), expected, "{text}");
        }
    }

    /// Commands of later versions are refused by name, not accepted and ignored.
    #[test]
    fn only_what_exists_is_offered() {
        let refused = |args: &[&str]| {
            let args = ["mesh-agent"].iter().chain(args);
            Cli::try_parse_from(args).expect_err("no such command")
        };
        for command in LATER {
            assert_eq!(later(&refused(&[command])), Some(command));
        }
        let typed = refused(&["-o", "json", "register", "orders", "10.0.0.1", "--nothing"]);
        assert_eq!(later(&typed), Some("register"));
        for other in [&["statsu"] as &[_], &["services", "--drain"], &[]] {
            assert_eq!(later(&refused(other)), None, "{other:?}");
        }
    }

    #[test]
    fn global_options_go_anywhere() {
        let cli = Cli::try_parse_from(["mesh-agent", "services", "-o", "json", "--socket", "/x"])
            .expect("valid");
        assert_eq!((cli.output, cli.socket), (Format::Json, Some("/x".into())));
    }
}
