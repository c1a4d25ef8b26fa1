//! Which endpoints a table has, and with which weights: by what their checks say, by priority, by
//! distance, and less for what has just come.

use std::borrow::Cow;

use mesh_common::{Reason, State};

use super::{Candidate, Condition, FALLBACK, Found, Rows, TableKey};
use crate::model::{Fallback, Locality, Service, WhenAllUnhealthy};

/// One, in the fixed point of shares.
const ONE: u64 = 1 << 20;

/// The largest weight of a slot.
const MOST: u128 = 65_535;

/// What is in a table, and why.
pub(super) struct Chosen {
    pub(super) rows: Rows,
    /// Which group of endpoints they are from; none when there is no choice.
    pub(super) group: Option<u8>,
    /// Whether those are among them whose checks fail, though others are usable: too few are.
    pub(super) panics: bool,
}

/// The rows of one table. The backends are sorted by key, so those of a port are a slice.
pub(super) fn rows(
    found: &[Found],
    table: TableKey,
    service: &Service,
    before: Option<u8>,
) -> Chosen {
    let refuse = |reason| Chosen { rows: Rows::Refuse(reason), group: None, panics: false };
    let of_port = |found: &Found| (found.backend.key.port, found.backend.key.protocol);
    let first = found.partition_point(|f| of_port(f) < (table.port, table.protocol));
    let end = found.partition_point(|f| of_port(f) <= (table.port, table.protocol));
    let of_family = |&i: &usize| found[i].backend.key.address.is_ipv4() == table.v4;
    let all: Vec<usize> = (first..end).filter(of_family).collect();
    if all.is_empty() {
        return refuse(Reason::NoEndpoint);
    }
    let weighted: Vec<usize> = all.into_iter().filter(|&i| found[i].backend.weight > 0).collect();
    if weighted.is_empty() {
        return refuse(Reason::NoWeight);
    }
    if let Some(group) = group(found, &weighted, service.fallback(), before) {
        let members: Vec<usize> =
            weighted.iter().copied().filter(|&i| found[i].group == group).collect();
        let taken = with_failing(found, &members, service.panic_threshold);
        let panics = matches!(taken, Cow::Owned(_));
        let found = &taken;
        let mut candidates = weigh(found, &members, service.locality);
        // Nobody else would find out that what comes before is back.
        let before = weighted.iter().copied().filter(|&i| found[i].group < group);
        await_return(found, before, &mut candidates);
        // The kernel looks at those without a weight when all others are out.
        candidates.sort_by_key(|candidate| (candidate.weight == 0, candidate.place));
        return Chosen { rows: Rows::Candidates(candidates), group: Some(group), panics };
    }
    // What drains is well, and better than nothing (KEP-1669). The other service has its own rules.
    let own = || weighted.iter().copied().filter(|&i| found[i].group != FALLBACK);
    let draining: Vec<Candidate> = own()
        .filter(|&i| found[i].condition.state == State::Draining)
        .map(|i| plain(found, i))
        .collect();
    let rows = match service.when_all_unhealthy {
        _ if !draining.is_empty() => Rows::Candidates(draining),
        WhenAllUnhealthy::Refuse => Rows::Refuse(Reason::AllUnhealthy),
        WhenAllUnhealthy::UseAll => {
            let all: Vec<Candidate> = own().map(|i| plain(found, i)).collect();
            if all.is_empty() { Rows::Refuse(Reason::AllUnhealthy) } else { Rows::Candidates(all) }
        }
    };
    // What was used before counts when any is usable again.
    Chosen { rows, group: before, panics: false }
}

/// What is known of the endpoints, but those of a group whose checks fail are taken for usable while less of
/// it is than the threshold, in per cent by weight: so few could not bear what comes to all. What drains
/// does so on purpose, and what another service's checks found is that one's business.
fn with_failing<'f>(found: &'f [Found], members: &[usize], threshold: u8) -> Cow<'f, [Found]> {
    let sum = |of: &dyn Fn(Condition) -> bool| -> u64 {
        let some = members.iter().filter(|&&i| of(found[i].condition));
        some.map(|&i| u64::from(found[i].backend.weight)).sum()
    };
    let all = sum(&|condition| condition.state != State::Draining);
    let fails =
        |&i: &usize| found[i].condition.state == State::Unhealthy && found[i].group != FALLBACK;
    let suffices = sum(&serves) * 100 >= u64::from(threshold) * all;
    if suffices || !members.iter().any(fails) {
        return Cow::Borrowed(found);
    }
    let mut taken = found.to_vec();
    for &i in members.iter().filter(|i| fails(i)) {
        taken[i].condition.state = State::Unknown;
    }
    Cow::Owned(taken)
}

/// With its own weight.
fn plain(found: &[Found], place: usize) -> Candidate {
    Candidate { place, weight: found[place].backend.weight }
}

/// Whether connects can go there now, as far as it counts for which endpoints are used.
const fn serves(condition: Condition) -> bool {
    condition.state.is_usable() && !condition.is_out
}

/// The group that is used: the first of which a large enough share serves, by weight; a larger one is
/// needed to come back from a later group than to stay. If there is none, the first of which any serves,
/// then the first of which any is usable, and none if no endpoint is.
fn group(found: &[Found], places: &[usize], policy: Fallback, before: Option<u8>) -> Option<u8> {
    let mut groups: Vec<u8> = places.iter().map(|&i| found[i].group).collect();
    groups.sort_unstable();
    groups.dedup();
    let members =
        |group: u8| places.iter().map(|&i| found[i]).filter(move |found| found.group == group);
    let suffices = |&group: &u8| {
        let sum = |of: &dyn Fn(&Found) -> bool| -> u64 {
            members(group).filter(of).map(|found| u64::from(found.backend.weight)).sum()
        };
        let (all, serving) = (sum(&|_| true), sum(&|found| serves(found.condition)));
        let share =
            if before.is_some_and(|before| group < before) { policy.back } else { policy.below };
        serving > 0 && serving * 100 >= u64::from(share) * all
    };
    let is_usable = |&group: &u8| members(group).any(|found| found.condition.state.is_usable());
    let fits = if groups.len() > 1 { groups.iter().copied().find(suffices) } else { None };
    let any_serves = |&group: &u8| members(group).any(|found| serves(found.condition));
    fits.or_else(|| groups.iter().copied().find(any_serves))
        .or_else(|| groups.into_iter().find(is_usable))
}

/// The usable ones of a group, with their weights.
fn weigh(found: &[Found], members: &[usize], locality: Option<Locality>) -> Vec<Candidate> {
    let usable: Vec<usize> =
        members.iter().copied().filter(|&i| found[i].condition.state.is_usable()).collect();
    // When all are out, distance does not help.
    let loads = locality.and_then(|locality| loads(found, members, locality));
    let ramp = |i: usize| found[i].condition.ramp.clamp(1, Condition::FULL);
    let alike = usable.iter().all(|&i| ramp(i) == ramp(usable[0]));
    // The distance, and what all at that distance get.
    let level =
        |i: usize| loads.map_or((0, ONE), |loads| (found[i].distance, loads[found[i].distance]));
    let whole = |i: &usize| matches!(level(*i).1, 0 | ONE);
    let mut candidates: Vec<Candidate> = if alike && usable.iter().all(whole) {
        let candidate = |i: usize| match level(i).1 {
            0 => Candidate { place: i, weight: 0 },
            _ => plain(found, i),
        };
        usable.iter().map(|&i| candidate(i)).collect()
    } else {
        let effective = |i: usize| u128::from(found[i].backend.weight) * u128::from(ramp(i));
        let mut sums = [0u128; 3];
        for &i in &usable {
            sums[level(i).0] += effective(i);
        }
        let exact = |i: usize| {
            let (distance, load) = level(i);
            ((effective(i) * u128::from(load)) << 32) / sums[distance].max(1)
        };
        let largest = usable.iter().map(|&i| exact(i)).max().unwrap_or_default().max(1);
        // Rounded to nearest, and what has a share keeps one.
        let weight = |exact: u128| match exact {
            0 => 0,
            exact => ((exact * MOST * 2 + largest) / (largest * 2)).clamp(1, MOST),
        };
        let weight = |i: usize| u16::try_from(weight(exact(i))).unwrap_or(u16::MAX);
        usable.iter().map(|&i| Candidate { place: i, weight: weight(i) }).collect()
    };
    let unused: Vec<usize> =
        candidates.extract_if(.., |candidate| candidate.weight == 0).map(|c| c.place).collect();
    let (out, rest): (Vec<usize>, Vec<usize>) =
        unused.into_iter().partition(|&i| found[i].condition.is_out);
    await_return(found, out.into_iter(), &mut candidates);
    candidates.extend(rest.into_iter().map(|place| Candidate { place, weight: 0 }));
    candidates
}

/// Adds those of these that the kernel has out, and would not meet for want of a weight: with a tenth of
/// the largest one. While they are out it passes them by, and when they are due for a try it tries them.
fn await_return(
    found: &[Found],
    places: impl Iterator<Item = usize>,
    candidates: &mut Vec<Candidate>,
) {
    let largest = candidates.iter().map(|candidate| candidate.weight).max().unwrap_or(1);
    let weight = (largest / 10).max(1);
    let waits = |&i: &usize| found[i].condition.state.is_usable() && found[i].condition.is_out;
    candidates.extend(places.filter(waits).map(|place| Candidate { place, weight }));
}

/// How much of all connects each distance gets. A nearer one gets all that it can take, which is
/// everything while the share of it that serves, by weight, is not below the threshold, and in proportion
/// less below it; the rest goes on to the next, and what nobody has room for where the rest goes. Nothing
/// when none serves.
fn loads(found: &[Found], members: &[usize], locality: Locality) -> Option<[u64; 3]> {
    let (mut all, mut serving) = ([0u64; 3], [0u64; 3]);
    for found in members.iter().map(|&i| found[i]) {
        let weight = u64::from(found.backend.weight);
        all[found.distance] += weight;
        serving[found.distance] += if serves(found.condition) { weight } else { 0 };
    }
    let mut left = ONE;
    let mut loads = [0; 3];
    for (load, (all, serving)) in loads.iter_mut().zip(all.into_iter().zip(serving)) {
        let whole = all * u64::from(locality.threshold);
        let takes = (serving * 100 * ONE).checked_div(whole).unwrap_or(0);
        *load = takes.min(left);
        left -= *load;
    }
    let taken = ONE - left;
    (taken > 0).then(|| loads.map(|load| load * ONE / taken))
}
