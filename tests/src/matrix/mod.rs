//! What happens when something fails: every kind of failure, measured with the defaults, each figure beside
//! what it may be at the most. For `cargo xtask matrix`, and in a shorter form for the tests.

pub mod bounds;
pub mod clock;
pub mod course;
pub mod damage;
pub mod figure;
pub mod flapping;
pub mod rows;
pub mod slow;
pub mod stage;

/// How much of it.
#[derive(Clone, Copy, Debug)]
pub struct Size {
    /// Connects of the healthy run.
    pub connects: u64,
}
