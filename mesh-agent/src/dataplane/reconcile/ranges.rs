//! The ranges in which an address that is no service is refused.

use ipnet::IpNet;
use mesh_common::Addr;

use super::{Problem, Reconciler};
use crate::dataplane::maps::Contents;

impl<M: Contents> Reconciler<M> {
    /// Makes these the ranges. Called once.
    ///
    /// # Errors
    ///
    /// When there are more than `VIRTUAL_IPS` holds, or the kernel refuses one.
    pub fn set_virtual_ips(&mut self, ranges: &[IpNet]) -> Result<(), Problem> {
        let limit = self.maps.capacity().virtual_ips;
        let missing = ranges.len().saturating_sub(limit as usize);
        if missing > 0 {
            let (what, of, map) = ("ranges", ranges.len(), "VIRTUAL_IPS");
            return Err(Problem::Full { what, missing, of, map, limit, note: "" });
        }
        let prefix = |range: &IpNet| {
            // An IPv4 prefix lies behind the 96 bits that map it into IPv6.
            let mapped = if range.network().is_ipv4() { 96 } else { 0 };
            (Addr::from(range.network()), mapped + range.prefix_len())
        };
        let wanted: Vec<_> = ranges.iter().map(prefix).collect();
        let there = self.maps.virtual_ips()?;
        // What goes comes first: there may be no room for both.
        for &(addr, bits) in there.iter().filter(|prefix| !wanted.contains(prefix)) {
            self.maps.remove_virtual_ip(addr, bits)?;
        }
        for &(addr, bits) in wanted.iter().filter(|prefix| !there.contains(prefix)) {
            self.maps.insert_virtual_ip(addr, bits)?;
        }
        self.virtual_ips = u32::try_from(ranges.len()).unwrap_or(limit);
        Ok(self.maps.set_virtual_ip_count(self.virtual_ips)?)
    }
}
