//! What the kernel programs and the agent share: the map layouts (their ABI) and the pure logic
//! that both sides run.
//!
//! Nothing here allocates, panics or calls the operating system, so the same code is verified by
//! the kernel, run by the agent (`explain`) and tested with properties on the host.
#![no_std]
#![cfg_attr(target_arch = "bpf", feature(asm_experimental_arch))]
#![cfg_attr(
    target_arch = "bpf",
    expect(unstable_features, reason = "atomic instructions need inline assembly")
)]

#[cfg(test)]
extern crate std;

pub mod addr;
pub mod affinity;
pub mod alias;
mod backend;
pub mod balance;
pub mod chance;
pub mod datagram;
pub mod ejection;
pub mod event;
pub mod flow;
pub mod latency;
pub mod layout;
pub mod limits;
pub mod maglev;
pub mod rate;
pub mod reason;
pub mod socket;
pub mod stats;
pub mod translate;
pub mod word;

pub use addr::Addr;
pub use affinity::{Affinity, Pin, PinKey};
pub use balance::Algorithm;
pub use ejection::{Client, Ejection, Policy, Token};
pub use event::Event;
pub use flow::{Flow, Given, Held, Origin, Places, Role};
pub use layout::{
    ABI_VERSION, Backend, Elsewhere, FrontendKey, FrontendValue, Marks, Name, Protocol, Reason,
    Service, Settings, Slot, State, Table,
};
pub use limits::{Limits, chunk};
pub use rate::{Rate, Window};
pub use stats::{BackendStats, Failure, ServiceStats};
pub use translate::{Caller, Choice, Tables, Verdict, translate};
pub use word::{Half, Word};
