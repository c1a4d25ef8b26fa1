//! How many backends may be out, while several go at the same time.

use loom::sync::Arc;
use loom::thread;
use mesh_common::{Client, Ejection, Failure, Policy, Token};

use crate::node::{A, End, HALF, NOW, Node, TWICE, client};
use crate::{a_try, explore, explore_three, join, spawn, suspected};

/// A connect of this client to this backend fails.
fn fails(
    node: &Arc<Node>,
    backend: usize,
    policy: Policy,
    client: Client,
) -> thread::JoinHandle<()> {
    spawn(node, move |node| {
        let stats = &node.backends[backend];
        stats.opened.increment();
        node.fail(stats, Failure::Refused, Token::NONE, policy, client, NOW);
    })
}

/// None of these clients, who saw failures, has more than one of two backends out.
fn share_holds_for(node: &Node, clients: &[u64]) {
    for whose in clients.iter().copied().map(client) {
        let out = node.backends.iter().filter(|stats| stats.ejection().is_out_for(whose)).count();
        assert!(out <= 1, "{out} of 2 are out for {whose:?}: {:?}", node.backends);
    }
}

/// Two backends of two fail at the same time, for these clients, and one of them may go.
fn one_too_many(name: &str, before: [Ejection; 2], policy: Policy, clients: [u64; 2]) {
    explore(name, move || {
        let node = Node::new(before);
        let [first, second] = clients.map(client);
        join([fails(&node, 0, policy, first), fails(&node, 1, policy, second)]);
        // What goes out for all meanwhile may be one more for whoever took one out alone.
        share_holds_for(&node, &clients[..1]);
        assert_eq!(node.settled([1, 1]), 2);
    });
}

#[test]
fn one_too_many_for_a_client() {
    one_too_many("one_too_many_for_a_client", [Ejection::NONE; 2], HALF, [2, 2]);
}

/// Another client has seen each of them fail before.
#[test]
fn one_too_many_for_all() {
    let once = Ejection::NONE.fail(TWICE, client(1), Token::NONE, NOW - 1).expect("counted");
    one_too_many("one_too_many_for_all", [once; 2], TWICE, [2, 2]);
}

/// One goes out for all while the other goes out for a client alone.
#[test]
fn one_too_many_for_all_and_a_client() {
    let before = [suspected(), Ejection::NONE];
    one_too_many("one_too_many_for_all_and_a_client", before, HALF, [2, 3]);
}

/// Each is out for another client: one of them may go out for all, and what single clients have out
/// beside it is the agent's matter.
#[test]
fn one_too_many_of_what_others_suspect() {
    explore("one_too_many_of_what_others_suspect", || {
        let fail = |n| Ejection::NONE.fail(HALF, client(n), Token::NONE, NOW - 1);
        let node = Node::new([1, 2].map(|n| fail(n).expect("suspected")));
        join([fails(&node, 0, HALF, client(3)), fails(&node, 1, HALF, client(3))]);
        share_holds_for(&node, &[3]);
        assert_eq!(node.settled([1, 1]), 2);
    });
}

/// While one goes out for all and the other for a client alone, the try of the first ends: its token
/// must not be waited for when the backend comes back.
#[test]
fn a_try_of_one_too_many() {
    explore_three("a_try_of_one_too_many", || {
        let (node, _) = a_try([suspected(), Ejection::NONE]);
        let ends = spawn(&node, |node| {
            node.destroy(A, client(1), End::NotConnected, NOW);
        });
        join([fails(&node, 0, HALF, client(2)), fails(&node, 1, HALF, client(3)), ends]);
        share_holds_for(&node, &[2]);
        assert_eq!(node.settled([2, 1]), 2);
    });
}
