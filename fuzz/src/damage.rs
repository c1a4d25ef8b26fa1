//! What anybody may have written into the maps.

use mesh_agent::dataplane::maps::{Generations, Kind, Maps as _};
use mesh_agent::dataplane::memory::{Memory, Spoiled};
use mesh_common::maglev::Size;
use mesh_common::{
    Addr, Algorithm, Backend, FrontendKey, FrontendValue, Marks, Name, Protocol, Slot, Table,
    maglev,
};

use crate::adopting::{ip, name};
use crate::script::Script;

/// Has arrays be there, also where nobody has written anything.
pub fn fill(memory: &mut Memory, script: &Script<'_>) {
    for kind in [Kind::Services, Kind::Slots, Kind::Backends] {
        memory.reach(kind, script.byte().into());
    }
}

/// One value in one place.
pub fn anything(script: &Script<'_>) -> Spoiled {
    let place = number(script);
    match script.byte() % 14 {
        0 => Spoiled::Entry(place, value(script)),
        1 => Spoiled::Frontend(key(script), value(script)),
        2 => Spoiled::Table(place, script.long()),
        3 => {
            let table = Table::slots(number(script), number(script));
            let algorithm = Algorithm::from_number(script.byte() % 8);
            Spoiled::Table(place, table.sized(Size::from_number(script.byte())).by(algorithm).0)
        }
        4 => Spoiled::Generation(place, generation(script)),
        5 => Spoiled::Key(place, key(script)),
        6 => Spoiled::Rules(place, script.long(), script.long()),
        7 => Spoiled::Owner(place, number(script)),
        8 => Spoiled::Slot(place, slot(script)),
        9 => Spoiled::Backend(place, backend(script)),
        10 => Spoiled::Life(place, generation(script)),
        11 => Spoiled::Opened(place, script.long()),
        12 => Spoiled::Name(place, called(script)),
        _ => match script.byte() % 3 {
            0 => {
                Spoiled::Noted(Generations { service: generation(script), backend: number(script) })
            }
            1 => Spoiled::Gone(script.long()),
            _ => Spoiled::VirtualIp(addr(script), script.byte()),
        },
    }
}

/// Mostly one of those that are used.
fn number(script: &Script<'_>) -> u32 {
    match script.byte() {
        255 => script.word(),
        small => (small % 64).into(),
    }
}

fn generation(script: &Script<'_>) -> u64 {
    match script.byte() {
        255 => script.long(),
        small => (small % 64).into(),
    }
}

/// Mostly one that a service has, or an endpoint.
fn addr(script: &Script<'_>) -> Addr {
    match script.byte() {
        255 => Addr::from_words([(); 4].map(|()| script.word())),
        n if n < 128 => ip(96, n % 8).into(),
        n => ip(n % 4, n / 4 % 8).into(),
    }
}

fn key(script: &Script<'_>) -> FrontendKey {
    let mut key = FrontendKey::new(addr(script), 80, Protocol::Tcp);
    match script.byte() {
        0 => key.protocol = script.byte(),
        1 => key.port = script.half(),
        2 => key.pad = script.byte(),
        3 => key = FrontendKey::address_only(key.addr),
        4..64 => key.protocol = Protocol::Udp as u8,
        _ => {}
    }
    key
}

fn value(script: &Script<'_>) -> FrontendValue {
    let pad = if script.byte() == 0 { script.word() } else { 0 };
    FrontendValue { service: number(script), pad, generation: generation(script) }
}

fn slot(script: &Script<'_>) -> Slot {
    if script.byte() < 32 {
        return maglev::slot([(); 16].map(|()| script.half()));
    }
    Slot {
        addr: addr(script),
        port: script.half(),
        weight: script.half(),
        backend: number(script),
        generation: number(script),
        threshold: script.word(),
        alias: number(script),
        end: script.word(),
    }
}

fn backend(script: &Script<'_>) -> Backend {
    let any = script.byte() < 64;
    Backend {
        addr: addr(script),
        port: if any { script.half() } else { 8080u16.to_be() },
        weight: script.half(),
        protocol: if any { script.byte() } else { Protocol::Tcp as u8 },
        marks: Marks(script.byte()),
        service_port: if any { script.half() } else { 80 },
        generation: number(script),
        owner: number(script),
    }
}

fn called(script: &Script<'_>) -> Name {
    match script.byte() {
        0..64 => Name::from_bytes(&[(); Name::MOST + 1].map(|()| script.byte())),
        n if n < 128 => Name::NONE,
        n => Name::new(name(n % 8).as_str(), script.byte().into()).unwrap_or(Name::NONE),
    }
}
