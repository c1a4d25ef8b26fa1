//! What is wrong with a file, and where.

use std::fmt;

/// A place in a file. Both numbers count from 1; columns are characters.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Position {
    /// Line.
    pub line: usize,
    /// Column.
    pub column: usize,
}

impl Position {
    /// The first character of a file.
    pub const START: Self = Self { line: 1, column: 1 };
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.line, self.column)
    }
}

/// Something wrong with a file.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Problem {
    /// Where, unless it is about the file as a whole.
    pub at: Option<Position>,
    /// What is wrong, and what was expected.
    pub text: String,
}

impl Problem {
    /// About one place.
    pub fn at(at: Position, text: impl Into<String>) -> Self {
        Self { at: Some(at), text: text.into() }
    }

    /// About the file as a whole.
    pub fn whole(text: impl Into<String>) -> Self {
        Self { at: None, text: text.into() }
    }

    /// `FILE:LINE:COLUMN: text`.
    #[must_use]
    pub fn line(&self, file: &str) -> String {
        match self.at {
            Some(at) => format!("{file}:{at}: {}", self.text),
            None => format!("{file}: {}", self.text),
        }
    }
}

/// The problems of one file, as they are found.
#[derive(Default, Debug)]
pub struct Problems {
    found: Vec<Problem>,
    /// How many were found after [`Problems::KEPT`].
    more: usize,
}

impl Problems {
    /// How many are kept: nobody reads more, and one mistake in a generated file can repeat a
    /// hundred thousand times.
    pub const KEPT: usize = 20;

    /// Adds one.
    pub fn add(&mut self, at: Position, text: impl Into<String>) {
        if self.found.len() < Self::KEPT {
            self.found.push(Problem::at(at, text));
        } else {
            self.more += 1;
        }
    }

    /// How many were found so far.
    #[must_use]
    pub fn count(&self) -> usize {
        self.found.len() + self.more
    }

    /// `value` when nothing is wrong, else the problems in the order of the file.
    ///
    /// # Errors
    ///
    /// Everything that was added, at most [`Problems::KEPT`] and one line about the rest.
    pub fn finish<T>(mut self, value: T) -> Result<T, Vec<Problem>> {
        if self.found.is_empty() {
            return Ok(value);
        }
        self.found.sort_by_key(|problem| problem.at);
        if self.more > 0 {
            self.found.push(Problem::whole(format!("and {} more problems", self.more)));
        }
        Err(self.found)
    }
}

/// How much of a file's text a message repeats, in characters.
const EXCERPT: usize = 40;

/// Text from a file as a message may show it: in quotes, cut, control characters escaped.
#[must_use]
pub fn excerpt(text: &str) -> String {
    match text.char_indices().nth(EXCERPT) {
        Some((end, _)) => format!("\"{}…\"", printable(&text[..end])),
        None => format!("\"{}\"", printable(text)),
    }
}

/// Text that cannot move the cursor of the terminal it is shown on.
#[must_use]
pub fn printable(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        // `escape_debug` also escapes quotes, which are harmless and common.
        if matches!(c, '"' | '\'') {
            out.push(c);
        } else {
            out.extend(c.escape_debug());
        }
    }
    out
}
