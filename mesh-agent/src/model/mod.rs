//! Plain types: what a service is, independent of where it came from and of how the kernel holds
//! it.

mod health;
mod service;

pub use health::{
    Authorities, CommandCheck, Ending, GrpcCheck, Health, HealthCheck, HealthPolicy, HttpCheck,
    Pace, Tls, Trust,
};
pub use service::{
    Affinity, EjectionPolicy, Endpoint, Fallback, Locality, Service, ServiceName, ServicePort,
    WhenAllUnhealthy,
};
