//! What is measured, and in which order.
//!
//! Some of the programs run for every TCP socket of the machine. So a direct connect is only direct
//! while no agent runs, and agents are started and stopped all along: before and after each block
//! with an agent, or of anything else than direct connects, there is a direct one, and nothing is
//! compared but neighbours.

use crate::peers;
use crate::timeline;

/// What is timed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// connect(2) of a TCP socket.
    Connect,
    /// The same until a backend has the connection: a proxy only then begins.
    Reach,
    /// connect(2) of a UDP socket.
    DatagramConnect,
    /// The first sendto(2) of a UDP socket that is not connected.
    DatagramFirst,
    /// Each further one.
    DatagramNext,
}

/// What is dialled, and beside whom.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Variant {
    /// A backend; no agent runs on the machine.
    Direct,
    /// A backend, from another cgroup than the agent's: what the agent costs everybody else.
    Beside,
    /// The only service, whose backends are chosen at random.
    One,
    /// The same, whose backends are chosen otherwise.
    By(Choice),
    /// One of many services, always the same.
    Many(Size),
    /// Any of many services.
    Random(Size),
    /// A backend, where rules of nftables are loaded.
    Untranslated,
    /// Any of the services of another way.
    Peer(Peer),
}

/// How many services are many.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Size {
    /// 10,000.
    Ten,
    /// 60,000.
    Sixty,
}

/// Another way to a backend.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Peer {
    /// Address translation, with one service.
    NftablesOne,
    /// Address translation, with many.
    Nftables(Size),
    /// A proxy.
    Haproxy,
    /// A proxy.
    Envoy,
}

/// How else a backend is chosen.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Choice {
    /// In turn.
    RoundRobin,
    /// The lighter of two.
    LeastConnections,
    /// The nearer of two.
    Latency,
    /// Always the same for one client.
    ConsistentHash,
    /// At random, and then the one that the client has.
    Affinity,
}

/// The state of the agent's table of records.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Table {
    /// Empty, but for the connection that is measured.
    Fresh,
    /// As many connections are open as it has places.
    Full,
}

/// The agent that runs during a block.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Services {
    /// It has one service.
    One,
    /// It has the same, chosen from otherwise.
    By(Choice),
    /// It has many.
    Many(Size),
}

/// What one figure is about.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Subject {
    /// What is timed.
    pub kind: Kind,
    /// What is dialled.
    pub variant: Variant,
    /// With direct connects: whether the connections that fill the table are open.
    pub table: Table,
    /// How many threads connect at the same time.
    pub threads: usize,
}

/// What is timed, with how many threads.
type Kinds = &'static [(Kind, usize)];

/// A time in which nothing changes but what is dialled.
#[derive(Clone, Copy, Debug)]
pub struct Block {
    /// The agent that runs.
    pub services: Option<Services>,
    /// Whether the connections that fill the table are open.
    pub table: Table,
    /// What is measured, in rounds of shuffled order.
    pub variants: &'static [(Variant, Kinds)],
}

/// Rounds in a block. Short, so that neighbours are near in time.
pub const ROUNDS: u32 = 4;

/// Filling the table takes seconds, so it is done in one of so many cycles.
const FILL_EVERY: u32 = 2;

/// A connect, alone and beside another thread's.
const CONNECT: Kinds = &[(Kind::Connect, 1), (Kind::Connect, 2)];
/// A connect alone: what it is compared with may use the other processor.
const CONNECT_ALONE: Kinds = &[(Kind::Connect, 1)];
const THROUGH_PROXY: Kinds = &[(Kind::Connect, 1), (Kind::Reach, 1)];
/// Address translation has nothing to do with the connect of a UDP socket.
const TRANSLATED: Kinds =
    &[(Kind::Connect, 1), (Kind::Reach, 1), (Kind::DatagramFirst, 1), (Kind::DatagramNext, 1)];
const ALL: Kinds = &[
    (Kind::Connect, 1),
    (Kind::Connect, 2),
    (Kind::Reach, 1),
    (Kind::DatagramConnect, 1),
    (Kind::DatagramFirst, 1),
    (Kind::DatagramNext, 1),
];

const DIRECT: Block =
    Block { services: None, table: Table::Fresh, variants: &[(Variant::Direct, ALL)] };
const fn fresh(services: Services, variants: &'static [(Variant, Kinds)]) -> Block {
    Block { services: Some(services), table: Table::Fresh, variants }
}
const fn peers(variants: &'static [(Variant, Kinds)]) -> Block {
    Block { services: None, table: Table::Fresh, variants }
}
const fn by(choice: Choice, variants: &'static [(Variant, Kinds)]) -> Block {
    fresh(Services::By(choice), variants)
}
/// With a fresh table; between each two a direct one.
const FRESH: [Block; 11] = [
    fresh(Services::One, &[(Variant::One, ALL), (Variant::Beside, CONNECT)]),
    by(Choice::RoundRobin, &[(Variant::By(Choice::RoundRobin), CONNECT)]),
    by(Choice::LeastConnections, &[(Variant::By(Choice::LeastConnections), CONNECT)]),
    by(Choice::Latency, &[(Variant::By(Choice::Latency), CONNECT)]),
    by(Choice::ConsistentHash, &[(Variant::By(Choice::ConsistentHash), CONNECT)]),
    by(Choice::Affinity, &[(Variant::By(Choice::Affinity), CONNECT)]),
    fresh(
        Services::Many(Size::Ten),
        &[(Variant::Many(Size::Ten), CONNECT), (Variant::Random(Size::Ten), CONNECT)],
    ),
    fresh(
        Services::Many(Size::Sixty),
        &[(Variant::Many(Size::Sixty), CONNECT), (Variant::Random(Size::Sixty), CONNECT)],
    ),
    peers(&[
        (Variant::Peer(Peer::NftablesOne), TRANSLATED),
        (Variant::Untranslated, CONNECT_ALONE),
        (Variant::Peer(Peer::Nftables(Size::Ten)), CONNECT_ALONE),
    ]),
    NFTABLES_SIXTY,
    peers(&[
        (Variant::Peer(Peer::Haproxy), THROUGH_PROXY),
        (Variant::Peer(Peer::Envoy), THROUGH_PROXY),
    ]),
];
/// Apart: its rules take minutes to load, so people may leave it out.
const NFTABLES_SIXTY: Block = peers(&[(Variant::Peer(Peer::Nftables(Size::Sixty)), CONNECT_ALONE)]);
/// The sockets that fill the table cost something themselves, so they stay open for a direct block.
const DIRECT_FULL: Block =
    Block { services: None, table: Table::Full, variants: &[(Variant::Direct, CONNECT)] };
const FULL: [Block; 5] = [
    Block {
        services: Some(Services::One),
        table: Table::Full,
        variants: &[(Variant::One, CONNECT)],
    },
    DIRECT_FULL,
    Block {
        services: Some(Services::Many(Size::Ten)),
        table: Table::Full,
        variants: &[(Variant::Many(Size::Ten), CONNECT), (Variant::Random(Size::Ten), CONNECT)],
    },
    DIRECT_FULL,
    DIRECT,
];

/// What is compared with, in the order in which it is started.
pub fn peers_of(blocks: &[Block]) -> Vec<Peer> {
    let mut peers = Vec::new();
    for (variant, _) in blocks.iter().flat_map(|block| block.variants) {
        if let Variant::Peer(peer) = variant
            && !peers.contains(peer)
        {
            peers.push(*peer);
        }
    }
    peers
}

/// All blocks, when each variant is to have at least so many rounds with a fresh table.
pub fn blocks(rounds: u32, quick: bool) -> Vec<Block> {
    let left_out = |block: &Block| quick && block.variants == NFTABLES_SIXTY.variants;
    let mut blocks = vec![DIRECT];
    for cycle in 0..rounds.div_ceil(ROUNDS) {
        let fresh = FRESH.into_iter().filter(|block| !left_out(block));
        blocks.extend(fresh.flat_map(|block| [block, DIRECT]));
        if cycle % FILL_EVERY == 0 {
            blocks.extend(FULL);
        }
    }
    blocks
}

/// All subjects of these blocks, in the order in which people see them.
pub fn subjects(blocks: &[Block]) -> Vec<Subject> {
    let mut subjects = Vec::new();
    for subject in blocks.iter().copied().flat_map(Block::subjects) {
        if !subjects.contains(&subject) {
            subjects.push(subject);
        }
    }
    subjects.sort_by_key(|subject| {
        (subject.kind as u8, subject.table as u8, subject.threads, subject.variant.order())
    });
    subjects
}

// === impl Block ===

impl Block {
    /// What is measured in it.
    pub fn subjects(self) -> impl Iterator<Item = Subject> {
        let table = self.table;
        self.variants.iter().flat_map(move |&(variant, kinds)| {
            kinds.iter().map(move |&(kind, threads)| Subject { kind, variant, table, threads })
        })
    }

    /// For people.
    pub fn describe(self) -> String {
        let table = if self.table == Table::Full { ", table of records full" } else { "" };
        let services = match self.services {
            None => self.variants.first().map_or("nothing", |(variant, _)| variant.name()),
            Some(Services::One) => "1 service",
            Some(Services::By(choice)) => return format!("1 service, {}{table}", choice.name()),
            Some(Services::Many(Size::Ten)) => "10,000 services",
            Some(Services::Many(Size::Sixty)) => "60,000 services",
        };
        format!("{services}{table}")
    }
}

// === impl Subject ===

impl timeline::Subject for Subject {
    fn baseline(self) -> Self {
        Self { variant: Variant::Direct, ..self }
    }
}

// === impl Kind ===

impl Kind {
    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::Connect,
        Self::Reach,
        Self::DatagramConnect,
        Self::DatagramFirst,
        Self::DatagramNext,
    ];

    /// The name in tables, in JSON, and in orders to workers.
    pub fn name(self) -> &'static str {
        match self {
            Self::Connect => "connect",
            Self::Reach => "connect-to-accept",
            Self::DatagramConnect => "udp-connect",
            Self::DatagramFirst => "udp-first-sendto",
            Self::DatagramNext => "udp-sendto",
        }
    }
}

// === impl Variant ===

impl Variant {
    /// Its place in tables.
    fn order(self) -> u8 {
        match self {
            Self::Direct => 0,
            Self::Beside => 1,
            Self::One => 2,
            Self::By(choice) => 3 + choice as u8,
            Self::Many(size) => 20 + 2 * size as u8,
            Self::Random(size) => 21 + 2 * size as u8,
            Self::Untranslated => 30,
            Self::Peer(Peer::NftablesOne) => 31,
            Self::Peer(Peer::Nftables(size)) => 32 + size as u8,
            Self::Peer(Peer::Haproxy) => 40,
            Self::Peer(Peer::Envoy) => 41,
        }
    }

    /// The name in tables and JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Beside => "direct-beside-agent",
            Self::One => "1-service",
            Self::By(choice) => choice.name(),
            Self::Many(Size::Ten) => "10k-services",
            Self::Random(Size::Ten) => "10k-services-random",
            Self::Many(Size::Sixty) => "60k-services",
            Self::Random(Size::Sixty) => "60k-services-random",
            Self::Untranslated => "direct-beside-nftables",
            Self::Peer(Peer::NftablesOne) => "nftables",
            Self::Peer(Peer::Nftables(Size::Ten)) => "nftables-10k-random",
            Self::Peer(Peer::Nftables(Size::Sixty)) => "nftables-60k-random",
            Self::Peer(Peer::Haproxy) => "haproxy",
            Self::Peer(Peer::Envoy) => "envoy",
        }
    }
}

// === impl Size ===

impl Size {
    /// So many services.
    pub const fn services(self) -> u32 {
        match self {
            Self::Ten => 10_000,
            Self::Sixty => 60_000,
        }
    }
}

// === impl Peer ===

impl Peer {
    /// What runs.
    pub fn kind(self) -> peers::Kind {
        match self {
            Self::NftablesOne => peers::Kind::Nftables(1),
            Self::Nftables(size) => peers::Kind::Nftables(size.services()),
            Self::Haproxy => peers::Kind::Haproxy,
            Self::Envoy => peers::Kind::Envoy,
        }
    }
}

// === impl Choice ===

impl Choice {
    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::RoundRobin,
        Self::LeastConnections,
        Self::Latency,
        Self::ConsistentHash,
        Self::Affinity,
    ];

    /// The name in tables and JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::RoundRobin => "round-robin",
            Self::LeastConnections => "least-connections",
            Self::Latency => "latency",
            Self::ConsistentHash => "consistent-hash",
            Self::Affinity => "affinity",
        }
    }

    /// What a service says that wants it.
    pub fn key(self) -> String {
        match self {
            Self::Affinity => "affinity: {by: client}".to_owned(),
            other => format!("balance: {}", other.name()),
        }
    }
}

// === impl Table ===

impl Table {
    /// The name in tables and JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Fresh => "fresh",
            Self::Full => "full",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::timeline::Subject as _;

    #[test]
    fn each_block_is_between_direct_ones() {
        let blocks = blocks(20, false);
        let direct = |block: &Block| {
            block.services.is_none()
                && block.variants.iter().all(|(variant, _)| *variant == Variant::Direct)
        };
        for window in blocks.windows(3) {
            let [before, block, after] = window else { unreachable!("windows of 3") };
            if !direct(block) {
                assert!(direct(before) && direct(after));
                assert_eq!(after.table, block.table);
            }
        }
        assert!(blocks.first().zip(blocks.last()).is_some_and(|(a, b)| direct(a) && direct(b)));
    }

    #[test]
    fn every_subject_has_its_baseline() {
        let subjects = subjects(&blocks(4, false));
        assert!(subjects.iter().all(|subject| subjects.contains(&subject.baseline())));
        let connects = |table| {
            let of = |s: &&Subject| s.kind == Kind::Connect && s.table == table && s.threads == 1;
            subjects.iter().filter(of).count()
        };
        // Of the peers: three sizes, beside them, and two proxies.
        assert_eq!(connects(Table::Fresh), 12 + 6);
        assert_eq!(connects(Table::Full), 4);
    }

    #[test]
    fn what_takes_minutes_can_be_left_out() {
        let sixty = Peer::Nftables(Size::Sixty);
        assert!(peers_of(&blocks(4, false)).contains(&sixty));
        assert!(!peers_of(&blocks(4, true)).contains(&sixty));
    }
}
