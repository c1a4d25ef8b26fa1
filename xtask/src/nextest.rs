//! Running the tests with cargo-nextest, each in a process of its own and several at a time, and saying
//! which were the slowest.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::thread;

use anyhow::{Context, Result};

use crate::host::SELECTION;
use crate::process;
use crate::setup::Tool;
use crate::workspace::Workspace;

/// How many tests run at a time for each processor. End-to-end tests wait for half of their time; for most of the
/// rest the kernel verifies an agent's programs.
const TESTS_PER_PROCESSOR: usize = 2;

/// How many of the slowest tests are named.
const SLOWEST: usize = 20;

/// Adds to a command the program that runs the tests, and which are there to run. They have to be built: it
/// may not look for anything outside this machine.
pub(crate) fn command(workspace: &Workspace, command: &mut Command) {
    let processors = thread::available_parallelism().map_or(1, usize::from);
    let threads = (processors * TESTS_PER_PROCESSOR).to_string();
    command
        .arg(Tool::NEXTEST.path(workspace))
        .args(["nextest", "run", "--offline"])
        .args(SELECTION);
    command.args(["--test-threads", &threads, "--hide-progress-bar", "--no-tests", "fail"]);
}

/// Runs such a command, and names the slowest tests.
///
/// # Errors
///
/// When a test fails.
pub(crate) fn run(workspace: &Workspace, command: &mut Command) -> Result<()> {
    let report = report(workspace);
    // That of a former run would be taken for this one's.
    drop(fs::remove_file(&report));
    let result = process::run(command);
    // Without a report no test was run, and the error says why.
    if let Ok(text) = fs::read_to_string(&report) {
        let times = times(&text).context("cannot read the report of cargo-nextest")?;
        eprintln!("\nTests run: {}. The slowest:", times.len());
        for (seconds, name) in times.iter().take(SLOWEST) {
            eprintln!("  {seconds:8.1} s  {name}");
        }
    }
    result
}

/// Where it puts what it has run.
fn report(workspace: &Workspace) -> PathBuf {
    workspace.target.join("nextest/default/junit.xml")
}

/// How long each test took, the longest first, in what it reports. Nothing when that is of another form.
fn times(report: &str) -> Option<Vec<(f64, String)>> {
    let cases = report.split("<testcase ").skip(1);
    let mut times: Vec<(f64, String)> = cases
        .map(|case| {
            let head = case.split('>').next()?;
            let name = format!("{} {}", attribute(head, "classname")?, attribute(head, "name")?);
            Some((attribute(head, "time")?.parse().ok()?, name))
        })
        .collect::<Option<_>>()?;
    times.sort_by(|(one, _), (other, _)| other.total_cmp(one));
    Some(times)
}

/// The value of an attribute of an element.
fn attribute<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    let start = format!("{name}=\"");
    let mut words = head.split(&start);
    // Not the end of a longer name.
    let before = words.next()?;
    let value = words.next().filter(|_| before.is_empty() || before.ends_with(' '))?;
    Some(value.split_once('"')?.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_slowest_come_first() {
        let report = r#"<testsuites><testsuite name="a" tests="2">
            <testcase name="x::one" classname="mesh-a" timestamp="2026-01-01" time="0.018"></testcase>
            <testcase name="two" classname="mesh-tests::b" timestamp="2026-01-01" time="12.5">
            <system-out>time="99"</system-out></testcase></testsuite></testsuites>"#;
        let found = times(report).expect("times");
        let expected = [(12.5, "mesh-tests::b two"), (0.018, "mesh-a x::one")];
        assert_eq!(found, expected.map(|(time, name)| (time, name.to_owned())));
        assert_eq!(times("<testcase name=\"a\">"), None, "another form");
        assert_eq!(times(""), Some(vec![]));
    }
}
