//! The kernel's side of the agent: loading the programs, and keeping their maps in step with what
//! the compiler wants.

mod alloc;
mod btf;
mod chunks;
pub mod clock;
mod contents;
mod description;
pub mod exclusions;
pub mod fault;
pub mod footprint;
pub mod grace;
mod handover;
pub mod kernel;
pub mod load;
pub mod maps;
pub mod memory;
pub mod opened;
pub mod pindir;
pub mod pins;
pub mod programs;
pub mod reconcile;
pub mod records;
pub mod sys;
pub mod units;
