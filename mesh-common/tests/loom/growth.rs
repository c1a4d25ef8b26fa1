//! The table of records grows and settles while sockets connect and end (`mesh-ebpf/src/records.rs`,
//! `Records::grow` and `settle` in `mesh-agent/src/dataplane/records.rs`).

use loom::sync::{Arc, Mutex, MutexGuard};
use loom::thread;
use mesh_common::flow::{self, Claim};
use mesh_common::{Held, Places, Word};

use crate::{explore, explore_three, join};

const FORMER: u32 = 2;
const SIZE: u32 = 4;

/// The first socket has its record at place 1 of two, and 3 of four; the second at 1 of either.
const SOCKETS: [u64; 2] = [0x0003_0003, 0x0005_0001];

struct Node {
    places: Word,
    records: [Word; SIZE as usize],
    /// A program runs on this CPU: the grace period waits for it, and nothing else does.
    running: [Mutex<()>; 2],
    opened: Word,
    closed: Word,
}

impl Node {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            places: Word::new(Places::settled(FORMER).0),
            records: [0; SIZE as usize].map(Word::new),
            running: [Mutex::new(()), Mutex::new(())],
            opened: Word::new(0),
            closed: Word::new(0),
        })
    }

    /// A CPU runs the programs of one socket, as its lock has it.
    fn run(&self, socket: usize) -> MutexGuard<'_, ()> {
        self.running[socket].lock().expect("a CPU")
    }

    fn places(&self) -> Places {
        Places(self.places.load())
    }

    fn find(&self, cookie: u64) -> Option<&Word> {
        let record = &self.records[self.places().of(cookie) as usize];
        if Held(record.load()).is_of(cookie) {
            return Some(record);
        }
        let record = &self.records[self.places().former(cookie)? as usize];
        Held(record.load()).is_of(cookie).then_some(record)
    }

    fn end(&self, cookie: u64) {
        if self.find(cookie).is_some_and(|record| flow::release(record, cookie).is_some()) {
            self.closed.increment();
        }
    }

    fn connect(&self, socket: usize) {
        let (cookie, _running) = (SOCKETS[socket], self.run(socket));
        let places = self.places();
        let record = &self.records[places.of(cookie) as usize];
        if record.load() != 0 || places.has_former() {
            self.end(cookie);
        }
        self.opened.increment();
        if flow::claim(record) == Claim::Taken {
            flow::publish(record, Held::new(cookie, 1, false));
        } else {
            // To `OVERFLOW`, which is full.
            self.closed.increment();
        }
    }

    fn destroy(&self, socket: usize) {
        let _running = self.run(socket);
        self.end(SOCKETS[socket]);
    }

    /// The agent.
    fn grow_and_settle(&self) {
        self.places.store(Places::grown(FORMER, SIZE).0);
        for cpu in 0..self.running.len() {
            drop(self.run(cpu));
        }
        let places = self.places();
        let misplaced = (0..).zip(&self.records).any(|(place, record)| {
            let held = Held(record.load());
            // The lower bits are those of the only socket that can be there.
            let of = SOCKETS.iter().find(|cookie| held.is_of(**cookie));
            of.is_some_and(|cookie| places.of(*cookie) != place)
        });
        if !misplaced {
            self.places.store(Places::settled(SIZE).0);
        }
    }

    /// All sockets are gone.
    fn over(&self) {
        assert!(self.records.iter().all(|record| record.load() == 0), "a record is left");
        assert_eq!(self.opened.load(), self.closed.load(), "released exactly once");
    }
}

fn spawn(node: &Arc<Node>, f: impl FnOnce(&Node) + 'static) -> thread::JoinHandle<()> {
    let node = Arc::clone(node);
    thread::spawn(move || f(&node))
}

/// Whenever it connects, and again, what it has is found when it ends.
#[test]
fn a_socket_while_the_table_grows() {
    explore("a socket while the table grows", || {
        let node = Node::new();
        let socket = spawn(&node, |node| {
            node.connect(0);
            node.connect(0);
            node.destroy(0);
        });
        join([socket, spawn(&node, Node::grow_and_settle)]);
        node.over();
    });
}

/// It ends long after the table has settled, or could not because of it.
#[test]
fn a_socket_that_outlives_it() {
    explore("a socket that outlives it", || {
        let node = Node::new();
        join([spawn(&node, |node| node.connect(0)), spawn(&node, Node::grow_and_settle)]);
        node.destroy(0);
        node.over();
    });
}

/// The former place of the one is the place of the other.
#[test]
fn two_sockets_while_the_table_grows() {
    explore_three("two sockets while the table grows", || {
        let node = Node::new();
        let sockets = [0, 1].map(|socket| spawn(&node, move |node| node.connect(socket)));
        node.grow_and_settle();
        join(sockets);
        node.destroy(0);
        node.destroy(1);
        node.over();
    });
}
