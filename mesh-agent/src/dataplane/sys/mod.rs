//! Raw system calls: the only unsafe code of the agent, each call with the argument why it is
//! sound.
#![expect(unsafe_code, reason = "the system calls that no crate offers are made here")]

pub mod attached;
mod call;
mod chunks;
mod elements;
pub mod heap;
pub mod inherited;
pub mod links;
mod mapped;
pub mod netns;

pub use chunks::set_maps;
pub use elements::Elements;
pub use mapped::{Flat, Mapped};
