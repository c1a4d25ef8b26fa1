//! The comparison, pass by pass, without a kernel.

use mesh_common::Origin;

use super::*;

const NETNS: u64 = 7;

fn record(cookie: u64) -> Record {
    in_namespace(cookie, NETNS)
}

fn in_namespace(cookie: u64, netns: u64) -> Record {
    let given = Given { origin: Origin::new(netns, 0), ..Given::default() };
    Record { place: Place::Array(9), cookie, word: cookie << 27 | 1 << 24, given }
}

fn socket(cookie: u64) -> Socket {
    let id = netlink_packet_sock_diag::inet::SocketId::new_v4();
    Socket {
        cookie,
        protocol: 6,
        state: 1,
        inode: 5,
        family: 2,
        id,
        retransmits: 0,
        unacknowledged: 0,
    }
}

/// All sockets of the namespace.
fn exist(cookies: &[u64]) -> HashMap<u64, Found> {
    let sockets = cookies.iter().map(|&cookie| (cookie, socket(cookie))).collect();
    HashMap::from([(NETNS, Found { sockets, incomplete: BTreeMap::new() })])
}

/// Not all of them.
fn exist_and_others(cookies: &[u64]) -> HashMap<u64, Found> {
    let mut found = exist(cookies);
    for found in found.values_mut() {
        found.incomplete.insert(0, "cut short".to_owned());
    }
    found
}

fn yes(_: &Record) -> bool {
    true
}

#[test]
fn what_exists_is_seen() {
    let mut audit = Audit::default();
    for _ in 0..3 {
        let (report, gone) = audit.compare(&[record(1), record(2)], &exist(&[3, 2, 1]), yes);
        assert_eq!(report, Report { records: 2, seen: 2, ..Report::default() });
        assert!(gone.is_empty());
    }
}

#[test]
fn unseen_twice_is_gone() {
    let mut audit = Audit::default();
    let (report, gone) = audit.compare(&[record(1), record(2)], &exist(&[1]), yes);
    assert_eq!(report, Report { records: 2, seen: 1, unseen: 1, ..Report::default() });
    assert!(gone.is_empty(), "once is not enough");
    let (report, gone) = audit.compare(&[record(1), record(2)], &exist(&[1]), yes);
    assert_eq!((report.unseen, gone), (1, vec![record(2)]));
    let (_, gone) = audit.compare(&[record(1), record(2)], &exist(&[1]), yes);
    assert_eq!(gone, [record(2)], "and again while the caller does not release it");
}

#[test]
fn seen_in_between_begins_anew() {
    let mut audit = Audit::default();
    for cookies in [&[][..], &[1], &[]] {
        assert!(audit.compare(&[record(1)], &exist(cookies), yes).1.is_empty());
    }
    assert_eq!(audit.compare(&[record(1)], &exist(&[]), yes).1, [record(1)]);
}

#[test]
fn closed_between_the_records_and_the_sockets() {
    let mut audit = Audit::default();
    let is_two = |record: &Record| record.cookie == 2;
    for pass in 0..2 {
        let (report, gone) = audit.compare(&[record(1), record(2)], &exist(&[]), is_two);
        assert_eq!((report.ended, report.unseen), (1, 1));
        assert_eq!(gone.len(), pass, "only what is still there: {gone:?}");
    }
    // A record that is not the same any more is not asked about when its socket exists.
    let (report, _) = audit.compare(&[record(1)], &exist(&[1]), |_| unreachable!());
    assert_eq!(report.seen, 1);
}

#[test]
fn only_the_very_same_record_is_gone() {
    let before = record(1);
    let other = |change: fn(&mut Record)| {
        let mut record = before;
        change(&mut record);
        record
    };
    let changed = [
        other(|record| record.word |= 1 << 25),
        other(|record| record.cookie += 1 << 16),
        other(|record| record.place = Place::Elsewhere(0)),
    ];
    for now in changed {
        let mut audit = Audit::default();
        audit.compare(&[before], &exist(&[]), yes);
        let (report, gone) = audit.compare(&[now], &exist(&[]), yes);
        assert_eq!((report.unseen, gone), (1, vec![]), "{now:?}");
    }
}

#[test]
fn a_namespace_that_was_read_half_written() {
    let (mut audit, mut found) = (Audit::default(), exist(&[]));
    found.insert(NETNS + 1, Found { sockets: HashMap::new(), incomplete: BTreeMap::new() });
    let stale = in_namespace(1, NETNS + 1);
    assert_eq!(audit.compare(&[stale], &found, yes).0.unseen, 1);
    let (report, gone) = audit.compare(&[record(1)], &found, yes);
    assert_eq!((report.unseen, gone), (1, vec![]), "the word is the same, the namespace is not");
}

#[test]
fn an_unknown_namespace_says_nothing() {
    let mut audit = Audit::default();
    let elsewhere = in_namespace(1, NETNS + 1);
    for _ in 0..3 {
        let (report, gone) = audit.compare(&[elsewhere], &exist(&[]), yes);
        assert_eq!(report, Report { records: 1, in_unknown_namespaces: 1, ..Report::default() });
        assert!(gone.is_empty());
    }
}

#[test]
fn a_list_that_was_cut_short_says_only_what_exists() {
    let mut audit = Audit::default();
    audit.compare(&[record(1), record(2)], &exist(&[1]), yes);
    for _ in 0..2 {
        let (report, gone) = audit.compare(&[record(1), record(2)], &exist_and_others(&[1]), yes);
        let problem = Some("cut short".to_owned());
        assert_eq!(
            report,
            Report { records: 2, seen: 1, undecided: 1, problem, ..Report::default() }
        );
        assert!(gone.is_empty());
    }
    assert!(audit.compare(&[record(2)], &exist(&[]), yes).1.is_empty(), "two passes in a row");
    assert_eq!(audit.compare(&[record(2)], &exist(&[]), yes).1, [record(2)]);
}
