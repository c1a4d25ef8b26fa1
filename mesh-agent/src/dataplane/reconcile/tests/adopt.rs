//! Agents that end at any moment, and what the next one makes of what they leave.

use std::cell::Cell;
use std::rc::Rc;

use mesh_common::{FrontendValue, Name};

use super::model::{Model, Plan, WIDE, plan};
use super::*;
use crate::dataplane::maps::{Contents as _, Kind};
use crate::dataplane::memory::Spoiled;

/// Adopts maps, and counts what is written from then on.
fn adopted(memory: Memory) -> (Reconciler<Faulty<Memory, Fails>>, Adopted, Rc<Cell<usize>>) {
    let writes = Rc::new(Cell::new(0));
    let counter = Rc::clone(&writes);
    let fails: Fails = Box::new(move |_| {
        counter.set(counter.get() + 1);
        false
    });
    let (reconciler, adopted) = Reconciler::adopt(Faulty::new(memory, fails)).expect("no faults");
    (reconciler, adopted, writes)
}

/// What a model wants, all of it.
fn all(model: &Model) -> Vec<(ServiceName, Arc<Tables>)> {
    model.wanted.iter().map(|(n, tables)| (name(*n), Arc::clone(tables))).collect()
}

/// Services that are held and not defined are removed, as the engine does once its sources have answered.
fn settle<M: Maps>(reconciler: &mut Reconciler<M>, model: &Model) {
    let defined: Vec<ServiceName> = model.wanted.keys().map(|n| name(*n)).collect();
    let stale: Vec<ServiceName> =
        reconciler.services().filter(|name| !defined.contains(name)).cloned().collect();
    reconciler.apply(stale.into_iter().map(|name| (name, Arc::default())).collect());
}

/// Nothing is left in maps of which nothing is wanted.
fn ensure_empty(memory: &Memory) -> Result<(), TestCaseError> {
    prop_assert_eq!(memory.frontends().count(), 0);
    for id in 0..memory.there(Kind::Backends) {
        prop_assert_eq!(Maps::backend(memory, id).map(|backend| backend.protocol), Some(0));
        prop_assert_eq!(memory.life(id), 0);
    }
    for index in 0..memory.there(Kind::Names) {
        prop_assert_eq!(memory.name(index), Some(Name::NONE));
    }
    Ok(())
}

/// Applies what is wanted to what was adopted: then all of it is there, and nothing else.
fn ensure_taken_over(
    mut reconciler: Reconciler<Faulty<Memory, Fails>>,
    model: &Model,
) -> Result<(), TestCaseError> {
    reconciler.apply(all(model));
    settle(&mut reconciler, model);
    finish(&mut reconciler);
    prop_assert!(!reconciler.is_unfinished());
    model.ensure_held(&reconciler, &reconciler.maps().maps)?;

    // Nothing is lost: a new agent over empty maps uses as much.
    let mut fresh = Reconciler::new(Memory::new(WIDE));
    fresh.apply(all(model));
    finish(&mut fresh);
    prop_assert_eq!(reconciler.usage(), fresh.usage());

    let nothing = model.wanted.keys().map(|n| (name(*n), Arc::default())).collect();
    reconciler.apply(nothing);
    finish(&mut reconciler);
    prop_assert_eq!(reconciler.usage(), Usage::default());
    ensure_empty(&reconciler.maps().maps)
}

/// Runs an agent until it has made so many changes, or all of them. Gives the maps as it leaves them, what
/// was wanted of it last, and whether it came to the end.
fn run(batches: &[Vec<Plan>], lives: usize) -> (Memory, Model, bool) {
    let mut maps = Faulty::new(Memory::new(WIDE), Box::new(|_: &'static str| false) as Fails);
    maps.lives = Some(lives);
    let (mut reconciler, mut model) = (Reconciler::new(maps), Model::default());
    for batch in batches {
        reconciler.apply(model.apply(batch.clone()));
        if reconciler.begin_grace() {
            reconciler.end_grace(true);
        }
        if reconciler.maps().lives == Some(0) {
            return (reconciler.into_maps().maps, model, false);
        }
    }
    (reconciler.into_maps().maps, model, true)
}

/// Anything in any place.
fn spoiled() -> impl Strategy<Value = Spoiled> {
    let key = (any::<u8>(), any::<u16>(), any::<u8>());
    let key = key.prop_map(|(n, port, protocol)| FrontendKey { port, protocol, ..frontend(n) });
    let words = any::<[u16; 16]>();
    let backend = (any::<u8>(), any::<u16>(), any::<u8>(), any::<u16>(), 0u32..6, any::<u32>());
    prop_oneof![
        (any::<u32>(), 0u32..70, any::<u64>()).prop_map(|(place, service, generation)| {
            let generation = generation % 40;
            Spoiled::Entry(place, FrontendValue { service, pad: 0, generation })
        }),
        (any::<u32>(), any::<u64>()).prop_map(|(place, table)| Spoiled::Table(place, table)),
        (any::<u32>(), 0u32..12_000, 0u32..300)
            .prop_map(|(place, base, len)| { Spoiled::Table(place, Table::slots(base, len).0) }),
        (any::<u32>(), 0u64..40).prop_map(|(place, life)| Spoiled::Generation(place, life)),
        (any::<u32>(), key).prop_map(|(place, key)| Spoiled::Key(place, key)),
        (any::<u32>(), 0u32..80).prop_map(|(place, owner)| Spoiled::Owner(place, owner)),
        (any::<u32>(), words).prop_map(|(place, words)| {
            // Of those that are used first.
            Spoiled::Slot(place % 400, Slot::of_entries(words))
        }),
        (any::<u32>(), backend).prop_map(
            |(place, (n, port, protocol, service_port, generation, owner))| {
                let addr = Addr::from(std::net::Ipv4Addr::new(10, 0, 0, n));
                let marks = mesh_common::Marks(n);
                let backend = Backend {
                    addr,
                    port,
                    weight: port,
                    protocol,
                    marks,
                    service_port,
                    generation,
                    owner,
                };
                Spoiled::Backend(place % 40, backend)
            }
        ),
        (any::<u32>(), 0u64..40).prop_map(|(place, life)| Spoiled::Life(place % 40, life)),
        (any::<u32>(), prop::collection::vec(any::<char>(), 0..20)).prop_map(|(place, text)| {
            let text: String = text.into_iter().collect();
            Spoiled::Name(place % 8, Name::new(&text, 0).unwrap_or(Name::NONE))
        }),
    ]
}

/// Empty maps are taken over like any others.
#[test]
fn there_need_not_be_anything() {
    let (reconciler, adopted, writes) = adopted(Memory::new(ROOMY));
    assert_eq!((reconciler.usage(), adopted, writes.get()), Default::default());
}

/// Ids, generations and what was counted of those that are gone go on.
#[test]
fn what_was_given_is_not_given_again() {
    let mut first = Reconciler::new(Memory::new(ROOMY));
    first.apply(vec![(name(1), tables(&[1], &[1, 2])), (name(2), tables(&[2], &[3]))]);
    first.apply(vec![(name(2), Arc::default())]);
    finish(&mut first);
    let (last, ids) = (first.last(), first.backends(&name(1)).collect::<Vec<_>>());
    let (mut second, adopted, writes) = adopted(first.into_maps());
    assert_eq!(adopted, Adopted { services: 1, frontends: 1, backends: 2, wrong: 0 });
    assert_eq!((second.last(), writes.get()), (last, 0));
    assert_eq!(second.backends(&name(1)).collect::<Vec<_>>(), ids);
    second.apply(vec![(name(3), tables(&[3], &[3]))]);
    assert!(second.last().backend > last.backend && second.last().service > last.service);
}

/// A service that nobody defines any more stays until that is known.
#[test]
fn what_is_not_wanted_yet_stays() {
    let mut first = Reconciler::new(Memory::new(ROOMY));
    first.apply(vec![(name(1), tables(&[1], &[1])), (name(2), tables(&[2], &[2]))]);
    let (mut second, ..) = adopted(first.into_maps());
    second.apply(vec![(name(2), tables(&[2], &[3]))]);
    finish(&mut second);
    let memory = &second.maps().maps;
    assert_eq!(answers(memory, &frontend(1)), Ok(BTreeSet::from([address(1)])));
    assert_eq!(answers(memory, &frontend(2)), Ok(BTreeSet::from([address(3)])));
}

/// However high somebody has written them, numbers go on, and 0 is none of them.
#[test]
fn numbers_at_their_end() {
    let mut first = Reconciler::new(Memory::new(ROOMY));
    first.apply(vec![(name(1), tables(&[1], &[1]))]);
    let mut memory = first.into_maps();
    memory.spoil(Spoiled::Noted(Generations { service: u64::MAX, backend: u32::MAX }));
    memory.spoil(Spoiled::Gone(u64::MAX));
    (0..ROOMY.backends).for_each(|id| memory.spoil(Spoiled::Opened(id, u64::MAX)));
    let (mut second, ..) = adopted(memory);
    second.apply(vec![(name(1), Arc::default()), (name(2), tables(&[2], &[2]))]);
    finish(&mut second);
    assert_eq!(second.last(), Generations { service: 1, backend: 1 });
    assert_eq!(second.opened(), u64::MAX.wrapping_add(u64::MAX));
    let memory = &second.maps().maps;
    assert_eq!(answers(memory, &frontend(2)), Ok(BTreeSet::from([address(2)])));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// What was finished, and is still wanted, is left as it is.
    #[test]
    fn nothing_is_written_twice(
        batches in prop::collection::vec(prop::collection::vec(plan(), 1..3), 1..8),
    ) {
        let (memory, model, _) = run(&batches, usize::MAX);
        let (mut reconciler, adopted, writes) = adopted(memory);
        prop_assert_eq!(adopted.wrong, 0);
        // What a former agent had not brought to an end yet is free.
        finish(&mut reconciler);
        writes.set(0);
        reconciler.maps_mut().lives = Some(1_000);
        for (_, problems) in reconciler.apply(all(&model)) {
            prop_assert!(problems.is_empty(), "{problems:?}");
        }
        prop_assert_eq!((writes.get(), reconciler.maps().lives), (0, Some(1_000)));
        model.ensure_held(&reconciler, &reconciler.maps().maps)?;
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    /// An agent that ends after any of its changes leaves nothing that the next one does not understand.
    #[test]
    fn a_crash_at_every_step(
        batches in prop::collection::vec(prop::collection::vec(plan(), 1..3), 1..5),
    ) {
        for lives in 0.. {
            let (mut memory, model, ended) = run(&batches, lives);
            memory.end_readers();
            let (reconciler, adopted, _) = adopted(memory);
            prop_assert_eq!(adopted.wrong, 0);
            // It may have ended before the last batches.
            ensure_taken_over(reconciler, &model)?;
            if ended {
                break;
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// Whatever is in the maps, the agent does not crash, believes nothing that makes no sense, and the
    /// kernel holds what is wanted in the end.
    #[test]
    fn spoiled_maps(
        batches in prop::collection::vec(prop::collection::vec(plan(), 1..3), 1..5),
        spoiled in prop::collection::vec(spoiled(), 1..20),
    ) {
        let (mut memory, model, _) = run(&batches, usize::MAX);
        for spoiled in spoiled {
            memory.spoil(spoiled);
        }
        let (reconciler, ..) = adopted(memory);
        ensure_taken_over(reconciler, &model)?;
    }
}
