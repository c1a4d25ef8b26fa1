//! Connections of every ugly kind, and an account of them that is independent of the kernel
//! programs: what the client itself saw.
//!
//! Each kind has services of its own with a single backend, so that the client knows which backend
//! a connect was given to even when nobody answered. One service more has backends of all kinds,
//! told apart by how they end a connection; the endpoints of another one change all the while.
//!
//! * [`plan`]: services, backends, addresses.
//! * [`server`]: the backends.
//! * [`client`], [`kind`], `kinds`, [`others`], [`dial`]: the client.
//! * [`tally`]: its account.
//! * [`exact`]: runs all that on a node, and compares the client's account with the kernel's.

pub mod client;
pub mod dial;
pub mod exact;
pub mod kind;
mod kinds;
pub mod others;
pub mod plan;
pub mod server;
pub mod tally;
