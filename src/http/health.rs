//! Whether an agent is alive and able to do its work, and `host-metrics health`, which asks one from outside.
//!
//! Owns what the two answers mean. Alive: its loop turns; one that hangs does not mend itself and should be restarted.
//! Ready: it has what it works with; one that waits for Kafka or Postgres is alive, and a restart would only begin its
//! waiting anew. How the answers are served is `http`'s.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use ureq::Agent;

/// How often an agent's loop turns at least, with nothing to do.
pub const TURN_EVERY: Duration = Duration::from_secs(5);

/// A loop that has not turned for so long hangs. The longest that one turn may take by its own bounds is a few questions
/// to Kafka of 3 s each.
const HANGS_AFTER: Duration = Duration::from_secs(30);

/// A loop's sign of life.
#[derive(Debug)]
pub struct Heartbeat {
    start: Instant,
    last_turn_millis: AtomicU64,
}

impl Default for Heartbeat {
    fn default() -> Self {
        Self {
            start: now(),
            last_turn_millis: AtomicU64::new(0),
        }
    }
}

impl Heartbeat {
    /// The loop turns.
    pub fn beat(&self) {
        self.beat_at(now());
    }

    /// # Errors
    /// The loop, `whose` it is, hangs: since when, for a person.
    pub fn check(&self, whose: &str) -> Result<(), String> {
        self.check_at(now(), whose)
    }

    fn beat_at(&self, now: Instant) {
        let millis = u64::try_from(now.saturating_duration_since(self.start).as_millis());
        self.last_turn_millis
            .store(millis.unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    fn check_at(&self, now: Instant, whose: &str) -> Result<(), String> {
        let last_turn = Duration::from_millis(self.last_turn_millis.load(Ordering::Relaxed));
        let silent = now
            .saturating_duration_since(self.start)
            .saturating_sub(last_turn);
        if silent > HANGS_AFTER {
            return Err(format!("{whose} has not turned for {} s", silent.as_secs()));
        }
        Ok(())
    }
}

/// What an agent waits for; until it is told, that it starts.
#[derive(Debug)]
pub struct Readiness(Mutex<Result<(), String>>);

impl Default for Readiness {
    fn default() -> Self {
        Self(Mutex::new(Err("it is starting".to_owned())))
    }
}

impl Readiness {
    pub fn set(&self, ready: Result<(), String>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = ready;
    }

    /// # Errors
    /// What it waits for, for a person.
    pub fn check(&self) -> Result<(), String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// The agent that listens at METRICS_ADDR says whether it is ready.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    Ready,
    /// What it waits for.
    NotReady(String),
}

/// Below the time after which container runtimes take a health check for failed.
const ANSWERS_WITHIN: Duration = Duration::from_secs(3);

/// Far more than an agent answers.
const MAX_ANSWER_BYTES: u64 = 16 << 10;

/// Asks the agent that serves METRICS_ADDR on this machine; an unspecified address means loopback.
///
/// # Errors
/// Nobody answers there in time, or nobody that is an agent of ours.
pub fn ask(metrics_addr: SocketAddr) -> Result<Answer, String> {
    let mut last = String::new();
    for address in from_here(metrics_addr) {
        match get_ready(address) {
            Ok((status, body)) => return read_answer(status, &body),
            Err(error) => last = format!("no agent answers at {address}: {error}"),
        }
    }
    Err(format!(
        "{last}; METRICS_ADDR has to be the agent's, and the agent on this machine"
    ))
}

/// Where what listens at `address` can be reached from the same machine.
fn from_here(address: SocketAddr) -> Vec<SocketAddr> {
    let with = |ip: IpAddr| SocketAddr::new(ip, address.port());
    match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => vec![with(Ipv4Addr::LOCALHOST.into())],
        // It listens on both families, and a container may have no loopback of the sixth.
        IpAddr::V6(ip) if ip.is_unspecified() => {
            vec![with(Ipv4Addr::LOCALHOST.into()), with(Ipv6Addr::LOCALHOST.into())]
        }
        _ => vec![address],
    }
}

/// The status and the body of its answer.
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

fn read_answer(status: u16, body: &str) -> Result<Answer, String> {
    match status {
        200 => Ok(Answer::Ready),
        503 => Ok(Answer::NotReady(body.trim().replace(char::is_control, " "))),
        _ => Err(format!("what answers there is no agent: status {status}")),
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "an edge: signs of life have their times"
)]
fn now() -> Instant {
    Instant::now()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loop_that_turns_is_alive_and_one_that_stands_still_is_not() {
        let heart = Heartbeat::default();
        let start = heart.start;
        let check = |seconds| heart.check_at(start + Duration::from_secs(seconds), "its loop");
        assert_eq!(check(HANGS_AFTER.as_secs()), Ok(()));
        assert_eq!(check(31), Err("its loop has not turned for 31 s".to_owned()));
        heart.beat_at(start + Duration::from_secs(40));
        assert_eq!(check(70), Ok(()));
        assert!(check(71).is_err());
    }

    #[test]
    fn nobody_is_ready_before_it_says_so() {
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
    fn an_answer_is_ready_not_ready_or_not_ours() {
        assert_eq!(read_answer(200, "ready\n"), Ok(Answer::Ready));
        assert_eq!(
            read_answer(503, "for\x1bKafka\n"),
            Ok(Answer::NotReady("for Kafka".to_owned()))
        );
        for wrong in [204, 302, 404, 500] {
            assert!(read_answer(wrong, "").is_err(), "{wrong}");
        }
    }
}
