//! Whether the numbers are as even, and as independent of those before, as those of a die: Pearson's
//! chi-squared over the cookies and times that occur. Nothing here is left to chance: the same
//! numbers are judged each time.

use std::vec::Vec;

use super::*;
use crate::alias;

/// How many numbers each test looks at.
const DRAWS: u64 = 120_000;

/// How many columns a table of backends has.
const TABLES: [u32; 5] = [2, 3, 7, 100, 1000];

/// How many in a row a CPU gives out (`COOKIE_LOCAL_BATCH` of include/linux/cookie.h).
const BATCH: u64 = 4096;

/// The first jiffy (`INITIAL_JIFFIES` with 250 in a second), and one of a node that runs for a year.
const TIMES: [u64; 3] = [0, 0xffff_ffff - 300 * 250, 0xffff_ffff + 365 * 86_400 * 250];

/// None, and others.
const SALTS: [u64; 3] = [0, 0x0123_4567_89ab_cdef, 0x5851_f42d_4c95_7f2d];

/// Columns of sockets, in the order in which they connect: the cookie and the time of each.
type Sockets = fn(u64) -> (u64, u64);

/// One CPU counts up.
fn in_order(n: u64) -> (u64, u64) {
    (n + 1, 0)
}

/// Each interrupts the one before: those count down (`gen_cookie_next`).
fn in_reverse(n: u64) -> (u64, u64) {
    (u64::MAX - n, 0)
}

/// Eight CPUs take turns; each counts up in batches of its own.
fn by_turns(n: u64) -> (u64, u64) {
    let (cpu, turn) = (n % 8, n / 8);
    ((turn / BATCH * 8 + cpu) * BATCH + turn % BATCH + 1, 0)
}

/// The same, down.
fn by_turns_in_reverse(n: u64) -> (u64, u64) {
    let (cpu, turn) = (n % 8, n / 8);
    ((turn / BATCH * 8 + cpu + 1) * BATCH - turn % BATCH, 0)
}

/// Every other socket of the machine is ours.
fn every_other(n: u64) -> (u64, u64) {
    (2 * n + 1, 0)
}

/// One for each CPU's batch.
fn one_of_a_batch(n: u64) -> (u64, u64) {
    (n * BATCH + 1, 0)
}

/// One socket tries again, each jiffy.
fn again(n: u64) -> (u64, u64) {
    (77_777, n)
}

/// One socket a jiffy.
fn slowly(n: u64) -> (u64, u64) {
    (n + 1, n)
}

/// A hundred sockets a jiffy.
fn fast(n: u64) -> (u64, u64) {
    (n + 1, n / 100)
}

const ORDERS: [(&str, Sockets); 9] = [
    ("in order", in_order),
    ("in reverse", in_reverse),
    ("by turns", by_turns),
    ("by turns in reverse", by_turns_in_reverse),
    ("every other", every_other),
    ("one of a batch", one_of_a_batch),
    ("again", again),
    ("slowly", slowly),
    ("fast", fast),
];

/// How far counts that should be equal are off, in standard deviations: chi-squared brought to the
/// normal distribution (E. Wilson, M. Hilferty 1931).
#[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
fn off(counts: &[u32]) -> f64 {
    let total: u64 = counts.iter().map(|&count| u64::from(count)).sum();
    let expected = total as f64 / counts.len() as f64;
    let chi: f64 = counts.iter().map(|&count| (f64::from(count) - expected).powi(2)).sum();
    let freedom = counts.len() as f64 - 1.0;
    let spread = 2.0 / (9.0 * freedom);
    ((chi / expected / freedom).cbrt() - (1.0 - spread)) / spread.sqrt()
}

/// Counts what `cell` makes of each order, time and salt, and asserts that the cells are even:
/// within five standard deviations, which one of 3,000,000 is not by chance.
fn assert_even(cells: u32, what: &str, cell: impl Fn(&dyn Fn(u64) -> u32, u64) -> u32, draws: u64) {
    let mut worst: f64 = 0.0;
    for (name, sockets) in ORDERS {
        for (time, salt) in TIMES.into_iter().zip(SALTS) {
            let number = |n| {
                let (cookie, later) = sockets(n);
                mix(cookie, time + later, salt)
            };
            let mut counts: Vec<u32> = std::vec![0; cells as usize];
            for n in 0..draws {
                counts[cell(&number, n) as usize] += 1;
            }
            let off = off(&counts);
            assert!(off.abs() < 5.0, "{what}, {name}, from {time}: {off:.1} deviations off");
            worst = worst.max(off.abs());
        }
    }
    std::eprintln!("{what}: at most {worst:.1} deviations off");
}

#[test]
fn every_column_is_drawn_alike() {
    for len in TABLES {
        let what = std::format!("{len} columns");
        assert_even(len, &what, |number, n| alias::column(number(n), len).0, DRAWS);
    }
}

/// Where the column is given, its backend and its alias share it by position.
#[test]
fn every_position_is_drawn_alike() {
    for len in TABLES {
        let what = std::format!("positions of {len} columns");
        let cell = |number: &dyn Fn(u64) -> u32, n| {
            let (column, position) = alias::column(number(n), len);
            column * 8 + (position >> 29)
        };
        assert_even(len * 8, &what, cell, DRAWS);
    }
}

/// What one socket draws says nothing about what the next ones draw.
#[test]
fn one_draw_says_nothing_about_the_next() {
    for len in [2, 3, 7, 100] {
        for apart in [1, 2, 8, BATCH] {
            let what = std::format!("{len} columns, {apart} apart");
            // Pairs that have no draw in common.
            let cell = |number: &dyn Fn(u64) -> u32, pair| {
                let first = pair / apart * 2 * apart + pair % apart;
                let column = |n| alias::column(number(n), len).0;
                column(first) * len + column(first + apart)
            };
            assert_even(len * len, &what, cell, DRAWS / 2);
        }
    }
}

/// Six in a row, of two backends.
#[test]
fn runs_are_as_long_as_chance_makes_them() {
    let cell = |number: &dyn Fn(u64) -> u32, n: u64| {
        (0..6).fold(0, |bits, step| bits << 1 | number(n * 6 + step) >> 31)
    };
    assert_even(64, "six in a row", cell, DRAWS / 6);
}

/// Nodes that differ in nothing but the salt choose independently.
#[test]
fn nodes_do_not_choose_alike() {
    for other in [1, 0x8000_0000_0000_0000, 0x0123_4567_89ab_cdef] {
        let mut counts = [0; 49];
        for cookie in 1..=DRAWS {
            let column = |salt| alias::column(mix(cookie, 5, salt), 7).0;
            counts[(column(0) * 7 + column(other)) as usize] += 1;
        }
        let off = off(&counts);
        assert!(off.abs() < 5.0, "salt {other:#x}: {off:.1} deviations off");
    }
}
