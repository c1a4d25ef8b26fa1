//! How errors read: one line with every cause, each said once, and what a limit means.

use std::error::Error;
use std::io;

/// An error with its causes, in one line.
///
/// Libraries differ in whether a message holds that of its cause: what has been said already is
/// left out.
pub(crate) fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = String::new();
    for error in std::iter::successors(Some(error), |&error| error.source()) {
        let next = one_line(&error.to_string());
        if text.is_empty() {
            text = next;
        } else if !text.contains(&next) {
            text = format!("{text}: {next}");
        }
    }
    text
}

/// The lines of a text as one: the verifier's come with many.
fn one_line(text: &str) -> String {
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    lines.collect::<Vec<_>>().join(" ")
}

/// What to do about an error that comes from a limit on open files, if it does.
pub(crate) fn open_files(error: &io::Error) -> Option<&'static str> {
    match error.raw_os_error()? {
        libc::EMFILE => Some("raise the limit on open files: see `ulimit -n`"),
        libc::ENFILE => Some("the node has too many open files: see /proc/sys/fs/file-nr"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use anyhow::Context as _;

    use super::*;

    /// Holds its cause in its message, with advice behind it.
    #[derive(Debug, thiserror::Error)]
    #[error("map SLOTS: {source}; run as root")]
    struct Holds {
        source: io::Error,
    }

    /// Leaves its cause to the reader.
    #[derive(Debug, thiserror::Error)]
    #[error("map error")]
    struct Leaves(#[source] Holds);

    #[test]
    fn every_cause_is_said_once() {
        let holds = || Holds { source: io::Error::from_raw_os_error(libc::EPERM) };
        let once = "map SLOTS: Operation not permitted (os error 1); run as root";
        assert_eq!(chain(&holds()), once);
        assert_eq!(chain(&Leaves(holds())), format!("map error: {once}"));
        let error = Err::<(), _>(holds()).context("starting").expect_err("an error");
        assert_eq!(chain(error.as_ref()), format!("starting: {once}"));
        assert_eq!(chain(&io::Error::other("first\n  second\n")), "first second");
    }

    #[test]
    fn limits_are_told_apart() {
        let advice = |code| open_files(&io::Error::from_raw_os_error(code));
        assert!(advice(libc::EMFILE).is_some_and(|advice| advice.contains("ulimit -n")));
        assert!(advice(libc::ENFILE).is_some_and(|advice| advice.contains("file-nr")));
        assert_eq!(advice(libc::EAGAIN), None);
    }
}
