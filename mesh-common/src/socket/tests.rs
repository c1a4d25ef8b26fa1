//! What a socket's fields say.

use super::*;

/// `EPERM`, `EACCES`, `EADDRNOTAVAIL`, `ENETUNREACH`, `ECONNABORTED`, `EPIPE`, `EPROTO`.
const OTHERS: [i32; 7] = [1, 13, 99, 101, 103, 32, 71];

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
            "unreachable" => seen.unreachable = true,
            other => panic!("no field is called {other}"),
        }
    }
    seen
}

/// All that can be seen of a socket with this error. What was answered was connected.
fn everything(error: i32) -> impl Iterator<Item = Seen> {
    (0u32..64).map(move |bits| {
        let [connected, answered, closed, disconnected, repeated, unreachable] =
            [0, 1, 2, 3, 4, 5].map(|bit| bits >> bit & 1 == 1);
        let answered = answered && connected;
        Seen { error, connected, answered, closed, disconnected, repeated, unreachable }
    })
}

#[test]
fn errors() {
    use Outcome::{Failed, Nothing, Over};
    use errno::{ECONNREFUSED, ECONNRESET, EHOSTUNREACH, ETIMEDOUT};
    let cases: [(i32, &str, Outcome); 23] = [
        // The SYN: a reset, nothing at all, an ICMP message or no neighbour.
        (ECONNREFUSED, "closed", Failed(Failure::Refused)),
        (ETIMEDOUT, "closed repeated", Failed(Failure::Timeout)),
        (ETIMEDOUT, "closed", Failed(Failure::Timeout)),
        (EHOSTUNREACH, "closed", Failed(Failure::Unreachable)),
        (EHOSTUNREACH, "", Failed(Failure::Unreachable)),
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
    let cases: [(&str, Outcome); 14] = [
        // The SYN was sent again and again.
        ("closed repeated", Failed(Failure::Timeout)),
        // Somebody said that the host cannot be reached: at once, or while it was sent again.
        ("closed", Failed(Failure::Unreachable)),
        ("closed unreachable", Failed(Failure::Unreachable)),
        ("closed repeated unreachable", Failed(Failure::Unreachable)),
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
        ("closed repeated unreachable", !given_up, None),
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
