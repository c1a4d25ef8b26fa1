//! What clients saw of endpoints that failed, out of the records of their connects.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::bounds::{BASE, LATE, TICK, silence};
use crate::mortal::scene::tells;
use crate::mortal::server::BROKEN;
use crate::mortal::storm::Trial;

/// An endpoint that failed. Times are `CLOCK_MONOTONIC` in nanoseconds.
#[derive(Clone, Copy, Debug)]
pub struct Victim {
    /// Its name.
    pub name: &'static str,
    /// Where connects to it come from.
    pub source: IpAddr,
    /// When it failed.
    pub from: u64,
    /// When it worked again.
    pub back: u64,
}

/// When a client is through with an endpoint.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Leaves {
    /// With the first failure that it sees, or two others see: an application learns of a refused connect
    /// at once.
    AtOnce,
    /// When one of its connects has sent its SYN the third time.
    WhenSilent,
    /// When the checks have found it: what connects do tells nothing.
    WhenChecked,
    /// Never: all others have failed too.
    Never,
}

/// A packet that is lost is sent again after a second (RFC 6298); timers may be that early.
const AGAIN: Duration = Duration::from_millis(990);

/// What it has cost.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Damage {
    /// From the failure to the last connect that failed and was no try.
    pub last: Duration,
    /// Failed connects, by client.
    pub failed: Vec<u64>,
    /// Connects that went there, one by one, to find out whether it works again.
    pub tries: u64,
    /// Connects that went there though it was out, and no try was due.
    pub leaks: u64,
    /// From when it worked again to its first answer.
    pub back: Duration,
    /// Connects that began when it worked again, and failed.
    pub relapses: u64,
}

/// Whether a connect did not give its client what it wanted, or not before a packet was sent again.
#[must_use]
pub fn is_failure(trial: &Trial) -> bool {
    let waited = Duration::from_nanos(trial.end.saturating_sub(trial.start));
    trial.error.is_some() || trial.backend.as_deref() == Some(BROKEN) || waited >= AGAIN
}

impl Damage {
    /// What one endpoint has cost `clients`, and when it was back.
    ///
    /// # Errors
    ///
    /// It was not used before, or never again.
    pub fn of(victim: Victim, leaves: Leaves, clients: &[Vec<Trial>]) -> Result<Self> {
        let Victim { name, from, back, .. } = victim;
        let answered = |trial: &&Trial| trial.backend.as_deref() == Some(name);
        let all = || clients.iter().flatten().filter(answered);
        let before = all().filter(|trial| trial.end < from).count();
        ensure!(before > 10, "{name} was not used before: {before} connects");
        let again = all().filter(|trial| trial.start >= back).map(|trial| trial.end).min();
        let again = again.with_context(|| format!("{name} is never used again"))?;
        let back = Duration::from_nanos(again - back);
        Ok(Self { back, ..Self::meanwhile(victim, leaves, clients) })
    }

    /// What it has cost until it worked again.
    #[must_use]
    pub fn meanwhile(victim: Victim, leaves: Leaves, clients: &[Vec<Trial>]) -> Self {
        let Victim { source, from, back, .. } = victim;
        let there = |trial: &&Trial| trial.source == Some(source);
        let failed = |trial: &&Trial| is_failure(trial) && trial.end >= from && trial.start < back;
        let failures: Vec<Vec<&Trial>> = clients
            .iter()
            .map(|trials| trials.iter().filter(there).filter(failed).collect())
            .collect();
        let mut damage = Self {
            failed: failures.iter().map(|failures| failures.len() as u64).collect(),
            relapses: clients
                .iter()
                .flatten()
                .filter(there)
                .filter(|trial| trial.start >= back && is_failure(trial))
                .count() as u64,
            ..Self::default()
        };
        for (number, own) in failures.iter().enumerate() {
            let out = out(leaves, number, &failures);
            for trial in own {
                match out {
                    Some(out) if trial.start > out.due => damage.tries += 1,
                    Some(out) if trial.start > out.from => damage.leaks += 1,
                    _ => {
                        let after = Duration::from_nanos(trial.start.saturating_sub(from));
                        damage.last = damage.last.max(after);
                    }
                }
            }
        }
        damage
    }

    /// Adds that of another endpoint.
    #[must_use]
    pub fn and(mut self, other: &Self) -> Self {
        self.last = self.last.max(other.last);
        self.back = self.back.max(other.back);
        self.tries += other.tries;
        self.leaks += other.leaks;
        self.relapses += other.relapses;
        self.failed.resize(self.failed.len().max(other.failed.len()), 0);
        for (sum, more) in self.failed.iter_mut().zip(&other.failed) {
            *sum += more;
        }
        self
    }
}

/// From when on an endpoint is out for a client, and from when on one connect may try it.
#[derive(Clone, Copy, Debug)]
struct Out {
    from: u64,
    due: u64,
}

fn out(leaves: Leaves, number: usize, failures: &[Vec<&Trial>]) -> Option<Out> {
    let nanos = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
    let alone = nanos(BASE) - nanos(TICK);
    match leaves {
        Leaves::AtOnce => {
            // The first failure of each client, by when it was seen; with the second one all know.
            let seen = |own: &Vec<&Trial>| own.iter().filter(|t| tells(t)).map(|t| t.end).min();
            let mut all: Vec<u64> = failures.iter().filter_map(seen).collect();
            all.sort_unstable();
            let own = failures.get(number).and_then(seen);
            let from = own.into_iter().chain(all.get(1).copied()).min()?;
            // The kernel may have seen it at any time of that connect.
            let began = failures.iter().flatten().filter(|trial| trial.end <= from);
            let began = began.map(|trial| trial.start).min().unwrap_or(from);
            Some(Out { from, due: began + alone })
        }
        Leaves::WhenSilent => {
            let began = |own: &Vec<&Trial>| own.iter().map(|trial| trial.start).min();
            let own = failures.get(number).and_then(began)?;
            // Who met it first may be the first to try it.
            let first = failures.iter().filter_map(began).min()?;
            let silence = nanos(silence());
            Some(Out { from: own + silence + nanos(LATE), due: first + silence + alone })
        }
        Leaves::WhenChecked | Leaves::Never => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;

    const MILLI: u64 = 1_000_000;
    const SOURCE: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 2));

    fn trial(start: u64, end: u64, answered: bool) -> Trial {
        let backend = answered.then(|| "b".to_owned());
        let error = (!answered).then(|| "connect: ECONNREFUSED".to_owned());
        Trial { start: start * MILLI, end: end * MILLI, source: Some(SOURCE), backend, error }
    }

    fn damage(leaves: Leaves, one: &[(u64, u64)], two: &[(u64, u64)]) -> Damage {
        let client = |failures: &[(u64, u64)]| {
            let before = (0..20).map(|n| trial(n, n + 1, true));
            let failures = failures.iter().map(|&(start, end)| trial(start, end, false));
            before.chain(failures).chain([trial(9_500, 9_501, true)]).collect::<Vec<_>>()
        };
        let victim = Victim { name: "b", source: SOURCE, from: 100 * MILLI, back: 9_000 * MILLI };
        Damage::of(victim, leaves, &[client(one), client(two)]).expect("used before and after")
    }

    #[test]
    fn in_flight_tries_and_leaks_are_told_apart() {
        // Under way when it failed; the first; a try a second later.
        let found = damage(Leaves::AtOnce, &[(99, 100), (110, 111), (1_120, 1_121)], &[]);
        assert_eq!((found.failed.clone(), found.tries, found.leaks), (vec![3, 0], 1, 1));
        let found = damage(Leaves::AtOnce, &[(110, 111), (1_120, 1_121)], &[(111, 112)]);
        assert_eq!((found.failed.clone(), found.tries, found.leaks), (vec![2, 1], 1, 0));
        assert_eq!(found.last, Duration::from_millis(11));
        assert_eq!(found.back, Duration::from_millis(501));
        // Two have seen it; a third connect of either is one too many.
        let found = damage(Leaves::AtOnce, &[(110, 111)], &[(111, 112), (113, 114)]);
        assert_eq!((found.tries, found.leaks), (0, 1));
    }

    #[test]
    fn silence_takes_two_retransmissions() {
        let silent = u64::try_from(silence().as_millis()).expect("small");
        let found = damage(
            Leaves::WhenSilent,
            &[(110, 6_110), (105 + silent, 8_000), (1_110 + silent, 8_500)],
            &[],
        );
        assert_eq!((found.tries, found.leaks), (1, 0));
        assert_eq!(found.last, Duration::from_millis(5 + silent));
    }

    #[test]
    fn a_try_is_due_for_all_alike() {
        let silent = u64::try_from(silence().as_millis()).expect("small");
        // That is less than a second after it is out for the second one, and not for the first one.
        let tried = [(190, 6_190), (1_110 + silent, 8_500)];
        let found = damage(Leaves::WhenSilent, &[(110, 6_110)], &tried);
        assert_eq!((found.tries, found.leaks), (1, 0));
        let found =
            damage(Leaves::WhenSilent, &[(110, 6_110)], &[(190, 6_190), (1_050 + silent, 8_500)]);
        assert_eq!((found.tries, found.leaks), (0, 1));
    }

    #[test]
    fn one_that_is_not_used_proves_nothing() {
        let victim = Victim { name: "b", source: SOURCE, from: 100 * MILLI, back: 900 * MILLI };
        assert!(Damage::of(victim, Leaves::AtOnce, &[vec![trial(0, 1, true)]]).is_err());
    }
}
