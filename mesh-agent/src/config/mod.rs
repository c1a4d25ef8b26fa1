//! What operators write: the agent file and the service files.
//!
//! Both refuse what they do not know. A documented key that this version cannot serve is refused
//! by name: a file that is accepted means what it says.

mod agent;
mod checks;
mod ejection;
mod health;
mod service_file;
mod spread;
mod values;

pub use agent::{Config, ConfigError, DEFAULT_FILE, DEFAULT_SERVICES, Exclude, Source};
pub use service_file::{MAX_ADDRESSES, MAX_BACKENDS, MAX_PORTS, parse_services};
