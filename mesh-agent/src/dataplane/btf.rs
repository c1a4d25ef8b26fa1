//! Where the running kernel keeps the fields of its sockets that the programs read.
//!
//! The kernel describes its types in BTF (`Documentation/bpf/btf.rst`). No Rust compiler emits the
//! relocations that loaders resolve with it, so the places are looked up here and handed to the
//! programs as constants. aya reads BTF too, but keeps the members of its types to itself.

use std::collections::HashMap;
use std::io;

use mesh_common::socket::{Field, Places};

/// The kernel's own types.
const VMLINUX: &str = "/sys/kernel/btf/vmlinux";

/// Why a field cannot be found.
#[derive(Debug, thiserror::Error)]
pub enum BtfError {
    /// The kernel's types cannot be read.
    #[error("reading {VMLINUX}: {0}; the kernel must be built with CONFIG_DEBUG_INFO_BTF")]
    Read(#[source] io::Error),
    /// They are not what the format says.
    #[error("{VMLINUX} is damaged or of an unknown version, at byte {0}")]
    Format(usize),
    /// A field is not there.
    #[error(
        "this kernel's struct {0} has no field {1}: it is of a version that this agent does not know \
         yet; report it with the output of `uname -r`, and use the kernel before it until then"
    )]
    Missing(&'static str, &'static str),
}

/// The places of all fields in the running kernel.
///
/// # Errors
///
/// When it does not describe its types, or has other ones.
pub fn places() -> Result<Places, BtfError> {
    find(&std::fs::read(VMLINUX).map_err(BtfError::Read)?)
}

fn find(btf: &[u8]) -> Result<Places, BtfError> {
    let types = Types::parse(btf)?;
    let mut places = Places::default();
    for (place, (_, of, field)) in places.iter_mut().zip(Field::ALL) {
        *place = types.offset(of, field)?;
    }
    Ok(places)
}

/// A member of a struct or union.
struct Member {
    name: u32,
    /// Id of its type.
    of: u32,
    /// In bits.
    offset: u32,
}

/// What is kept of the types: structs and unions.
struct Types<'b> {
    strings: &'b [u8],
    members: HashMap<u32, Vec<Member>>,
    /// Structs by name.
    structs: HashMap<&'b [u8], u32>,
}

/// Structs are this deep in one another at the most.
const DEPTH: u32 = 4;

impl<'b> Types<'b> {
    fn parse(btf: &'b [u8]) -> Result<Self, BtfError> {
        const MAGIC: u32 = 0xeb9f;
        let word = |at: usize| -> Result<u32, BtfError> {
            let bytes = btf.get(at..at + 4).and_then(|bytes| bytes.first_chunk());
            bytes.copied().map(u32::from_ne_bytes).ok_or(BtfError::Format(at))
        };
        // Magic (16 bits), version, flags; length of the header; then where types and strings are.
        let first = word(0)?;
        if first & 0xffff != MAGIC || first >> 16 & 0xff != 1 {
            return Err(BtfError::Format(0));
        }
        let header = word(4)? as usize;
        let (types, types_len) = (header + word(8)? as usize, word(12)? as usize);
        let (strings, strings_len) = (header + word(16)? as usize, word(20)? as usize);
        let strings = btf.get(strings..strings + strings_len).ok_or(BtfError::Format(16))?;
        let mut found = Self { strings, members: HashMap::new(), structs: HashMap::new() };
        let (mut at, end) = (types, types + types_len);
        let mut id = 1;
        while at < end {
            let (name, info) = (word(at)?, word(at + 4)?);
            let (kind, count) = (info >> 24 & 0x1f, (info & 0xffff) as usize);
            at += 12;
            if let 4 | 5 = kind {
                // With the flag, a member's offset has the size of its bit field on top.
                let mask = if info >> 31 == 1 { 0x00ff_ffff } else { u32::MAX };
                let mut members = Vec::with_capacity(count);
                for member in 0..count {
                    let at = at + member * 12;
                    let (name, of) = (word(at)?, word(at + 4)?);
                    members.push(Member { name, of, offset: word(at + 8)? & mask });
                }
                found.members.insert(id, members);
                if kind == 4 {
                    found.structs.entry(found.string(name)).or_insert(id);
                }
            }
            at += match kind {
                // Integers, variables and declaration tags have one more word, arrays three.
                1 | 14 | 17 => 4,
                3 => 12,
                4 | 5 | 15 | 19 => count * 12,
                6 | 13 => count * 8,
                2 | 7..=12 | 16 | 18 => 0,
                _ => return Err(BtfError::Format(at)),
            };
            id += 1;
        }
        Ok(found)
    }

    fn string(&self, at: u32) -> &'b [u8] {
        let rest = self.strings.get(at as usize..).unwrap_or_default();
        rest.split(|&byte| byte == 0).next().unwrap_or_default()
    }

    /// The place of a field of a struct, also one of the structs in it.
    fn offset(&self, of: &'static str, field: &'static str) -> Result<u32, BtfError> {
        let id = self.structs.get(of.as_bytes());
        let bits = id.and_then(|&id| self.search(id, field.as_bytes(), DEPTH));
        bits.map(|bits| bits / 8).ok_or(BtfError::Missing(of, field))
    }

    fn search(&self, of: u32, field: &[u8], depth: u32) -> Option<u32> {
        let members = self.members.get(&of)?;
        let own = members.iter().find(|member| self.string(member.name) == field);
        own.map(|member| member.offset).or_else(|| {
            let depth = depth.checked_sub(1)?;
            // Unnamed ones, and what all kinds of sockets have in common.
            let inner = members
                .iter()
                .filter(|member| matches!(self.string(member.name), b"" | b"__sk_common"));
            inner
                .into_iter()
                .find_map(|member| Some(member.offset + self.search(member.of, field, depth)?))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_kernel_has_them() {
        let places = places().expect("types of this kernel");
        let at = |field: Field| places[field as usize];
        assert!(places.iter().all(|&place| place > 0), "{places:?}");
        let of_sockets = Field::ALL.iter().filter(|(_, of, _)| of.ends_with("sock"));
        let different: std::collections::BTreeSet<_> =
            of_sockets.clone().map(|&(field, ..)| at(field)).collect();
        assert_eq!(different.len(), of_sockets.count(), "{places:?}");
        for field in [Field::Cookie, Field::Owner, Field::BytesAcked, Field::BytesReceived] {
            assert!(at(field).is_multiple_of(8), "{field:?}: {places:?}");
        }
        assert!(at(Field::PeerPort) < at(Field::State), "{places:?}");
        assert!(at(Field::State) < at(Field::Cookie), "{places:?}");
        // What is TCP's comes after what all sockets have.
        for (field, of, _) in Field::ALL {
            let is_after = at(field) > at(Field::Error).max(at(Field::Owner));
            assert!(is_after || of != "tcp_sock", "{field:?}: {places:?}");
        }
    }

    #[test]
    fn damage_is_told() {
        let btf = std::fs::read(VMLINUX).expect("types of this kernel");
        assert!(matches!(find(&[]), Err(BtfError::Format(0))));
        assert!(matches!(find(&btf[..100]), Err(BtfError::Format(_))));
        let mut other = btf.clone();
        other[2] = 9;
        assert!(matches!(find(&other), Err(BtfError::Format(0))));
        // Cut at the types: whatever it says, it does not panic.
        for len in (24..20_000).step_by(997) {
            assert!(find(&btf[..len]).is_err());
        }
    }

    /// A made-up object: a struct in a struct, a bit field, and every kind that is skipped.
    #[test]
    fn structs_are_followed() {
        let strings = b"\0sock\0__sk_common\0skc_cookie\0flag\0after\0";
        let at = |name: &[u8]| {
            let place = strings.windows(name.len()).position(|window| window == name);
            u32::try_from(place.expect("a string")).expect("short")
        };
        let mut types: Vec<u32> = vec![0, 1 << 24, 8, 64]; // 1: int
        for kind in [2, 7, 8, 9, 10, 11, 12, 16, 18] {
            types.extend([0, kind << 24, 1]);
        }
        types.extend([0, 3 << 24, 0, 1, 1, 4]); // array
        types.extend([0, 14 << 24, 1, 0, 0, 17 << 24, 1, 0]); // variable, tag
        types.extend([0, 6 << 24 | 1, 4, 0, 7, 0, 13 << 24 | 1, 1, 0, 1]); // enum, prototype
        let common = 1 + 9 + 1 + 2 + 2 + 1;
        let (cookie, flag) = (at(b"skc_cookie\0"), at(b"flag\0"));
        types.extend([0, 4 << 24 | 1 << 31 | 2, 16, flag, 1, 3 << 24 | 5, cookie, 1, 64]);
        let (name, inner, after) = (at(b"sock\0"), at(b"__sk_common\0"), at(b"after\0"));
        types.extend([name, 4 << 24 | 2, 32, inner, common, 32, after, 1, 256]);
        let len = |bytes: usize| u32::try_from(bytes).expect("short");
        let (all, text) = (len(types.len() * 4), len(strings.len()));
        let mut btf: Vec<u8> = [0x0001_eb9f, 24, 0, all, all, text]
            .iter()
            .chain(&types)
            .flat_map(|word| word.to_ne_bytes())
            .collect();
        btf.extend(strings);
        let types = Types::parse(&btf).expect("well formed");
        assert_eq!(types.offset("sock", "skc_cookie").expect("a field"), (32 + 64) / 8);
        assert_eq!(types.offset("sock", "after").expect("a field"), 32);
        assert!(matches!(types.offset("sock", "gone"), Err(BtfError::Missing("sock", "gone"))));
        assert!(types.offset("tcp_sock", "after").is_err());
    }
}
