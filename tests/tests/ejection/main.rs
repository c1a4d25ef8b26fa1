//! Backends die, and clients lie: what the kernel programs conclude from the connects that fail.
//!
//! A backend that fails leaves rotation at its first failure, for the client that saw it, and for
//! all when another client saw it as well; it comes back by a single connect that tries it. What a
//! client does to itself is not held against a backend.

mod clients;
mod death;
mod flaps;
mod healthy;
mod rates;
mod rejects;
mod rules;
mod silence;

use mesh_tests::mortal::{lan, scene};
