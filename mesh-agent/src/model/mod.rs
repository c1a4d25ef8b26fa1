//! Plain types: what a service is, independent of where it came from and of how the kernel holds
//! it.

mod service;

pub use service::{
    Affinity, EjectionPolicy, Endpoint, Fallback, HealthCheck, HealthPolicy, Locality, Service,
    ServiceName, ServicePort, WhenAllUnhealthy,
};
