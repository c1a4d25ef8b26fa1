//! What is measured, and in which order.
//!
//! Some of the programs run for every TCP socket of the machine. So a direct connect is only direct
//! while no agent runs, and agents are started and stopped all along: before and after each block
//! with an agent there is one without, and nothing is compared but neighbours.

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
    /// One of 10,000 services, always the same.
    Many,
    /// Any of 10,000 services.
    Random,
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
    /// It has 10,000.
    Many,
}

/// What one figure is about.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Subject {
    /// What is dialled.
    pub variant: Variant,
    /// With direct connects: whether the connections that fill the table are open.
    pub table: Table,
    /// How many threads connect at the same time.
    pub threads: usize,
}

/// A time in which nothing changes but what is dialled.
#[derive(Clone, Copy, Debug)]
pub struct Block {
    /// The agent that runs.
    pub services: Option<Services>,
    /// Whether the connections that fill the table are open.
    pub table: Table,
    /// What is measured, in rounds of shuffled order.
    pub variants: &'static [Variant],
}

/// The numbers of threads that each variant is measured with.
pub const THREADS: [usize; 2] = [1, 2];

/// Rounds in a block. Short, so that neighbours are near in time.
pub const ROUNDS: u32 = 4;

/// Filling the table takes seconds, so it is done in one of so many cycles.
const FILL_EVERY: u32 = 2;

const DIRECT: Block = Block { services: None, table: Table::Fresh, variants: &[Variant::Direct] };
const fn by(choice: Choice, variants: &'static [Variant]) -> Block {
    Block { services: Some(Services::By(choice)), table: Table::Fresh, variants }
}
const FRESH: [Block; 14] = [
    Block {
        services: Some(Services::One),
        table: Table::Fresh,
        variants: &[Variant::One, Variant::Beside],
    },
    DIRECT,
    by(Choice::RoundRobin, &[Variant::By(Choice::RoundRobin)]),
    DIRECT,
    by(Choice::LeastConnections, &[Variant::By(Choice::LeastConnections)]),
    DIRECT,
    by(Choice::Latency, &[Variant::By(Choice::Latency)]),
    DIRECT,
    by(Choice::ConsistentHash, &[Variant::By(Choice::ConsistentHash)]),
    DIRECT,
    by(Choice::Affinity, &[Variant::By(Choice::Affinity)]),
    DIRECT,
    Block {
        services: Some(Services::Many),
        table: Table::Fresh,
        variants: &[Variant::Many, Variant::Random],
    },
    DIRECT,
];
/// The sockets that fill the table cost something themselves, so they stay open for a direct block.
const DIRECT_FULL: Block =
    Block { services: None, table: Table::Full, variants: &[Variant::Direct] };
const FULL: [Block; 5] = [
    Block { services: Some(Services::One), table: Table::Full, variants: &[Variant::One] },
    DIRECT_FULL,
    Block {
        services: Some(Services::Many),
        table: Table::Full,
        variants: &[Variant::Many, Variant::Random],
    },
    DIRECT_FULL,
    DIRECT,
];

/// All blocks, when each variant is to have at least so many rounds with a fresh table.
pub fn blocks(rounds: u32) -> Vec<Block> {
    let mut blocks = vec![DIRECT];
    for cycle in 0..rounds.div_ceil(ROUNDS) {
        blocks.extend(FRESH);
        if cycle % FILL_EVERY == 0 {
            blocks.extend(FULL);
        }
    }
    blocks
}

/// All subjects, in the order in which people see them.
pub fn subjects() -> Vec<Subject> {
    let all = [DIRECT].into_iter().chain(FRESH).chain(FULL);
    let mut subjects = Vec::new();
    for subject in all.flat_map(Block::subjects) {
        if !subjects.contains(&subject) {
            subjects.push(subject);
        }
    }
    subjects.sort_by_key(|subject| (subject.table as u8, subject.threads, subject.variant.order()));
    subjects
}

// === impl Block ===

impl Block {
    /// What is measured in it.
    pub fn subjects(self) -> impl Iterator<Item = Subject> {
        let table = self.table;
        let with = move |threads| {
            self.variants.iter().map(move |&variant| Subject { variant, table, threads })
        };
        THREADS.into_iter().flat_map(with)
    }

    /// For people.
    pub fn describe(self) -> String {
        let table = if self.table == Table::Full { ", table of records full" } else { "" };
        let services = match self.services {
            None => "no agent",
            Some(Services::One) => "1 service",
            Some(Services::By(choice)) => return format!("1 service, {}{table}", choice.name()),
            Some(Services::Many) => "10,000 services",
        };
        format!("{services}{table}")
    }
}

// === impl Subject ===

impl Subject {
    /// What it is compared with.
    pub fn baseline(self) -> Self {
        Self { variant: Variant::Direct, ..self }
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
            Self::Many => 20,
            Self::Random => 21,
        }
    }

    /// The name in tables and JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Beside => "direct-beside-agent",
            Self::One => "1-service",
            Self::By(choice) => choice.name(),
            Self::Many => "10k-services",
            Self::Random => "10k-services-random",
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

    #[test]
    fn each_block_with_an_agent_is_between_direct_ones() {
        let blocks = blocks(20);
        for window in blocks.windows(3) {
            let [before, block, after] = window else { unreachable!("windows of 3") };
            if block.services.is_some() {
                assert!(before.services.is_none() && after.services.is_none());
                assert_eq!(after.table, block.table);
            }
        }
        assert!(
            blocks
                .first()
                .zip(blocks.last())
                .is_some_and(|(a, b)| { a.services.is_none() && b.services.is_none() })
        );
    }

    #[test]
    fn every_subject_has_its_baseline() {
        let subjects = subjects();
        assert!(subjects.iter().all(|subject| subjects.contains(&subject.baseline())));
        // Ten with a fresh table and four with a full one.
        assert_eq!(subjects.len(), (10 + 4) * THREADS.len());
    }
}
