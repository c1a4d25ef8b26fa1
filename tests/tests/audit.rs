//! Which sockets the kernel lists, namespace by namespace, and what the audit makes of it. The
//! sockets are this test's own, in namespaces of its own.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::{self, Read as _};
use std::net::{Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr};
use std::os::fd::OwnedFd;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use mesh_agent::audit::sockets::End;
use mesh_agent::audit::{Audit, Place, Record, Report, namespaces, sockets};
use mesh_common::{FrontendKey, Given, Origin};
use mesh_tests::sys::netns;
use rustix::process::{Resource, getrlimit, setrlimit};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

const V4: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);
const V6: SocketAddr = SocketAddr::new(std::net::IpAddr::V6(Ipv6Addr::LOCALHOST), 0);

// Numbers of include/net/tcp_states.h.
const ESTABLISHED: u8 = 1;
const SYN_SENT: u8 = 2;
const FIN_WAIT1: u8 = 4;
const FIN_WAIT2: u8 = 5;
const CLOSE_WAIT: u8 = 8;
const LISTEN: u8 = 10;

/// How long the kernel may take to get a socket from one state to another.
const PATIENCE: Duration = Duration::from_secs(5);

/// A network namespace in which only the loopback interface is there, and up.
fn namespace() -> Result<OwnedFd> {
    let netns = netns::create().context("making a namespace: is this root?")?;
    let up =
        netns::inside(&netns, || Command::new("ip").args(["link", "set", "lo", "up"]).status())?;
    ensure!(up?.success(), "ip failed");
    Ok(netns)
}

/// A process in the namespace, so that it can be found. Ends with this process, however that ends.
struct Inhabitant(Child);

impl Inhabitant {
    fn of(netns: &OwnedFd) -> Result<Self> {
        // Reads until the pipe is closed.
        let mut cat = Command::new("cat");
        cat.stdin(Stdio::piped());
        Ok(Self(netns::inside(netns, || cat.spawn())??))
    }
}

impl Drop for Inhabitant {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        self.0.wait().ok();
    }
}

/// The sockets of a namespace, with their states.
fn list(netns: &OwnedFd) -> Result<HashMap<u64, u8>> {
    let mut all = HashMap::new();
    let dump = || {
        sockets::dump(6, |socket| {
            all.insert(socket.cookie, socket.state);
        })
    };
    let end = netns::inside(netns, dump)??;
    ensure!(end == End::Complete, "{end:?}");
    Ok(all)
}

/// A record of a TCP socket.
fn record_in(place: Place, cookie: u64, netns: u64) -> Record {
    let frontend = FrontendKey { protocol: 6, ..FrontendKey::default() };
    let given = Given { frontend, origin: Origin::new(netns, 0), ..Given::default() };
    Record { place, cookie, word: 1, given }
}

/// Waits until the kernel lists the socket in this state, or not at all.
fn expect(netns: &OwnedFd, cookie: u64, state: Option<u8>) -> Result<()> {
    let end = Instant::now() + PATIENCE;
    loop {
        let listed = list(netns)?.get(&cookie).copied();
        if listed == state {
            return Ok(());
        }
        ensure!(Instant::now() < end, "state {listed:?}, not {state:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn cookie_of(netns: &OwnedFd) -> Result<u64> {
    Ok(netns::inside(netns, namespaces::current)??)
}

fn tcp(address: SocketAddr) -> io::Result<Socket> {
    Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))
}

fn listen(address: SocketAddr, backlog: i32) -> io::Result<(Socket, SockAddr)> {
    let listener = tcp(address)?;
    listener.bind(&address.into())?;
    listener.listen(backlog)?;
    let address = listener.local_addr()?;
    Ok((listener, address))
}

/// A connection: who connected, and who accepted.
fn connection(listener: &Socket, address: &SockAddr) -> io::Result<(Socket, Socket)> {
    let client = Socket::new(address.domain(), Type::STREAM, None)?;
    client.connect(address)?;
    Ok((client, listener.accept()?.0))
}

#[test]
fn open_sockets_are_listed_with_their_cookies() -> Result<()> {
    let netns = namespace()?;
    ensure!(list(&netns)?.is_empty(), "a new namespace has no sockets");
    for address in [V4, V6] {
        let (listener, local) = netns::inside(&netns, || listen(address, 8))??;
        let (client, server) = netns::inside(&netns, || connection(&listener, &local))??;
        let expected = HashMap::from([
            (listener.cookie()?, LISTEN),
            (client.cookie()?, ESTABLISHED),
            (server.cookie()?, ESTABLISHED),
        ]);
        ensure!(list(&netns)? == expected, "{:?}, not {expected:?}", list(&netns)?);

        client.shutdown(Shutdown::Write)?;
        expect(&netns, client.cookie()?, Some(FIN_WAIT2))?;
        expect(&netns, server.cookie()?, Some(CLOSE_WAIT))?;
        let cookies = [client.cookie()?, server.cookie()?, listener.cookie()?];
        drop((server, client, listener));
        for cookie in cookies {
            // What the kernel keeps of them for a minute are no sockets.
            expect(&netns, cookie, None)?;
        }
        ensure!(list(&netns)?.is_empty());
    }
    Ok(())
}

#[test]
fn a_connecting_socket_is_listed() -> Result<()> {
    let netns = namespace()?;
    let (listener, local) = netns::inside(&netns, || listen(V4, 0))??;
    let queued = netns::inside(&netns, || tcp(V4))??;
    queued.connect(&local)?;
    // The queue is full, so this one is not answered.
    let waiting = netns::inside(&netns, || tcp(V4))??;
    waiting.set_nonblocking(true)?;
    ensure!(waiting.connect(&local).is_err());
    expect(&netns, waiting.cookie()?, Some(SYN_SENT))?;
    let cookie = waiting.cookie()?;
    drop(waiting);
    expect(&netns, cookie, None)?;
    drop(listener);
    Ok(())
}

/// An application may hold these, and the kernel does not list them: none has a connection. What
/// the audit says of records is to be read with this in mind.
#[test]
fn sockets_without_a_connection_are_not_listed() -> Result<()> {
    let netns = namespace()?;
    let new = netns::inside(&netns, || tcp(V4))??;
    expect(&netns, new.cookie()?, None)?;

    let nowhere: SocketAddr = "192.0.2.1:80".parse()?;
    let error = new.connect(&nowhere.into()).expect_err("there is no route");
    ensure!(error.raw_os_error() == Some(libc::ENETUNREACH), "{error}");
    expect(&netns, new.cookie()?, None)?;

    let (listener, local) = netns::inside(&netns, || listen(V4, 8))??;
    let (mut client, server) = netns::inside(&netns, || connection(&listener, &local))??;
    let refused = netns::inside(&netns, || tcp(V4))??;
    let nobody: SocketAddr = "127.0.0.1:1".parse()?;
    let error = refused.connect(&nobody.into()).expect_err("nobody listens");
    ensure!(error.raw_os_error() == Some(libc::ECONNREFUSED), "{error}");
    expect(&netns, refused.cookie()?, None)?;

    client.shutdown(Shutdown::Write)?;
    drop(server);
    ensure!(client.read(&mut [0])? == 0, "the end");
    expect(&netns, client.cookie()?, None)
}

#[test]
fn a_closed_socket_is_listed_while_tcp_works_for_it() -> Result<()> {
    let netns = namespace()?;
    let (listener, local) = netns::inside(&netns, || listen(V4, 8))??;
    let (client, server) = netns::inside(&netns, || connection(&listener, &local))??;
    // The peer does not read, so there is no end of what is to be sent.
    client.set_nonblocking(true)?;
    while client.send(&[0; 65536]).is_ok() {}
    let cookie = client.cookie()?;
    drop(client);
    expect(&netns, cookie, Some(FIN_WAIT1))?;
    drop(server);
    expect(&netns, cookie, None)?;

    // Only the peer's end is missing: what the kernel keeps for that is no socket, though it has
    // the socket's cookie and its state.
    let (client, _server) = netns::inside(&netns, || connection(&listener, &local))??;
    let cookie = client.cookie()?;
    drop(client);
    expect(&netns, cookie, None)
}

#[test]
fn subflows_of_mptcp_are_listed() -> Result<()> {
    let netns = namespace()?;
    let mptcp = || Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::MPTCP));
    let (listener, client) = netns::inside(&netns, || Ok::<_, io::Error>((mptcp()?, mptcp()?)))??;
    listener.bind(&V4.into())?;
    listener.listen(8)?;
    client.connect(&listener.local_addr()?)?;
    let (server, _) = listener.accept()?;
    let listed = list(&netns)?;
    let mut states: Vec<_> = listed.values().copied().collect();
    states.sort_unstable();
    ensure!(states == [ESTABLISHED, ESTABLISHED, LISTEN], "{states:?}");
    for parent in [listener, client, server] {
        ensure!(!listed.contains_key(&parent.cookie()?), "the cookies are the subflows'");
    }
    Ok(())
}

#[test]
fn ten_thousand_sockets_are_all_listed() -> Result<()> {
    const CONNECTIONS: usize = 5_000;
    let mut limit = getrlimit(Resource::Nofile);
    let needed = 2 * CONNECTIONS as u64 + 1_000;
    ensure!(limit.maximum.is_none_or(|most| most >= needed), "ulimit -Hn is below {needed}");
    limit.current = limit.current.map(|now| now.max(needed));
    setrlimit(Resource::Nofile, limit)?;

    let netns = namespace()?;
    let (listener, local) = netns::inside(&netns, || listen(V4, 8))??;
    let (six, local_six) = netns::inside(&netns, || listen(V6, 8))??;
    let connect = || {
        let four = (0..CONNECTIONS / 2).map(|_| connection(&listener, &local));
        let six = (0..CONNECTIONS / 2).map(|_| connection(&six, &local_six));
        four.chain(six).collect::<io::Result<Vec<_>>>()
    };
    let connections = netns::inside(&netns, connect)??;
    let ends = connections.iter().flat_map(|(client, server)| [client, server]);
    let expected = ends.map(Socket::cookie).collect::<io::Result<HashSet<_>>>()?;
    ensure!(expected.len() == 2 * CONNECTIONS);
    let mut listed = list(&netns)?;
    listed.retain(|_, state| *state != LISTEN);
    ensure!(listed.keys().copied().collect::<HashSet<_>>() == expected);
    Ok(())
}

#[test]
fn namespaces_are_found_while_somebody_lives_there() -> Result<()> {
    let netns = namespace()?;
    let cookie = cookie_of(&netns)?;
    let own = namespaces::current()?;
    ensure!(own != cookie);
    let wanted = HashSet::from([cookie, own, u64::MAX]);
    // On a thread of its own, because it wanders.
    let found = || -> Result<HashSet<u64>> {
        let find = || namespaces::find(&wanted);
        let found = std::thread::scope(|scope| scope.spawn(find).join().expect("no panic"))?;
        Ok(found.into_keys().collect())
    };
    ensure!(found()? == HashSet::from([own]), "nobody can find a descriptor");
    let inhabitant = Inhabitant::of(&netns)?;
    ensure!(found()? == HashSet::from([own, cookie]));
    drop(inhabitant);
    ensure!(found()? == HashSet::from([own]), "no processes any more");
    ensure!(namespaces::current()? == own, "this thread stays where it is");
    Ok(())
}

#[test]
fn processes_that_come_and_go_do_not_matter() -> Result<()> {
    let netns = namespace()?;
    let wanted = HashSet::from([cookie_of(&netns)?]);
    let _inhabitant = Inhabitant::of(&netns)?;
    std::thread::scope(|scope| {
        let churn =
            scope.spawn(|| (0..200).try_for_each(|_| Command::new("true").status().map(drop)));
        let find = scope.spawn(|| -> Result<()> {
            for _ in 0..100 {
                ensure!(namespaces::find(&wanted)?.len() == 1);
            }
            Ok(())
        });
        churn.join().expect("no panic")?;
        find.join().expect("no panic")
    })
}

/// A pass over these records, all of which are still the same.
fn pass(audit: &mut Audit, records: &[Record]) -> Result<(Report, Vec<Record>)> {
    let runtime = tokio::runtime::Builder::new_current_thread().build()?;
    Ok(runtime.block_on(audit.pass(records.to_vec(), |_| true))?)
}

#[test]
fn records_of_sockets_that_ended_are_found() -> Result<()> {
    let (netns, hidden) = (namespace()?, namespace()?);
    let inhabitant = Inhabitant::of(&netns)?;
    let (listener, local) = netns::inside(&netns, || listen(V4, 8))??;
    let (client, _server) = netns::inside(&netns, || connection(&listener, &local))??;
    let (ended, _other) = netns::inside(&netns, || connection(&listener, &local))??;
    let record = |cookie, netns: &OwnedFd| -> Result<Record> {
        Ok(record_in(Place::Elsewhere(0), cookie, cookie_of(netns)?))
    };
    let gone = record(ended.cookie()?, &netns)?;
    let records = [record(client.cookie()?, &netns)?, gone, record(client.cookie()?, &hidden)?];

    let mut audit = Audit::default();
    let expected = Report { records: 3, seen: 2, in_unknown_namespaces: 1, ..Report::default() };
    ensure!(pass(&mut audit, &records)? == (expected, vec![]));
    // A connection that is reset leaves nothing behind.
    ended.set_linger(Some(Duration::ZERO))?;
    drop(ended);
    // A child that another test is just starting can hold the descriptor for a moment.
    expect(&netns, gone.cookie, None)?;
    let expected =
        Report { records: 3, seen: 1, unseen: 1, in_unknown_namespaces: 1, ..Report::default() };
    ensure!(pass(&mut audit, &records)? == (expected.clone(), vec![]));
    ensure!(pass(&mut audit, &records)? == (expected, vec![gone]));

    // Nobody is left there: the records are left alone, though sockets are still held.
    drop(inhabitant);
    let expected = Report { records: 3, in_unknown_namespaces: 3, ..Report::default() };
    ensure!(pass(&mut audit, &records)? == (expected, vec![]));
    Ok(())
}

#[test]
fn a_pass_goes_slowly_and_leaves_its_caller_where_it_is() -> Result<()> {
    const NAMESPACES: u8 = 5;
    let own = namespaces::current()?;
    let all = (0..NAMESPACES).map(|_| namespace()).collect::<Result<Vec<_>>>()?;
    let _inhabitants = all.iter().map(Inhabitant::of).collect::<Result<Vec<_>>>()?;
    let cookies = all.iter().map(cookie_of).collect::<Result<Vec<_>>>()?;
    let record = |netns: &u64| record_in(Place::Array(0), 1, *netns);
    let records: Vec<_> = cookies.iter().map(record).collect();
    let begin = Instant::now();
    let (report, _) = pass(&mut Audit::default(), &records)?;
    let took = begin.elapsed();
    let unseen = usize::from(NAMESPACES);
    ensure!(report == Report { records: unseen, unseen, ..Report::default() });
    ensure!(took >= Duration::from_millis(10) * u32::from(NAMESPACES), "{took:?}");
    ensure!(namespaces::current()? == own);
    let netns = File::open("/proc/thread-self/ns/net")?;
    ensure!(cookie_of(&netns.into())? == own);
    Ok(())
}
