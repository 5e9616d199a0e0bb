//! Decides whether a failed check is the fault of our own network.
//!
//! Pure: `now` and all times are microseconds of a clock that never goes back. `ask` sends the questions, and `mod.rs` reports the
//! answers.
//!
//! A failure is our own if nothing else can be reached through the same uplink. If two other networks were reached meanwhile, our
//! network works. Otherwise the reference hosts are asked, at most once a second for the whole agent. An answer counts only if the
//! question was sent after the check began.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;

use super::routes::{FirstHop, Routes};
use crate::config::References;
use crate::sample::Outcome;

const SECOND: i64 = 1_000_000;

/// How long the answer of another network proves that our network works.
const PROOF_LASTS: i64 = 2 * SECOND;

/// How many other networks have to be reached.
const OTHER_NETWORKS: usize = 2;

/// References are asked at most this often.
const ASK_EVERY: i64 = SECOND;

/// How many networks are remembered, the most recent ones, so that there are enough behind each of a few uplinks.
const MAX_NETWORKS: usize = 16;

/// How many gateways and uplinks are remembered. A machine has one or two.
const MAX_UPLINKS: usize = 64;

/// Whether our own network can be the cause of this outcome.
pub fn could_be_ours(outcome: Outcome) -> bool {
    matches!(
        outcome,
        Outcome::DnsTimeout
            | Outcome::DnsError
            | Outcome::ConnectUnreachable
            | Outcome::ConnectTimeout
            | Outcome::ConnectError
    )
}

/// Something whose answer shows that our network works.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Reference {
    /// A member of REFERENCE_HOSTS.
    Host(String, u16),
    Gateway(FirstHop),
    NameServer(IpAddr),
}

/// How a reference answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reply {
    Answered,
    /// A name server reports a failure. It does so if it cannot reach the internet itself.
    ServerFailure,
    Nothing,
    /// The gateway does not answer ARP in the local network.
    NoNeighbour,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    pub reference: Reference,
    /// The address that was asked.
    pub ip: Option<IpAddr>,
    pub reply: Reply,
}

/// A failed check.
#[derive(Clone, Copy, Debug)]
pub struct Failure {
    pub started_at: i64,
    pub ended_at: i64,
    /// The host's address, if it is known.
    pub ip: Option<IpAddr>,
    /// It failed because of the name servers.
    pub is_dns: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// The host failed.
    Host,
    /// Our own network failed.
    Ours,
    /// Ask the references, report the answers, then decide again.
    Ask,
    /// Decide again at this time, or (`None`) when the answers have arrived.
    Wait(Option<i64>),
}

#[derive(Debug)]
pub struct Judge {
    references: References,
    reached: Vec<Reached>,
    /// The last question and its answers.
    asked: Option<Asked>,
    is_asking_since: Option<i64>,
    /// The references that have answered at least once. Only their silence or failure shows that our network is down.
    proven: HashSet<Reference>,
    /// Whether there has ever been a gateway for IPv4 and for IPv6.
    had_route: [bool; 2],
    /// The uplinks that were found to be down, each with the time at which it was first found to be up again. The failure of a
    /// check that began before that time is our own.
    down: HashMap<Uplink, Option<i64>>,
}

/// A network that was reached.
#[derive(Debug)]
struct Reached {
    network: Network,
    ip: IpAddr,
    /// A name server gave the address.
    by_name: bool,
    at: i64,
}

#[derive(Debug)]
struct Asked {
    at: i64,
    answers: Vec<Answer>,
}

/// The part of our network that a check depends on: its first hop, or the name servers.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Uplink {
    first_hop: Option<FirstHop>,
    is_ipv6: bool,
    is_dns: bool,
}

/// Hosts of one network are likely to fail together: an IPv4 address without its last byte, or the first 48 bits of an IPv6
/// address, which is the network of one site (RFC 6177).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Network(u64, bool);

impl Network {
    fn of(ip: IpAddr) -> Self {
        match ip.to_canonical() {
            IpAddr::V4(ip) => Self(u64::from(u32::from(ip) >> 8), false),
            IpAddr::V6(ip) => Self((u128::from(ip) >> 80) as u64, true),
        }
    }
}

impl Judge {
    pub fn new(references: References) -> Self {
        Self {
            references,
            reached: Vec::new(),
            asked: None,
            is_asking_since: None,
            proven: HashSet::new(),
            had_route: [false; 2],
            down: HashMap::new(),
        }
    }

    /// A host has answered. `routes` is called only if our network was down.
    pub fn reached(&mut self, now: i64, ip: IpAddr, by_name: bool, routes: impl FnOnce() -> Routes) {
        if self.down.values().any(Option::is_none) {
            let routes = routes();
            for (uplink, up_at) in &mut self.down {
                let is_same = match uplink.is_dns {
                    true => by_name,
                    false => routes.first_hop(ip) == uplink.first_hop.as_ref(),
                };
                if is_same {
                    up_at.get_or_insert(now);
                }
            }
        }
        let network = Network::of(ip);
        let known = self.reached.iter_mut();
        let mut known = known.filter(|known| known.network == network && known.by_name == by_name);
        if let Some(known) = known.next() {
            known.at = now;
            return;
        }
        let reached = Reached {
            network,
            ip,
            by_name,
            at: now,
        };
        if self.reached.len() < MAX_NETWORKS {
            self.reached.push(reached);
        } else if let Some(oldest) = self.reached.iter_mut().min_by_key(|known| known.at) {
            *oldest = reached;
        }
    }

    /// Remembers which gateways exist, so that a missing one is noticed later.
    pub fn saw(&mut self, routes: &Routes) {
        for gateway in routes.gateways().filter_map(|hop| hop.gateway) {
            self.had_route[usize::from(gateway.is_ipv6())] = true;
        }
    }

    pub fn decide(&mut self, now: i64, failure: &Failure, routes: &Routes) -> Decision {
        let is_here = failure.ip.is_some_and(|ip| ip.is_loopback());
        if is_here && self.references == References::Gateways {
            return Decision::Host;
        }
        let uplink = uplink_of(failure, routes);
        let was_down = self.down.get(&uplink).copied();
        let recent = self.asked.as_ref().filter(|asked| asked.at > now - ASK_EVERY);
        let is_down_still = recent.is_some_and(|asked| self.is_down(asked, &uplink, routes));
        match was_down {
            Some(Some(up_at)) if failure.started_at < up_at => return Decision::Ours,
            Some(None) if is_down_still => return Decision::Ours,
            _ => {}
        }
        let asked = self.asked.as_ref().filter(|asked| asked.at >= failure.started_at);
        let is_up = match asked {
            _ if self.is_proven_up(failure, &uplink, routes) => Some(true),
            Some(asked) => Some(!self.is_down(asked, &uplink, routes)),
            None => None,
        };
        match is_up {
            Some(true) if was_down == Some(None) => {
                self.down.insert(uplink, Some(now));
                return Decision::Ours;
            }
            Some(true) => return Decision::Host,
            Some(false) => {
                if self.down.len() >= MAX_UPLINKS {
                    self.down.clear();
                }
                self.down.insert(uplink, None);
                return Decision::Ours;
            }
            None => {}
        }
        if self.is_asking_since.is_some() {
            return Decision::Wait(None);
        }
        match self.asked.as_ref().map(|asked| asked.at + ASK_EVERY) {
            Some(next) if next > now => Decision::Wait(Some(next)),
            _ => {
                self.is_asking_since = Some(now);
                Decision::Ask
            }
        }
    }

    /// Whether to ask now, while everything works, to learn which references answer. This is done once.
    pub fn should_learn(&mut self, now: i64) -> bool {
        let is_first = self.asked.is_none() && self.is_asking_since.is_none();
        if is_first {
            self.is_asking_since = Some(now);
        }
        is_first
    }

    /// The references to ask. `name_servers` are those of the system.
    pub fn references(&self, routes: &Routes, name_servers: &[IpAddr]) -> Vec<Reference> {
        let mut references: Vec<Reference> = match &self.references {
            References::Hosts(hosts) => {
                let host = |(name, port): &(String, u16)| Reference::Host(name.clone(), *port);
                hosts.iter().map(host).collect()
            }
            References::Gateways | References::Off => {
                let mut gateways: Vec<_> = routes.gateways().cloned().map(Reference::Gateway).collect();
                gateways.truncate(MAX_NETWORKS);
                gateways
            }
        };
        references.extend(name_servers.iter().copied().map(Reference::NameServer));
        let mut seen = HashSet::new();
        references.retain(|reference| seen.insert(reference.clone()));
        references
    }

    /// The answers to [`Decision::Ask`].
    pub fn answered(&mut self, now: i64, answers: Vec<Answer>) {
        for answer in answers.iter().filter(|answer| answer.reply == Reply::Answered) {
            if self.proven.len() < MAX_UPLINKS {
                self.proven.insert(answer.reference.clone());
            }
        }
        self.asked = Some(Asked {
            at: self.is_asking_since.take().unwrap_or(now),
            answers,
        });
    }

    /// Whether enough other networks were reached through the same uplink.
    fn is_proven_up(&self, failure: &Failure, uplink: &Uplink, routes: &Routes) -> bool {
        let since = failure.started_at.max(failure.ended_at - PROOF_LASTS);
        let own = failure.ip.map(Network::of);
        let behind_this_uplink = |reached: &&Reached| {
            !failure.is_dns && routes.first_hop(reached.ip) == uplink.first_hop.as_ref()
                || failure.is_dns && reached.by_name
        };
        let mut networks = Vec::new();
        for reached in self.reached.iter().filter(behind_this_uplink) {
            if reached.at >= since && Some(reached.network) != own && !networks.contains(&reached.network) {
                networks.push(reached.network);
            }
        }
        networks.len() >= OTHER_NETWORKS
    }

    fn is_down(&self, asked: &Asked, uplink: &Uplink, routes: &Routes) -> bool {
        uplink.is_dns && self.has_no_name_server(asked) || self.is_cut_off(asked, uplink, routes)
    }

    fn has_no_name_server(&self, asked: &Asked) -> bool {
        let mut answers = asked
            .answers
            .iter()
            .filter(|answer| matches!(answer.reference, Reference::NameServer(_)))
            .peekable();
        answers.peek().is_some()
            && answers.all(|answer| match answer.reply {
                Reply::Answered => false,
                Reply::ServerFailure => self.proven.contains(&answer.reference),
                Reply::Nothing | Reply::NoNeighbour => true,
            })
    }

    /// Whether no reference behind this uplink has answered.
    fn is_cut_off(&self, asked: &Asked, uplink: &Uplink, routes: &Routes) -> bool {
        if let References::Hosts(_) = self.references {
            let hosts: Vec<&Answer> = asked
                .answers
                .iter()
                .filter(|answer| matches!(answer.reference, Reference::Host(..)))
                .collect();
            let is_behind_uplink = |answer: &&&Answer| {
                answer
                    .ip
                    .is_some_and(|ip| routes.first_hop(ip) == uplink.first_hop.as_ref())
            };
            let behind_uplink: Vec<&Answer> = hosts.iter().filter(is_behind_uplink).copied().collect();
            let relevant = match behind_uplink.is_empty() || uplink.first_hop.is_none() {
                true => hosts,
                false => behind_uplink,
            };
            return !relevant.iter().any(|answer| answer.reply == Reply::Answered);
        }
        let Some(first_hop) = &uplink.first_hop else {
            // The machine has lost its route. If it never had one, nothing is known.
            return self.had_route[usize::from(uplink.is_ipv6)];
        };
        // A host in our own network is reached without a gateway. Then the default gateway shows whether our link works.
        let gateway = match first_hop.gateway {
            Some(_) => Some(first_hop),
            None => routes.default_hop(),
        };
        let answer = asked.answers.iter().find(|answer| match &answer.reference {
            Reference::Gateway(asked) => Some(asked) == gateway,
            _ => false,
        });
        answer.is_some_and(|answer| match answer.reply {
            Reply::Answered | Reply::ServerFailure => false,
            Reply::Nothing => self.proven.contains(&answer.reference),
            Reply::NoNeighbour => true,
        })
    }
}

fn uplink_of(failure: &Failure, routes: &Routes) -> Uplink {
    let first_hop = match failure.ip {
        Some(ip) => routes.first_hop(ip),
        None => routes.default_hop(),
    };
    Uplink {
        first_hop: first_hop.cloned(),
        is_ipv6: failure.ip.is_some_and(|ip| ip.is_ipv6()),
        is_dns: failure.is_dns,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: &str = "203.0.113.1";
    const B: &str = "198.51.100.1";
    const C: &str = "192.0.2.1";

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    /// A default route, and a second uplink to 192.0.2.0/24.
    #[cfg(target_endian = "little")]
    fn routes() -> Routes {
        Routes::parse(
            "up1 00000000 0101000A 0003 0 0 0 00000000 0 0 0\n\
             up2 000200C0 0102000A 0003 0 0 0 00FFFFFF 0 0 0\n",
            "",
        )
    }

    fn failure(started_at: i64, address: Option<&str>) -> Failure {
        Failure {
            started_at,
            ended_at: started_at + 10,
            ip: address.map(ip),
            is_dns: address.is_none(),
        }
    }

    fn hosts(addresses: &[&str]) -> References {
        References::Hosts(
            addresses
                .iter()
                .map(|address| ((*address).to_owned(), 80))
                .collect(),
        )
    }

    /// Asks all references, of which only `answering` answer.
    fn ask(judge: &mut Judge, now: i64, failure: &Failure, routes: &Routes, answering: &[&str]) -> Decision {
        assert_eq!(judge.decide(now, failure, routes), Decision::Ask);
        answer(judge, now + 5, routes, answering);
        judge.decide(now + 5, failure, routes)
    }

    fn answer(judge: &mut Judge, now: i64, routes: &Routes, answering: &[&str]) {
        let references = judge.references(routes, &[ip("10.0.1.53")]);
        let answers = references.into_iter().map(|reference| {
            let asked = match &reference {
                Reference::Host(name, _) => ip(name),
                Reference::Gateway(hop) => hop.gateway.unwrap(),
                Reference::NameServer(ip) => *ip,
            };
            let reply = match answering.iter().any(|known| ip(known) == asked) {
                true => Reply::Answered,
                false => Reply::Nothing,
            };
            Answer {
                reference,
                ip: Some(asked),
                reply,
            }
        });
        let answers = answers.collect();
        judge.answered(now, answers);
    }

    #[test]
    fn two_other_networks_that_were_reached_meanwhile_prove_that_our_network_works() {
        let routes = Routes::default();
        for (reached, at, expected) in [
            (&[A, B][..], 5, Decision::Host),
            (&[A, B], -5, Decision::Ask),
            (&[A, "203.0.113.2"], 5, Decision::Ask),
            (&[A, "192.0.2.9"], 5, Decision::Ask),
        ] {
            let mut judge = Judge::new(hosts(&["10.0.0.9"]));
            for address in reached {
                judge.reached(SECOND + at, ip(address), false, Routes::default);
            }
            let failure = failure(SECOND, Some(C));
            assert_eq!(
                judge.decide(SECOND + 10, &failure, &routes),
                expected,
                "{reached:?} {at}"
            );
        }
    }

    #[test]
    fn a_long_check_needs_proof_of_its_last_two_seconds() {
        let routes = Routes::default();
        let failure = Failure {
            ended_at: 10 * SECOND,
            ..failure(0, Some(C))
        };
        for (at, expected) in [(7, Decision::Ask), (9, Decision::Host)] {
            let mut judge = Judge::new(hosts(&["10.0.0.9"]));
            judge.reached(at * SECOND, ip(A), false, Routes::default);
            judge.reached(at * SECOND, ip(B), false, Routes::default);
            assert_eq!(judge.decide(10 * SECOND, &failure, &routes), expected);
        }
    }

    #[test]
    fn references_are_asked_once_a_second_and_one_answer_is_for_all_who_wait() {
        let routes = Routes::default();
        let mut judge = Judge::new(hosts(&["10.0.0.9"]));
        let first = failure(0, Some(A));
        assert_eq!(judge.decide(10, &first, &routes), Decision::Ask);
        assert_eq!(
            judge.decide(11, &failure(1, Some(B)), &routes),
            Decision::Wait(None)
        );
        answer(&mut judge, 20, &routes, &["10.0.0.9"]);
        for waiting in [first, failure(1, Some(B))] {
            assert_eq!(judge.decide(20, &waiting, &routes), Decision::Host);
        }
        // The answer is older than this check.
        let next = failure(30, Some(C));
        assert_eq!(
            judge.decide(40, &next, &routes),
            Decision::Wait(Some(10 + SECOND))
        );
        assert_eq!(judge.decide(10 + SECOND, &next, &routes), Decision::Ask);
    }

    #[test]
    fn without_an_answer_the_fault_is_ours_until_an_answer_comes() {
        let routes = Routes::default();
        let mut judge = Judge::new(hosts(&["10.0.0.9", "10.0.0.8"]));
        let down = failure(0, Some(A));
        assert_eq!(ask(&mut judge, 10, &down, &routes, &[]), Decision::Ours);
        // Nobody is asked again for a second.
        assert_eq!(
            judge.decide(SECOND, &failure(SECOND - 10, Some(A)), &routes),
            Decision::Ours
        );
        // This check began before the network was known to be up again, and the next one afterwards.
        let later = failure(2 * SECOND, Some(A));
        let decision = ask(&mut judge, 2 * SECOND + 10, &later, &routes, &["10.0.0.8"]);
        assert_eq!(decision, Decision::Ours);
        let next = failure(3 * SECOND + 20, Some(A));
        let decision = ask(&mut judge, 3 * SECOND + 30, &next, &routes, &["10.0.0.8"]);
        assert_eq!(decision, Decision::Host);
        let long = Failure {
            started_at: 12,
            ..next
        };
        assert_eq!(judge.decide(4 * SECOND, &long, &routes), Decision::Ours);
    }

    #[test]
    fn a_host_that_answers_ends_our_outage() {
        let routes = Routes::default();
        let mut judge = Judge::new(hosts(&["10.0.0.9"]));
        assert_eq!(
            ask(&mut judge, 10, &failure(0, Some(A)), &routes, &[]),
            Decision::Ours
        );
        judge.reached(3 * SECOND, ip(B), false, Routes::default);
        let before = failure(3 * SECOND - 5, Some(A));
        assert_eq!(judge.decide(3 * SECOND + 5, &before, &routes), Decision::Ours);
        let after = failure(3 * SECOND + 5, Some(A));
        let decision = ask(&mut judge, 3 * SECOND + 20, &after, &routes, &["10.0.0.9"]);
        assert_eq!(decision, Decision::Host);
    }

    #[test]
    #[cfg(target_endian = "little")]
    fn a_gateway_that_never_answered_proves_nothing_and_each_uplink_has_its_own() {
        let routes = routes();
        let mut judge = Judge::new(References::Gateways);
        judge.saw(&routes);
        let (first, second) = ("10.0.1.1", "10.0.2.1");
        assert_eq!(
            ask(&mut judge, 10, &failure(0, Some(A)), &routes, &[]),
            Decision::Host
        );
        let at = |seconds: i64| failure(seconds * SECOND, Some(C));
        let mut ask_at = |seconds: i64, address, answering: &[&str]| {
            let failure = failure(seconds * SECOND, Some(address));
            ask(&mut judge, seconds * SECOND + 10, &failure, &routes, answering)
        };
        assert_eq!(ask_at(2, A, &[first, second]), Decision::Host);
        assert_eq!(
            ask_at(4, C, &[first]),
            Decision::Ours,
            "the second uplink is down"
        );
        assert_eq!(ask_at(6, A, &[first]), Decision::Host);
        // Networks behind the first uplink prove nothing about the second one.
        judge.reached(8 * SECOND, ip(A), false, Routes::default);
        judge.reached(8 * SECOND, ip(B), false, Routes::default);
        assert_eq!(judge.decide(8 * SECOND + 10, &at(8), &routes), Decision::Ask);
    }

    #[test]
    #[cfg(target_endian = "little")]
    fn a_route_that_is_gone_is_our_fault_and_one_that_never_was_is_not() {
        for (had_route, expected) in [(true, Decision::Ours), (false, Decision::Host)] {
            let mut judge = Judge::new(References::Gateways);
            if had_route {
                judge.saw(&routes());
            }
            let failure = failure(0, Some(A));
            assert_eq!(ask(&mut judge, 10, &failure, &Routes::default(), &[]), expected);
        }
    }

    #[test]
    fn silent_name_servers_are_our_fault_and_those_that_fail_for_one_name_are_not() {
        let routes = Routes::default();
        let mut judge = Judge::new(hosts(&["10.0.0.9"]));
        let failure = failure(0, None);
        let decision = ask(&mut judge, 10, &failure, &routes, &["10.0.0.9", "10.0.1.53"]);
        assert_eq!(decision, Decision::Host);
        // Hosts that were reached without a name prove nothing about name servers.
        let later = Failure {
            started_at: 2 * SECOND,
            ended_at: 2 * SECOND + 10,
            ..failure
        };
        judge.reached(2 * SECOND + 5, ip(A), false, Routes::default);
        judge.reached(2 * SECOND + 5, ip(B), false, Routes::default);
        let decision = ask(&mut judge, 2 * SECOND + 10, &later, &routes, &["10.0.0.9"]);
        assert_eq!(decision, Decision::Ours);
    }

    #[test]
    fn only_failures_of_names_and_connections_could_be_ours() {
        let ours = Outcome::ALL.into_iter().filter(|outcome| could_be_ours(*outcome));
        let words: Vec<&str> = ours.map(Outcome::as_str).collect();
        assert_eq!(
            words,
            [
                "dns_error",
                "dns_timeout",
                "connect_unreachable",
                "connect_timeout",
                "connect_error"
            ]
        );
    }

    #[test]
    fn what_was_reached_takes_no_more_memory_than_a_bound() {
        let mut judge = Judge::new(References::Gateways);
        for i in 0..10_000_u32 {
            judge.reached(
                i64::from(i),
                IpAddr::from((i << 8).to_be_bytes()),
                false,
                Routes::default,
            );
        }
        assert_eq!(judge.reached.len(), MAX_NETWORKS);
    }
}
