//! The kinds of health checks, and what each can be told.

use std::collections::BTreeMap;
use std::fs;
use std::ops::RangeInclusive;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use http::uri::{Authority, PathAndQuery};
use http::{HeaderMap, HeaderName, HeaderValue};
use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};

use super::values::path;
use crate::model::{Authorities, CommandCheck, GrpcCheck, HealthCheck, HttpCheck, Tls, Trust};
use crate::text as words;
use crate::yaml::{
    Fields, Keys, Node, Problems, Value, boolean, excerpt, fields, is_nothing, items, text,
};

/// Their keys.
pub(super) const KINDS: [&str; 5] = ["tcp", "http", "https", "grpc", "command"];

const TCP: Keys = Keys { of: "tcp", known: &[], later: &[] };

const HTTP: Keys =
    Keys { of: "http", known: &["path", "host", "expect", "headers", "http2"], later: &[] };

const HTTPS: Keys = Keys {
    of: "https",
    known: &["path", "host", "expect", "headers", "http2", "verify", "ca", "server-name"],
    later: &[],
};

const GRPC: Keys = Keys { of: "grpc", known: &["service", "host", "tls"], later: &[] };

const COMMAND: Keys = Keys { of: "command", known: &["run"], later: &[] };

const TLS: Keys = Keys { of: "tls", known: &["verify", "ca", "server-name"], later: &[] };

/// Status codes (RFC 9110, 15).
const STATUS: RangeInclusive<u16> = 100..=599;

/// What is expected when nothing is said: everything but errors.
const EXPECT: RangeInclusive<u16> = 200..=399;

/// The most headers that a check may send.
const MAX_HEADERS: usize = 32;

/// The longest path, name of a gRPC service and value of a header, in bytes: servers refuse longer ones.
const MAX_TEXT: usize = 4_096;

/// The most words that a command may have.
const MAX_ARGUMENTS: usize = 64;

/// The largest file of certificates: that of all public authorities is a quarter of a megabyte.
const MAX_CERTIFICATES: u64 = 4 << 20;

/// Reads what is behind one of [`KINDS`].
pub(super) fn check(kind: &str, node: &Node, problems: &mut Problems) -> Option<HealthCheck> {
    let keys = match kind {
        "http" => &HTTP,
        "https" => &HTTPS,
        "grpc" => &GRPC,
        "command" => &COMMAND,
        _ => &TCP,
    };
    // `tcp:` with nothing behind it is how YAML is often written for `tcp: {}`.
    let fields =
        if is_nothing(node) { Fields::none(node.at) } else { fields(node, keys, problems)? };
    match kind {
        "http" => Some(HealthCheck::Http(Arc::new(http(&fields, None, problems)?))),
        "https" => {
            let tls = tls(&fields, problems);
            let check = http(&fields, tls.clone(), problems)?;
            tls.map(|_| HealthCheck::Http(Arc::new(check)))
        }
        "grpc" => Some(HealthCheck::Grpc(Arc::new(grpc(&fields, problems)?))),
        "command" => Some(HealthCheck::Command(Arc::new(command(&fields, problems)?))),
        _ => Some(HealthCheck::Tcp),
    }
}

fn http(fields: &Fields<'_>, tls: Option<Tls>, problems: &mut Problems) -> Option<HttpCheck> {
    // All of them are read, so that everything that is wrong is found.
    let path = match fields.get("path") {
        Some(node) => request_path(node, problems),
        None => Some(PathAndQuery::from_static("/")),
    };
    let host = host(fields, problems);
    let expect = match fields.get("expect") {
        Some(node) => expected(node, problems),
        None => Some(vec![EXPECT]),
    };
    let headers = match fields.get("headers") {
        Some(node) => headers(node, problems),
        None => Some(HeaderMap::new()),
    };
    let http2 = match fields.get("http2") {
        Some(node) => boolean(node, "http2", problems),
        None => Some(false),
    };
    Some(HttpCheck {
        path: path?,
        host: host?,
        expect: expect?,
        headers: headers?,
        http2: http2?,
        tls,
    })
}

fn grpc(fields: &Fields<'_>, problems: &mut Problems) -> Option<GrpcCheck> {
    let service = match fields.get("service") {
        Some(node) => bounded(node, "the name that is asked for", problems).map(str::to_owned),
        None => Some(String::new()),
    };
    let host = host(fields, problems);
    let tls = match fields.get("tls") {
        None => Some(None),
        Some(node) if is_nothing(node) => {
            problems
                .add(node.at, "expected tls: {} for a connection that is secured; found nothing");
            None
        }
        Some(node) => {
            self::fields(node, &TLS, problems).and_then(|fields| tls(&fields, problems)).map(Some)
        }
    };
    Some(GrpcCheck { service: service?, host: host?, tls: tls? })
}

fn command(fields: &Fields<'_>, problems: &mut Problems) -> Option<CommandCheck> {
    const EXPECTED: &str =
        "a program with its arguments, such as [/usr/lib/mesh/check-orders, --fast]";
    let Some(node) = fields.get("run") else {
        problems.add(fields.at, format!("`run` is missing; expected {EXPECTED}"));
        return None;
    };
    let list = items(node, EXPECTED, problems)?;
    let (Some((program, arguments)), true) = (list.split_first(), list.len() <= MAX_ARGUMENTS)
    else {
        let found = list.len();
        let text = format!("expected {EXPECTED}, of 1 to {MAX_ARGUMENTS} words; found {found}");
        problems.add(node.at, text);
        return None;
    };
    let is_program = path(program, "the path of a program", problems)
        .is_some_and(|path| is_executable(program, &path, problems));
    let mut run = vec![text(program, EXPECTED, problems)?.to_owned()];
    for node in arguments {
        let argument = bounded(node, "an argument", problems)?;
        if argument.contains('\0') {
            problems.add(node.at, "expected an argument without a zero byte");
            return None;
        }
        run.push(argument.to_owned());
    }
    is_program.then_some(CommandCheck { run })
}

/// Whether somebody may run it; whether the user may that checks are run as, only trying tells.
fn is_executable(node: &Node, program: &Path, problems: &mut Problems) -> bool {
    let wrong = match fs::metadata(program) {
        Ok(found) if found.is_file() && found.mode() & 0o111 != 0 => return true,
        Ok(found) if found.is_file() => "it is not executable; use chmod +x".to_owned(),
        Ok(_) => "it is no file".to_owned(),
        Err(error) => words::chain(&error),
    };
    problems.add(node.at, format!("{}: {wrong}; expected a program", program.display()));
    false
}

/// A text that is no longer than servers take.
fn bounded<'n>(node: &'n Node, what: &str, problems: &mut Problems) -> Option<&'n str> {
    let text = text(node, what, problems)?;
    if text.len() <= MAX_TEXT {
        return Some(text);
    }
    problems
        .add(node.at, format!("expected {what} of at most {MAX_TEXT} bytes; found {}", text.len()));
    None
}

fn request_path(node: &Node, problems: &mut Problems) -> Option<PathAndQuery> {
    const EXPECTED: &str = "a path that begins with /, such as /healthz";
    let written = bounded(node, EXPECTED, problems)?;
    let parsed = written.parse::<PathAndQuery>().ok();
    // A fragment is not sent: whoever writes one means something else.
    let parsed = parsed.filter(|_| written.starts_with('/') && !written.contains('#'));
    if parsed.is_none() {
        problems.add(node.at, format!("expected {EXPECTED}; found {}", excerpt(written)));
    }
    parsed
}

/// What is sent as the host that is asked for.
fn host(fields: &Fields<'_>, problems: &mut Problems) -> Option<Option<Authority>> {
    const EXPECTED: &str = "a host name, which may have a port, such as orders.example:8080";
    let Some(node) = fields.get("host") else { return Some(None) };
    let written = bounded(node, EXPECTED, problems)?;
    let parsed = written.parse::<Authority>().ok().filter(|_| !written.contains('@'));
    if parsed.is_none() {
        problems.add(node.at, format!("expected {EXPECTED}; found {}", excerpt(written)));
    }
    parsed.map(Some)
}

/// `200`, `200-399`, or a list of such.
fn expected(node: &Node, problems: &mut Problems) -> Option<Vec<RangeInclusive<u16>>> {
    const EXPECTED: &str = "status codes from 100 to 599, such as 200, 200-399 or [200, 204-206]";
    let one = |node: &Node, problems: &mut Problems| {
        let written = text(node, EXPECTED, problems)?;
        let (first, last) = written.split_once('-').unwrap_or((written, written));
        let code = |text: &str| {
            let digits = text.len() == 3 && text.bytes().all(|byte| byte.is_ascii_digit());
            text.parse().ok().filter(|code| digits && STATUS.contains(code))
        };
        let range = code(first).zip(code(last)).filter(|(first, last)| first <= last);
        if range.is_none() {
            problems.add(node.at, format!("expected {EXPECTED}; found {}", excerpt(written)));
        }
        range.map(|(first, last)| first..=last)
    };
    if !matches!(node.value, Value::Sequence(_)) {
        return Some(vec![one(node, problems)?]);
    }
    let list = items(node, EXPECTED, problems)?;
    if list.is_empty() {
        problems.add(node.at, format!("the list is empty; expected {EXPECTED}"));
        return None;
    }
    // Each is looked at, so that all that is wrong is found.
    let ranges: Vec<_> = list.iter().map(|node| one(node, problems)).collect();
    ranges.into_iter().collect()
}

fn headers(node: &Node, problems: &mut Problems) -> Option<HeaderMap> {
    let Value::Mapping(entries) = &node.value else {
        problems.add(node.at, "expected headers such as {x-probe: node}: a mapping");
        return None;
    };
    if entries.len() > MAX_HEADERS {
        problems.add(
            node.at,
            format!("{} headers; a check sends at most {MAX_HEADERS}", entries.len()),
        );
        return None;
    }
    let (mut headers, mut all) = (HeaderMap::new(), true);
    for entry in entries {
        let name = HeaderName::try_from(&entry.key).ok().filter(is_ours);
        if name.is_none() {
            problems.add(
                entry.at,
                format!(
                    "expected the name of a header that is not the connection's own (Host is `host`); found {}",
                    excerpt(&entry.key)
                ),
            );
        }
        let value = bounded(&entry.value, "the value of a header", problems).and_then(|value| {
            let parsed = HeaderValue::from_str(value).ok();
            if parsed.is_none() {
                let text = format!(
                    "expected a value without control characters; found {}",
                    excerpt(value)
                );
                problems.add(entry.value.at, text);
            }
            parsed
        });
        match name.zip(value) {
            Some((name, value)) => drop(headers.insert(name, value)),
            None => all = false,
        }
    }
    all.then_some(headers)
}

/// Whether a check may send it: what belongs to the message or to the connection is not up to people.
fn is_ours(name: &HeaderName) -> bool {
    use http::header::{
        CONNECTION, CONTENT_LENGTH, EXPECT, HOST, TE, TRAILER, TRANSFER_ENCODING, UPGRADE,
    };
    let own = [HOST, CONNECTION, CONTENT_LENGTH, EXPECT, TE, TRAILER, TRANSFER_ENCODING, UPGRADE];
    !own.contains(name)
        && !matches!(name.as_str(), "keep-alive" | "proxy-connection" | "http2-settings")
}

/// How an endpoint proves who it is.
fn tls(fields: &Fields<'_>, problems: &mut Problems) -> Option<Tls> {
    let verify = match fields.get("verify") {
        Some(node) => boolean(node, "verify", problems),
        None => Some(true),
    };
    let server_name = match fields.get("server-name") {
        Some(node) => server_name(node, problems).map(Some),
        None => Some(None),
    };
    let trust = match (fields.get("ca"), verify?) {
        (None, true) => Some(Trust::System),
        (None, false) => Some(Trust::Anybody),
        (Some(node), true) => authorities(node, problems),
        (Some(_), false) => {
            problems.add(
                fields.key_at("ca"),
                "`ca` says nothing with `verify: false`; remove one of them",
            );
            None
        }
    };
    Some(Tls { server_name: server_name?, trust: trust? })
}

fn server_name(node: &Node, problems: &mut Problems) -> Option<ServerName<'static>> {
    const EXPECTED: &str = "a host name or an IP address, such as orders.example";
    let written = bounded(node, EXPECTED, problems)?;
    let parsed = ServerName::try_from(written.to_owned()).ok();
    if parsed.is_none() {
        problems.add(node.at, format!("expected {EXPECTED}; found {}", excerpt(written)));
    }
    parsed
}

/// The certificates of a file, as it is now. Services that name the same one share them.
fn authorities(node: &Node, problems: &mut Problems) -> Option<Trust> {
    let file = path(node, "a file of certificates (PEM)", problems)?;
    match listed(&file) {
        Ok(authorities) => Some(Trust::Listed(authorities)),
        Err(why) => {
            let text = format!("{}: {why}; expected certificates in PEM", file.display());
            problems.add(node.at, text);
            None
        }
    }
}

/// What tells a file from what it was before: device, inode, size, and when it was changed.
type Stamp = (u64, u64, u64, (i64, i64));

/// What is in use, by file.
static LISTED: Mutex<BTreeMap<PathBuf, (Stamp, Weak<Authorities>)>> = Mutex::new(BTreeMap::new());

fn listed(file: &Path) -> Result<Arc<Authorities>, String> {
    let found = fs::metadata(file).map_err(|error| words::chain(&error))?;
    if !found.is_file() {
        return Err("it is no file".to_owned());
    }
    if found.len() > MAX_CERTIFICATES {
        return Err(format!("it is larger than {} MiB", MAX_CERTIFICATES >> 20));
    }
    let stamp = (found.dev(), found.ino(), found.len(), (found.mtime(), found.mtime_nsec()));
    let mut all = LISTED.lock().unwrap_or_else(PoisonError::into_inner);
    all.retain(|_, (_, known)| known.strong_count() > 0);
    if let Some(known) = all.get(file).filter(|known| known.0 == stamp).and_then(|k| k.1.upgrade())
    {
        return Ok(known);
    }
    let certificates = CertificateDer::pem_file_iter(file)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|error| error.to_string())?;
    if certificates.is_empty() {
        return Err("it has no certificate".to_owned());
    }
    let mut roots = RootCertStore::empty();
    // One that nobody could use would only be found out when nothing can be checked.
    for certificate in &certificates {
        roots.add(certificate.clone()).map_err(|error| error.to_string())?;
    }
    let authorities = Arc::new(Authorities { certificates, roots: Arc::new(roots) });
    all.insert(file.to_owned(), (stamp, Arc::downgrade(&authorities)));
    Ok(authorities)
}
