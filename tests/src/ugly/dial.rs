//! Sockets of all families, the steps of a connection, and what is noted of each.

use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use super::plan::{ANSWERS, Target};
use super::tally::{Counts, Tally};
use crate::sys;

/// No step of a connection takes longer.
const LIMIT: Duration = Duration::from_secs(10);

/// A socket, and how addresses are written for it.
#[derive(Debug)]
pub struct Link {
    /// The socket.
    pub socket: Socket,
    /// Whether services and backends have IPv6 addresses for it.
    pub six: bool,
    /// Whether its addresses are IPv4-mapped IPv6 addresses.
    pub mapped: bool,
    /// Whether it is of `IPPROTO_MPTCP`.
    pub multipath: bool,
}

// === impl Link ===

impl Link {
    /// A socket of a family drawn at random, and with `multipath` of MPTCP one time in ten.
    ///
    /// # Errors
    ///
    /// Those of socket(2).
    pub fn draw(random: &mut fastrand::Rng, multipath: bool) -> Result<Self> {
        let multipath = multipath && random.u8(0..10) == 0;
        Self::open(random, multipath)
    }

    /// A socket of plain TCP, of a family drawn at random.
    ///
    /// # Errors
    ///
    /// Those of socket(2).
    pub fn draw_plain(random: &mut fastrand::Rng) -> Result<Self> {
        Self::open(random, false)
    }

    fn open(random: &mut fastrand::Rng, multipath: bool) -> Result<Self> {
        let (domain, six, mapped) = match random.u8(0..3) {
            0 => (Domain::IPV4, false, false),
            1 => (Domain::IPV6, true, false),
            _ => (Domain::IPV6, false, true),
        };
        let protocol = if multipath { Protocol::MPTCP } else { Protocol::TCP };
        let socket = Socket::new(domain, Type::STREAM, Some(protocol)).context("socket")?;
        socket.set_write_timeout(Some(LIMIT)).context("SO_SNDTIMEO")?;
        socket.set_read_timeout(Some(LIMIT)).context("SO_RCVTIMEO")?;
        Ok(Self { socket, six, mapped, multipath })
    }

    /// An address as this socket takes it.
    #[must_use]
    pub fn form(&self, address: SocketAddr) -> SockAddr {
        match address.ip() {
            IpAddr::V4(ip) if self.mapped => {
                SocketAddr::new(ip.to_ipv6_mapped().into(), address.port()).into()
            }
            _ => address.into(),
        }
    }

    /// connect(2) to a service that has one backend, which is noted as given to that backend.
    ///
    /// # Errors
    ///
    /// Those of connect(2).
    pub fn dial(&self, tally: &mut Tally, target: Target) -> io::Result<()> {
        self.account(tally, target).opened += 1;
        self.socket.connect(&self.form(target.dialled(self.six)))
    }

    /// The account of the only backend of a service, for this socket's family.
    pub fn account<'t>(&self, tally: &'t mut Tally, target: Target) -> &'t mut Counts {
        tally.account(target.account(target.backend(self.six)))
    }

    /// Makes a connect that nobody answers go on for more than a minute, and not only as long as the
    /// node's `tcp_syn_retries` lets it.
    pub fn connect_for_long(&self) {
        // MPTCP does not take the option; its sockets have three seconds.
        let _ = sys::socket::set_syn_count(&self.socket, 6);
    }

    /// As [`Link::dial`], without waiting: the connect must be under way.
    ///
    /// # Errors
    ///
    /// It has ended already, or could not be started.
    pub fn start(&self, tally: &mut Tally, target: Target) -> Result<()> {
        self.socket.set_nonblocking(true)?;
        match self.dial(tally, target) {
            Err(error) if is(&error, libc::EINPROGRESS) => Ok(()),
            Err(error) => Err(error).context("connect without waiting"),
            Ok(()) => bail!("connect without waiting: connected at once"),
        }
    }

    /// As [`Link::dial`], in one of the ways to connect; it must succeed.
    ///
    /// # Errors
    ///
    /// It does not.
    pub fn reach(
        &self,
        tally: &mut Tally,
        target: Target,
        random: &mut fastrand::Rng,
    ) -> Result<()> {
        if random.u8(0..4) > 0 {
            return self.dial(tally, target).context("connect");
        }
        match self.start(tally, target) {
            Err(error) if error.to_string().ends_with("connected at once") => {}
            other => other?,
        }
        sys::socket::wait_writable(&self.socket, LIMIT).context("poll")?;
        if let Some(error) = self.socket.take_error()? {
            return Err(error).context("connect, polled");
        }
        self.socket.set_nonblocking(false)?;
        Ok(())
    }

    /// Connects where no service is.
    ///
    /// # Errors
    ///
    /// Those of connect(2).
    pub fn direct(&self, backend: SocketAddr) -> io::Result<()> {
        self.socket.connect(&self.form(backend))
    }

    /// connect(2) to `AF_UNSPEC`.
    ///
    /// # Errors
    ///
    /// Those of connect(2).
    pub fn dissolve(&self) -> Result<()> {
        sys::socket::disconnect(&self.socket).context("disconnect")
    }

    /// Sends a request, see [`super::server`].
    ///
    /// # Errors
    ///
    /// Those of send(2).
    pub fn request(&self, request: u8) -> io::Result<()> {
        (&self.socket).write_all(&[request])
    }

    /// Receives who answers.
    ///
    /// # Errors
    ///
    /// Those of recv(2), and `UnexpectedEof`.
    pub fn answer(&self) -> io::Result<SocketAddr> {
        let (mut buffer, mut filled) = ([0; 64], 0);
        while !buffer[..filled].ends_with(b"\n") {
            match (&self.socket).read(&mut buffer[filled..])? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                count => filled += count,
            }
        }
        let text = std::str::from_utf8(&buffer[..filled]).map_err(io::Error::other)?;
        text.trim_end().parse().map_err(io::Error::other)
    }

    /// Requests, and demands an answer from the backend of a service.
    ///
    /// # Errors
    ///
    /// There is none, or it comes from another one.
    pub fn ask(&self, tally: &mut Tally, target: Target, request: u8) -> Result<()> {
        self.request(request).context("send")?;
        let who = self.answer().context("receive")?;
        let backend = target.backend(self.six);
        ensure!(who == backend, "{who} answered in place of {backend}");
        tally.answered += 1;
        Ok(())
    }

    /// Demands that the server closes.
    ///
    /// # Errors
    ///
    /// It does not, or it resets.
    pub fn closed(&self) -> Result<()> {
        let count = (&self.socket).read(&mut [0; 64]).context("receive the end")?;
        ensure!(count == 0, "received more than an answer");
        Ok(())
    }

    /// Demands that the server has reset the connection, which may be seen as early as in
    /// connect(2): `first` is what came of the step before.
    ///
    /// # Errors
    ///
    /// It has not.
    pub fn reset(&self, first: io::Result<()>) -> Result<()> {
        match first.and_then(|()| (&self.socket).read(&mut [0; 64])) {
            Err(error) if is(&error, libc::ECONNRESET) || is(&error, libc::EPIPE) => Ok(()),
            Err(error) => Err(error).context("in place of a reset"),
            Ok(0) => bail!("closed in place of a reset"),
            Ok(_) => bail!("answered in place of a reset"),
        }
    }
}

// === functions ===

/// A service that answers.
pub fn any_answer(random: &mut fastrand::Rng) -> Target {
    Target::Answer(random.u8(0..ANSWERS))
}

/// A service that answers and does not speak MPTCP: MPTCP hides a reset from the application, which
/// a fallback to TCP does not.
pub fn plain_answer(random: &mut fastrand::Rng) -> Target {
    Target::Answer(random.u8(0..ANSWERS - 1))
}

/// Whether an error is this one.
#[must_use]
pub fn is(error: &io::Error, number: i32) -> bool {
    error.raw_os_error() == Some(number)
}

/// Demands that something fails with this error.
///
/// # Errors
///
/// It does not.
pub fn must_fail(result: io::Result<()>, number: i32) -> Result<()> {
    match result {
        Err(error) if is(&error, number) => Ok(()),
        Err(error) => Err(error)
            .with_context(|| format!("in place of {}", io::Error::from_raw_os_error(number))),
        Ok(()) => bail!("success in place of {}", io::Error::from_raw_os_error(number)),
    }
}
