//! What the kernel programs and the agent share: the map layouts (their ABI) and the pure logic
//! that both sides run.
//!
//! Nothing here allocates, panics or calls the operating system, so the same code is verified by
//! the kernel, run by the agent (`explain`) and tested with properties on the host.
#![no_std]

#[cfg(test)]
extern crate std;

pub mod addr;
pub mod alias;
pub mod layout;
pub mod translate;
pub mod word;

pub use addr::Addr;
pub use layout::{
    ABI_VERSION, Backend, BackendStats, Flow, FrontendKey, FrontendValue, Protocol, Reason,
    Service, Settings, Slot, State, Table,
};
pub use translate::{Tables, Verdict, translate};
pub use word::Word;
