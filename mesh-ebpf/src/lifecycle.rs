//! What becomes of a connection. These programs run for every TCP socket of the machine, that for errors
//! also for those of other protocols, and do nothing for those without a record of ours.
//!
//! A connection that succeeds meets one of them, when its socket ends.
//!
//! The kernel does not run a tracing program that is running on the same CPU already
//! (`bpf_prog_active` by program, `__bpf_trace_run`): a packet or a timer that interrupts one would go
//! unseen. What must not be missed is therefore seen by two programs that do the same; whichever
//! comes first releases the record, and the other one finds nothing.

use aya_ebpf::macros::btf_tracepoint;
use aya_ebpf::programs::BtfTracePointContext;
use mesh_common::ejection::Phase;
use mesh_common::layout::counter;
use mesh_common::socket::{
    Outcome, Said, Seen, failure, judge, judge_datagram, judge_dissolved, judge_end, judge_reset,
};
use mesh_common::stats::Change;
use mesh_common::{
    BackendStats, Client, Ejection, Failure, Flow, Given, Held, Policy, Rate, Table, Tables as _,
    Token, Window, flow,
};

use crate::chunks::{BACKEND_STATS, SERVICES, WINDOWS};
use crate::events;
use crate::maps::{Maps, count, measure, mesh_share_allows};
use crate::records::{self, Released};
use crate::sock::{Sock, TcpSock};

/// A TCP socket is reset by its peer, which is told before anything of it has changed.
#[btf_tracepoint(function = "tcp_receive_reset")]
pub fn mesh_reset(ctx: BtfTracePointContext) -> i32 {
    reset(&ctx)
}

/// The same, for the resets that come in while the other one runs on this CPU.
#[btf_tracepoint(function = "tcp_receive_reset")]
pub fn mesh_reset_too(ctx: BtfTracePointContext) -> i32 {
    reset(&ctx)
}

/// What a failed connection counts as, in microseconds.
const FAILED: u64 = 1_000_000;

/// A socket has an error, also when that is only that it was disconnected.
#[btf_tracepoint(function = "inet_sk_error_report")]
pub fn mesh_error(ctx: BtfTracePointContext) -> i32 {
    error(&ctx)
}

/// The same, for the errors that are reported while the other one runs on this CPU.
#[btf_tracepoint(function = "inet_sk_error_report")]
pub fn mesh_error_too(ctx: BtfTracePointContext) -> i32 {
    error(&ctx)
}

/// A TCP socket ends, whatever it was.
#[btf_tracepoint(function = "tcp_destroy_sock")]
pub fn mesh_destroy(ctx: BtfTracePointContext) -> i32 {
    destroy(&ctx)
}

/// The same, for the sockets that end while the other one runs on this CPU.
#[btf_tracepoint(function = "tcp_destroy_sock")]
pub fn mesh_destroy_too(ctx: BtfTracePointContext) -> i32 {
    destroy(&ctx)
}

/// How often the SYN of a connect is sent again until its backend is blamed: once may be chance.
const SILENT: u32 = 2;

/// A TCP socket sends something again. The SYN of a connect that tries a backend says at once that the
/// backend is silent, that of others the second time.
#[btf_tracepoint(function = "tcp_retransmit_skb")]
pub fn mesh_retransmit(ctx: BtfTracePointContext) -> i32 {
    let sock = Sock::new(ctx.arg(0));
    if let Some((cookie, flow)) = ours(sock)
        && let Some(tcp) = sock.tcp()
        && tcp.bytes_acked() == 0
    {
        let held = Held(records::held(flow).load());
        if held.has_token() {
            silent(cookie, flow);
        } else if !held.is_told() && tcp.retransmitted() >= SILENT {
            unanswered(cookie, flow);
        }
    }
    0
}

#[inline(always)]
fn reset(ctx: &BtfTracePointContext) -> i32 {
    let sock = Sock::new(ctx.arg(0));
    if let Some((cookie, flow)) = ours(sock)
        // What comes after the application has closed the socket is no answer to it.
        && !sock.is_orphaned()
        && let Some(tcp) = sock.tcp()
    {
        match judge_reset(tcp.bytes_acked() != 0, tcp.bytes_received() != 0) {
            Some(failure) => failed(cookie, flow, failure),
            None => ended(cookie, flow, true),
        }
    }
    0
}

#[inline(always)]
fn error(ctx: &BtfTracePointContext) -> i32 {
    let sock = Sock::new(ctx.arg(0));
    let Some((cookie, flow)) = ours(sock) else { return 0 };
    let Some(tcp) = sock.tcp() else {
        // A datagram socket that is not connected (any more).
        if !sock.is_closed()
            && let Some(failure) = judge_datagram(sock.error(), sock.said())
        {
            not_taken(cookie, flow, failure);
        }
        return 0;
    };
    let connected = tcp.bytes_acked() != 0;
    let errors = u64::from(sock.error() as u32) | u64::from(sock.soft_error() as u32) << 32;
    // What comes later says nothing, so it is not looked at.
    let said = if connected { Said::NOTHING } else { sock.said() };
    let flags = (u64::from(connected) * CONNECTED)
        | (u64::from(tcp.bytes_received() != 0) * ANSWERED)
        | (u64::from(sock.is_closed()) * CLOSED)
        | (u64::from(sock.is_disconnected()) * DISCONNECTED)
        | (u64::from(tcp.has_retransmitted()) * REPEATED)
        | (u64::from(!records::frontend(flow).addr.is_v4()) * UNQUEUED)
        | (u64::from(Held(records::held(flow).load()).is_told()) * TOLD)
        | (u64::from(tcp.was_answered()) * WAS_ANSWERED);
    match mesh_judge(errors, said.0, flags) {
        NOTHING => {}
        OVER => ended(cookie, flow, false),
        OVER_WELL => ended(cookie, flow, true),
        told => {
            let Some(failure) = Failure::from_number(told as u8 & 3) else { return 0 };
            if told & WARNED != 0 {
                // The application learns it when it asks. A SYN that is sent again may be answered otherwise.
                blame(cookie, flow, failure);
            } else {
                failed(cookie, flow, failure);
            }
        }
    }
    0
}

// What is seen of a socket, for `mesh_judge`: bits of its last argument.
const CONNECTED: u64 = 1;
const ANSWERED: u64 = 1 << 1;
const CLOSED: u64 = 1 << 2;
const DISCONNECTED: u64 = 1 << 3;
const REPEATED: u64 = 1 << 4;
const UNQUEUED: u64 = 1 << 5;
const TOLD: u64 = 1 << 6;
const WAS_ANSWERED: u64 = 1 << 7;

// What it says: one of these, or the number of a failure with a bit for "it goes on".
const NOTHING: u64 = 1 << 8;
const OVER: u64 = 2 << 8;
const OVER_WELL: u64 = 3 << 8;
const WARNED: u64 = 1 << 4;

/// [`judge`] and [`judge_dissolved`], as a global function: the verifier looks at it once, and at what follows
/// once for each of its answers, and not for everything that can be seen of a socket. Takes the errors, the
/// soft one in the upper half; what the queue says; and the bits above.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn mesh_judge(errors: u64, said: u64, flags: u64) -> u64 {
    let is = |flag: u64| flags & flag != 0;
    let seen = Seen {
        error: errors as i32,
        connected: is(CONNECTED),
        answered: is(ANSWERED),
        closed: is(CLOSED),
        disconnected: is(DISCONNECTED),
        repeated: is(REPEATED),
        soft: failure((errors >> 32) as i32),
        said: Said(said).failure(),
        unqueued: is(UNQUEUED),
        told: is(TOLD),
    };
    match judge(seen) {
        Outcome::Nothing => NOTHING,
        Outcome::Warned(failure) => failure as u64 | WARNED,
        Outcome::Over => {
            let was_answered = seen.disconnected && is(WAS_ANSWERED);
            match judge_dissolved(seen, was_answered) {
                Some(failure) => failure as u64,
                None if seen.connected || seen.error != 0 && was_answered => OVER_WELL,
                None => OVER,
            }
        }
        Outcome::Failed(failure) => failure as u64,
    }
}

/// A datagram was not taken, as somebody says (ICMP). The socket goes on, so it is counted once. Only of
/// a connected socket is it known who did not take it.
#[inline(always)]
fn not_taken(cookie: u64, flow: *mut Flow, failure: Failure) {
    let held = Held(records::held(flow).load());
    let given = records::given(flow);
    if !given.role.is_connected() || !flow::tell(records::held(flow), held, cookie) {
        return;
    }
    let Some(stats) = BACKEND_STATS.get(held.backend()).filter(|s| s.is_life(given.generation))
    else {
        return;
    };
    let token = if held.has_token() { given.token } else { Token::NONE };
    let (policy, rate, table) = rules(&given);
    let policy = stricter(held.backend(), stats, rate, policy);
    let client = Client::of_cgroup(given.client);
    let may_go = |_: Ejection, is_out: bool| may_go(table, policy, client, is_out);
    let change = stats.fail_open(failure, token, policy, client, Maps.now(), may_go);
    tell(held, &given, failure, policy, change);
}

/// Whether one more backend of a table may go out for a client; counted for it also when the backend
/// would go out for all: what is out for all is out for it too, beside what it alone has out. Another
/// client may have more out for a moment then, until the agent takes some of what it alone suspects back.
#[inline(always)]
fn may_go(table: Table, policy: Policy, client: Client, is_out: bool) -> bool {
    let packed = u64::from(client.tag()) | u64::from(is_out) << 16;
    let allowed = mesh_share_allows(table.0, policy.0, packed) != 0;
    if !allowed {
        count(counter::SHARE_REACHED);
    }
    allowed
}

#[inline(always)]
fn destroy(ctx: &BtfTracePointContext) -> i32 {
    let sock = Sock::new(ctx.arg(0));
    if let Some((cookie, flow)) = ours(sock) {
        // None of ours is anything else; if one were, its record would have to go all the same.
        let Some(tcp) = sock.tcp() else {
            ended(cookie, flow, false);
            return 0;
        };
        let seen = seen(sock, tcp, flow);
        if records::role(flow).is_measured() && seen.connected {
            let id = Held(records::held(flow).load()).backend();
            let generation = records::generation(flow);
            if BACKEND_STATS.get(id).is_some_and(|stats| stats.is_life(generation)) {
                measure(id, tcp.round_trip().into());
            }
        }
        match judge_end(seen, tcp.has_sent() && !tcp.is_in_flight()) {
            Some(failure) => failed(cookie, flow, failure),
            None => {
                // Whether it was answered makes a difference only to a backend in doubt.
                let held = Held(records::held(flow).load());
                let stats = BACKEND_STATS.get(held.backend());
                let matters = stats.is_some_and(|stats| stats.awaits_success(held));
                ended(cookie, flow, seen.connected && matters);
            }
        }
    }
    0
}

/// What there is to see of a socket with this record.
#[inline(always)]
fn seen(sock: Sock, tcp: TcpSock, flow: *mut Flow) -> Seen {
    let connected = tcp.bytes_acked() != 0;
    Seen {
        error: sock.error(),
        connected,
        answered: tcp.bytes_received() != 0,
        closed: sock.is_closed(),
        disconnected: sock.is_disconnected(),
        repeated: tcp.has_retransmitted(),
        soft: failure(sock.soft_error()),
        // What comes later says nothing, so it is not looked at.
        said: if connected { None } else { sock.said().failure() },
        unqueued: !records::frontend(flow).addr.is_v4(),
        told: Held(records::held(flow).load()).is_told(),
    }
}

/// The cookie and the record of a socket, if it has one of ours.
#[inline(always)]
fn ours(sock: Sock) -> Option<(u64, *mut Flow)> {
    let cookie = sock.cookie();
    if cookie == 0 {
        return None;
    }
    records::find(cookie).map(|flow| (cookie, flow))
}

/// Something came back to a datagram socket that tries a backend.
#[inline(never)]
pub fn answered(cookie: u64, flow: *mut Flow) {
    let given = records::given(flow);
    let held = Held(records::held(flow).load());
    if !flow::settle(records::held(flow), cookie) {
        return;
    }
    let Some(stats) = BACKEND_STATS.get(held.backend()).filter(|s| s.is_life(given.generation))
    else {
        return;
    };
    let (policy, _, _) = rules(&given);
    let client = Client::of_cgroup(given.client);
    if let Some((before, after)) = stats.succeed_open(given.token, policy, client, Maps.now())
        && !before.is_in()
        && after.is_in()
    {
        events::changed(events::Kind::Recovered, held, &given, 0, after);
    }
}

/// A datagram socket that was connected ends, and nobody said that it failed: that is all there is to know
/// of datagrams.
#[inline(never)]
pub fn ended_well(cookie: u64, flow: *mut Flow) {
    ended(cookie, flow, true);
}

/// A connection has ended that is not known to have failed.
#[inline(always)]
fn ended(cookie: u64, flow: *mut Flow, connected: bool) {
    if !connected {
        if let Some(Released { held, stats, token }) = records::release(flow, cookie) {
            records::account(stats, held.backend(), token);
        }
        return;
    }
    let given = records::given(flow);
    let Some(Released { held, stats, token }) = records::release(flow, cookie) else { return };
    let (policy, _, _) = rules(&given);
    let client = Client::of_cgroup(given.client);
    if let Some((before, after)) = stats.succeed(token, policy, client, Maps.now())
        && !before.is_in()
        && after.is_in()
    {
        events::changed(events::Kind::Recovered, held, &given, 0, after);
    }
}

/// A connection has failed.
#[inline(always)]
fn failed(cookie: u64, flow: *mut Flow, failure: Failure) {
    let given = records::given(flow);
    let Some(Released { held, stats, token }) = records::release(flow, cookie) else { return };
    // Otherwise what fails would be forgotten to be far, and be the nearest.
    if given.role.is_measured() {
        measure(held.backend(), FAILED);
    }
    // It was blamed while nothing was answered.
    if held.is_told() {
        stats.fail_blamed(failure);
        return tell(held, &given, failure, Policy::OFF, None);
    }
    let (policy, rate, table) = rules(&given);
    let policy = stricter(held.backend(), stats, rate, policy);
    let client = Client::of_cgroup(given.client);
    let may_go = |_: Ejection, is_out: bool| may_go(table, policy, client, is_out);
    let change = stats.fail(failure, token, policy, client, Maps.now(), may_go);
    tell(held, &given, failure, policy, change);
}

/// The SYN of a connect was sent twice again: nobody has to wait until its application gives up. How it
/// ends is counted when it does.
#[inline(always)]
fn unanswered(cookie: u64, flow: *mut Flow) {
    blame(cookie, flow, Failure::Timeout);
}

/// Blames a backend for a connect that goes on.
#[inline(always)]
fn blame(cookie: u64, flow: *mut Flow, failure: Failure) {
    let held = Held(records::held(flow).load());
    let given = records::given(flow);
    if !flow::tell(records::held(flow), held, cookie) {
        return;
    }
    let Some(stats) = BACKEND_STATS.get(held.backend()).filter(|s| s.is_life(given.generation))
    else {
        return;
    };
    let token = if held.has_token() { given.token } else { Token::NONE };
    let (policy, rate, table) = rules(&given);
    let policy = stricter(held.backend(), stats, rate, policy);
    let client = Client::of_cgroup(given.client);
    let may_go = |_: Ejection, is_out: bool| may_go(table, policy, client, is_out);
    let change = stats.blame(token, policy, client, Maps.now(), may_go);
    tell_out(held, &given, failure as u8, policy, change);
}

/// The SYN of a try was not answered for a second. That is all that the backend is blamed for by this connect: when
/// it sends its SYN once more, another try may have found the backend well.
#[inline(always)]
fn silent(cookie: u64, flow: *mut Flow) {
    let held = Held(records::held(flow).load());
    let given = records::given(flow);
    let Some(stats) = BACKEND_STATS.get(held.backend()).filter(|s| s.is_life(given.generation))
    else {
        return;
    };
    if stats.ejection().token() != given.token {
        // The try counts as answered, because this comes late: it has said nothing, and its connect may be blamed
        // for like any other.
        let _ = flow::settle(records::held(flow), cookie);
        return;
    }
    if !flow::tell(records::held(flow), held, cookie) {
        return;
    }
    let (policy, _, _) = rules(&given);
    let client = Client::of_cgroup(given.client);
    if let Some(change) = stats.stay_silent(policy, client, given.token, Maps.now()) {
        tell_change(held, &given, Failure::Timeout as u8, change.1);
    }
}

/// Tells the agent about a failure and what it led to.
#[inline(always)]
fn tell(held: Held, given: &Given, failure: Failure, policy: Policy, change: Option<Change>) {
    let detail = failure as u8;
    let after = change.map_or(Ejection::NONE, |(_, after)| after);
    events::failed(held, given, detail, after);
    tell_out(held, given, detail, policy, change);
}

/// Tells the agent what a failure led to.
#[inline(always)]
fn tell_out(held: Held, given: &Given, detail: u8, policy: Policy, change: Option<Change>) {
    let Some((before, after)) = change else { return };
    if !after.is_in() {
        tell_change(held, given, detail, after);
    } else if before.failures() + 1 >= policy.failures() && policy.failures() != 0 {
        events::failed_but_spared(held, given, detail, after);
    }
}

/// Tells the agent that a backend went out, or stays out for longer.
#[inline(always)]
fn tell_change(held: Held, given: &Given, detail: u8, after: Ejection) {
    let kind = match after.phase() {
        Phase::Suspected => events::Kind::Suspected,
        _ => events::Kind::Ejected,
    };
    events::changed(kind, held, given, detail, after);
}

/// The rules of the service that a socket was given by, and the table of its backends; neither when
/// it is gone.
#[inline(always)]
fn rules(given: &Given) -> (Policy, Rate, Table) {
    match SERVICES.get(given.role.service()) {
        Some(service) if service.key == given.frontend => {
            (service.policy(), service.rate(), service.table())
        }
        _ => (Policy::OFF, Rate::OFF, Table(0)),
    }
}

/// Counts a failure, which is about to be blamed on a backend. Gives the policy, or the one by which this
/// failure is enough, when too many have failed.
#[inline(always)]
fn stricter(backend: u32, stats: &BackendStats, rate: Rate, policy: Policy) -> Policy {
    if !rate.matters(policy) || !is_often(backend, stats.opened.load(), rate.0) {
        return policy;
    }
    policy.at_once()
}

/// Whether too many connects to a backend fail, of which so many were opened. They are counted on: what one
/// client has seen fail too often is out for it alone, and others need not see as many again.
#[inline(never)]
fn is_often(backend: u32, opened: u64, rate: u32) -> bool {
    let Some(word) = WINDOWS.get(backend) else { return false };
    let before = Window(word.load());
    let window = before.with_failure(opened, Maps.now());
    word.replace(before.0, window.0) && window.is_bad(Rate(rate), opened)
}
