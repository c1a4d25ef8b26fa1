//! The agent's API: JSON over HTTP on a unix socket, its types, both ends of it, and the socket.

pub mod client;
pub mod server;
pub mod socket;
pub mod types;

#[cfg(test)]
mod tests;
