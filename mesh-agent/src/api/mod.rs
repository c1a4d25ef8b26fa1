//! The agent's API: JSON over HTTP on a unix socket, and its types.

pub mod types;
