//! What a socket's fields say.

use super::*;

/// `EPERM`, `EADDRNOTAVAIL`, `ENETUNREACH`, `ECONNABORTED`, `EPIPE`, `EPROTO`, `EMSGSIZE`.
const OTHERS: [i32; 7] = [1, 99, 101, 103, 32, 71, 90];

const SOMEBODY: [Option<Failure>; 3] = [None, Some(Failure::Refused), Some(Failure::Unreachable)];

/// What is seen of a socket, as words in a table.
fn seen(error: i32, words: &str) -> Seen {
    let mut seen = Seen { error, ..Seen::default() };
    for word in words.split_whitespace() {
        match word {
            "connected" => seen.connected = true,
            "answered" => seen.answered = true,
            "closed" => seen.closed = true,
            "disconnected" => seen.disconnected = true,
            "repeated" => seen.repeated = true,
            "unreachable" => seen.soft = Some(Failure::Unreachable),
            "refused" => seen.soft = Some(Failure::Refused),
            "said-unreachable" => seen.said = Some(Failure::Unreachable),
            "said-refused" => seen.said = Some(Failure::Refused),
            "told" => seen.told = true,
            "six" => seen.unqueued = true,
            other => panic!("no field is called {other}"),
        }
    }
    seen
}

/// All that can be seen of a socket with this error. What was answered was connected.
fn everything(error: i32) -> impl Iterator<Item = Seen> {
    (0u32..1152).map(move |number| {
        let [connected, answered, closed, disconnected, repeated, told, unqueued] =
            [0, 1, 2, 3, 4, 5, 6].map(|bit| number >> bit & 1 == 1);
        let answered = answered && connected;
        let [soft, said] = [number / 128 % 3, number / 384].map(|which| SOMEBODY[which as usize]);
        let seen = Seen { error, connected, answered, closed, disconnected, ..Seen::default() };
        Seen { repeated, soft, said, unqueued, told, ..seen }
    })
}

#[test]
fn errors() {
    use Outcome::{Failed, Nothing, Over};
    use errno::{EACCES, ECONNREFUSED, ECONNRESET, EHOSTUNREACH, ETIMEDOUT};
    let cases: [(i32, &str, Outcome); 26] = [
        // The SYN: a reset, nothing at all, an ICMP message or no neighbour.
        (ECONNREFUSED, "closed", Failed(Failure::Refused)),
        (ETIMEDOUT, "closed repeated", Failed(Failure::Timeout)),
        (ETIMEDOUT, "closed", Failed(Failure::Timeout)),
        (EHOSTUNREACH, "closed", Failed(Failure::Unreachable)),
        (EHOSTUNREACH, "", Failed(Failure::Unreachable)),
        // A firewall's ICMPv6 message.
        (EACCES, "", Failed(Failure::Unreachable)),
        (EACCES, "closed repeated", Failed(Failure::Unreachable)),
        (EACCES, "connected", Nothing),
        // After a time without an answer, this is what the kernel was told on the way.
        (EHOSTUNREACH, "closed repeated unreachable", Failed(Failure::Unreachable)),
        // Connected, and no byte came.
        (ETIMEDOUT, "connected closed repeated", Failed(Failure::Timeout)),
        (ETIMEDOUT, "connected", Failed(Failure::Timeout)),
        // It has served: how it ends is the application's affair.
        (ETIMEDOUT, "connected answered closed repeated", Over),
        (ECONNRESET, "connected answered closed", Over),
        // A peer's reset was seen before; what is left is this side's.
        (ECONNRESET, "connected closed", Over),
        (ECONNRESET, "connected", Over),
        // `AF_UNSPEC` and `SO_LINGER` 0 report this after the counters were reset.
        (ECONNRESET, "closed disconnected", Over),
        (ECONNRESET, "closed disconnected repeated", Over),
        // `IP_RECVERR` on an established connection.
        (EHOSTUNREACH, "connected", Nothing),
        (ECONNREFUSED, "connected", Nothing),
        (EHOSTUNREACH, "connected answered", Nothing),
        (EHOSTUNREACH, "connected closed", Over),
        (ECONNREFUSED, "connected closed", Over),
        (EHOSTUNREACH, "connected answered closed", Over),
        (ECONNREFUSED, "connected answered closed", Over),
        // A soft error is none while the connection goes on.
        (0, "repeated unreachable", Nothing),
        (0, "connected repeated unreachable", Nothing),
    ];
    for (error, words, expected) in cases {
        assert_eq!(judge(seen(error, words)), expected, "{error} {words}");
    }
    for error in OTHERS {
        for seen in everything(error) {
            let expected = if seen.closed || !seen.connected { Over } else { Nothing };
            assert_eq!(judge(seen), expected, "{seen:?}");
        }
    }
}

/// Somebody was faster and has asked for the error: what the kernel did to the socket tells it.
#[test]
fn errors_that_were_fetched() {
    use Outcome::{Failed, Nothing, Over};
    let cases: [(&str, Outcome); 17] = [
        // The SYN was sent again and again.
        ("closed repeated", Failed(Failure::Timeout)),
        // Somebody said that the host cannot be reached: at once, or while it was sent again.
        ("closed", Failed(Failure::Unreachable)),
        ("closed unreachable", Failed(Failure::Unreachable)),
        ("closed repeated unreachable", Failed(Failure::Unreachable)),
        ("closed said-refused", Failed(Failure::Refused)),
        ("closed refused", Failed(Failure::Refused)),
        ("closed repeated said-refused", Failed(Failure::Refused)),
        // Data was sent again and again.
        ("connected closed repeated", Failed(Failure::Timeout)),
        // Nothing was, or somebody said why: this connection's end is not the backend's failure.
        ("connected closed", Over),
        ("connected closed repeated unreachable", Over),
        // It has served.
        ("connected answered closed", Over),
        ("connected answered closed repeated", Over),
        // It was disconnected.
        ("closed disconnected", Over),
        ("closed disconnected repeated", Over),
        // Something to read on the error queue.
        ("", Nothing),
        ("connected", Nothing),
        ("connected answered repeated", Nothing),
    ];
    for (words, expected) in cases {
        assert_eq!(judge(seen(0, words)), expected, "{words}");
    }
}

/// Whatever else is seen.
#[test]
fn what_is_no_failure_of_the_backend() {
    use errno::{ECONNREFUSED, ECONNRESET, EHOSTUNREACH, ETIMEDOUT};
    for error in [0, ECONNREFUSED, ECONNRESET, EHOSTUNREACH, ETIMEDOUT] {
        for seen in everything(error) {
            let failed = matches!(judge(seen), Outcome::Failed(_));
            assert!(!(failed && seen.answered), "it was answered: {seen:?}");
            // These two are what `tcp_disconnect` reports.
            let disconnected = seen.disconnected && matches!(error, 0 | ECONNRESET);
            assert!(!(failed && disconnected), "it was disconnected: {seen:?}");
        }
    }
}

/// What is said to a connect while its socket is locked, or before the error itself is told.
#[test]
fn what_is_said_of_a_connect_that_goes_on() {
    use Outcome::{Nothing, Warned};
    let cases: [(&str, Outcome); 8] = [
        ("said-refused", Warned(Failure::Refused)),
        ("said-unreachable", Warned(Failure::Unreachable)),
        ("repeated refused said-refused told", Warned(Failure::Refused)),
        // The soft error alone is none while the connection goes on: whose it is is not known.
        ("refused", Nothing),
        // A connection that was made; a socket that has no peer any more.
        ("connected said-refused", Nothing),
        ("connected answered said-unreachable", Nothing),
        ("disconnected said-refused", Nothing),
        ("told", Nothing),
    ];
    for (words, expected) in cases {
        assert_eq!(judge(seen(0, words)), expected, "{words}");
    }
}

/// `errno`, origin (2: ICMP, 3: ICMPv6), type and code, and what they say of a connect and of a datagram.
#[test]
fn errors_in_the_queue() {
    use Failure::{Refused, Unreachable};
    use errno::{EACCES, ECONNREFUSED, EHOSTUNREACH};
    type Said4 = (i32, u8, u8, u8);
    let cases: [(Said4, Option<Failure>, Option<Failure>); 16] = [
        // Port, host prohibited, filtered.
        ((ECONNREFUSED, 2, 3, 3), Some(Refused), Some(Refused)),
        ((EHOSTUNREACH, 2, 3, 10), Some(Unreachable), Some(Unreachable)),
        ((EHOSTUNREACH, 2, 3, 13), Some(Unreachable), Some(Unreachable)),
        ((ECONNREFUSED, 3, 1, 4), Some(Refused), Some(Refused)),
        ((EACCES, 3, 1, 1), Some(Unreachable), Some(Unreachable)),
        ((EACCES, 3, 1, 5), Some(Unreachable), Some(Unreachable)),
        // A router without a neighbour: datagrams are told of it only when they ask.
        ((EHOSTUNREACH, 2, 3, 1), Some(Unreachable), None),
        ((EHOSTUNREACH, 3, 1, 3), Some(Unreachable), None),
        // A TTL that was too short.
        ((EHOSTUNREACH, 2, 11, 0), None, None),
        ((EHOSTUNREACH, 3, 3, 0), None, None),
        // No route, no such protocol, too big.
        ((101, 2, 3, 0), None, None),
        ((92, 2, 3, 2), None, None),
        ((90, 2, 3, 4), None, None),
        // Of this node itself, a time stamp, and what was sent without a copy.
        ((ECONNREFUSED, 1, 0, 0), None, None),
        ((42, 4, 3, 3), None, None),
        ((0, 5, 1, 4), None, None),
    ];
    for ((error, origin, kind, code), connect, datagram) in cases {
        let said = Said::new(error, origin, kind, code);
        assert_eq!(said.failure(), connect, "{error} {origin} {kind} {code}");
        // Whether or not the error was fetched already.
        for error in [error, 0] {
            let judged = judge_datagram(error, said);
            let refused = error == ECONNREFUSED && origin == 1;
            let expected = if refused { Some(Refused) } else { datagram };
            assert_eq!(judged, expected, "{error} {origin} {kind} {code}");
        }
    }
    // Nobody asked for more.
    for (error, expected) in [
        (ECONNREFUSED, Some(Refused)),
        (EHOSTUNREACH, Some(Unreachable)),
        (EACCES, Some(Unreachable)),
        (0, None),
    ] {
        assert_eq!(judge_datagram(error, Said::NOTHING), expected, "{error}");
    }
    for error in OTHERS {
        assert_eq!(judge_datagram(error, Said::NOTHING), None, "{error}");
    }
}

#[test]
fn resets() {
    assert_eq!(judge_reset(false, false), Some(Failure::Refused), "of the SYN");
    assert_eq!(judge_reset(true, false), Some(Failure::Reset), "before the first byte");
    assert_eq!(judge_reset(true, true), None, "it has served");
}

/// The end of a socket whose error was reported to nobody.
#[test]
fn ends() {
    let (given_up, timeout, unreachable) = (true, Failure::Timeout, Failure::Unreachable);
    let cases = [
        // The kernel gave up: after sending the SYN again, or since it was told that it must.
        ("closed repeated", given_up, Some(timeout)),
        ("closed", given_up, Some(unreachable)),
        ("closed unreachable", given_up, Some(unreachable)),
        ("closed repeated unreachable", given_up, Some(unreachable)),
        // The application gave up, or has not sent anything.
        ("closed", !given_up, None),
        ("closed repeated", !given_up, None),
        // It was told before that it fails: what is left of that may be of an earlier connect, unless the
        // backend was blamed for this one. With IPv6 nobody is blamed for what is not queued.
        ("closed repeated unreachable six", !given_up, Some(unreachable)),
        ("closed refused six", !given_up, Some(Failure::Refused)),
        ("closed repeated unreachable", !given_up, None),
        ("closed refused", !given_up, None),
        ("closed repeated unreachable told", !given_up, Some(unreachable)),
        ("closed refused told", !given_up, Some(Failure::Refused)),
        // All of it was taken away; silence is told of only after the SYN was sent again.
        ("closed told", !given_up, Some(unreachable)),
        ("closed told six", !given_up, Some(unreachable)),
        ("closed said-refused told", !given_up, Some(Failure::Refused)),
        ("closed said-unreachable told", !given_up, Some(unreachable)),
        ("closed said-refused", !given_up, None),
        ("closed repeated told", !given_up, None),
        ("closed said-refused", given_up, Some(Failure::Refused)),
        ("closed disconnected refused told six", !given_up, None),
        ("connected closed refused", !given_up, None),
        // It was disconnected.
        ("closed disconnected", given_up, None),
        ("closed disconnected repeated", given_up, None),
        // It was connected.
        ("connected closed", given_up, None),
        ("connected closed repeated", given_up, None),
        ("connected answered closed", given_up, None),
        ("connected answered closed repeated", !given_up, None),
    ];
    for (words, given_up, expected) in cases {
        // By then the error says nothing: it is there, or was fetched.
        for error in [0, errno::ETIMEDOUT, errno::EHOSTUNREACH] {
            let judged = judge_end(seen(error, words), given_up);
            assert_eq!(judged, expected, "{error} {words}, given up: {given_up}");
        }
    }
}

/// `AF_UNSPEC` and `SO_LINGER` 0, after which the counters say nothing.
#[test]
fn what_was_dissolved() {
    let said = Some(Failure::Refused);
    let cases = [
        ("closed disconnected said-refused told", false, said),
        // A SYN that was sent again was answered, nobody blamed this connect's backend for what lies there, or
        // it was blamed for silence.
        ("closed disconnected said-refused told", true, None),
        ("closed disconnected said-refused", false, None),
        ("closed disconnected told", false, None),
        // The soft error stays when the socket connects again.
        ("closed disconnected refused six", false, None),
        // Not the application's doing.
        ("closed said-refused told", false, None),
    ];
    for (words, answered, expected) in cases {
        for error in [errno::ECONNRESET, 0] {
            let seen = seen(error, words);
            assert_eq!(judge(Seen { disconnected: true, ..seen }), Outcome::Over, "{words}");
            assert_eq!(judge_dissolved(seen, answered), expected, "{error} {words}, {answered}");
        }
    }
}
