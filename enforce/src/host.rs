//! What the host says of itself: its addresses, gateways, families, and what this process may do.

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;

use nix::ifaddrs::getifaddrs;

use crate::plan::Family;

/// Bit of CAP_NET_ADMIN in the capability masks of `/proc/self/status`.
const CAP_NET_ADMIN: u32 = 12;

/// The host did not say. That is not the same as having none.
#[derive(Debug, thiserror::Error)]
#[error("cannot read the host's {what}")]
pub(crate) struct HostError {
    /// Addresses or routes.
    pub(crate) what: &'static str,
    /// Why.
    pub(crate) source: io::Error,
}

/// Whether this process may change the firewall of its network namespace.
pub(crate) fn may_change_firewall() -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    mask.is_some_and(|mask| mask & (1 << CAP_NET_ADMIN) != 0)
}

/// The families that the kernel has.
pub(crate) fn families() -> Vec<Family> {
    let has_ipv6 = fs::exists("/proc/net/if_inet6").unwrap_or(false);
    if has_ipv6 { Family::ALL.to_vec() } else { vec![Family::V4] }
}

/// Whether legacy tables are in use, so that listing them creates none.
pub(crate) fn legacy_is_awake(family: Family) -> bool {
    let names = match family {
        Family::V4 => "/proc/net/ip_tables_names",
        Family::V6 => "/proc/net/ip6_tables_names",
    };
    fs::read_to_string(names).is_ok_and(|names| !names.trim().is_empty())
}

/// Addresses of all interfaces, ascending.
pub(crate) fn own_addresses() -> Result<Vec<IpAddr>, HostError> {
    let interfaces = getifaddrs().map_err(|error| HostError { what: "addresses", source: error.into() })?;
    let mut own: Vec<IpAddr> = interfaces
        .filter_map(|interface| {
            let address = interface.address?;
            let v4 = address.as_sockaddr_in().map(|address| IpAddr::V4(address.ip()));
            v4.or_else(|| address.as_sockaddr_in6().map(|address| IpAddr::V6(address.ip())))
        })
        .collect();
    own.sort_unstable();
    own.dedup();
    Ok(own)
}

/// Next hops of all routes of the main table, ascending.
pub(crate) fn gateways() -> Result<Vec<IpAddr>, HostError> {
    let mut gateways = parse_routes_v4(&read_routes(Path::new("/proc/net/route"))?);
    gateways.extend(parse_routes_v6(&read_routes(Path::new("/proc/net/ipv6_route"))?));
    gateways.sort_unstable();
    gateways.dedup();
    Ok(gateways)
}

/// A kernel without the family has no such file, and no routes.
fn read_routes(path: &Path) -> Result<String, HostError> {
    match fs::read_to_string(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        read => read.map_err(|source| HostError { what: "routes", source }),
    }
}

/// `/proc/net/route`: the third column is the next hop, in the byte order of memory.
fn parse_routes_v4(text: &str) -> Vec<IpAddr> {
    let column = |line: &str| u32::from_str_radix(line.split_whitespace().nth(2)?, 16).ok();
    let hops = text.lines().skip(1).filter_map(column).filter(|hop| *hop != 0);
    hops.map(|hop| IpAddr::V4(Ipv4Addr::from(hop.to_ne_bytes()))).collect()
}

/// `/proc/net/ipv6_route`: the fifth column is the next hop.
fn parse_routes_v6(text: &str) -> Vec<IpAddr> {
    let column = |line: &str| u128::from_str_radix(line.split_whitespace().nth(4)?, 16).ok();
    let hops = text.lines().filter_map(column).filter(|hop| *hop != 0);
    hops.map(|hop| IpAddr::V6(Ipv6Addr::from_bits(hop))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn routes_that_cannot_be_read_are_not_taken_for_none() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(read_routes(&dir.path().join("none")).unwrap(), "");
        assert_eq!(read_routes(dir.path()).unwrap_err().to_string(), "cannot read the host's routes");
        assert!(!own_addresses().unwrap().is_empty() && gateways().is_ok());
    }

    #[test]
    fn gateways_are_read_from_the_routes() {
        let v4 = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n\
                  eth0\t00000000\t010200C0\t0003\t0\t0\t0\t00000000\t0\t0\t0\n\
                  eth0\t000200C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n";
        if cfg!(target_endian = "little") {
            assert_eq!(parse_routes_v4(v4), ["192.0.2.1".parse::<IpAddr>().unwrap()]);
        }
        let v6 = "00000000000000000000000000000000 00 00000000000000000000000000000000 00 \
                  20010db8000000000000000000000001 00000400 00000001 00000000 00000003     eth0\n\
                  20010db8000000000000000000000000 40 00000000000000000000000000000000 00 \
                  00000000000000000000000000000000 00000100 00000001 00000000 00000001     eth0\n";
        assert_eq!(parse_routes_v6(v6), ["2001:db8::1".parse::<IpAddr>().unwrap()]);
    }
}
