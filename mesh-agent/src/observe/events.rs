//! Reading the ring buffer of the kernel programs.
//!
//! Most entries do not wake this task, because they can come in a flood: it looks by itself, [`TICK`]
//! apart. What it reads it hands to the engine. It never waits for the engine: the ring would fill,
//! and the kernel would drop what is newest.

use std::io;
use std::mem::{offset_of, take};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use aya::maps::{MapData, RingBuf};
use mesh_common::event::Kind;
use mesh_common::{Addr, Event, FrontendKey};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use super::clients::Clients;

/// How often the ring is looked at without a wake-up.
const TICK: Duration = Duration::from_millis(200);

/// The most entries that are read at once; the ring has room for 4,096.
const BATCH: usize = 1_024;

/// How many batches may wait for the engine: twelve seconds of a flood.
pub const BATCHES: usize = 64;

/// An event, with the name of its client.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Observed {
    /// What happened.
    pub kind: Kind,
    /// The entry of the ring.
    pub event: Event,
    /// The client's cgroup.
    pub client: Arc<str>,
}

/// What was read together.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Batch {
    /// In the order of the ring.
    pub events: Vec<Observed>,
    /// How many before these were left out, because the engine had not taken earlier ones.
    pub dropped: u64,
    /// How many entries before these were no events: a defect.
    pub malformed: u64,
}

/// Reads the ring until `cancel`, and hands what is in it to `batches`. `balanced` is the directory
/// of the balanced cgroup, inside which the clients are.
///
/// # Errors
///
/// When the ring cannot be waited for.
pub fn watch(
    ring: RingBuf<MapData>,
    balanced: &Path,
    batches: mpsc::Sender<Batch>,
    cancel: CancellationToken,
) -> io::Result<impl Future<Output = ()> + Send + use<>> {
    #[expect(
        deprecated,
        reason = "its successor is unsafe, to demand what a ring does: it keeps its descriptor open, \
                  and it is the same one always"
    )]
    let mut ring = AsyncFd::with_interest(ring, Interest::READABLE)?;
    let mut clients = Clients::of(balanced);
    Ok(async move {
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut pending = Batch::default();
        let mut read = Vec::new();
        loop {
            tokio::select! {
                biased;
                () = cancel.cancelled() => return,
                ready = ring.readable_mut() => match ready {
                    Ok(mut guard) => {
                        drain(guard.get_inner_mut(), &mut read, &mut pending.malformed);
                        guard.clear_ready();
                    }
                    // The runtime ends.
                    Err(_) => return,
                },
                _ = tick.tick() => drain(ring.get_mut(), &mut read, &mut pending.malformed),
            }
            clients.learn(read.iter().map(|(_, event)| event.client)).await;
            let named = read.drain(..).map(|(kind, event): (Kind, Event)| Observed {
                kind,
                event,
                client: clients.name(event.client),
            });
            pending.events.extend(named);
            hand_over(&mut pending, &batches);
        }
    })
}

/// Reads what is there, but no more than fits a batch: the rest is read at the next tick.
fn drain(ring: &mut RingBuf<MapData>, read: &mut Vec<(Kind, Event)>, malformed: &mut u64) {
    for _ in 0..BATCH {
        let Some(entry) = ring.next() else { return };
        match decode(&entry) {
            Some(event) => read.push(event),
            None => *malformed += 1,
        }
    }
}

/// Gives the batch to the engine. When the engine is slow, its events are lost, and counted in the
/// next one.
fn hand_over(pending: &mut Batch, batches: &mpsc::Sender<Batch>) {
    if *pending == Batch::default() {
        return;
    }
    if let Err(TrySendError::Full(batch)) = batches.try_send(take(pending)) {
        let lost = u64::try_from(batch.events.len()).unwrap_or(u64::MAX);
        pending.dropped = batch.dropped.saturating_add(lost);
        pending.malformed = batch.malformed;
    }
}

/// An entry of the ring; nothing when it is of another size or of an unknown kind.
fn decode(entry: &[u8]) -> Option<(Kind, Event)> {
    if entry.len() != size_of::<Event>() {
        return None;
    }
    let frontend = offset_of!(Event, frontend);
    let event = Event {
        time: u64::from_ne_bytes(field(entry, offset_of!(Event, time))?),
        client: u64::from_ne_bytes(field(entry, offset_of!(Event, client))?),
        ejection: u64::from_ne_bytes(field(entry, offset_of!(Event, ejection))?),
        frontend: FrontendKey {
            addr: addr(field(entry, frontend + offset_of!(FrontendKey, addr))?),
            // In network byte order on both sides.
            port: u16::from_ne_bytes(field(entry, frontend + offset_of!(FrontendKey, port))?),
            protocol: *entry.get(frontend + offset_of!(FrontendKey, protocol))?,
            pad: *entry.get(frontend + offset_of!(FrontendKey, pad))?,
        },
        backend: u32::from_ne_bytes(field(entry, offset_of!(Event, backend))?),
        generation: u32::from_ne_bytes(field(entry, offset_of!(Event, generation))?),
        kind: *entry.get(offset_of!(Event, kind))?,
        detail: *entry.get(offset_of!(Event, detail))?,
        pad: u16::from_ne_bytes(field(entry, offset_of!(Event, pad))?),
    };
    Some((Kind::from_number(event.kind)?, event))
}

fn field<const N: usize>(entry: &[u8], offset: usize) -> Option<[u8; N]> {
    entry.get(offset..)?.first_chunk().copied()
}

/// Of its 16 bytes in network order, which is how an address lies in memory.
fn addr(bytes: [u8; 16]) -> Addr {
    let mut words = [0; 4];
    for (word, chunk) in words.iter_mut().zip(bytes.as_chunks::<4>().0) {
        *word = u32::from_ne_bytes(*chunk);
    }
    Addr::from_words(words)
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_common::Protocol;

    /// As the kernel writes it: C's layout, every byte another one.
    fn bytes() -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(0x0102_0304_0506_0708_u64.to_ne_bytes());
        bytes.extend(0x1112_1314_1516_1718_u64.to_ne_bytes());
        bytes.extend(0x2122_2324_2526_2728_u64.to_ne_bytes());
        bytes.extend([0xfd, 0, 0, 0x96, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x10]);
        bytes.extend(8080_u16.to_be_bytes());
        bytes.extend([6, 0]);
        bytes.extend(0x3132_3334_u32.to_ne_bytes());
        bytes.extend(0x4142_4344_u32.to_ne_bytes());
        bytes.extend([3, 2, 0, 0]);
        bytes
    }

    #[test]
    fn an_entry_is_read_as_it_was_written() {
        let address: std::net::Ipv6Addr = "fd00:96::10".parse().expect("address");
        let (kind, event) = decode(&bytes()).expect("an event");
        assert_eq!(kind, Kind::Suspected);
        let expected = Event {
            time: 0x0102_0304_0506_0708,
            client: 0x1112_1314_1516_1718,
            ejection: 0x2122_2324_2526_2728,
            frontend: FrontendKey::new(Addr::from(address), 8080, Protocol::Tcp),
            backend: 0x3132_3334,
            generation: 0x4142_4344,
            kind: 3,
            detail: 2,
            pad: 0,
        };
        assert_eq!(event, expected);
        assert_eq!(event.frontend.addr.ip().to_string(), "fd00:96::10");
        assert_eq!(event.frontend.host_port(), 8080);
    }

    #[test]
    fn what_is_no_event_is_no_panic() {
        let whole = bytes();
        for length in 0..whole.len() {
            assert_eq!(decode(&whole[..length]), None, "{length} bytes");
        }
        assert_eq!(decode(&[whole.as_slice(), &[0]].concat()), None);
        for kind in [0, 7, 255] {
            let mut unknown = bytes();
            unknown[offset_of!(Event, kind)] = kind;
            assert_eq!(decode(&unknown), None, "kind {kind}");
        }
    }

    /// A slow engine loses events and learns how many; it holds up nobody.
    #[test]
    fn what_a_slow_engine_loses_is_counted() {
        let (sender, mut receiver) = mpsc::channel(1);
        let (kind, event) = decode(&bytes()).expect("an event");
        let observed = Observed { kind, event, client: "/a".into() };
        let mut pending = Batch::default();
        hand_over(&mut pending, &sender);
        assert!(receiver.try_recv().is_err(), "nothing is not handed over");
        for events in [1, 2, 3] {
            pending.events = vec![observed.clone(); events];
            hand_over(&mut pending, &sender);
        }
        pending.malformed += 1;
        assert_eq!(receiver.try_recv().expect("the first").events.len(), 1);
        hand_over(&mut pending, &sender);
        let counted = Batch { events: Vec::new(), dropped: 5, malformed: 1 };
        assert_eq!(receiver.try_recv(), Ok(counted));
        assert_eq!(pending, Batch::default());
        drop(receiver);
        pending.events.push(observed);
        hand_over(&mut pending, &sender);
        assert_eq!(pending, Batch::default(), "an engine that is gone does not need to know");
    }
}
