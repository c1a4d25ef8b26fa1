//! `events`: what has happened, as a table, and what happens, line by line.

use std::convert::Infallible;
use std::path::PathBuf;
use std::time::SystemTime;

use super::args::EventsArgs;
use super::ask::{ask, block_on, socket};
use super::failure::Failure;
use super::output::{self, Output, Style, age, clean, coloured, number, text};
use crate::api::client::Client;
use crate::api::types::Event;

/// How many characters of a client a line has room for: the end of a long path says the most.
const CLIENT: usize = 20;

/// The columns of a line that is printed as it comes, and how wide each is. With two spaces between
/// them they and [`REASON`] take 100 columns.
const COLUMNS: [(&str, usize); 5] =
    [("TIME", 8), ("KIND", 9), ("SERVICE", 16), ("BACKEND", 21), ("CLIENT", CLIENT)];

/// The same with nothing cut; what is longer moves what follows.
const WIDE: [(&str, usize); 6] = [
    ("TIME", 24),
    ("KIND", 9),
    ("SERVICE", 16),
    ("FRONTEND", 25),
    ("BACKEND", 21),
    ("CLIENT", CLIENT),
];

const REASON: &str = "REASON";

/// `events`.
pub(super) fn events(
    named: Option<PathBuf>,
    args: &EventsArgs,
    output: &Output,
) -> Result<(), Failure> {
    let service = args.service.as_deref();
    if args.follow {
        return follow(named, service, output);
    }
    let events = ask(named, async |client: &Client| client.events(service).await)?;
    if events.is_empty() && output.is_for_people() {
        output::complain("no events: nothing was refused, nothing failed, no backend changed");
        return Ok(());
    }
    output.print(&events, |events, style| table(events, style, SystemTime::now()))
}

/// Ctrl-C ends it as it ends any program.
fn follow(named: Option<PathBuf>, service: Option<&str>, output: &Output) -> Result<(), Failure> {
    let client = Client::new(&socket(named, None));
    let mut first = true;
    let print = |event: Event| {
        let shown = output.print_next(&event, |event, style| line(event, style, first));
        first = false;
        shown
    };
    let never: Infallible = block_on(async {
        tokio::select! {
            ended = client.follow(service, print) => ended,
            () = output::unread() => Err(Failure::Unread),
        }
    })??;
    match never {}
}

/// What has happened, the oldest first.
fn table(events: &[Event], style: Style, now: SystemTime) -> String {
    let mut list = style.list(if style.wide {
        &[
            "SEQ", "TIME", "AGE", "KIND", "SERVICE", "FRONTEND", "BACKEND", "CLIENT", REASON,
            "DETAIL",
        ]
    } else {
        &["AGE", "KIND", "SERVICE", "BACKEND", "CLIENT", REASON]
    });
    for event in events {
        let (age, kind) = (number(age(&event.time, now)), coloured(&event.kind));
        let (service, backend) = (text(or_dash(&event.service)), text(or_dash(&event.backend)));
        if style.wide {
            let (seq, time) = (number(event.seq), text(&event.time));
            let (frontend, client) = (text(or_dash(&event.frontend)), text(or_dash(&event.client)));
            let (reason, detail) = (text(or_dash(&event.reason)), text(&event.detail));
            list.row([seq, time, age, kind, service, frontend, backend, client, reason, detail]);
        } else {
            let client = text(end(&clean(or_dash(&event.client)), CLIENT));
            list.row([age, kind, service, backend, client, text(reason(event))]);
        }
    }
    list.finish()
}

/// One event as it comes, under a header if it is the first.
fn line(event: &Event, style: Style, first: bool) -> String {
    let [service, frontend, backend, client] =
        [&event.service, &event.frontend, &event.backend, &event.client]
            .map(|field| clean(or_dash(field)));
    let (time, kind) = (clean(&event.time), clean(&event.kind));
    let mut lines = String::new();
    if style.wide {
        if first {
            lines += &columns(&WIDE, &WIDE.map(|(name, _)| name.to_owned()), REASON);
        }
        let last = match &event.reason {
            Some(reason) if !event.detail.is_empty() => format!("{reason}: {}", event.detail),
            _ => reason(event).to_owned(),
        };
        lines += &columns(&WIDE, &[time, kind, service, frontend, backend, client], &clean(&last));
        return lines;
    }
    // `2026-01-10T00:03:00.000Z`: the time of day, which is what is new.
    let time = time.get(11..19).unwrap_or(&time).to_owned();
    let mut shown = vec![];
    if first {
        shown.push(columns(&COLUMNS, &COLUMNS.map(|(name, _)| name.to_owned()), REASON));
    }
    let mut cells = [time, kind, service, backend, end(&client, CLIENT)];
    for (cell, (_, width)) in cells.iter_mut().zip(COLUMNS) {
        *cell = start(cell, width);
    }
    shown.push(columns(&COLUMNS, &cells, &clean(reason(event))));
    for line in shown {
        lines += &start(line.trim_end(), usize::from(style.width));
        lines.push('\n');
    }
    lines
}

/// Cells, each at its place, and what comes last.
fn columns<const N: usize>(
    columns: &[(&str, usize); N],
    cells: &[String; N],
    last: &str,
) -> String {
    let mut line = String::new();
    for (cell, (_, width)) in cells.iter().zip(columns) {
        line += &format!("{cell:<width$}  ");
    }
    line + last + "\n"
}

/// The reason in short, or what is said instead.
fn reason(event: &Event) -> &str {
    event.reason.as_deref().unwrap_or(&event.detail)
}

fn or_dash(field: &Option<String>) -> &str {
    field.as_deref().unwrap_or("-")
}

/// The first characters, when there are more than fit.
fn start(text: &str, width: usize) -> String {
    if text.chars().count() <= width {
        return text.to_owned();
    }
    let kept: String = text.chars().take(width.saturating_sub(1)).collect();
    kept + "…"
}

/// The last characters, when there are more than fit.
fn end(text: &str, width: usize) -> String {
    let count = text.chars().count();
    if count <= width {
        return text.to_owned();
    }
    let kept: String = text.chars().skip(count + 1 - width).collect();
    format!("…{kept}")
}

#[cfg(test)]
mod tests {
    use super::super::output::WIDTH;
    use super::*;

    const PLAIN: Style = Style { wide: false, colour: false, width: WIDTH };

    fn failed() -> Event {
        Event {
            seq: 7,
            time: "2026-01-10T00:00:08.123Z".into(),
            kind: "failed".into(),
            service: Some("orders".into()),
            frontend: Some("10.96.0.10:80/tcp".into()),
            backend: Some("10.0.0.2:8080".into()),
            reason: Some("refused".into()),
            client: Some("/system.slice/containers/web-1".into()),
            detail: "the backend refused the connection".into(),
            missed: None,
        }
    }

    fn recovered() -> Event {
        Event {
            seq: 8,
            kind: "recovered".into(),
            service: Some("a-service-with-a-long-name.in-a-namespace.svc.cluster.local".into()),
            backend: Some("[2001:db8:1111:2222:3333:4444:5555:6666]:65535".into()),
            reason: None,
            client: Some("/web\u{1b}[31m".into()),
            detail: "a connect tried it, and was answered, which is said here at some length"
                .into(),
            ..failed()
        }
    }

    #[test]
    fn a_table_fits_and_wide_cuts_nothing() {
        let now = humantime::parse_rfc3339("2026-01-10T00:00:10Z").expect("time");
        let shown = table(&[failed()], PLAIN, now);
        let expected = "\
AGE  KIND    SERVICE  BACKEND        CLIENT                REASON
1s   failed  orders   10.0.0.2:8080  …ce/containers/web-1  refused
";
        assert_eq!(shown, expected, "\n{shown}");
        let both = [failed(), recovered()];
        for width in [40, 80, 100] {
            let shown = table(&both, Style { width, ..PLAIN }, now);
            assert_eq!(shown.lines().count(), 3, "{shown}");
            assert!(shown.lines().all(|l| l.chars().count() <= usize::from(width)), "{shown}");
            assert!(!shown.contains('\u{1b}'), "{shown}");
        }
        let wide = table(&both, Style { wide: true, ..PLAIN }, now);
        for words in ["/system.slice/containers/web-1", "at some length", "10.96.0.10:80/tcp"] {
            assert!(wide.contains(words), "{wide}");
        }
    }

    #[test]
    fn lines_stand_below_each_other() {
        let shown = line(&failed(), PLAIN, true) + &line(&recovered(), PLAIN, false);
        let expected = "\
TIME      KIND       SERVICE           BACKEND                CLIENT                REASON
00:00:08  failed     orders            10.0.0.2:8080          …ce/containers/web-1  refused
00:00:08  recovered  a-service-with-…  [2001:db8:1111:2222:…  /web\\u{1b}[31m        a connect tried…
";
        assert_eq!(shown, expected, "\n{shown}");
        for width in [40, 80, 100] {
            let shown = line(&recovered(), Style { width, ..PLAIN }, true);
            assert_eq!(shown.lines().count(), 2, "{shown}");
            assert!(shown.lines().all(|l| l.chars().count() <= usize::from(width)), "{shown}");
        }
        let wide = line(&recovered(), Style { wide: true, ..PLAIN }, true);
        assert_eq!(wide.lines().count(), 2, "{wide}");
        assert!(wide.contains("6666]:65535  ") && wide.contains("at some length"), "{wide}");
        let wide = line(&failed(), Style { wide: true, ..PLAIN }, false);
        assert!(wide.contains("refused: the backend refused"), "{wide}");
    }
}
