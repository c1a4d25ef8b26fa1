//! What people see of each answer.

use std::fmt::Write as _;
use std::time::{Duration, SystemTime};

use super::output::{Style, age, brief, clean, coloured, lines, number, text};
use crate::api::types::{
    Answer, Audit, Backend, Checks, Connection, Explanation, Frontend, Input, Memory, Service,
    Status,
};
use crate::check::Check;

/// How many frontends of a service are shown before `-o wide` is needed.
const FRONTENDS: usize = 1;

/// From this width on, all numbers of a backend are shown.
const ROOMY: u16 = 80;

/// `services`.
pub(super) fn services(services: &[Service], style: Style) -> String {
    let mut list = style.list(&["NAME", "BALANCE", "HEALTHY", "FRONTENDS", "SOURCE"]);
    for service in services {
        list.row([
            text(&service.name),
            text(&service.balance),
            number(format!("{}/{}", service.backends.healthy, service.backends.total)),
            text(frontends(&service.frontends, style.wide)),
            text(&service.source),
        ]);
    }
    let mut out = list.finish();
    for service in services {
        for problem in &service.problems {
            line(&mut out, format_args!("{}: {}", clean(&service.name), clean(problem)));
        }
    }
    out
}

fn frontends(frontends: &[Frontend], all: bool) -> String {
    let shown = if all { frontends.len() } else { FRONTENDS };
    let mut words: Vec<String> = frontends.iter().take(shown).map(frontend).collect();
    if frontends.len() > shown {
        words.push(format!("+{}", frontends.len() - shown));
    }
    words.join(" ")
}

fn frontend(frontend: &Frontend) -> String {
    let Frontend { address, port, protocol } = frontend;
    if address.contains(':') {
        format!("[{address}]:{port}/{protocol}")
    } else {
        format!("{address}:{port}/{protocol}")
    }
}

/// `backends`.
pub(super) fn backends(backends: &[Backend], style: Style, now: SystemTime) -> String {
    // A narrow terminal has no room for all numbers.
    let roomy = style.wide || style.width >= ROOMY;
    let mut header = vec!["SERVICE", "PORT", "ADDRESS", "STATE", "WEIGHT", "OPENED"];
    if roomy {
        header.extend(["ACTIVE", "FAILED"]);
    }
    header.push("AGE");
    if style.wide {
        header.extend(["REFUSED", "TIMEOUT", "UNREACHABLE", "RESET", "LATENCY", "ZONE"]);
    }
    header.push("REASON");
    let mut list = style.list(&header);
    for backend in backends {
        let mut row = vec![
            text(&backend.service),
            text(format!("{}/{}", backend.port, backend.protocol)),
            text(&backend.address),
            coloured(&backend.state),
            number(backend.weight),
            number(backend.opened),
        ];
        if roomy {
            row.extend([number(backend.active), number(backend.failed)]);
        }
        row.push(number(age(&backend.since, now)));
        if style.wide {
            row.extend([
                number(backend.failures.refused),
                number(backend.failures.timeout),
                number(backend.failures.unreachable),
                number(backend.failures.reset),
                number(backend.latency_us.map_or_else(|| "-".to_owned(), |us| format!("{us}us"))),
                text(backend.zone.as_deref().unwrap_or("-")),
            ]);
        }
        row.push(text(if style.wide { said(backend, now) } else { backend.reason.clone() }));
        list.row(row);
    }
    list.finish()
}

/// All that is said of a backend, and for how long.
fn said(backend: &Backend, now: SystemTime) -> String {
    let one = |input: &Input| {
        let since = input.since.as_ref().map(|since| format!(" for {}", age(since, now)));
        let reason =
            if input.reason.is_empty() { String::new() } else { format!(" ({})", input.reason) };
        format!("{} {}{}{reason}", input.by, input.state, since.unwrap_or_default())
    };
    match &*backend.inputs {
        // Of an agent that does not tell.
        [] => backend.reason.clone(),
        inputs => inputs.iter().map(one).collect::<Vec<_>>().join("; "),
    }
}

/// `connections`.
pub(super) fn connections(connections: &[Connection], style: Style) -> String {
    let mut header = vec!["SERVICE", "FRONTEND", "BACKEND", "STATE", "AGE", "PID", "COMMAND"];
    if style.wide {
        header.push("CGROUP");
    }
    let mut list = style.list(&header);
    for connection in connections {
        let or_none = |name: &str| if name.is_empty() { "-" } else { name }.to_owned();
        let pid = connection.pid.map_or_else(|| "-".to_owned(), |pid| pid.to_string());
        let mut row = vec![
            text(match connection.service.as_str() {
                "" => "(removed)",
                name => name,
            }),
            text(format!("{}/{}", connection.frontend, connection.protocol)),
            text(or_none(&connection.backend)),
            text(&connection.state),
            number(brief(Duration::from_secs(connection.age))),
            number(pid),
            text(connection.command.as_deref().unwrap_or("-")),
        ];
        if style.wide {
            row.push(text(&connection.cgroup));
        }
        list.row(row);
    }
    list.finish()
}

/// `audit`.
pub(super) fn audit(audit: &Audit, style: Style) -> String {
    let mut list = style.list(&["RECORDS", "COUNT"]);
    for (name, count) in [
        ("in use", audit.records as u64),
        ("of a socket that exists", audit.seen as u64),
        ("whose connection is over", audit.unseen as u64),
        ("released meanwhile", audit.ended as u64),
        ("in network namespaces out of reach", audit.in_unknown_namespaces as u64),
        ("where not all sockets were listed", audit.undecided as u64),
        ("released by this audit", audit.released),
        ("released by all audits so far", audit.released_ever),
    ] {
        list.row([text(name), number(count)]);
    }
    let mut out = list.finish();
    if let Some(problem) = &audit.problem {
        line(&mut out, format_args!("{}", clean(problem)));
    }
    out
}

/// `status`.
pub(super) fn status(status: &Status, style: Style, now: SystemTime) -> String {
    let mut head = style.text(&[]);
    let zone = status.zone.as_ref().map(|zone| format!(" (zone {zone})")).unwrap_or_default();
    head.row([text("node"), text(format!("{}{zone}", status.node))]);
    head.row([text("agent"), text(format!("{} (pid {})", status.version, status.pid))]);
    head.row([text("ready"), coloured(if status.ready { "yes" } else { "no" })]);
    for reason in &status.reasons {
        head.row([text("reason"), text(reason)]);
    }
    head.row([text("cgroup"), text(&status.cgroup)]);
    let last_error = status.last_error.as_ref().map_or_else(
        || "none".into(),
        |last| format!("{} ago: {}", age(&last.time, now), last.error),
    );
    head.row([text("last error"), text(last_error)]);
    let Memory { anonymous, maps } = status.memory;
    let memory = format!("{} of the agent, {} of maps", mebibytes(anonymous), mebibytes(maps));
    head.row([text("memory"), text(memory)]);
    let mut out = head.finish();

    let mut programs = style.list(&["PROGRAM", "HOOK", "ATTACHED"]);
    for program in &status.programs {
        let attached = coloured(if program.attached { "yes" } else { "no" });
        programs.row([text(&program.name), text(&program.hook), attached]);
    }
    // An error of a source names file, line and column: it is wrapped and never cut.
    let mut sources = style.text(&["SOURCE", "STATE", "SERVICES", "ERROR"]);
    for source in &status.sources {
        sources.row([
            text(&source.name),
            coloured(&source.state),
            number(source.services),
            lines(source.error.as_deref().unwrap_or("-")),
        ]);
    }
    let mut maps = style.list(&["MAP", "USED", "SIZE", "MAX", "FULL"]);
    for map in &status.maps {
        let full = (map.used * 100).checked_div(map.max).unwrap_or(0);
        let [used, size, max] = [map.used, map.size, map.max].map(number);
        maps.row([text(&map.name), used, size, max, number(format!("{full}%"))]);
    }
    let mut counters = style.list(&["CONNECTS", "COUNT"]);
    counters.row([text("balanced"), number(status.counters.balanced)]);
    for refused in &status.counters.refused {
        counters.row([text(format!("refused: {}", refused.reason)), number(refused.count)]);
    }
    for (name, count) in [
        ("retries", status.counters.retries),
        ("no flow record", status.counters.no_flow_record),
        ("collisions", status.counters.collisions),
        ("all ejected", status.counters.all_ejected),
        ("spared by the share", status.counters.share_reached),
        ("datagram records given up", status.counters.gave_way),
        ("no room for affinity", status.counters.no_pin),
        ("events lost", status.counters.events_lost),
    ] {
        counters.row([text(name), number(count)]);
    }
    let mut checks = style.list(&["HEALTH CHECKS", "COUNT"]);
    let Checks { passed, failed, unmade, unjudged, late, .. } = status.checks;
    for (name, count) in [
        ("passed", passed),
        ("failed", failed),
        ("could not be made", unmade),
        ("not judged", unjudged),
        ("late", late),
    ] {
        checks.row([text(name), number(count)]);
    }
    for part in [programs, sources, maps, counters, checks] {
        out.push('\n');
        out.push_str(&part.finish());
    }
    out
}

fn mebibytes(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

/// `explain`.
pub(super) fn explanation(explanation: &Explanation, style: Style) -> String {
    let mut head = style.text(&[]);
    head.row([text("frontend"), text(&explanation.frontend)]);
    head.row([text("service"), text(explanation.service.as_deref().unwrap_or("-"))]);
    head.row([text("algorithm"), text(explanation.algorithm.as_deref().unwrap_or("-"))]);
    let answer = match &explanation.answer {
        Some(Answer::Backend { backend }) => backend.clone(),
        Some(Answer::Refused { errno, reason }) => format!("{errno} ({reason})"),
        None => "not touched".into(),
    };
    head.row([text("answer"), text(answer)]);

    let mut steps = style.text(&["STEP", "DETAIL"]);
    for step in &explanation.steps {
        steps.row([text(&step.step), text(&step.detail)]);
    }
    let mut out = format!("{}\n{}", head.finish(), steps.finish());
    if !explanation.candidates.is_empty() {
        let mut list = style.list(&["CANDIDATE", "STATE", "PROBABILITY"]);
        for candidate in &explanation.candidates {
            list.row([
                text(&candidate.address),
                coloured(&candidate.state),
                number(format!("{:.2}%", candidate.score * 100.0)),
            ]);
        }
        out.push('\n');
        out.push_str(&list.finish());
    }
    out
}

/// `check`.
pub(super) fn checks(checks: &[Check], style: Style) -> String {
    let mut list = style.text(&["RESULT", "CHECK", "DETAIL"]);
    for check in checks {
        let result = match (check.ok, check.required) {
            (true, _) => "ok",
            (false, true) => "fail",
            (false, false) => "warn",
        };
        list.row([coloured(result), text(&check.name), text(&check.detail)]);
        if !check.advice.is_empty() {
            list.row([text(""), text(""), text(format!("→ {}", check.advice))]);
        }
    }
    list.finish()
}

/// Appends a line.
pub(super) fn line(out: &mut String, line: std::fmt::Arguments<'_>) {
    // Writing to a string cannot fail.
    let _ = writeln!(out, "{line}");
}

#[cfg(test)]
mod tests;
