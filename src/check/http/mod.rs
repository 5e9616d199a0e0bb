//! The HTTP check: lookup, connection, TLS, request, redirects, body, regex. Times each phase and classifies each failure.
//!
//! A check always ends with an [`Observation`], whatever happens. Every connection is new, and every request is sent once.
//! When to check, and turning the observation into a sample, is up to the caller.
//!
//! ureq implements HTTP. Its own name lookup, connections, TLS, codings and redirects are replaced, because they retry,
//! cache and hide what a check has to report: see `resolver`, `transport`, `tls` and `body`. These parts write what they
//! observe to `progress`, and `fault` classifies their errors.

mod body;
mod chunks;
mod head;
mod inflate;
mod request;
mod transport;

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use ureq::http::header::LOCATION;
use ureq::http::{HeaderMap, HeaderValue, Response};
use ureq::{Agent, Body};
use url::Url;

use crate::check::details::{Details, Exchange};
use crate::check::fault::classify;
use crate::check::observation::Observation;
use crate::check::pattern::{DeadlinePassed, Search};
use crate::check::progress::{Phase, SharedProgress, add};
use crate::check::resolver::{CheckResolver, Lookup, Names, getaddrinfo};
use crate::check::target::{Method, NOT_NAMED, Target, can_be_named};
use crate::check::tls::Trust;
use crate::clock::instant_now;
use crate::config::CheckConfig;
use crate::sample::Outcome;
use crate::terminal::counted;
pub use body::{BROTLI_DECODER_BYTES, MAX_BROTLI_DECODERS, READING_BYTES};
use body::{BodyEnd, BodyFault, BodyLimits, BrotliDecoders};
use request::{Request, origin};
use transport::CheckConnector;

/// The least time in which the next host of a redirect can be expected to answer. If less is left, a timeout is attributed to
/// the hosts before it.
const LEAST_HOP_TIME: Duration = Duration::from_millis(10);

/// How much of a body that the check does not read is shown to a person, and how long to wait for it.
const GLANCE_BYTES: u64 = 8_192;
const GLANCE_TIME: Duration = Duration::from_secs(1);

/// What all checks of a process share: the trust anchors, the resolver's threads and the settings. Cheap to clone.
#[derive(Clone)]
pub struct Checks {
    names: Names,
    trust: Trust,
    user_agent: HeaderValue,
    max_body_bytes: u64,
    brotli: Arc<BrotliDecoders>,
}

impl Checks {
    /// # Errors
    /// CHECK_CA_FILE or USER_AGENT cannot be used. That there are no trust anchors only causes a warning.
    pub fn new(config: &CheckConfig) -> anyhow::Result<Self> {
        Self::with_lookup(config, Box::new(getaddrinfo))
    }

    /// As [`Checks::new`], but with another function for name lookups than the system's.
    pub fn with_lookup(config: &CheckConfig, lookup: Box<Lookup>) -> anyhow::Result<Self> {
        let user_agent = HeaderValue::from_bytes(config.user_agent.as_bytes())
            .context("USER_AGENT: expected one line without control characters")?;
        let checks = Self {
            names: Names::new(lookup, config.max_threads),
            trust: Trust::load(config.ca_file.as_deref())?,
            user_agent,
            max_body_bytes: config.max_body_bytes,
            brotli: Arc::new(BrotliDecoders::new()),
        };
        Ok(checks)
    }

    /// A checker for one thread. Threads do not share one, because a shared agent goes through the list of all open
    /// connections whenever it connects.
    pub fn checker(&self) -> Checker {
        let progress = SharedProgress::new();
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .proxy(None)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .max_response_header_size(transport::MAX_HEAD_BYTES)
            .max_idle_connections(0)
            .build();
        let connector = CheckConnector {
            tls: self.trust.client_config(progress.clone()),
            progress: progress.clone(),
            user_agent: self.user_agent.clone(),
        };
        let resolver = CheckResolver {
            names: self.names.clone(),
            progress: progress.clone(),
        };
        Checker {
            agent: Agent::with_parts(config, connector, resolver),
            progress,
            checks: self.clone(),
            search: None,
        }
    }
}

pub struct Checker {
    agent: Agent,
    progress: SharedProgress,
    checks: Checks,
    /// The last search. If the next host has the same regex, the table built for it is used again.
    search: Option<Search>,
}

impl Checker {
    /// Checks `target` once, over new connections, and returns by `deadline`. The kernel's socket timeouts can delay that by
    /// 3 % of the time that was left when a wait began.
    pub fn check(&mut self, target: &Target, deadline: Instant) -> Observation {
        self.observe(target, deadline, None)
    }

    /// As [`Checker::check`], with what a person wants to know beyond the record.
    pub fn check_in_detail(&mut self, target: &Target, deadline: Instant) -> (Observation, Details) {
        let observation = self.observe(target, deadline, Some(Box::default()));
        let mut details = *self.progress.lock().details.take().unwrap_or_default();
        for text in details.texts() {
            for secret in target.secrets() {
                secret.value().hide_in(text);
            }
        }
        (observation, details)
    }

    fn observe(&mut self, target: &Target, deadline: Instant, details: Option<Box<Details>>) -> Observation {
        let started_at = instant_now();
        self.progress.begin_check(deadline, target, details);
        let mut observation = Observation::new(Outcome::Ok, None);
        let mut unread = None;
        match self.final_response(target, &mut observation) {
            Ok((mut response, method)) => {
                observation.latency = Some(instant_now() - started_at);
                self.judge(target, method, &mut response, &mut observation);
                let has_body = method != Method::Head && may_have_body(response.status().as_u16());
                if has_body && !target.reads_body() && self.progress.lock().details.is_some() {
                    unread = Some(response);
                }
            }
            Err(Failure::Exchange(outcome, text)) => fail(&mut observation, outcome, text),
            Err(Failure::Redirect(outcome, text)) => {
                observation.latency = Some(instant_now() - started_at);
                fail(&mut observation, outcome, text);
            }
        }
        if let Some(error) = &mut observation.error {
            for secret in target.secrets() {
                secret.value().hide_in(error);
            }
        }
        {
            let mut seen = self.progress.lock();
            observation.phases = seen.phases;
            observation.ip = seen.ip;
            observation.lookup_began_at = seen.lookup_began_at;
            observation.cert_expires_at = seen.cert_expires_at;
            if let Some(details) = &mut seen.details {
                details.took = instant_now() - started_at;
            }
        }
        if let Some(response) = unread {
            self.glance(response);
        }
        observation
    }

    /// Reads the beginning of a body that the check does not read, once the observation is complete.
    fn glance(&self, mut response: Response<Body>) {
        let deadline = {
            let mut progress = self.progress.lock();
            progress.phase = Phase::Body;
            progress.deadline = progress.deadline.min(instant_now() + GLANCE_TIME);
            progress.deadline
        };
        let limits = BodyLimits {
            max_bytes: GLANCE_BYTES,
            deadline,
            brotli: &self.checks.brotli,
        };
        let mut beginning = String::new();
        // What came before a fault is shown.
        let _ = body::read(&mut response, &limits, &mut 0, |text| {
            beginning.push_str(text);
            Ok(())
        });
        if let Some(details) = &mut self.progress.lock().details {
            details.body = beginning;
        }
    }

    /// Requests the target's URL and follows redirects to the final response. Returns the method of the last request too.
    fn final_response(
        &self,
        target: &Target,
        observation: &mut Observation,
    ) -> Result<(Response<Body>, Method), Failure> {
        let mut request = Request::first(target);
        let mut followed = 0;
        loop {
            let began_at = instant_now();
            let response = self
                .send(target, &request)
                .map_err(|error| self.failed_exchange(&error, began_at, followed))?;
            observation.redirects = Some(followed);
            let status = response.status().as_u16();
            if let Some(details) = &mut self.progress.lock().details {
                details.exchanges.push(Exchange {
                    url: request.url.to_string(),
                    status,
                    took: instant_now() - began_at,
                });
            }
            if status == 407 && target.proxy.is_some() && request.url.scheme() == "http" {
                observation.status_code = Some(status);
                let text = "the proxy requires a user and a password (status 407)";
                return Err(Failure::Redirect(Outcome::ProxyError, text.into()));
            }
            let next = match is_followed(target, status) {
                true => next_url(&request.url, response.headers()),
                false => Ok(None),
            };
            let failure = match next {
                Ok(None) => {
                    observation.status_code = Some(status);
                    return Ok((response, request.method));
                }
                Ok(Some(_)) if followed == target.follow => {
                    let text = format!("more than {}", counted(followed, "redirect"));
                    Failure::Redirect(Outcome::TooManyRedirects, text)
                }
                Ok(Some(next)) if target.tls_required && next.scheme() != "https" => {
                    let text = format!(
                        "redirect (status {status}) to {}, which tls=required does not allow",
                        origin(&next)
                    );
                    Failure::Redirect(Outcome::ProtocolError, text)
                }
                Ok(Some(next)) => {
                    request.redirect(status, next);
                    followed += 1;
                    observation.redirects = Some(followed);
                    continue;
                }
                Err(cause) => Failure::Redirect(
                    Outcome::ProtocolError,
                    format!("redirect (status {status}) {cause}"),
                ),
            };
            observation.status_code = Some(status);
            return Err(failure);
        }
    }

    fn failed_exchange(&self, error: &ureq::Error, began_at: Instant, followed: u32) -> Failure {
        let progress = self.progress.lock();
        let time_given = progress.deadline.saturating_duration_since(began_at);
        let (outcome, text) = match classify(error, &progress) {
            (Outcome::DnsTimeout | Outcome::ConnectTimeout | Outcome::TlsTimeout, _)
                if followed > 0 && time_given < LEAST_HOP_TIME =>
            {
                (Outcome::ResponseTimeout, "there was no response in time".into())
            }
            named => named,
        };
        Failure::Exchange(outcome, text + &after_redirects(followed))
    }

    /// One request over one connection, up to the response's headers.
    ///
    /// ureq only connects and reads the response. What is sent is written here and replaces ureq's own request, so ureq never
    /// sees a secret.
    fn send(&self, target: &Target, request: &Request<'_>) -> Result<Response<Body>, ureq::Error> {
        {
            let is_own = request.is_to_own_origin();
            let mut progress = self.progress.lock();
            // tls=insecure is about the certificate of the target's host, not of hosts that it redirects to.
            let tls_insecure = target.tls_insecure && request.url.host() == target.url.host();
            let outgoing = request.write(self.checks.user_agent.as_bytes());
            progress.begin_request(tls_insecure, outgoing);
            let certificate = target.cert.as_ref().filter(|_| is_own);
            progress.client_certificate = certificate.map(|files| Arc::clone(&files.value().0));
        }
        let url = origin(&request.url);
        let result = match request.method {
            // A response to HEAD has no body, whatever its headers say.
            Method::Head => self.agent.head(url),
            _ => self.agent.get(url),
        }
        .call();
        self.progress.lock().response_ended(result.is_ok());
        result
    }

    /// Judges the status, then the body, then the certificate. The first fault is the outcome. The body is also read after a
    /// bad status, for `regex_matched`.
    fn judge(
        &mut self,
        target: &Target,
        method: Method,
        response: &mut Response<Body>,
        observation: &mut Observation,
    ) {
        let status = response.status().as_u16();
        let bad_status =
            (!target.is_good_status(status)).then(|| (Outcome::BadStatus, format!("status {status}")));
        let bad_body = if !target.reads_body() {
            None
        } else if method == Method::Head || !may_have_body(status) {
            without_body(target, status)
        } else {
            self.judge_body(target, response, observation)
        };
        let failure = bad_status.or(bad_body).or_else(|| self.judge_certificate(target));
        if let Some((outcome, text)) = failure {
            fail(observation, outcome, text);
        }
    }

    fn judge_body(
        &mut self,
        target: &Target,
        response: &mut Response<Body>,
        observation: &mut Observation,
    ) -> Option<(Outcome, String)> {
        let began_at = instant_now();
        let (deadline, is_detailed) = {
            let mut progress = self.progress.lock();
            progress.phase = Phase::Body;
            (progress.deadline, progress.details.is_some())
        };
        let mut search = target.regex.as_ref().map(|regex| match self.search.take() {
            Some(mut last) if Arc::ptr_eq(last.pattern(), regex) => {
                last.restart();
                last
            }
            _ => Search::new(Arc::clone(regex)),
        });
        let mut searching = Duration::ZERO;
        let mut body_bytes = 0;
        let mut document = String::new();
        let limits = BodyLimits {
            max_bytes: self.checks.max_body_bytes,
            deadline,
            brotli: &self.checks.brotli,
        };
        let result = body::read(response, &limits, &mut body_bytes, |text| {
            if is_detailed || !target.json.is_empty() {
                document.push_str(text);
            }
            let Some(search) = &mut search else { return Ok(()) };
            let began_at = instant_now();
            let searched = search.search(text, || instant_now() >= deadline);
            searching += instant_now() - began_at;
            searched.map_err(BodyFault::from)
        });
        add(
            &mut self.progress.lock().phases.body,
            instant_now() - began_at - searching,
        );
        if let Some(details) = &mut self.progress.lock().details {
            details.body.clone_from(&document);
        }
        observation.body_bytes = Some(body_bytes);
        let end = match result {
            Ok(end) => end,
            Err(fault) => {
                self.search = search;
                return Some(self.unread_body(fault));
            }
        };
        observation.regex_matched = search.as_mut().map(Search::finish);
        self.search = search;
        let by_regex = observation
            .regex_matched
            .and_then(|matched| self.judge_regex(target, matched, end));
        by_regex.or_else(|| self.judge_json(target, &document, end, deadline))
    }

    fn judge_regex(&self, target: &Target, matched: bool, end: BodyEnd) -> Option<(Outcome, String)> {
        match (matched, target.regex_absent, end) {
            (true, true, _) => Some((Outcome::RegexMismatch, "the regex matches the body".into())),
            (true, false, _) | (false, true, BodyEnd::Complete) => None,
            (false, false, BodyEnd::Complete) => {
                Some((Outcome::RegexMismatch, "the regex does not match the body".into()))
            }
            (false, _, BodyEnd::Beyond) => Some((
                Outcome::BodyTooLarge,
                format!(
                    "the regex does not match the first {} bytes of the body",
                    self.checks.max_body_bytes
                ),
            )),
        }
    }

    /// Why a body could not be read to its end.
    fn unread_body(&self, fault: BodyFault) -> (Outcome, String) {
        match fault {
            BodyFault::Transfer(error) => classify(&error, &self.progress.lock()),
            BodyFault::NoDecoder => (
                Outcome::AgentError,
                format!(
                    "all {MAX_BROTLI_DECODERS} brotli decoders of this process were busy until the deadline"
                ),
            ),
            BodyFault::DeadlinePassed(DeadlinePassed) => (
                Outcome::BodyTimeout,
                "the search for the regex did not finish in time".into(),
            ),
        }
    }

    fn judge_json(
        &self,
        target: &Target,
        document: &str,
        end: BodyEnd,
        deadline: Instant,
    ) -> Option<(Outcome, String)> {
        if !target.json.is_empty() && end == BodyEnd::Beyond {
            let text = format!(
                "the body has more than {} bytes, too many for json=",
                self.checks.max_body_bytes
            );
            return Some((Outcome::BodyTooLarge, text));
        }
        target.json.iter().find_map(|rule| {
            if instant_now() >= deadline {
                let text = "the search in the JSON document did not finish in time";
                return Some((Outcome::BodyTimeout, text.into()));
            }
            let found = rule.holds(document).err()?;
            Some((Outcome::JsonMismatch, found))
        })
    }

    fn judge_certificate(&self, target: &Target) -> Option<(Outcome, String)> {
        let wanted = target.cert_days?;
        let (expires_at, seconds_left) = self.progress.lock().soonest_expiry?;
        let days = seconds_left.div_euclid(24 * 60 * 60);
        (days < i64::from(wanted)).then(|| {
            let left = match days {
                0.. => format!("in {}", counted(days, "day")),
                _ => "already".to_owned(),
            };
            let text = format!("a certificate expires {left}, at {expires_at}; cert-days={wanted}");
            (Outcome::TlsCertExpiring, text)
        })
    }
}

fn may_have_body(status: u16) -> bool {
    !matches!(status, 100..=199 | 204 | 304)
}

/// The outcome of a response that has no body, where the target has a rule for the body: a REGEX or `json=`.
fn without_body(target: &Target, status: u16) -> Option<(Outcome, String)> {
    let text = || format!("status {status} has no body");
    match (&target.regex, target.regex_absent) {
        (Some(_), false) => Some((Outcome::RegexMismatch, text())),
        _ if !target.json.is_empty() => Some((Outcome::JsonMismatch, text())),
        _ => None,
    }
}

/// Why there is no final response to judge.
enum Failure {
    Exchange(Outcome, String),
    /// A redirect that cannot be followed: it is the final response, and is not valid.
    Redirect(Outcome, String),
}

fn fail(observation: &mut Observation, outcome: Outcome, error: String) {
    observation.outcome = outcome;
    observation.error = Some(error);
}

/// Whether to follow a response of this status. A redirect is not followed with `follow=0`, or if `status=` names its code.
fn is_followed(target: &Target, status: u16) -> bool {
    matches!(status, 301 | 302 | 303 | 307 | 308)
        && target.follow > 0
        && !target
            .status
            .as_ref()
            .is_some_and(|written| written.contains(status))
}

/// The URL that a redirect leads to, without credentials and fragment. `None` if its Location is empty: it is then judged
/// like any other response, as in curl and browsers. The error continues a text that begins with "redirect".
fn next_url(from: &Url, headers: &HeaderMap) -> Result<Option<Url>, String> {
    if !headers.contains_key(LOCATION) {
        return Err("without a Location".into());
    }
    let mut locations = headers.get_all(LOCATION).iter().map(HeaderValue::as_bytes);
    let Some(location) = locations.find(|location| !location.is_empty()) else {
        return Ok(None);
    };
    // Bytes outside ASCII are sent back unchanged, because their encoding is not known.
    let location: String = location
        .iter()
        .map(|byte| match byte {
            0x80.. => format!("%{byte:02X}"),
            _ => char::from(*byte).to_string(),
        })
        .collect();
    let mut url = from
        .join(&location)
        .map_err(|error| format!("to an invalid URL: {error}"))?;
    if !matches!(url.scheme(), "http" | "https") {
        return Err(format!("to a URL with the scheme {}", url.scheme()));
    }
    if !can_be_named(&url) {
        return Err(format!("to {}: {NOT_NAMED}", origin(&url)));
    }
    url.set_fragment(None);
    // They only fail for a URL without a host, and an http or https URL always has one.
    let _ = url.set_username("");
    let _ = url.set_password(None);
    Ok(Some(url))
}

/// `, after 2 redirects`, or nothing without redirects.
fn after_redirects(followed: u32) -> String {
    match followed {
        0 => String::new(),
        _ => format!(", after {}", counted(followed, "redirect")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ureq::http::header::HeaderName;

    fn headers(name: HeaderName, value: &[u8]) -> HeaderMap {
        HeaderMap::from_iter([(name, HeaderValue::from_bytes(value).unwrap())])
    }

    #[test]
    fn a_location_is_resolved_as_a_browser_does_and_loses_credentials_and_fragment() {
        let from = Url::parse("https://a.test/dir/page?q=1").unwrap();
        let table: [(&[u8], &str); 13] = [
            (b"/x", "https://a.test/x"),
            (b"x", "https://a.test/dir/x"),
            (b"../x?y=z", "https://a.test/x?y=z"),
            (b"?y", "https://a.test/dir/page?y"),
            (b"#top", "https://a.test/dir/page?q=1"),
            (b"//b.test:8443/", "https://b.test:8443/"),
            (b"http://user:secret@b.test/x#y", "http://b.test/x"),
            ("/\u{fc}".as_bytes(), "https://a.test/%C3%BC"),
            (b"/gr\xfcn?\xfc=\xc3\xbc", "https://a.test/gr%FCn?%FC=%C3%BC"),
            (
                "/\u{20ac}?\u{20ac}".as_bytes(),
                "https://a.test/%E2%82%AC?%E2%82%AC",
            ),
            (b"/50%", "https://a.test/50%"),
            (b"/a b", "https://a.test/a%20b"),
            (b"https://b\xc3\xbc.test", "https://xn--b-eha.test/"),
        ];
        for (location, expected) in table {
            let next = next_url(&from, &headers(LOCATION, location));
            assert_eq!(
                next.as_ref().map(|url| url.as_ref().map(Url::as_str)),
                Ok(Some(expected)),
                "{}",
                location.escape_ascii()
            );
        }
        for location in [
            &b"ftp://b.test/"[..],
            b"mailto:a@b.test",
            b"http://",
            b"http://[::1",
            b"http://a:b:c/",
            b"https://b\xfc.test/",
            b"https://-b.test/",
            b"//b-.test/",
        ] {
            let next = next_url(&from, &headers(LOCATION, location));
            assert!(next.is_err(), "{}: {next:?}", location.escape_ascii());
        }
        assert!(next_url(&from, &HeaderMap::new()).is_err());
    }

    #[test]
    fn a_redirect_with_an_empty_location_leads_nowhere() {
        let from = Url::parse("https://a.test/").unwrap();
        let mut headers = headers(LOCATION, b"");
        assert_eq!(next_url(&from, &headers), Ok(None));
        headers.append(LOCATION, HeaderValue::from_static("/x"));
        let next = next_url(&from, &headers).unwrap();
        assert_eq!(
            next.as_ref().map(Url::as_str),
            Some("https://a.test/x"),
            "as curl does"
        );
    }
}
