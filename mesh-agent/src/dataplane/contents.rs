//! What the kernel's maps hold, as it is read by an agent that takes them over.

use std::net::Ipv6Addr;

use aya::maps::lpm_trie::Key;
use mesh_common::{Addr, FrontendKey, FrontendValue, Half, Name, Service, Word};

use super::kernel::{KernelMaps, map_error};
use super::maps::{Contents, Frontend, Generations, Kind, MapError};
use crate::compile::Rules;

/// A record as it is written.
pub(super) fn record(frontend: &Frontend) -> Service {
    let Frontend { key, generation, table, rules, .. } = frontend;
    Service {
        table: Word::new(table.0),
        generation: Word::new(*generation),
        policy: Word::new(rules.policy.0),
        key: *key,
        rate: Half::new(rules.rate.0),
        position: Word::new(0),
        affinity: Word::new(rules.affinity.0),
    }
}

/// What a record says, and whose it is.
pub(super) fn frontend(record: &Service, owner: u64) -> Option<Frontend> {
    Some(Frontend {
        key: record.key,
        generation: record.generation(),
        table: record.table(),
        rules: Rules { policy: record.policy(), rate: record.rate(), affinity: record.affinity() },
        owner: u32::try_from(owner).ok()?,
    })
}

impl Contents for KernelMaps {
    fn entries(&self) -> Result<Vec<(FrontendKey, FrontendValue)>, MapError> {
        let entries = self.frontends.iter().collect::<Result<_, _>>();
        entries.map_err(map_error("reading FRONTENDS"))
    }

    fn virtual_ips(&self) -> Result<Vec<(Addr, u8)>, MapError> {
        let prefix = |key: Key<[u8; 16]>| {
            (Addr::from(Ipv6Addr::from(key.data())), u8::try_from(key.prefix_len()))
        };
        let prefixes = self.virtual_ips.keys().map(|key| {
            let (addr, bits) = prefix(key?);
            Ok((addr, bits.unwrap_or(128)))
        });
        prefixes.collect::<Result<_, _>>().map_err(map_error("reading VIRTUAL_IPS"))
    }

    fn there(&self, kind: Kind) -> u32 {
        Self::there(self, kind)
    }

    fn service(&self, index: u32) -> Option<Frontend> {
        frontend(self.services.get(index)?, self.service_stats.get(index)?.owner.load())
    }

    fn name(&self, index: u32) -> Option<Name> {
        self.names.get(index).copied()
    }

    fn life(&self, id: u32) -> u64 {
        self.stats.get(id).map_or(0, |stats| stats.generation.load())
    }

    fn generations(&self) -> Generations {
        self.settings.get(0).map_or(Generations::default(), |settings| Generations {
            service: settings.generation.load(),
            // Only what fits was ever stored.
            backend: u32::try_from(settings.backend_generation.load()).unwrap_or_default(),
        })
    }

    fn gone(&self) -> u64 {
        self.settings.get(0).map_or(0, |settings| settings.gone_opened.load())
    }
}
