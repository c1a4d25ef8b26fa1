//! What the kernel programs tell as it happens, on its way to the engine: read from the ring
//! buffer, checked, and with the names of the cgroups that only the file system knows.

pub mod clients;
pub mod events;
pub mod units;
