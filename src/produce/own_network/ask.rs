//! Asks references: opens a TCP connection, or sends a question to a name server.

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6, TcpStream, ToSocketAddrs, UdpSocket};
use std::time::{Duration, Instant};

use super::judge::{Answer, Reference, Reply};
use super::routes::{FirstHop, Routes};
use crate::clock::instant_now;

/// The port at which a gateway is asked. Many gateways are name servers, and the others refuse the connection, which is an answer
/// too.
const GATEWAY_PORT: u16 = 53;
const DNS_PORT: u16 = 53;

/// glibc uses no more name servers than these (MAXNS).
const MAX_NAME_SERVERS: usize = 3;

/// The routes at this moment. Empty where Linux's files do not exist.
pub(super) fn routes() -> Routes {
    let text = |path: &str| fs::read_to_string(path).unwrap_or_default();
    Routes::parse(&text("/proc/net/route"), &text("/proc/net/ipv6_route"))
}

/// The name servers of /etc/resolv.conf.
pub(super) fn name_servers() -> Vec<IpAddr> {
    let text = fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    let address = |line: &str| line.trim().strip_prefix("nameserver")?.trim().parse().ok();
    text.lines().filter_map(address).take(MAX_NAME_SERVERS).collect()
}

/// Waits for the answer of one reference, until `deadline` at the latest. Only the lookup of its name may take longer.
pub(super) fn ask(reference: Reference, deadline: Instant) -> Answer {
    let (ip, reply) = match &reference {
        Reference::Host(name, port) => ask_host(name, *port, deadline),
        Reference::Gateway(hop) => (hop.gateway, ask_gateway(hop, deadline)),
        Reference::NameServer(ip) => (
            Some(*ip),
            ask_name_server(*ip, deadline).unwrap_or(Reply::Nothing),
        ),
    };
    Answer { reference, ip, reply }
}

fn ask_host(name: &str, port: u16, deadline: Instant) -> (Option<IpAddr>, Reply) {
    let addresses = (name, port).to_socket_addrs().into_iter().flatten();
    let mut asked = None;
    for address in addresses {
        asked.get_or_insert(address.ip());
        if answers(address, deadline) {
            return (Some(address.ip()), Reply::Answered);
        }
    }
    (asked, Reply::Nothing)
}

fn ask_gateway(hop: &FirstHop, deadline: Instant) -> Reply {
    let address = match hop.gateway {
        Some(IpAddr::V4(ip)) => SocketAddr::from((ip, GATEWAY_PORT)),
        // The address of an IPv6 gateway is valid on one device only.
        Some(IpAddr::V6(ip)) => SocketAddrV6::new(ip, GATEWAY_PORT, 0, device_index(&hop.device)).into(),
        None => return Reply::Nothing,
    };
    if answers(address, deadline) {
        Reply::Answered
    } else if has_no_neighbour(&address.ip().to_string()) {
        Reply::NoNeighbour
    } else {
        Reply::Nothing
    }
}

/// A refused connection is an answer.
fn answers(address: SocketAddr, deadline: Instant) -> bool {
    let left = deadline.saturating_duration_since(instant_now());
    // The time must not be zero.
    let connected = TcpStream::connect_timeout(&address, left.max(Duration::from_millis(1)));
    match connected {
        Ok(_) => true,
        Err(error) => error.kind() == io::ErrorKind::ConnectionRefused,
    }
}

fn device_index(device: &str) -> u32 {
    let text = fs::read_to_string(format!("/sys/class/net/{device}/ifindex"));
    text.ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0)
}

/// Whether the address did not answer in the local network: its entry in the kernel's ARP table is incomplete (flags 0x0).
fn has_no_neighbour(ip: &str) -> bool {
    let table = fs::read_to_string("/proc/net/arp").unwrap_or_default();
    table.lines().any(|line| {
        let mut words = line.split_ascii_whitespace();
        words.next() == Some(ip) && words.nth(1) == Some("0x0")
    })
}

/// A question for the address of the root, which every name server can answer (RFC 1035, section 4.1).
fn ask_name_server(ip: IpAddr, deadline: Instant) -> io::Result<Reply> {
    const QUESTION: [u8; 17] = [
        0x68, 0x6d, // Any number, which the answer repeats.
        0x01, 0x00, // Recursion desired.
        0, 1, 0, 0, 0, 0, 0, 0, // One question.
        0, 0, 1, 0, 1, // The root, type A, class IN.
    ];
    const SERVFAIL: u8 = 2;
    let any: IpAddr = match ip {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0))?;
    socket.connect((ip, DNS_PORT))?;
    socket.send(&QUESTION)?;
    let mut answer = [0; 512];
    loop {
        let left = deadline.saturating_duration_since(instant_now());
        if left.is_zero() {
            return Ok(Reply::Nothing);
        }
        socket.set_read_timeout(Some(left))?;
        let length = socket.recv(&mut answer)?;
        if length >= 4 && answer[..2] == QUESTION[..2] {
            return Ok(match answer[3] & 0x0f {
                SERVFAIL => Reply::ServerFailure,
                _ => Reply::Answered,
            });
        }
    }
}
