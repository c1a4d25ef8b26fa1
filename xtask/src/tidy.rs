//! The project's conventions, as checks.
//!
//! Sources are looked at as tokens, so what a string or a comment says does not matter where only
//! code counts.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use proc_macro2::{Delimiter, TokenStream, TokenTree};
use serde_json::Value;

use crate::process;
use crate::workspace::Workspace;

/// A file that is longer does more than one job.
const MAX_LINES: usize = 600;

/// Where `unsafe` may be: each of these argues for every use of it.
const UNSAFE: [&str; 7] = [
    "mesh-ebpf/",
    "mesh-common/src/ejection/apart.rs",
    "mesh-common/src/layout.rs",
    "mesh-common/src/word.rs",
    "mesh-agent/src/dataplane/sys.rs",
    "mesh-agent/src/dataplane/sys/",
    "tests/",
];

/// Macros that say that something is not finished.
const UNFINISHED: [&str; 3] = ["todo", "unimplemented", "dbg"];

/// Words in comments that say the same.
const MARKS: [&str; 2] = [concat!("FIX", "ME"), concat!("XX", "X")];

/// Licences that a binary may be made from without conditions beyond attribution.
const LICENCES: [&str; 12] = [
    "0BSD",
    "Apache-2.0",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "CC0-1.0",
    "ISC",
    "MIT",
    // Of libFuzzer, which is in nothing that anybody installs.
    "NCSA",
    "Unicode-3.0",
    "Unlicense",
    "Zlib",
];

/// Checks every source file and every dependency's licence.
///
/// # Errors
///
/// All problems found, each with its place.
pub(crate) fn check(workspace: &Workspace) -> Result<()> {
    let mut files = Vec::new();
    collect(&workspace.root, &workspace.target, &mut files)?;
    let mut problems = Vec::new();
    for file in &files {
        let text = fs::read_to_string(file).with_context(|| format!("reading {file:?}"))?;
        let name = file.strip_prefix(&workspace.root).unwrap_or(file).display().to_string();
        problems.extend(source(&name, &text));
    }
    let packages = licences(workspace, &mut problems)?;
    if !problems.is_empty() {
        bail!("{} problem(s):\n  {}", problems.len(), problems.join("\n  "));
    }
    eprintln!("tidy: {} files and {packages} packages are in order", files.len());
    Ok(())
}

fn collect(directory: &Path, target: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    let entries = directory.read_dir().with_context(|| format!("reading {directory:?}"))?;
    for entry in entries {
        let entry = entry?;
        let path = entry.path();
        let hidden = entry.file_name().to_string_lossy().starts_with('.');
        if entry.file_type()?.is_dir() {
            if !hidden && path != target && !path.join("CACHEDIR.TAG").exists() {
                collect(&path, target, files)?;
            }
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    Ok(())
}

// === sources ===

/// The problems of one source file.
fn source(name: &str, text: &str) -> Vec<String> {
    let mut problems = Vec::new();
    if !text.starts_with("//!") {
        problems.push(format!("{name}:1: begin with a `//!` comment: what is this file for?"));
    }
    let lines = text.lines().count();
    if lines > MAX_LINES {
        problems.push(format!("{name}: {lines} lines; {MAX_LINES} is the limit, split it"));
    }
    for (number, line) in (1..).zip(text.lines()) {
        let words = line.split(|c: char| !c.is_alphanumeric() && c != '_');
        for mark in words.filter(|word| MARKS.contains(word)) {
            problems.push(format!("{name}:{number}: {mark}: finish it, or open an issue"));
        }
    }
    match text.parse::<TokenStream>() {
        Ok(tokens) => {
            let mut tokens_of = Tokens { name, problems: &mut problems };
            tokens_of.visit(tokens);
        }
        Err(error) => problems.push(format!("{name}: does not parse: {error}")),
    }
    problems
}

struct Tokens<'a> {
    name: &'a str,
    problems: &'a mut Vec<String>,
}

impl Tokens<'_> {
    fn visit(&mut self, tokens: TokenStream) {
        let tokens: Vec<TokenTree> = tokens.into_iter().collect();
        for (index, token) in tokens.iter().enumerate() {
            match token {
                TokenTree::Ident(ident) => {
                    let is_macro = is_punct(tokens.get(index + 1), '!');
                    let ident_text = ident.to_string();
                    if ident_text == "unsafe" && !self.may_be_unsafe() {
                        self.report(token, "unsafe code belongs into one of", &UNSAFE.join(", "));
                    }
                    if is_macro && UNFINISHED.contains(&ident_text.as_str()) {
                        self.report(token, "not finished:", &format!("{ident_text}!"));
                    }
                }
                TokenTree::Group(group) => {
                    let bang = index.checked_sub(1).and_then(|index| tokens.get(index));
                    let hash = if is_punct(bang, '!') {
                        index.checked_sub(2).and_then(|index| tokens.get(index))
                    } else {
                        bang
                    };
                    if group.delimiter() == Delimiter::Bracket && is_punct(hash, '#') {
                        self.attribute(group.stream());
                    }
                    self.visit(group.stream());
                }
                TokenTree::Punct(_) | TokenTree::Literal(_) => {}
            }
        }
    }

    /// What is inside the brackets of an attribute, or of a `cfg_attr` in it.
    fn attribute(&mut self, tokens: TokenStream) {
        let tokens: Vec<TokenTree> = tokens.into_iter().collect();
        for (index, token) in tokens.iter().enumerate() {
            let text = token.to_string();
            let arguments = match tokens.get(index + 1) {
                Some(TokenTree::Group(group)) => Some(group.stream()),
                _ => None,
            };
            match (text.as_str(), arguments) {
                ("allow", Some(_)) => {
                    self.report(token, "a bare allow:", "use #[expect(…, reason = \"…\")]");
                }
                ("ignore", _) => self.report(
                    token,
                    "an ignored test:",
                    "make it run, or let it fail with the reason",
                ),
                ("cfg_attr", Some(arguments)) => self.attribute(arguments),
                _ => {}
            }
        }
    }

    fn may_be_unsafe(&self) -> bool {
        UNSAFE.iter().any(|place| self.name.starts_with(place))
    }

    fn report(&mut self, token: &TokenTree, what: &str, detail: &str) {
        let line = token.span().start().line;
        self.problems.push(format!("{}:{line}: {what} {detail}", self.name));
    }
}

fn is_punct(token: Option<&TokenTree>, wanted: char) -> bool {
    matches!(token, Some(TokenTree::Punct(punct)) if punct.as_char() == wanted)
}

// === licences ===

/// Checks the licence of every package in `Cargo.lock`, and returns how many there are.
fn licences(workspace: &Workspace, problems: &mut Vec<String>) -> Result<usize> {
    let mut cargo = process::cargo();
    cargo.current_dir(&workspace.root).args(["metadata", "--format-version=1", "--locked"]);
    let metadata: Value = serde_json::from_str(&process::output(&mut cargo)?)?;
    let packages = metadata["packages"].as_array().context("`cargo metadata` names no packages")?;
    for package in packages {
        let licence = package["license"].as_str().unwrap_or_default();
        if let Err(error) = permissive(licence) {
            problems.push(format!("Cargo.lock: {} has {error}", package["id"]));
        }
    }
    Ok(packages.len())
}

/// Whether a licence expression can be met with [`LICENCES`] alone.
fn permissive(expression: &str) -> Result<(), String> {
    // Older packages write `MIT/Apache-2.0`, which lax parsing takes as "or".
    let parsed = spdx::Expression::parse_mode(expression, spdx::ParseMode::LAX)
        .map_err(|error| format!("no licence that can be read: {expression:?} ({error})"))?;
    let met = parsed.evaluate(|requirement| {
        requirement.license.id().is_some_and(|id| LICENCES.contains(&id.name))
    });
    if met {
        Ok(())
    } else {
        Err(format!("the licence {expression}, which is not among {}", LICENCES.join(", ")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn assert_problem(name: &str, text: &str, place: &str) {
        let problems = source(name, text);
        assert_eq!(problems.len(), 1, "{text}: {problems:?}");
        assert!(problems[0].starts_with(place), "{problems:?}");
    }

    #[test]
    fn each_convention_is_checked() {
        assert_problem("a.rs", "fn f() {}\n", "a.rs:1:");
        assert_problem("a.rs", &format!("//! a\n{}", "\n".repeat(MAX_LINES)), "a.rs: 601 lines");
        for mark in MARKS {
            assert_problem("a.rs", &format!("//! a\n// {mark}: later\n"), "a.rs:2:");
        }
        for line in [
            "fn f() { todo!() }",
            "fn f() { dbg!(1); }",
            "fn f() { unsafe { g() } }",
            "#[allow(dead_code)] fn f() {}",
            "#![allow(dead_code)]",
            "#[cfg_attr(test, allow(dead_code))] fn f() {}",
            "#[ignore] #[test] fn f() {}",
            "#[ignore = \"slow\"] #[test] fn f() {}",
        ] {
            assert_problem("a.rs", &format!("//! a\n{line}\n"), "a.rs:2:");
        }
    }

    #[test]
    fn what_is_fine_passes() {
        let fine = "//! todo!() and unsafe in text\n#![expect(unsafe_code, reason = \"r\")]\n\
                    fn todo(allow: u8) { g(\"dbg!()\", allow) }\n";
        assert_eq!(source("a.rs", fine), Vec::<String>::new());
        let sys = "//! a\nfn f() { unsafe { g() } }\n";
        assert_eq!(source("mesh-agent/src/dataplane/sys/mod.rs", sys), Vec::<String>::new());
    }

    #[test]
    fn licences_are_expressions() {
        assert_eq!(permissive("MIT/Apache-2.0"), Ok(()));
        assert_eq!(permissive("GPL-2.0-only OR MIT"), Ok(()));
        assert_eq!(permissive("(MIT OR Apache-2.0) AND Unicode-3.0"), Ok(()));
        assert_eq!(permissive("Apache-2.0 WITH LLVM-exception"), Ok(()));
        assert!(permissive("MIT AND GPL-3.0-only").is_err());
        assert!(permissive("").is_err());
    }
}
