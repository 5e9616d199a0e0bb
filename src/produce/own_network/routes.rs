//! The routes of this machine: which gateway leads to an address.
//!
//! Pure. Reads Linux's text formats of /proc/net/route and /proc/net/ipv6_route (net/ipv4/fib_trie.c and net/ipv6/route.c in the
//! kernel's source).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Where packets for an address are sent first.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FirstHop {
    pub device: String,
    /// `None`: the address is in the same network as this machine.
    pub gateway: Option<IpAddr>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Routes(Vec<Route>);

#[derive(Clone, Debug, PartialEq, Eq)]
struct Route {
    destination: IpAddr,
    prefix: u32,
    metric: u32,
    flags: u32,
    first_hop: FirstHop,
}

/// From the kernel's linux/route.h.
const RTF_UP: u32 = 0x1;
const RTF_GATEWAY: u32 = 0x2;
const RTF_REJECT: u32 = 0x200;

impl Routes {
    /// Lines that are not understood are ignored.
    pub fn parse(ipv4: &str, ipv6: &str) -> Self {
        let ipv4 = ipv4.lines().filter_map(parse_ipv4);
        let ipv6 = ipv6.lines().filter_map(parse_ipv6);
        Self(
            ipv4.chain(ipv6)
                .filter(|route| route.flags & RTF_UP != 0)
                .collect(),
        )
    }

    /// `None`: there is no route to the address.
    pub fn first_hop(&self, ip: IpAddr) -> Option<&FirstHop> {
        let matching = self.0.iter().filter(|route| route.matches(ip));
        let best = matching.max_by_key(|route| (route.prefix, std::cmp::Reverse(route.metric)))?;
        (best.flags & RTF_REJECT == 0).then_some(&best.first_hop)
    }

    /// The default route of IPv4, or of IPv6 if there is no other.
    pub fn default_hop(&self) -> Option<&FirstHop> {
        self.first_hop(Ipv4Addr::UNSPECIFIED.into())
            .or_else(|| self.first_hop(Ipv6Addr::UNSPECIFIED.into()))
    }

    /// All gateways.
    pub fn gateways(&self) -> impl Iterator<Item = &FirstHop> {
        let usable = self.0.iter().filter(|route| route.flags & RTF_REJECT == 0);
        usable
            .map(|route| &route.first_hop)
            .filter(|hop| hop.gateway.is_some())
    }
}

impl Route {
    fn matches(&self, ip: IpAddr) -> bool {
        match (self.destination, ip) {
            (IpAddr::V4(destination), IpAddr::V4(ip)) => {
                let mask = u32::MAX.checked_shl(32 - self.prefix).unwrap_or(0);
                u32::from(destination) & mask == u32::from(ip) & mask
            }
            (IpAddr::V6(destination), IpAddr::V6(ip)) => {
                let mask = u128::MAX.checked_shl(128 - self.prefix).unwrap_or(0);
                u128::from(destination) & mask == u128::from(ip) & mask
            }
            _ => false,
        }
    }
}

/// Iface Destination Gateway Flags RefCnt Use Metric Mask …, addresses as hexadecimal numbers in the machine's byte order.
fn parse_ipv4(line: &str) -> Option<Route> {
    let words: Vec<&str> = line.split_ascii_whitespace().collect();
    let [device, destination, gateway, flags, _, _, metric, mask, ..] = words.as_slice() else {
        return None;
    };
    let address = |word: &str| Some(Ipv4Addr::from(u32::from_str_radix(word, 16).ok()?.to_ne_bytes()));
    let flags = u32::from_str_radix(flags, 16).ok()?;
    Some(Route {
        destination: address(destination)?.into(),
        prefix: u32::from(address(mask)?).count_ones(),
        metric: metric.parse().ok()?,
        flags,
        first_hop: FirstHop {
            device: (*device).to_owned(),
            gateway: Some(IpAddr::V4(address(gateway)?)).filter(|_| flags & RTF_GATEWAY != 0),
        },
    })
}

/// Destination, prefix, source, prefix, next hop, metric, references, uses, flags, device; numbers are hexadecimal.
fn parse_ipv6(line: &str) -> Option<Route> {
    let words: Vec<&str> = line.split_ascii_whitespace().collect();
    let [destination, prefix, _, _, gateway, metric, _, _, flags, device] = words.as_slice() else {
        return None;
    };
    let address = |word: &str| Some(Ipv6Addr::from(u128::from_str_radix(word, 16).ok()?));
    let flags = u32::from_str_radix(flags, 16).ok()?;
    Some(Route {
        destination: address(destination)?.into(),
        prefix: u32::from_str_radix(prefix, 16)
            .ok()
            .filter(|prefix| *prefix <= 128)?,
        metric: u32::from_str_radix(metric, 16).ok()?,
        flags,
        first_hop: FirstHop {
            device: (*device).to_owned(),
            gateway: Some(IpAddr::V6(address(gateway)?)).filter(|_| flags & RTF_GATEWAY != 0),
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Copied from a machine with two uplinks; the addresses are in the byte order of x86 and ARM.
    const IPV4: &str = "\
Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT
eth0\t00000000\t010011AC\t0003\t0\t0\t100\t00000000\t0\t0\t0
eth1\t00000000\t01001FAC\t0003\t0\t0\t200\t00000000\t0\t0\t0
eth1\t0064A8C0\t01001FAC\t0003\t0\t0\t0\t00FFFFFF\t0\t0\t0
eth0\t000011AC\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\t0\t0
*\t0909090A\t00000000\t0205\t0\t0\t0\tFFFFFFFF\t0\t0\t0
";
    const IPV6: &str = "\
fe800000000000000000000000000000 40 00000000000000000000000000000000 00 00000000000000000000000000000000 00000100 00000001 00000000 00000001     eth0
00000000000000000000000000000000 00 00000000000000000000000000000000 00 fe800000000000000000000000000001 00000400 00000001 00000000 00000003     eth0
00000000000000000000000000000000 00 00000000000000000000000000000000 00 00000000000000000000000000000000 ffffffff 00000001 00000000 00200200       lo
";

    #[test]
    #[cfg(target_endian = "little")]
    fn the_way_to_an_address_is_the_longest_match_with_the_lowest_metric() {
        let routes = Routes::parse(IPV4, IPV6);
        let hop = |ip: &str| {
            let hop = routes.first_hop(ip.parse().unwrap())?;
            Some(format!("{} {:?}", hop.device, hop.gateway))
        };
        for (ip, expected) in [
            ("203.0.113.7", Some("eth0 Some(172.17.0.1)")),
            ("192.168.100.9", Some("eth1 Some(172.31.0.1)")),
            ("172.17.3.4", Some("eth0 None")),
            ("10.9.9.9", None),
            ("2001:db8::1", Some("eth0 Some(fe80::1)")),
            ("fe80::77", Some("eth0 None")),
        ] {
            assert_eq!(hop(ip).as_deref(), expected, "{ip}");
        }
        assert_eq!(
            routes.default_hop(),
            routes.first_hop("203.0.113.7".parse().unwrap())
        );
        assert_eq!(routes.gateways().count(), 4);
    }

    #[test]
    fn a_machine_without_these_files_has_no_routes() {
        assert_eq!(Routes::parse("", "not a route"), Routes::default());
        assert_eq!(Routes::default().default_hop(), None);
    }
}
