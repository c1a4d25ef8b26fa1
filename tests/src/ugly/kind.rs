//! Which kinds of connections there are, and how often each is made.

/// What a connection is going to be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// Asks, is answered, and closes in order.
    Success,
    /// Asks with the SYN, by TCP fast open.
    FastOpen,
    /// The client resets.
    ClientReset,
    /// The server resets before it answers.
    ServerReset,
    /// The server answers and resets.
    LateReset,
    /// The server closes without an answer, in order.
    Unanswered,
    /// The port is closed.
    Refused,
    /// No packet is answered.
    Timeout,
    /// A firewall answers.
    Unreachable,
    /// No connect at all.
    Unconnected,
    /// Closed while it connects.
    ClosedConnecting,
    /// The same socket again after a failure.
    Again,
    /// The same socket elsewhere.
    Elsewhere,
    /// Dissolved after it was connected.
    Dissolved,
    /// Dissolved while it connects.
    DissolvedConnecting,
    /// No route.
    NoRoute,
    /// No port.
    AddressTaken,
    /// connect(2) on a socket that is connected, or connects.
    Busy,
    /// A service with backends of all kinds.
    Mixed,
    /// A service whose endpoints change.
    Changing,
    /// Stays open.
    Held,
    /// Another process has the socket too.
    Forked,
    /// Another process closes it.
    Passed,
    /// It is closed while it is on its way to another process.
    Abandoned,
    /// Its process is killed.
    Killed,
    /// Its process is killed, and its network namespace ends.
    NamespaceGone,
}

/// How often each kind is, in 10,000.
pub const WEIGHTS: [(Kind, u32); 26] = [
    (Kind::Success, 2_500),
    (Kind::FastOpen, 100),
    (Kind::ClientReset, 1_000),
    (Kind::ServerReset, 800),
    (Kind::LateReset, 500),
    (Kind::Unanswered, 200),
    (Kind::Refused, 800),
    (Kind::Timeout, 50),
    (Kind::Unreachable, 50),
    (Kind::Unconnected, 300),
    (Kind::ClosedConnecting, 500),
    (Kind::Again, 400),
    (Kind::Elsewhere, 300),
    (Kind::Dissolved, 400),
    (Kind::DissolvedConnecting, 200),
    (Kind::NoRoute, 400),
    (Kind::AddressTaken, 150),
    (Kind::Busy, 150),
    (Kind::Mixed, 600),
    (Kind::Changing, 400),
    (Kind::Held, 60),
    (Kind::Forked, 30),
    (Kind::Passed, 80),
    (Kind::Abandoned, 25),
    (Kind::Killed, 4),
    (Kind::NamespaceGone, 1),
];

// === impl Kind ===

impl Kind {
    /// One of them, by weight.
    pub fn draw(random: &mut fastrand::Rng) -> Self {
        let mut left = random.u32(0..WEIGHTS.iter().map(|(_, weight)| weight).sum());
        for (kind, weight) in WEIGHTS {
            if left < weight {
                return kind;
            }
            left -= weight;
        }
        Self::Success
    }
}
