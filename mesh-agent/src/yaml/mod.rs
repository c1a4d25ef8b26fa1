//! YAML with a line and a column for everything that can be wrong.
//!
//! A file becomes a tree of [`Node`]s that each know where they stand; readers of a format walk the
//! tree with [`fields`], [`items`] and the like and collect every [`Problem`] they meet, so that a
//! person sees all of them at once. A derived deserializer stops at the first one, and what it says
//! is about types, not about what was expected.
//!
//! The tree is bounded: by [`MAX_SIZE`] for the text, by [`MAX_DEPTH`] for the nesting and by
//! [`MAX_ALIASED`] for what aliases repeat, so a hostile file costs a few megabytes and a moment.

mod parse;
mod problem;
mod value;

pub use parse::{MAX_ALIASED, MAX_DEPTH, MAX_SIZE, parse};
pub use problem::{Position, Problem, Problems, excerpt, printable};
pub use value::{Fields, Keys, boolean, fields, integer, is_nothing, items, text};

use std::rc::Rc;

/// A value and where it begins.
#[derive(Debug)]
pub struct Node {
    /// Where it begins; for an alias, where the anchored value begins.
    pub at: Position,
    /// What it is.
    pub value: Value,
    /// How many values it holds with itself, aliases counted as if they were written out.
    size: usize,
}

/// What a [`Node`] is.
#[derive(Debug)]
pub enum Value {
    /// Text, a number, `true`, nothing: YAML has one syntax for them, the reader knows which.
    Scalar {
        /// With quotes, escapes and folding resolved.
        text: String,
        /// Whether it was written without quotes, and so may be a number or nothing.
        plain: bool,
    },
    /// A list. A value that is an alias is shared with its anchor.
    Sequence(Vec<Rc<Node>>),
    /// A mapping in the order of the file; no key twice.
    Mapping(Vec<Entry>),
}

/// A key of a mapping and its value.
#[derive(Debug)]
pub struct Entry {
    /// Where the key begins.
    pub at: Position,
    /// The key.
    pub key: String,
    /// The value.
    pub value: Rc<Node>,
}
