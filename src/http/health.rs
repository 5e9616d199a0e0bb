//! Whether an agent is alive and ready, and the request of `host-metrics health` to a running agent.
//!
//! Alive means that the agent's loops run; an agent that hangs should be restarted. Ready means that the agent is connected
//! to its servers. An agent that waits for Kafka or Postgres is alive, and a restart would not help it. `http` serves both.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use ureq::Agent;

use crate::clock::instant_now;
use crate::lock::lock;

/// The longest that an idle agent's loop takes for one iteration: well below [`HANGS_AFTER`], and seldom enough to cost nothing.
pub const TURN_EVERY: Duration = Duration::from_secs(5);

/// A loop without an iteration for this long hangs. The longest bounded iteration is a few requests to Kafka of 3 s each.
const HANGS_AFTER: Duration = Duration::from_secs(30);

/// When a loop last began an iteration.
#[derive(Debug)]
pub struct Heartbeat {
    start: Instant,
    last_turn_millis: AtomicU64,
}

impl Default for Heartbeat {
    fn default() -> Self {
        Self {
            start: instant_now(),
            last_turn_millis: AtomicU64::new(0),
        }
    }
}

impl Heartbeat {
    /// Notes that the loop runs. Call it in every iteration.
    pub fn beat(&self) {
        self.beat_at(instant_now());
    }

    /// # Errors
    /// The loop `name` hangs: for how long, for a person.
    pub fn check(&self, name: &str) -> Result<(), String> {
        self.check_at(instant_now(), name)
    }

    fn beat_at(&self, now: Instant) {
        let millis = u64::try_from(now.saturating_duration_since(self.start).as_millis());
        self.last_turn_millis
            .store(millis.unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    fn check_at(&self, now: Instant, name: &str) -> Result<(), String> {
        let last_turn = Duration::from_millis(self.last_turn_millis.load(Ordering::Relaxed));
        let silent = now
            .saturating_duration_since(self.start)
            .saturating_sub(last_turn);
        if silent > HANGS_AFTER {
            return Err(format!("{name} has hung for {} s", silent.as_secs()));
        }
        Ok(())
    }
}

/// Whether an agent is ready, or what it waits for. At first, it is starting.
#[derive(Debug)]
pub struct Readiness(Mutex<Result<(), String>>);

impl Default for Readiness {
    fn default() -> Self {
        Self(Mutex::new(Err("it is starting".to_owned())))
    }
}

impl Readiness {
    /// Sets the state; an error is what the agent waits for.
    pub fn set(&self, ready: Result<(), String>) {
        *lock(&self.0) = ready;
    }

    pub fn check(&self) -> Result<(), String> {
        lock(&self.0).clone()
    }
}

/// What an agent answers to `host-metrics health`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Health {
    Ready,
    /// With what the agent waits for.
    NotReady(String),
}

/// Below the timeout of container runtimes for a health check.
const ANSWERS_WITHIN: Duration = Duration::from_secs(3);

/// The most that is read of a response. An agent sends a line; another program at that port may send anything.
const MAX_ANSWER_BYTES: u64 = 16 << 10;

/// Asks the agent that listens at METRICS_ADDR on this machine. An unspecified address such as 0.0.0.0 means loopback.
pub fn ask(metrics_addr: SocketAddr) -> Result<Health, String> {
    let mut last = String::new();
    for address in from_here(metrics_addr) {
        match get_ready(address) {
            Ok((status, body)) => return read_answer(status, &body),
            Err(error) => last = format!("no agent answers at {address}: {error}"),
        }
    }
    Err(format!(
        "{last}; set METRICS_ADDR to the same value as for the agent, which must run on this machine"
    ))
}

/// The addresses at which a listener on `address` is reached from the same machine.
fn from_here(address: SocketAddr) -> Vec<SocketAddr> {
    let with = |ip: IpAddr| SocketAddr::new(ip, address.port());
    match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => vec![with(Ipv4Addr::LOCALHOST.into())],
        // It listens on IPv4 and IPv6, and a container may have no IPv6 loopback.
        IpAddr::V6(ip) if ip.is_unspecified() => {
            vec![with(Ipv4Addr::LOCALHOST.into()), with(Ipv6Addr::LOCALHOST.into())]
        }
        _ => vec![address],
    }
}

/// The status and the body of the response.
fn get_ready(address: SocketAddr) -> Result<(u16, String), ureq::Error> {
    let config = Agent::config_builder()
        .timeout_global(Some(ANSWERS_WITHIN))
        .http_status_as_error(false)
        .max_redirects(0)
        .proxy(None)
        .build();
    let mut answer = Agent::new_with_config(config)
        .get(format!("http://{address}/readyz"))
        .call()?;
    let body = answer.body_mut().with_config();
    let body = body.limit(MAX_ANSWER_BYTES).lossy_utf8(true).read_to_string()?;
    Ok((answer.status().as_u16(), body))
}

fn read_answer(status: u16, body: &str) -> Result<Health, String> {
    match status {
        200 => Ok(Health::Ready),
        503 => Ok(Health::NotReady(body.trim().replace(char::is_control, " "))),
        _ => Err(format!(
            "there is no agent at METRICS_ADDR, but a server that answers with status {status}"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loop_that_runs_is_alive_and_one_that_hangs_is_not() {
        let heart = Heartbeat::default();
        let start = heart.start;
        let check = |seconds| heart.check_at(start + Duration::from_secs(seconds), "its loop");
        assert_eq!(check(HANGS_AFTER.as_secs()), Ok(()));
        assert_eq!(check(31), Err("its loop has hung for 31 s".to_owned()));
        heart.beat_at(start + Duration::from_secs(40));
        assert_eq!(check(70), Ok(()));
        assert!(check(71).is_err());
    }

    #[test]
    fn an_agent_is_not_ready_at_first() {
        let ready = Readiness::default();
        assert_eq!(ready.check(), Err("it is starting".to_owned()));
        ready.set(Ok(()));
        assert_eq!(ready.check(), Ok(()));
        ready.set(Err("waiting for Kafka".to_owned()));
        assert_eq!(ready.check(), Err("waiting for Kafka".to_owned()));
    }

    #[test]
    fn an_unspecified_address_means_loopback() {
        let reached = |address: &str| {
            let addresses = from_here(address.parse().unwrap());
            addresses.iter().map(SocketAddr::to_string).collect::<Vec<_>>()
        };
        assert_eq!(reached("0.0.0.0:9464"), ["127.0.0.1:9464"]);
        assert_eq!(reached("[::]:9464"), ["127.0.0.1:9464", "[::1]:9464"]);
        assert_eq!(reached("10.1.2.3:9464"), ["10.1.2.3:9464"]);
        assert_eq!(reached("[::1]:1"), ["[::1]:1"]);
    }

    #[test]
    fn an_answer_is_ready_not_ready_or_not_from_an_agent() {
        assert_eq!(read_answer(200, "ready\n"), Ok(Health::Ready));
        assert_eq!(
            read_answer(503, "for\x1bKafka\n"),
            Ok(Health::NotReady("for Kafka".to_owned()))
        );
        for wrong in [204, 302, 404, 500] {
            assert!(read_answer(wrong, "").is_err(), "{wrong}");
        }
    }
}
