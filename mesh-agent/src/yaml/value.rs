//! Reading values out of a tree: each helper adds what is wrong to the problems and gives nothing.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::rc::Rc;

use super::{Entry, Node, Position, Problems, Value, excerpt};

/// The keys that a mapping may have.
#[derive(Debug)]
pub struct Keys {
    /// What the mapping is, with its article, for messages: `a service`.
    pub of: &'static str,
    /// Keys that are read.
    pub known: &'static [&'static str],
    /// Keys that are documented and that this version cannot serve: refused by name, so that
    /// nobody believes they work.
    pub later: &'static [&'static str],
}

/// The fields of a mapping whose keys were checked.
#[derive(Debug)]
pub struct Fields<'n> {
    /// Where the mapping begins.
    pub at: Position,
    entries: BTreeMap<&'n str, &'n Entry>,
}

// === impl Keys ===

impl Keys {
    fn allowed(&self) -> String {
        if self.known.is_empty() {
            return format!("{} takes no keys", self.of);
        }
        format!("allowed in {}: {}", self.of, self.known.join(", "))
    }
}

// === impl Fields ===

impl<'n> Fields<'n> {
    /// Those of a mapping that is not written out, since it would have none.
    #[must_use]
    pub fn none(at: Position) -> Self {
        Self { at, entries: BTreeMap::new() }
    }

    /// The value of a key.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&'n Node> {
        self.entries.get(key).map(|entry| &*entry.value)
    }

    /// Where a key stands; where the mapping begins when it has no such key.
    #[must_use]
    pub fn key_at(&self, key: &str) -> Position {
        self.entries.get(key).map_or(self.at, |entry| entry.at)
    }

    /// The value of a key that must be there.
    pub fn require(&self, key: &str, advice: &str, problems: &mut Problems) -> Option<&'n Node> {
        let value = self.get(key);
        if value.is_none() {
            problems.add(self.at, format!("`{key}` is missing; {advice}"));
        }
        value
    }
}

/// The fields of a mapping; what is not a mapping, and keys it may not have, are problems.
pub fn fields<'n>(node: &'n Node, keys: &Keys, problems: &mut Problems) -> Option<Fields<'n>> {
    let Value::Mapping(entries) = &node.value else {
        problems.add(
            node.at,
            format!(
                "expected {}: a mapping; found {} ({})",
                keys.of,
                describe(node),
                keys.allowed()
            ),
        );
        return None;
    };
    let mut found = BTreeMap::new();
    for entry in entries {
        let key = entry.key.as_str();
        if keys.known.contains(&key) {
            found.insert(key, entry);
        } else if keys.later.contains(&key) {
            problems.add(
                entry.at,
                format!("`{key}` is not supported yet; remove it ({})", keys.allowed()),
            );
        } else {
            problems.add(entry.at, format!("unknown key {}; {}", excerpt(key), keys.allowed()));
        }
    }
    Some(Fields { at: node.at, entries: found })
}

/// The items of a list.
pub fn items<'n>(
    node: &'n Node,
    expected: &str,
    problems: &mut Problems,
) -> Option<&'n [Rc<Node>]> {
    match &node.value {
        Value::Sequence(items) => Some(items),
        _ => {
            problems.add(node.at, format!("expected {expected}; found {}", describe(node)));
            None
        }
    }
}

/// A text. Numbers and the like are taken as they are written: a service may be called `8080`.
pub fn text<'n>(node: &'n Node, expected: &str, problems: &mut Problems) -> Option<&'n str> {
    match &node.value {
        Value::Scalar { text, .. } if !is_nothing(node) => Some(text),
        _ => {
            problems.add(node.at, format!("expected {expected}; found {}", describe(node)));
            None
        }
    }
}

/// A whole number in decimal digits.
pub fn integer<T: TryFrom<u64>>(
    node: &Node,
    what: &str,
    range: RangeInclusive<u64>,
    problems: &mut Problems,
) -> Option<T> {
    let number = match &node.value {
        Value::Scalar { text, plain: true } if text.bytes().all(|byte| byte.is_ascii_digit()) => {
            text.parse().ok().filter(|number| range.contains(number))
        }
        _ => None,
    };
    let number = number.and_then(|number| T::try_from(number).ok());
    if number.is_none() {
        let (first, last) = range.into_inner();
        problems.add(
            node.at,
            format!("{what}: expected a number from {first} to {last}; found {}", describe(node)),
        );
    }
    number
}

/// `true` or `false`.
pub fn boolean(node: &Node, what: &str, problems: &mut Problems) -> Option<bool> {
    match &node.value {
        Value::Scalar { text, plain: true } if text == "true" => Some(true),
        Value::Scalar { text, plain: true } if text == "false" => Some(false),
        _ => {
            let found = describe(node);
            problems.add(node.at, format!("{what}: expected true or false; found {found}"));
            None
        }
    }
}

/// Whether nothing is written where a value could be.
#[must_use]
pub fn is_nothing(node: &Node) -> bool {
    matches!(&node.value, Value::Scalar { text, plain: true }
        if matches!(text.as_str(), "" | "~" | "null" | "Null" | "NULL"))
}

/// What a value is, for "found …".
fn describe(node: &Node) -> String {
    match &node.value {
        _ if is_nothing(node) => "nothing".into(),
        Value::Scalar { text, plain: false } => format!("the quoted text {}", excerpt(text)),
        Value::Scalar { text, .. } => excerpt(text),
        Value::Sequence(_) => "a list".into(),
        Value::Mapping(_) => "a mapping".into(),
    }
}
