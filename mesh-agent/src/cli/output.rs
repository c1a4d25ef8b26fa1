//! Printing: one value as a table for people, or as JSON or YAML for programs.

use std::io::{self, IsTerminal, Write as _};
use std::time::{Duration, SystemTime};

use comfy_table::{Cell, Color, ContentArrangement, Row, Table, presets};
use serde::Serialize;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::args::Format;
use super::failure::Failure;

/// Tables are no wider than this, except with `-o wide`.
pub(super) const WIDTH: u16 = 100;

/// Where a command's result goes, and in which form.
#[derive(Clone, Copy, Debug)]
pub(super) struct Output {
    format: Format,
    style: Style,
}

/// How tables look.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Style {
    pub(super) wide: bool,
    pub(super) colour: bool,
    /// The most columns of the terminal that a line takes, unless `wide`.
    pub(super) width: u16,
}

// === impl Output ===

impl Output {
    pub(super) fn new(format: Format, style: Style) -> Self {
        Self { format, style }
    }

    /// Prints `value`; for people as `table` writes it.
    pub(super) fn print<T: Serialize>(
        &self,
        value: &T,
        table: impl FnOnce(&T, Style) -> String,
    ) -> Result<(), Failure> {
        let mut text = match self.format {
            Format::Table | Format::Wide => table(value, self.style),
            Format::Json => serde_json::to_string_pretty(value).map_err(Failure::failed)?,
            Format::Yaml => serde_saphyr::to_string(value).map_err(Failure::failed)?,
        };
        if !text.is_empty() && !text.ends_with('\n') {
            text.push('\n');
        }
        write(text.as_bytes())
    }

    /// Prints one of many values as it comes; for people as `table` writes it. In JSON each is a
    /// line, in YAML a document.
    pub(super) fn print_next<T: Serialize>(
        &self,
        value: &T,
        table: impl FnOnce(&T, Style) -> String,
    ) -> Result<(), Failure> {
        let text = match self.format {
            Format::Table | Format::Wide => table(value, self.style),
            Format::Json => serde_json::to_string(value).map_err(Failure::failed)? + "\n",
            Format::Yaml => {
                format!("---\n{}", serde_saphyr::to_string(value).map_err(Failure::failed)?)
            }
        };
        write(text.as_bytes())
    }

    /// Whether a person reads this.
    pub(super) fn is_for_people(&self) -> bool {
        matches!(self.format, Format::Table | Format::Wide)
    }
}

// === impl Style ===

impl Style {
    /// What fits standard output, be it a terminal or not.
    pub(super) fn of_stdout(format: Format) -> Self {
        let terminal = terminal_size::terminal_size_of(io::stdout());
        Self {
            wide: format == Format::Wide,
            colour: wants_colour(&io::stdout()),
            width: terminal.map_or(WIDTH, |(width, _)| width.0.min(WIDTH)),
        }
    }

    /// A table whose lines are cut to the width: one line for each row.
    pub(super) fn list(self, header: &[&str]) -> Grid {
        Grid::new(self, header, 1)
    }

    /// A table whose long cells go on in the next line: nothing is lost.
    pub(super) fn text(self, header: &[&str]) -> Grid {
        Grid::new(self, header, usize::MAX)
    }
}

/// Colour only for a person who wants it (no-color.org), at a terminal that can do it.
pub(super) fn wants_colour(stream: &impl IsTerminal) -> bool {
    let unwanted = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    let unable = std::env::var_os("TERM").is_some_and(|value| value == "dumb");
    !unwanted && !unable && stream.is_terminal()
}

/// A table in the making: no borders, two spaces between columns, as kubectl prints them.
pub(super) struct Grid {
    table: Table,
    lines: usize,
}

impl Grid {
    fn new(style: Style, header: &[&str], lines: usize) -> Self {
        let mut table = Table::new();
        // What is a terminal has been decided already, also against `NO_COLOR`.
        table.load_preset(presets::NOTHING).force_no_tty().set_truncation_indicator("…");
        if style.colour {
            table.enforce_styling();
        }
        if style.wide {
            table.set_content_arrangement(ContentArrangement::Disabled);
        } else {
            table.set_content_arrangement(ContentArrangement::Dynamic).set_width(style.width);
        }
        if !header.is_empty() {
            let mut header = Row::from(header);
            header.max_height(1);
            table.set_header(header);
        }
        Self { table, lines }
    }

    /// Adds a row.
    pub(super) fn row(&mut self, cells: impl IntoIterator<Item = Cell>) {
        let mut row = Row::from(cells.into_iter().collect::<Vec<_>>());
        row.max_height(self.lines);
        self.table.add_row(row);
    }

    /// The finished table, without trailing spaces.
    pub(super) fn finish(mut self) -> String {
        for column in self.table.column_iter_mut() {
            column.set_padding((0, 2));
        }
        let mut text = self.table.trim_fmt();
        text.push('\n');
        text
    }
}

// === cells ===

/// A cell of text. What would move the cursor is shown and not done.
pub(super) fn text(text: impl AsRef<str>) -> Cell {
    Cell::new(clean(text.as_ref()))
}

/// A cell with a number; to the left, as kubectl has it.
pub(super) fn number(number: impl ToString) -> Cell {
    Cell::new(number)
}

/// A cell of several lines.
pub(super) fn lines(text: &str) -> Cell {
    Cell::new(text.lines().map(clean).collect::<Vec<_>>().join("\n"))
}

/// A word that is good, bad or neither.
pub(super) fn coloured(word: &str) -> Cell {
    let cell = text(word);
    match word {
        "healthy" | "recovered" | "ready" | "yes" | "ok" => cell.fg(Color::Green),
        "unhealthy" | "ejected" | "error" | "no" | "fail" => cell.fg(Color::Red),
        "draining" | "starting" | "warn" | "suspected" | "spared" | "missed" => {
            cell.fg(Color::Yellow)
        }
        _ => cell,
    }
}

/// Control characters, escaped: names and messages come from outside, and must not drive a
/// terminal or break a line.
pub(super) fn clean(text: &str) -> String {
    if !text.contains(char::is_control) {
        return text.to_owned();
    }
    text.chars()
        .map(|c| if c.is_control() { c.escape_default().to_string() } else { c.into() })
        .collect()
}

/// The time since `since` (RFC 3339) as kubectl writes it; `-` for what is no time.
pub(super) fn age(since: &str, now: SystemTime) -> String {
    let Ok(since) = humantime::parse_rfc3339(since) else { return "-".into() };
    // A clock that was set back makes the future of now.
    brief(now.duration_since(since).unwrap_or(Duration::ZERO))
}

/// A duration in one number.
pub(super) fn brief(duration: Duration) -> String {
    match duration.as_secs() {
        seconds @ 0..120 => format!("{seconds}s"),
        seconds @ 120..7_200 => format!("{}m", seconds / 60),
        seconds @ 7_200..172_800 => format!("{}h", seconds / 3_600),
        seconds => format!("{}d", seconds / 86_400),
    }
}

/// Resolves when nobody reads standard output any more, which a pipe tells at once and not only when
/// something is written to it.
pub(super) async fn unread() {
    #[expect(
        deprecated,
        reason = "its successor is unsafe, to demand that the descriptor stays open: nobody closes \
                  standard output here"
    )]
    let stdout = AsyncFd::with_interest(io::stdout(), Interest::ERROR);
    match stdout {
        Ok(stdout) if stdout.ready(Interest::ERROR).await.is_ok() => {}
        // A file, which is always ready, cannot be waited for; nor can it lose its reader.
        _ => std::future::pending().await,
    }
}

/// Writes a line to standard error. There is nobody to tell when that fails.
pub(super) fn complain(message: &str) {
    let _ = writeln!(io::stderr(), "mesh-agent: {}", clean(message));
}

/// Writes to standard output.
pub(super) fn write(bytes: &[u8]) -> Result<(), Failure> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(bytes).and_then(|()| stdout.flush()).map_err(|error| match error.kind() {
        io::ErrorKind::BrokenPipe => Failure::Unread,
        _ => Failure::failed(format!("standard output: {error}; is the disk full?")),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages() {
        let now = humantime::parse_rfc3339("2026-01-10T00:00:00Z").expect("time");
        for (since, expected) in [
            ("2026-01-10T00:00:09Z", "0s"),
            ("2026-01-09T23:58:01Z", "119s"),
            ("2026-01-09T23:57:00Z", "3m"),
            ("2026-01-09T22:00:00Z", "2h"),
            ("2026-01-01T00:00:00Z", "9d"),
            ("yesterday", "-"),
        ] {
            assert_eq!(age(since, now), expected, "{since}");
        }
    }

    #[test]
    fn rows_are_one_line_and_fit() {
        let style = Style { wide: false, colour: false, width: WIDTH };
        let long = "a word ".repeat(40);
        let mut list = style.list(&["NAME", "DETAIL"]);
        list.row([text("orders\n\u{1b}[31m"), text(&long)]);
        list.row([text("x".repeat(253)), text("short")]);
        let list = list.finish();
        assert_eq!(list.lines().count(), 3, "{list}");
        assert!(list.lines().all(|line| line.chars().count() <= usize::from(WIDTH)), "{list}");
        assert!(list.contains('…') && !list.contains('\u{1b}'), "{list}");

        let mut wide = Style { wide: true, ..style }.list(&["NAME", "DETAIL"]);
        wide.row([text("orders"), text(&long)]);
        assert!(wide.finish().contains(long.trim_end()));
    }

    #[test]
    fn colour_is_only_where_it_is_wanted() {
        let render = |colour| {
            let mut list = Style { wide: false, colour, width: WIDTH }.list(&["STATE"]);
            list.row([coloured("unhealthy")]);
            list.finish()
        };
        assert!(render(true).contains("\u{1b}["));
        assert!(!render(false).contains('\u{1b}'));
    }
}
