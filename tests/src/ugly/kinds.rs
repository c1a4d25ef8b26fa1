//! The kinds of connections that one process makes by itself.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use socket2::SockAddr;

use super::client::{Pending, Worker};
use super::dial::{Link, any_answer, is, must_fail, plain_answer};
use super::kind::Kind;
use super::plan::{MIXED, Target};

/// How long a pending connect may take: the kernel gives up after two seconds.
const PATIENCE: Duration = Duration::from_secs(10);

impl Worker<'_> {
    /// Makes one connection, or a few that belong together, and notes what came of them.
    ///
    /// # Errors
    ///
    /// Something goes otherwise than it must.
    pub fn attempt(&mut self, kind: Kind) -> Result<()> {
        match kind {
            Kind::Success => self.success(),
            Kind::FastOpen => self.fast_open(),
            Kind::ClientReset => self.client_reset(),
            Kind::ServerReset => self.server_reset(),
            Kind::LateReset => self.late_reset(),
            Kind::Unanswered => self.unanswered(),
            Kind::Refused => self.refused(),
            Kind::Timeout => self.pending(Target::Silent),
            Kind::Unreachable => self.pending(Target::Reject),
            Kind::Unconnected => self.unconnected(),
            Kind::ClosedConnecting => self.closed_connecting(),
            Kind::Again => self.again(),
            Kind::Elsewhere => self.elsewhere(),
            Kind::Dissolved => self.dissolved(),
            Kind::DissolvedConnecting => self.dissolved_connecting(),
            Kind::NoRoute => self.no_route(),
            Kind::AddressTaken => self.address_taken(),
            Kind::Busy => self.busy(),
            Kind::Mixed => self.mixed(),
            Kind::Changing => self.changing(),
            Kind::Held => self.held(),
            Kind::Forked => self.forked(),
            Kind::Passed => self.passed(),
            Kind::Abandoned => self.abandoned(),
            Kind::Killed => self.killed(false),
            Kind::NamespaceGone => self.killed(true),
        }
    }

    /// A socket that is connected to a service that answers.
    pub(super) fn connected(&mut self) -> Result<(Link, Target)> {
        let (link, target) = (self.link()?, any_answer(&mut self.random));
        link.reach(&mut self.tally, target, &mut self.random)?;
        Ok((link, target))
    }

    /// A socket of plain TCP that is connected to a service of plain TCP.
    pub(super) fn connected_plainly(&mut self) -> Result<(Link, Target)> {
        let (link, target) = (Link::draw_plain(&mut self.random)?, plain_answer(&mut self.random));
        link.reach(&mut self.tally, target, &mut self.random)?;
        Ok((link, target))
    }

    /// Connects a socket anew that has been through something, and demands an answer.
    fn recovered(&mut self, link: &Link) -> Result<()> {
        let target = plain_answer(&mut self.random);
        link.reach(&mut self.tally, target, &mut self.random).context("the second time")?;
        link.ask(&mut self.tally, target, b'a').context("the second time")
    }

    fn success(&mut self) -> Result<()> {
        let (link, target) = self.connected()?;
        let request = if self.random.bool() { b'a' } else { b'c' };
        link.ask(&mut self.tally, target, request)?;
        if request == b'c' {
            link.closed()?;
        } else if self.random.bool() {
            link.socket.shutdown(std::net::Shutdown::Write).context("shutdown")?;
            link.closed()?;
        }
        Ok(())
    }

    fn fast_open(&mut self) -> Result<()> {
        let (link, target) = (Link::draw_plain(&mut self.random)?, plain_answer(&mut self.random));
        link.account(&mut self.tally, target).opened += 1;
        let address = link.form(target.dialled(link.six));
        link.socket.send_to_with_flags(b"a", &address, libc::MSG_FASTOPEN).context("fast open")?;
        let who = link.answer().context("receive")?;
        anyhow::ensure!(who == target.backend(link.six), "{who} answered");
        self.tally.answered += 1;
        Ok(())
    }

    fn client_reset(&mut self) -> Result<()> {
        let (link, target) = self.connected()?;
        match self.random.u8(0..4) {
            // Nothing was asked.
            0 => {}
            // The answer is there or not: with it unread, a close without lingering resets too.
            1 => {
                link.request(b'a').context("send")?;
                if self.random.bool() {
                    return Ok(());
                }
            }
            _ => link.ask(&mut self.tally, target, b'a')?,
        }
        link.socket.set_linger(Some(Duration::ZERO)).context("SO_LINGER")
    }

    fn server_reset(&mut self) -> Result<()> {
        let link = self.link()?;
        if self.random.bool() {
            let connected = link.dial(&mut self.tally, Target::Reset);
            link.account(&mut self.tally, Target::Reset).reset += 1;
            let sent = connected
                .and_then(|()| if self.random.bool() { link.request(b'a') } else { Ok(()) });
            return link.reset(sent);
        }
        let target = plain_answer(&mut self.random);
        link.reach(&mut self.tally, target, &mut self.random)?;
        link.account(&mut self.tally, target).reset += 1;
        link.reset(link.request(b'x'))
    }

    fn late_reset(&mut self) -> Result<()> {
        let (link, target) = (self.link()?, plain_answer(&mut self.random));
        link.reach(&mut self.tally, target, &mut self.random)?;
        if self.random.bool() {
            link.ask(&mut self.tally, target, b'r')?;
            return link.reset(Ok(()));
        }
        link.ask(&mut self.tally, target, b'a')?;
        link.reset(link.request(b'x'))
    }

    fn unanswered(&mut self) -> Result<()> {
        let (link, _) = self.connected()?;
        link.request(b'e').context("send")?;
        link.closed()
    }

    fn refused(&mut self) -> Result<()> {
        let link = self.link()?;
        self.refuse(&link)
    }

    fn refuse(&mut self, link: &Link) -> Result<()> {
        let result = link.dial(&mut self.tally, Target::Closed);
        link.account(&mut self.tally, Target::Closed).refused += 1;
        must_fail(result, libc::ECONNREFUSED)
    }

    /// Leaves a connect to a backend that does not react to itself.
    fn pending(&mut self, target: Target) -> Result<()> {
        if !self.has_room() {
            return self.success();
        }
        let link = self.link()?;
        if !link.multipath && self.random.bool() {
            // Ends at the first time that the SYN would be sent again, after one second.
            link.socket.set_tcp_user_timeout(Some(Duration::from_millis(500)))?;
        }
        link.start(&mut self.tally, target)?;
        self.wait_for(Pending { link, target, until: Instant::now() + PATIENCE });
        Ok(())
    }

    /// Notes how a connect ended that nobody waited for, and goes on with its socket.
    ///
    /// # Errors
    ///
    /// It ended otherwise than it must.
    pub(super) fn ended(&mut self, pending: &Pending) -> Result<()> {
        let Pending { link, target, .. } = pending;
        let error = link.socket.take_error()?.context("the connect succeeded")?;
        let account = link.account(&mut self.tally, *target);
        match error.raw_os_error() {
            Some(libc::ETIMEDOUT) => account.timeout += 1,
            Some(libc::EHOSTUNREACH) => account.unreachable += 1,
            _ => bail!("{}: {error}", target.name()),
        }
        let wanted = if *target == Target::Silent { libc::ETIMEDOUT } else { libc::EHOSTUNREACH };
        anyhow::ensure!(is(&error, wanted), "{}: {error}", target.name());
        if link.multipath || self.random.bool() {
            return Ok(());
        }
        link.socket.set_nonblocking(false)?;
        link.socket.set_tcp_user_timeout(None)?;
        // The socket does not know yet that its connect is over: the next one only learns that.
        let target = plain_answer(&mut self.random);
        let learnt = link.direct(target.dialled(link.six));
        must_fail(learnt, libc::ECONNABORTED).context("after the error was read")?;
        self.recovered(link)
    }

    fn unconnected(&mut self) -> Result<()> {
        let link = Link::draw_plain(&mut self.random)?;
        match self.random.u8(0..4) {
            0 => link.dissolve(),
            1 => {
                link.socket.bind(&any_port(&link)).context("bind")?;
                link.socket.listen(1).context("listen")
            }
            _ => Ok(()),
        }
    }

    fn closed_connecting(&mut self) -> Result<()> {
        let link = self.link()?;
        if self.random.u8(0..3) == 0 {
            // Connected or not, whoever is faster.
            link.socket.set_nonblocking(true)?;
            let _ = link.dial(&mut self.tally, any_answer(&mut self.random));
            return Ok(());
        }
        self.hang(&link)?;
        match self.random.u8(0..4) {
            0 => link.socket.set_linger(Some(Duration::ZERO)).context("SO_LINGER"),
            1 => {
                sleep(Duration::from_micros(self.random.u64(0..2_000)));
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// Starts a connect that will not end by itself as long as it matters.
    pub(super) fn hang(&mut self, link: &Link) -> Result<()> {
        link.connect_for_long();
        if self.random.u8(0..16) == 0 {
            // A connect that waits, and is interrupted by its time limit.
            link.socket.set_write_timeout(Some(Duration::from_millis(4)))?;
            let result = link.dial(&mut self.tally, Target::Hang);
            link.socket.set_write_timeout(Some(Duration::from_secs(10)))?;
            return must_fail(result, libc::EINPROGRESS);
        }
        link.start(&mut self.tally, Target::Hang)
    }

    fn again(&mut self) -> Result<()> {
        let link = Link::draw_plain(&mut self.random)?;
        self.refuse(&link)?;
        match self.random.u8(0..4) {
            0 => self.refuse(&link)?,
            1 => must_fail(link.dial(&mut self.tally, Target::NoRoute), libc::ENETUNREACH)?,
            2 => link.dissolve()?,
            _ => {}
        }
        self.recovered(&link)
    }

    fn elsewhere(&mut self) -> Result<()> {
        let (link, target) = self.connected_plainly()?;
        if self.random.bool() {
            link.ask(&mut self.tally, target, b'a')?;
        }
        link.dissolve()?;
        let target = plain_answer(&mut self.random);
        link.direct(target.backend(link.six)).context("connect elsewhere")?;
        link.request(b'a').context("send elsewhere")?;
        let who = link.answer().context("receive elsewhere")?;
        anyhow::ensure!(who == target.backend(link.six), "elsewhere {who} answered");
        Ok(())
    }

    fn dissolved(&mut self) -> Result<()> {
        let (link, target) = self.connected_plainly()?;
        if self.random.bool() {
            link.ask(&mut self.tally, target, b'a')?;
        }
        link.dissolve()?;
        match self.random.u8(0..4) {
            0 => self.refuse(&link),
            1 => self.recovered(&link),
            2 => link.dissolve(),
            _ => Ok(()),
        }
    }

    fn dissolved_connecting(&mut self) -> Result<()> {
        let link = Link::draw_plain(&mut self.random)?;
        self.hang(&link)?;
        link.dissolve()?;
        link.socket.set_nonblocking(false)?;
        if self.random.bool() { self.recovered(&link) } else { Ok(()) }
    }

    fn no_route(&mut self) -> Result<()> {
        let link = Link::draw_plain(&mut self.random)?;
        must_fail(link.dial(&mut self.tally, Target::NoRoute), libc::ENETUNREACH)?;
        match self.random.u8(0..4) {
            0 => must_fail(link.dial(&mut self.tally, Target::NoRoute), libc::ENETUNREACH),
            1 => self.recovered(&link),
            2 => link.dissolve(),
            _ => Ok(()),
        }
    }

    /// Two sockets with the same address and port, which cannot both go to the same place.
    fn address_taken(&mut self) -> Result<()> {
        let first = Link::draw_plain(&mut self.random)?;
        let target = plain_answer(&mut self.random);
        let second = loop {
            let link = Link::draw_plain(&mut self.random)?;
            if (link.six, link.mapped) == (first.six, first.mapped) {
                break link;
            }
        };
        first.socket.set_reuse_address(true)?;
        second.socket.set_reuse_address(true)?;
        first.socket.bind(&any_port(&first)).context("bind")?;
        second.socket.bind(&first.socket.local_addr()?).context("bind to the same")?;
        first.dial(&mut self.tally, target).context("connect the first of two")?;
        must_fail(second.dial(&mut self.tally, target), libc::EADDRNOTAVAIL)?;
        first.ask(&mut self.tally, target, b'a')
    }

    fn busy(&mut self) -> Result<()> {
        if self.random.bool() {
            let link = Link::draw_plain(&mut self.random)?;
            link.start(&mut self.tally, Target::Hang)?;
            return must_fail(link.direct(Target::Hang.dialled(link.six)), libc::EALREADY);
        }
        let (link, target) = (Link::draw_plain(&mut self.random)?, plain_answer(&mut self.random));
        link.dial(&mut self.tally, target).context("connect")?;
        must_fail(link.direct(target.dialled(link.six)), libc::EISCONN)?;
        link.ask(&mut self.tally, target, b'a')
    }

    fn mixed(&mut self) -> Result<()> {
        let link = self.link()?;
        self.mixed_by(&link).map(drop)
    }

    /// Connects to the mixed service, and finds out to whom; gives the name of the account when
    /// that one answers.
    pub(super) fn mixed_by(&mut self, link: &Link) -> Result<Option<String>> {
        let six = link.six;
        let connected = link.socket.connect(&link.form(Target::Mixed.dialled(six)));
        let answer = connected.and_then(|()| {
            link.request(b'a')?;
            link.answer()
        });
        let backend = match &answer {
            Ok(who) => *who,
            Err(error) => match error.raw_os_error() {
                Some(libc::ECONNREFUSED) => Target::Closed.backend(six),
                Some(libc::ECONNRESET | libc::EPIPE) => Target::Reset.backend(six),
                Some(libc::ENETUNREACH) => Target::NoRoute.backend(six),
                _ => bail!("mixed: {error}"),
            },
        };
        if !MIXED.iter().any(|target| target.backend(six) == backend) {
            bail!("mixed: {backend} answered");
        }
        let name = Target::Mixed.account(backend);
        let account = self.tally.account(name.clone());
        account.opened += 1;
        account.refused += u64::from(backend == Target::Closed.backend(six));
        account.reset += u64::from(backend == Target::Reset.backend(six));
        self.tally.answered += u64::from(answer.is_ok());
        Ok(answer.is_ok().then_some(name))
    }

    fn changing(&mut self) -> Result<()> {
        let link = self.link()?;
        self.changing_by(&link).map(drop)
    }

    /// Connects to the service whose endpoints change; gives who answered.
    pub(super) fn changing_by(&mut self, link: &Link) -> Result<SocketAddr> {
        // Its backend may be gone with its account when the answer is there.
        self.tally.account(Target::Changing.name()).opened += 1;
        let dialled = link.form(Target::Changing.dialled(link.six));
        link.socket.connect(&dialled).context("connect")?;
        link.request(b'a').context("send")?;
        let who = link.answer().context("receive")?;
        self.tally.answered += 1;
        Ok(who)
    }

    fn held(&mut self) -> Result<()> {
        if !self.may_hold() {
            return self.success();
        }
        let link = self.link()?;
        let name = match self.random.u8(0..8) {
            0 => {
                self.changing_by(&link)?;
                Some(Target::Changing.name())
            }
            1 | 2 => self.mixed_by(&link)?,
            _ => {
                let target = any_answer(&mut self.random);
                link.reach(&mut self.tally, target, &mut self.random)?;
                if self.random.bool() {
                    link.ask(&mut self.tally, target, b'a')?;
                }
                Some(target.account(target.backend(link.six)))
            }
        };
        if let Some(name) = name {
            self.hold(name, link);
        }
        Ok(())
    }
}

/// Any port of the node itself.
fn any_port(link: &Link) -> SockAddr {
    if link.six {
        SocketAddr::from((Ipv6Addr::LOCALHOST, 0)).into()
    } else {
        link.form((Ipv4Addr::LOCALHOST, 0).into())
    }
}
