//! Services that are only called something else, and whose a backend was.

use super::*;

/// The backends of a service: where, and which life.
fn lives<M: Maps>(reconciler: &Reconciler<M>, service: u8) -> BTreeSet<(SocketAddr, u32, u32)> {
    let generation = |id| reconciler.maps().backend(id).map_or(0, |backend| backend.generation);
    let name = name(service);
    let backends = reconciler.backends(&name);
    backends.map(|(key, id)| (key.address, id, generation(id))).collect()
}

/// The record of a frontend.
fn record<M: Maps>(reconciler: &Reconciler<M>, n: u8) -> Option<(u32, u64)> {
    Maps::frontend(reconciler.maps(), &frontend(n)).map(|value| (value.service, value.generation))
}

fn renamed(former: Arc<Tables>, now: Arc<Tables>) -> Reconciler<Memory> {
    let mut reconciler = Reconciler::new(Memory::new(ROOMY));
    reconciler.apply(vec![(name(1), former)]);
    let outcome = reconciler.apply(vec![(name(1), tables(&[], &[])), (name(2), now)]);
    assert!(outcome.iter().all(|(_, problems)| problems.is_empty()), "{outcome:?}");
    reconciler
}

#[test]
fn a_renamed_service_keeps_what_it_had() {
    let writes = std::cell::RefCell::new(Vec::new());
    let maps = Faulty::new(Memory::new(ROOMY), |operation: &'static str| {
        writes.borrow_mut().push(operation);
        false
    });
    let mut reconciler = Reconciler::new(maps);
    reconciler.apply(vec![(name(1), tables(&[1, 2], &[1, 2]))]);
    let before = (lives(&reconciler, 1), record(&reconciler, 1), record(&reconciler, 2));
    let usage = reconciler.usage();
    writes.borrow_mut().clear();
    let now = tables(&[1, 2], &[1, 2]);
    reconciler.apply(vec![(name(1), tables(&[], &[])), (name(2), now)]);
    const OWNER: &str = "giving a record of SERVICES to another";
    // The new name, whose all is, and then nobody has the former one.
    let expected =
        ["writing NAMES", "writing BACKENDS", "writing BACKENDS", OWNER, OWNER, "writing NAMES"];
    assert_eq!(*writes.borrow(), expected);
    assert_eq!(before, (lives(&reconciler, 2), record(&reconciler, 1), record(&reconciler, 2)));
    assert_eq!(reconciler.take_let_go(), []);
    assert_eq!(reconciler.usage(), usage);
    assert_eq!(reconciler.owner(&frontend(1)), Some(&name(2)));
    assert!(reconciler.services().eq([&name(2)]));
    // The agent that comes next knows it by its new name.
    assert!(!reconciler.begin_grace());
    let (mut next, _) = Reconciler::adopt(reconciler.into_maps()).expect("adoption");
    assert_eq!(before, (lives(&next, 2), record(&next, 1), record(&next, 2)));
    // And the name is free again.
    next.apply(vec![(name(1), tables(&[3], &[3])), (name(2), tables(&[], &[]))]);
    finish(&mut next);
    assert!(next.services().eq([&name(1)]));
}

/// What is left of an endpoint that was removed before is the renamed service's too.
#[test]
fn former_endpoints_go_by_the_new_name() {
    let mut reconciler = Reconciler::new(Memory::new(ROOMY));
    reconciler.apply(vec![(name(1), tables(&[1], &[1, 2]))]);
    let (place, id, generation) = lives(&reconciler, 1).pop_first().expect("a backend");
    reconciler.apply(vec![(name(1), tables(&[1], &[2]))]);
    reconciler.apply(vec![(name(1), tables(&[], &[])), (name(2), tables(&[1], &[2]))]);
    let (now, key) = reconciler.giver(id, generation).expect("it is remembered");
    assert_eq!((now, key.address), (&name(2), place));
}

/// As when the file with the new name comes before the one with the old name goes.
#[test]
fn a_service_that_waited_for_its_addresses_is_the_renamed_one() {
    let mut reconciler = Reconciler::new(Memory::new(ROOMY));
    let now = tables(&[1], &[1]);
    let waits = Arc::new(Tables { frontends: Vec::new(), ..Tables::clone(&now) });
    reconciler.apply(vec![(name(1), Arc::clone(&now)), (name(2), waits)]);
    let before = (lives(&reconciler, 1), record(&reconciler, 1));
    assert_ne!(before.0, lives(&reconciler, 2));
    reconciler.apply(vec![(name(1), tables(&[], &[])), (name(2), now)]);
    assert_eq!(before, (lives(&reconciler, 2), record(&reconciler, 1)));
    finish(&mut reconciler);
    let usage = reconciler.usage();
    assert_eq!((usage.backends, usage.services, usage.slots), (1, 1, 1));
    // What it had meanwhile, and nobody was led to.
    assert_eq!(reconciler.take_let_go().len(), 1);
}

/// With more endpoints or addresses it is still the same; with other ones it is another that has the address now.
#[test]
fn another_service_is_not_taken_for_a_renamed_one() {
    let life = |reconciler: &Reconciler<Memory>, service| {
        lives(reconciler, service).into_iter().next().map(|(_, id, generation)| (id, generation))
    };
    let one = || tables(&[1], &[1]);
    let first = renamed(one(), one());
    let first = (life(&first, 2), record(&first, 1));
    for (now, is_same) in [
        (tables(&[1, 2], &[1]), true),
        (tables(&[1], &[1, 2]), true),
        (tables(&[1], &[2]), false),
        (tables(&[2], &[1]), false),
    ] {
        let reconciler = renamed(one(), Arc::clone(&now));
        let found = (life(&reconciler, 2), record(&reconciler, 1));
        assert_eq!(found == first, is_same, "{now:?}");
    }
    // Of several endpoints, all have to be there.
    let mut reconciler = renamed(tables(&[1], &[1, 2]), tables(&[1], &[2, 3]));
    assert_eq!(reconciler.take_let_go().len(), 2);
    // One that goes on is not renamed.
    let mut reconciler = Reconciler::new(Memory::new(ROOMY));
    reconciler.apply(vec![(name(1), tables(&[1, 2], &[1]))]);
    let before = record(&reconciler, 1);
    reconciler.apply(vec![(name(1), tables(&[2], &[1])), (name(2), tables(&[1], &[1]))]);
    assert_ne!(record(&reconciler, 1), before);
}

/// Whatever fails on the way, it has all in the end, and nothing that is its own has the former name.
#[test]
fn renamed_under_faults() {
    for failing in 0..8 {
        let count = std::cell::Cell::new(u32::MAX);
        let maps = Faulty::new(Memory::new(ROOMY), |_: &'static str| {
            let now = count.get();
            count.set(now.checked_sub(1).unwrap_or(u32::MAX));
            now == 0
        });
        let mut reconciler = Reconciler::new(maps);
        reconciler.apply(vec![(name(1), tables(&[1, 2], &[1, 2]))]);
        let before = (lives(&reconciler, 1), record(&reconciler, 1), record(&reconciler, 2));
        count.set(failing);
        let now = tables(&[1, 2], &[1, 2]);
        reconciler.apply(vec![(name(1), tables(&[], &[])), (name(2), now)]);
        count.set(u32::MAX);
        finish(&mut reconciler);
        assert!(!reconciler.is_unfinished(), "{failing}");
        assert!(reconciler.services().eq([&name(2)]), "{failing}");
        let after = (lives(&reconciler, 2), record(&reconciler, 1), record(&reconciler, 2));
        assert_eq!(before, after, "{failing}");
        let (next, adopted) = Reconciler::adopt(reconciler.into_maps()).expect("adoption");
        assert_eq!((adopted.services, lives(&next, 2)), (1, before.0), "{failing}");
    }
}

/// Called something else once more, before the records have its second name: the first stays until none has
/// it, and no other service is taken for their owner.
#[test]
fn renamed_again_under_faults() {
    for failing in 0..8 {
        let count = std::cell::Cell::new(u32::MAX);
        let maps = Faulty::new(Memory::new(ROOMY), |_: &'static str| {
            let now = count.get();
            count.set(now.checked_sub(1).unwrap_or(u32::MAX));
            // One fails, and all that follow it.
            now == 0 || now > 1_000_000
        });
        let mut reconciler = Reconciler::new(maps);
        count.set(1_000_000);
        reconciler.apply(vec![(name(1), tables(&[1, 2], &[1, 2]))]);
        let before = (lives(&reconciler, 1), record(&reconciler, 1), record(&reconciler, 2));
        count.set(failing);
        let now = || tables(&[1, 2], &[1, 2]);
        reconciler.apply(vec![(name(1), tables(&[], &[])), (name(2), now())]);
        reconciler.apply(vec![(name(2), tables(&[], &[])), (name(3), now())]);
        count.set(1_000_000);
        reconciler.apply(vec![(name(4), tables(&[4], &[4]))]);
        finish(&mut reconciler);
        assert!(!reconciler.is_unfinished(), "{failing}");
        let services: BTreeSet<_> = reconciler.services().cloned().collect();
        assert_eq!(services, BTreeSet::from([name(3), name(4)]), "{failing}");
        for (address, id, generation) in &before.0 {
            let (giver, key) = reconciler.giver(*id, *generation).expect("a name");
            assert_eq!((giver, key.address), (&name(3), *address), "{failing}");
        }
        let after = (lives(&reconciler, 3), record(&reconciler, 1), record(&reconciler, 2));
        assert_eq!(before, after, "{failing}");
        let (next, adopted) = Reconciler::adopt(reconciler.into_maps()).expect("adoption");
        assert_eq!((adopted.services, lives(&next, 3)), (2, before.0), "{failing}");
    }
}

/// Whose the backend of a record is, whoever has by now what was dialled.
#[test]
fn a_backend_is_named_by_its_service() {
    let mut reconciler = Reconciler::new(Memory::new(ROOMY));
    reconciler.apply(vec![(name(1), tables(&[1], &[1]))]);
    let (place, id, generation) = lives(&reconciler, 1).pop_first().expect("a backend");
    let (index, _) = record(&reconciler, 1).expect("a record");
    let of = |reconciler: &Reconciler<Memory>| {
        let giver = reconciler.giver_of((id, generation), &frontend(1), index).cloned();
        (giver, reconciler.giver(id, generation).map(|(_, key)| key.address))
    };
    assert_eq!(of(&reconciler), (Some(name(1)), Some(place)));
    let before = crate::dataplane::clock::monotonic();
    // Another service has the address now; and again, when the backend's id is another's.
    reconciler.apply(vec![(name(1), tables(&[], &[])), (name(2), tables(&[1], &[2]))]);
    assert_eq!(of(&reconciler), (Some(name(1)), Some(place)));
    finish(&mut reconciler);
    reconciler.apply(vec![(name(3), tables(&[3], &[3, 4]))]);
    assert_eq!(of(&reconciler), (Some(name(1)), Some(place)));
    // What was refused before is not of the one that has it now.
    assert_eq!(reconciler.refuser(&frontend(1), before), None);
    let now = crate::dataplane::clock::monotonic();
    assert_eq!(reconciler.refuser(&frontend(1), now), Some(&name(2)));

    // The next agent knows nothing of what was gone; only that the address is another record's.
    let (next, _) = Reconciler::adopt(reconciler.into_maps()).expect("adoption");
    assert_eq!(of(&next), (None, None));
    // Of a service that is as it was, an endpoint that was gone before is its own still.
    let (now, _) = record(&next, 1).expect("a record");
    let gone = (id, generation + 100);
    assert_eq!(next.giver_of(gone, &frontend(1), now), Some(&name(2)));
    assert_eq!(next.refuser(&frontend(1), 1), Some(&name(2)));
}
