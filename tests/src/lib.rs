//! End-to-end tests: real programs in network namespaces and cgroups against the real agent and
//! kernel.
//!
//! A [`Node`] is one node in miniature: a network namespace without a default route, a cgroup whose
//! sockets are balanced, named backends ([`server`]), and the agent as a person would start it
//! ([`agent`]). A test builds one, runs a client in it, and asserts *who* answered: that something
//! answered proves nothing. Its control is the same client with the agent stopped
//! ([`check::balanced`]).
//!
//! Nothing is skipped: a missing privilege, program or kernel feature is a failure that says what
//! is missing. Nothing is left behind, however a test ends: see [`cgroup`].

pub mod agent;
pub mod certified;
pub mod cgroup;
pub mod check;
pub mod client;
pub mod datagram;
pub mod later;
pub mod limited;
pub mod long;
pub mod matrix;
pub mod mortal;
pub mod node;
pub mod process;
pub mod relay;
pub mod replaced;
pub mod restarts;
pub mod selections;
pub mod server;
pub mod service;
pub mod shares;
pub mod storm;
pub mod sys;
pub mod ugly;
pub mod withheld;

pub use agent::Agent;
pub use datagram::Datagrams;
pub use later::Later;
pub use node::{Builder, Node};
pub use service::Service;
pub use withheld::Withheld;
