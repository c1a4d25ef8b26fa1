//! From bytes to a tree.

use std::collections::{HashMap, HashSet};
use std::rc::Rc;

use granit_parser::{ErrorKind, Event, Marker, Parser, ScalarStyle, ScanError, Span, Tag};

use super::{Entry, Node, Position, Problem, Value, excerpt, printable};

/// The largest file that is read, in bytes.
pub const MAX_SIZE: usize = 4 << 20;

/// How deeply collections may be nested. No format here needs more than eight.
pub const MAX_DEPTH: usize = 32;

/// How many values all aliases of a file may stand for: nested aliases grow exponentially.
pub const MAX_ALIASED: usize = 100_000;

/// Reads one YAML document. A file without a value (empty, or only comments) gives nothing.
///
/// # Errors
///
/// The first thing that is not YAML, or not a part of YAML that is accepted here: duplicate keys,
/// tags, keys that are no text, a second document, one of the limits of this module.
pub fn parse(bytes: &[u8]) -> Result<Option<Rc<Node>>, Problem> {
    if bytes.len() > MAX_SIZE {
        return Err(Problem::whole(format!(
            "the file is larger than {} MiB, the most that is read; split it",
            MAX_SIZE >> 20
        )));
    }
    let text = std::str::from_utf8(bytes).map_err(|e| invalid_utf8(bytes, e.valid_up_to()))?;
    let mut options = granit_parser::options! {
        flow_nesting_limit: MAX_DEPTH,
        block_nesting_limit: MAX_DEPTH,
    };
    options.set_emit_comments(false);
    let mut tree = Tree::default();
    for event in Parser::new_from_str_with_options(text, options) {
        let (event, span) = event.map_err(|e| malformed(&e))?;
        tree.event(event, span)?;
    }
    Ok(tree.root)
}

/// A tree that grows event by event.
#[derive(Default)]
struct Tree {
    root: Option<Rc<Node>>,
    documents: usize,
    open: Vec<Open>,
    /// Finished anchors by the parser's number for them.
    anchors: HashMap<usize, Rc<Node>>,
    aliased: usize,
}

/// A collection whose end has not come yet.
struct Open {
    at: Position,
    anchor: usize,
    size: usize,
    content: Content,
}

enum Content {
    Sequence(Vec<Rc<Node>>),
    Mapping { entries: Vec<Entry>, seen: HashSet<String>, key: Option<(Position, String)> },
}

// === impl Tree ===

impl Tree {
    fn event(&mut self, event: Event<'_>, span: Span) -> Result<(), Problem> {
        let at = position(&span.start);
        match event {
            Event::DocumentStart(..) => {
                self.documents += 1;
                if self.documents > 1 {
                    return Err(Problem::at(
                        at,
                        "a second YAML document begins here; expected one document in a file",
                    ));
                }
            }
            Event::Scalar(text, style, anchor, tag) => {
                refuse_tag(tag.as_deref(), &span)?;
                let plain = style == ScalarStyle::Plain;
                if let Some(Open {
                    content: Content::Mapping { seen, key: key @ None, .. }, ..
                }) = self.open.last_mut()
                {
                    let text = text.into_owned();
                    if !seen.insert(text.clone()) {
                        return Err(Problem::at(
                            at,
                            format!("the key {} is here a second time; keep one", excerpt(&text)),
                        ));
                    }
                    *key = Some((at, text));
                    return Ok(());
                }
                let value = Value::Scalar { text: text.into_owned(), plain };
                return self.value(Rc::new(Node { at, value, size: 1 }), anchor);
            }
            Event::SequenceStart(_, anchor, tag) => {
                refuse_tag(tag.as_deref(), &span)?;
                self.open(at, anchor, Content::Sequence(Vec::new()))?;
            }
            Event::MappingStart(_, anchor, tag) => {
                refuse_tag(tag.as_deref(), &span)?;
                let content =
                    Content::Mapping { entries: Vec::new(), seen: HashSet::new(), key: None };
                self.open(at, anchor, content)?;
            }
            Event::SequenceEnd | Event::MappingEnd => {
                if let Some(open) = self.open.pop() {
                    let value = match open.content {
                        Content::Sequence(items) => Value::Sequence(items),
                        Content::Mapping { entries, .. } => Value::Mapping(entries),
                    };
                    let node = Node { at: open.at, value, size: open.size };
                    return self.value(Rc::new(node), open.anchor);
                }
            }
            Event::Alias(anchor) => {
                self.refuse_key(at)?;
                // An anchor is finished with its value, so an alias inside itself finds none.
                let Some(node) = self.anchors.get(&anchor).cloned() else {
                    return Err(Problem::at(at, "this alias stands inside the value it repeats"));
                };
                self.aliased = self.aliased.saturating_add(node.size);
                if self.aliased > MAX_ALIASED {
                    return Err(Problem::at(
                        at,
                        format!(
                            "the aliases up to here repeat more than {MAX_ALIASED} values, the \
                             most that is accepted; write the values out"
                        ),
                    ));
                }
                return self.value(node, 0);
            }
            _ => {}
        }
        Ok(())
    }

    fn open(&mut self, at: Position, anchor: usize, content: Content) -> Result<(), Problem> {
        self.refuse_key(at)?;
        self.open.push(Open { at, anchor, size: 1, content });
        Ok(())
    }

    /// Takes a finished value to where it belongs.
    fn value(&mut self, node: Rc<Node>, anchor: usize) -> Result<(), Problem> {
        if anchor != 0 {
            self.anchors.insert(anchor, Rc::clone(&node));
        }
        let Some(open) = self.open.last_mut() else {
            self.root = Some(node);
            return Ok(());
        };
        open.size = open.size.saturating_add(node.size);
        match &mut open.content {
            Content::Sequence(items) => items.push(node),
            Content::Mapping { entries, key, .. } => {
                let (at, key) = key.take().ok_or_else(|| not_text(node.at))?;
                entries.push(Entry { at, key, value: node });
            }
        }
        Ok(())
    }

    /// An error when a mapping waits for a key: only text can be one.
    fn refuse_key(&self, at: Position) -> Result<(), Problem> {
        match self.open.last() {
            Some(Open { content: Content::Mapping { key: None, .. }, .. }) => Err(not_text(at)),
            _ => Ok(()),
        }
    }
}

fn not_text(at: Position) -> Problem {
    Problem::at(at, "a key must be plain text; expected `key: value`")
}

fn refuse_tag(tag: Option<&Tag>, span: &Span) -> Result<(), Problem> {
    match tag {
        Some(tag) => Err(Problem::at(
            position(&span.tag_start().unwrap_or(span.start)),
            format!("YAML tags are not accepted; remove {}", excerpt(&tag.original())),
        )),
        None => Ok(()),
    }
}

fn position(marker: &Marker) -> Position {
    // The parser counts lines from 1 and columns from 0.
    Position { line: marker.line(), column: marker.col() + 1 }
}

fn malformed(error: &ScanError) -> Problem {
    let text = match error.kind() {
        ErrorKind::RecursionLimitExceeded => {
            format!("more than {MAX_DEPTH} lists and mappings inside each other")
        }
        // The parser's messages are short; the cut is for those that quote the file.
        _ => printable(&error.info().chars().take(200).collect::<String>()),
    };
    Problem::at(position(error.marker()), format!("this is not valid YAML: {text}"))
}

fn invalid_utf8(bytes: &[u8], valid: usize) -> Problem {
    let before = String::from_utf8_lossy(&bytes[..valid]);
    let line = before.matches('\n').count() + 1;
    let column = before.rsplit('\n').next().unwrap_or_default().chars().count() + 1;
    let at = Position { line, column };
    Problem::at(at, format!("the byte 0x{:02x} is not UTF-8; expected text", bytes[valid]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, Instant};

    fn problem(text: &[u8]) -> String {
        match parse(text) {
            Ok(_) => panic!("this must not parse"),
            Err(problem) => problem.line("f"),
        }
    }

    #[test]
    fn positions_count_from_one() {
        let root = parse("a: 1\nbé:  [x]\n".as_bytes()).expect("valid").expect("a value");
        let Value::Mapping(entries) = &root.value else { panic!("a mapping") };
        let places: Vec<_> =
            entries.iter().map(|e| (e.at.to_string(), e.value.at.to_string())).collect();
        assert_eq!(places, [("1:1".into(), "1:4".into()), ("2:1".into(), "2:6".into())]);
    }

    #[test]
    fn what_is_not_accepted_is_named_with_its_place() {
        for (text, expected) in [
            (&b"a: 1\na: 2\n"[..], "f:2:1: the key \"a\" is here a second time; keep one"),
            (b"a: !!str 1\n", "f:1:4: YAML tags are not accepted; remove \"!!str\""),
            (b"? [a]\n: 1\n", "f:1:3: a key must be plain text; expected `key: value`"),
            (b"a: &x [*x]\n", "f:1:8: this alias stands inside the value it repeats"),
            (b"a\n---\nb\n", "f:2:1: a second YAML document begins here"),
            (b"a: 1\nb: \xff\n", "f:2:4: the byte 0xff is not UTF-8; expected text"),
            (b"a: [1\n", "f:1:4: this is not valid YAML: "),
        ] {
            let line = problem(text);
            assert!(line.starts_with(expected), "{line}\n{expected}");
        }
    }

    #[test]
    fn hostile_files_are_refused_at_once_and_in_few_words() {
        let mut bomb = String::from("a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n");
        for i in 1..20 {
            let previous = format!("*a{}, ", i - 1).repeat(10);
            bomb.push_str(&format!("a{i}: &a{i} [{previous}]\n"));
        }
        let noise: Vec<u8> = (0..1_u32 << 20)
            .scan(1_u32, |state, _| {
                *state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                Some(state.to_be_bytes()[0])
            })
            .collect();
        let cases = [
            bomb.into_bytes(),
            noise,
            b"[".repeat(1 << 20),
            b"- ".repeat(1 << 20),
            b"{a: ".repeat(1 << 18),
            b"? ".repeat(1 << 19),
            b"!".repeat(1 << 20),
            vec![0; 1 << 20],
            vec![b'#'; MAX_SIZE + 1],
        ];
        for (number, case) in cases.iter().enumerate() {
            let start = Instant::now();
            let line = problem(case);
            assert!(line.len() < 300, "case {number}: {} bytes", line.len());
            assert!(start.elapsed() < Duration::from_secs(2), "case {number}");
        }
    }
}
