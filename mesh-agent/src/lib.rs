//! The node agent.
//!
//! Data goes one way: sources ([`discovery`]) → [`catalog`] → [`compile`] → reconciler
//! ([`dataplane`]) → kernel. A source never writes a map, the compiler never does I/O, the
//! reconciler never decides policy.

pub mod agent;
pub mod api;
pub mod audit;
pub mod canary;
pub mod catalog;
pub mod check;
pub mod claim;
pub mod cli;
pub mod commands;
pub mod compile;
pub mod config;
pub mod connections;
pub mod dataplane;
pub mod discovery;
pub mod engine;
pub mod explain;
pub mod health;
pub mod inspect;
pub mod metrics;
pub mod model;
pub mod observe;
pub mod patience;
pub mod privileges;
pub mod signals;
pub mod supervisor;
mod text;
pub mod upkeep;
pub mod yaml;
