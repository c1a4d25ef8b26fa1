//! Whether what was chosen so often is what choosing by weight gives.
//!
//! Each count is held against the binomial distribution itself, so that a weight of one beside 65,535 is
//! judged as rightly as equal ones: with a handful of choices expected, Pearson's statistic would not be.

use std::collections::BTreeMap;

use anyhow::{Result, ensure};

/// A count is not believed to be chance when one as far from what is due, on its side, has a lower
/// probability than this: of a thousand counts that are fair, one is, once in ten million runs.
const CREDIBLE: f64 = 1e-10;

/// How often each place was chosen.
pub type Counts = BTreeMap<String, u32>;

/// Demands that only these places were chosen, `times` times in all, and each as often as independent
/// choices by these weights make credible.
///
/// # Errors
///
/// They were not: then with all counts.
pub fn ensure_credible(seen: &Counts, due: &[(&str, f64)], times: u32) -> Result<()> {
    ensure_credible_beyond(seen, &Counts::new(), due, times)
}

/// As [`ensure_credible`], where some of each were no choice: those are left out.
///
/// # Errors
///
/// As [`ensure_credible`], or there were fewer.
pub fn ensure_credible_beyond(
    seen: &Counts,
    certain: &Counts,
    due: &[(&str, f64)],
    times: u32,
) -> Result<()> {
    let places: Vec<_> = due.iter().map(|(place, _)| *place).collect();
    ensure_places(seen, &places, times)?;
    let chosen = times - certain.values().sum::<u32>();
    let total: f64 = due.iter().map(|(_, weight)| weight).sum();
    for (place, weight) in due {
        let of = |counts: &Counts| counts.get(*place).copied().unwrap_or_default();
        let count = of(seen).checked_sub(of(certain));
        let chance = count.map_or(0.0, |count| tail(chosen, weight / total, count));
        ensure!(
            chance >= CREDIBLE,
            "{place}, of {due:?}: {seen:?}, {certain:?} of which for certain; so far out with a \
             probability of {chance:.1e}"
        );
    }
    Ok(())
}

/// Demands that each place was chosen exactly so often.
///
/// # Errors
///
/// It was not: then with all counts.
pub fn ensure_exact(seen: &Counts, due: &[(&str, u32)]) -> Result<()> {
    let places: Vec<_> = due.iter().map(|(place, _)| *place).collect();
    ensure_places(seen, &places, due.iter().map(|(_, times)| times).sum())?;
    for (place, due) in due {
        let count = seen.get(*place).copied().unwrap_or_default();
        ensure!(count == *due, "{place}: {count}, not {due}: {seen:?}");
    }
    Ok(())
}

fn ensure_places(seen: &Counts, places: &[&str], times: u32) -> Result<()> {
    ensure!(seen.values().sum::<u32>() == times, "not {times}: {seen:?}");
    ensure!(seen.keys().all(|place| places.contains(&&**place)), "somewhere else: {seen:?}");
    Ok(())
}

/// The probability that of so many choices as many or more have this outcome, if `count` is above what
/// is due, otherwise as many or fewer. Summed from the term of `count` outwards, away from the greatest:
/// each is smaller than the one before.
fn tail(of: u32, probability: f64, count: u32) -> f64 {
    let (n, p, k) = (f64::from(of), probability, f64::from(count));
    if p <= 0.0 || p >= 1.0 || count > of {
        return if k == n * p { 1.0 } else { 0.0 };
    }
    let ln_factorial = |n: u32| (1..=n).map(|i| f64::from(i).ln()).sum::<f64>();
    let ways = ln_factorial(of) - ln_factorial(count) - ln_factorial(of - count);
    let mut term = (ways + k * p.ln() + (n - k) * (1.0 - p).ln()).exp();
    let (mut sum, mut at, odds) = (0.0, k, p / (1.0 - p));
    let above = k >= n * p;
    // What is left when a term changes the sum no more is no part of it either.
    while sum + term > sum {
        sum += term;
        if above {
            term *= (n - at) / (at + 1.0) * odds;
            at += 1.0;
        } else {
            term *= at / (n - at + 1.0) / odds;
            at -= 1.0;
        }
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    fn near(one: f64, other: f64) -> bool {
        (one / other - 1.0).abs() < 1e-3
    }

    #[test]
    fn tails_are_those_of_the_binomial_distribution() {
        assert!(near(tail(10, 0.5, 10), 1.0 / 1024.0));
        assert!(near(tail(10, 0.5, 1), 11.0 / 1024.0));
        assert!(near(tail(4, 0.25, 1), 1.0 - 0.75f64.powi(4)), "as much as is due, or more");
        assert_eq!((tail(9, 0.0, 0), tail(9, 0.0, 1)), (1.0, 0.0));
        assert_eq!((tail(9, 1.0, 9), tail(9, 1.0, 8)), (1.0, 0.0));
        // Of a normal distribution, beyond six standard deviations: 9.87e-10.
        let six = tail(1_000_000, 0.5, 503_000);
        assert!((9.5e-10..1.05e-9).contains(&six) && near(six, tail(1_000_000, 0.5, 497_000)));
        // Of Poisson's with a mean of 1: e^-1 / 10!, and a tenth of that for what is beyond.
        assert!((0.9e-7..1.2e-7).contains(&tail(100_000, 1e-5, 10)));
    }

    #[test]
    fn what_is_off_is_found() {
        let counts = |a, b| Counts::from([("a".to_owned(), a), ("b".to_owned(), b)]);
        let due = [("a", 1.0), ("b", 2.0)];
        assert!(ensure_credible(&counts(33_500, 66_500), &due, 100_000).is_ok());
        assert!(ensure_credible(&counts(34_500, 65_500), &due, 100_000).is_err(), "3% of a share");
        assert!(ensure_credible(&counts(33_500, 66_500), &due, 99_999).is_err(), "another sum");
        assert!(ensure_credible(&counts(0, 9), &[("b", 1.0)], 9).is_err(), "a place of nobody");
        assert!(ensure_credible(&counts(1, 9), &[("a", 0.0), ("b", 1.0)], 10).is_err());
        assert!(
            ensure_credible(&counts(20, 99_980), &[("a", 1.0), ("b", 65_535.0)], 100_000).is_err()
        );
        let certain = counts(0, 50_000);
        assert!(ensure_credible_beyond(&counts(16_700, 83_300), &certain, &due, 100_000).is_ok());
        assert!(ensure_credible_beyond(&counts(50_001, 49_999), &certain, &due, 100_000).is_err());
        assert!(ensure_exact(&counts(1, 2), &[("a", 1), ("b", 2)]).is_ok());
        assert!(ensure_exact(&counts(2, 1), &[("a", 1), ("b", 2)]).is_err());
    }
}
