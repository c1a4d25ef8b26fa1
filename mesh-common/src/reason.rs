//! Why connects are refused.

/// Why a connect was refused, or what else is counted. The numbers index `COUNTERS`.
#[repr(u8)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Reason {
    /// The service has no endpoint of this address family.
    NoEndpoint = 0,
    /// Every endpoint has weight 0.
    NoWeight = 1,
    /// Every endpoint is unhealthy, and the service says `when-all-unhealthy: refuse`.
    AllUnhealthy = 2,
    /// The address is inside `virtual-ips` and belongs to no service.
    NoService = 3,
    /// The address is inside `virtual-ips` and its service does not list this port.
    NoPort = 4,
    /// The tables changed under the program at each of its attempts.
    Contended = 5,
    /// The tables named something that does not exist: a defect, or a damaged map.
    Corrupt = 6,
    /// The service has endpoints, but the maps have no room for any of them.
    NoRoom = 7,
}

impl Reason {
    /// All of them, in the order of their numbers.
    pub const ALL: [Self; 8] = [
        Self::NoEndpoint,
        Self::NoWeight,
        Self::AllUnhealthy,
        Self::NoService,
        Self::NoPort,
        Self::Contended,
        Self::Corrupt,
        Self::NoRoom,
    ];

    /// From its number; an unknown number is [`Reason::Corrupt`].
    #[inline(always)]
    #[must_use]
    pub const fn from_number(number: u8) -> Self {
        match number {
            0 => Self::NoEndpoint,
            1 => Self::NoWeight,
            2 => Self::AllUnhealthy,
            3 => Self::NoService,
            4 => Self::NoPort,
            5 => Self::Contended,
            7 => Self::NoRoom,
            _ => Self::Corrupt,
        }
    }

    /// The name used in tables, JSON and metrics.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::NoEndpoint => "no-endpoint",
            Self::NoWeight => "no-weight",
            Self::AllUnhealthy => "all-unhealthy",
            Self::NoService => "no-service",
            Self::NoPort => "no-port",
            Self::Contended => "contended",
            Self::Corrupt => "corrupt",
            Self::NoRoom => "no-room",
        }
    }

    /// What it means, for people.
    #[must_use]
    pub const fn describe(self) -> &'static str {
        match self {
            Self::NoEndpoint => "the service has no endpoint of this address family",
            Self::NoWeight => "every endpoint of the service has weight 0",
            Self::AllUnhealthy => {
                "every endpoint is unhealthy and the service says when-all-unhealthy: refuse"
            }
            Self::NoService => "the address is inside virtual-ips and belongs to no service",
            Self::NoPort => {
                "the address is inside virtual-ips and its service does not list this port"
            }
            Self::Contended => "the tables changed during each of the program's attempts",
            Self::Corrupt => "the tables name something that does not exist",
            Self::NoRoom => "the maps have no room for any endpoint of the service",
        }
    }
}
