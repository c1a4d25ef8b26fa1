//! What was measured, as a table of 100 columns.

use std::fmt::Write as _;

use super::Report;
use super::figure::{Bound, Figure, Of, Value};

/// The columns: title, width, and what is in them.
const COLUMNS: [(&str, usize, Of); 5] = [
    ("LAST FAILED", 13, Of::Last),
    ("OF ONE CLIENT", 13, Of::Failed),
    ("TRIES", 6, Of::Tries),
    ("BACK AFTER", 13, Of::Back),
    ("FALSE", 6, Of::False),
];

/// Width of what fails.
const WHAT: usize = 27;

const WIDTH: usize = 100;

/// What the columns are.
const LEGEND: &str = "\
LAST FAILED    from the failure to the start of the last connect that failed there, tries aside
OF ONE CLIENT  failed connects or requests of the client that had most, of 100 a second
TRIES          connects, one at a time, that tried whether it works again
BACK AFTER     from when it works again to its first answer
FALSE          endpoints with nothing wrong that were out for anybody, or unhealthy
";

/// All of them.
#[must_use]
pub fn of(reports: &[Report]) -> String {
    let mut text = format!("{:WHAT$}", "WHAT FAILS");
    for (title, width, _) in COLUMNS {
        push(&mut text, title, width);
    }
    text.push_str("  VERDICT\n");
    for report in reports {
        let _ = write!(text, "{:WHAT$}", report.what);
        for (_, width, of) in &COLUMNS {
            let figure = report.figures.iter().find(|figure| figure.of == *of);
            push(&mut text, &figure.map_or("-".to_owned(), Figure::text), *width);
        }
        let verdict = match &report.error {
            Some(_) => "failed",
            None if report.holds() => "holds",
            None => "BROKEN",
        };
        let _ = writeln!(text, "  {verdict}");
    }
    text.push('\n');
    text.push_str(LEGEND);
    text.push('\n');
    for report in reports {
        text.push_str(&more(report));
    }
    text
}

fn push(text: &mut String, cell: &str, width: usize) {
    // Writing to a string cannot fail.
    let _ = write!(text, "  {cell:width$}");
}

/// What has no column, or is broken.
fn more(report: &Report) -> String {
    let mut words: Vec<String> = Vec::new();
    for figure in &report.figures {
        let name = match figure.of {
            Of::Other(name) => name,
            Of::Last => "last failed",
            Of::Failed => "failed of one client",
            Of::Tries => "tries",
            Of::Back => "back after",
            Of::False => "false",
        };
        let broken = !figure.holds();
        // That nothing happened which must not is no news.
        let none = matches!(figure.bound, Bound::Most(Value::Count(0)));
        if broken || (matches!(figure.of, Of::Other(_)) && !none) {
            let mark = if broken { "BROKEN: " } else { "" };
            words.push(format!("{mark}{name} {}", figure.text()));
        }
    }
    words.extend(report.error.clone());
    if words.is_empty() {
        return String::new();
    }
    wrapped(&format!("{}: {}", report.what, words.join("; ")))
}

/// Lines of no more than the width, but for longer words; all but the first are indented.
fn wrapped(text: &str) -> String {
    let (mut out, mut column) = (String::new(), 0);
    for word in text.split_whitespace() {
        let length = word.chars().count();
        if column > 0 && column + 1 + length > WIDTH {
            out.push_str("\n   ");
            column = 3;
        }
        if column > 0 {
            out.push(' ');
            column += 1;
        }
        out.push_str(word);
        column += length;
    }
    out.push('\n');
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn report(figures: Vec<Figure>, error: Option<&str>) -> Report {
        let error = error.map(ToOwned::to_owned);
        Report { name: "killed", what: "agent killed, then process", figures, error, seconds: 1.0 }
    }

    #[test]
    fn fits_and_names_what_is_broken() {
        let figures = vec![
            Figure::count(Of::Failed, 1_000, 1_000),
            Figure::time(Of::Last, Duration::from_millis(2_350), Duration::from_secs(2)),
            Figure::time(Of::Back, Duration::from_secs(1), Duration::from_secs(2)),
            Figure::count(Of::Tries, 12, 12),
            Figure::count(Of::Other("left out in the end"), 0, 0),
            Figure::told("connects", Value::Count(3_000)),
        ];
        let reports = [report(figures, None), report(Vec::new(), Some(&"long ".repeat(60)))];
        let text = of(&reports);
        assert!(text.lines().all(|line| line.chars().count() <= WIDTH), "{text}");
        assert!(text.contains("2.35 > 2.00 s") && text.contains("BROKEN\n"), "{text}");
        assert!(text.contains("BROKEN: last failed 2.35 > 2.00 s; connects 3000\n"), "{text}");
        assert!(text.contains("failed\n") && !text.contains("left out"), "{text}");
    }

    #[test]
    fn what_holds_holds() {
        let held = report(vec![Figure::count(Of::Failed, 1, 1)], None);
        assert!(held.holds());
        assert!(!report(vec![Figure::count(Of::Failed, 2, 1)], None).holds());
        assert!(!report(Vec::new(), Some("no")).holds());
    }
}
