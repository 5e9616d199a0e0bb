//! A target: what one line of the host file means.
//!
//! Owns the defaults, the limit of the timeout and which status is good. The syntax of the line is in `host_file`.

use std::fmt;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::ServerName;
use url::Url;

use crate::check::json::JsonRule;
use crate::check::pattern::Pattern;
use crate::check::secret::{CertificateFiles, SecretFile};
use crate::duration;
use crate::words::words;

/// The share of its interval that a check may take, so that a hanging check ends before the next tick.
pub const MAX_TIMEOUT_SHARE: f64 = 0.95;

/// How many redirects are followed without `follow=`.
pub const DEFAULT_FOLLOW: u32 = 10;

/// The statuses that are good without `status=`.
pub const DEFAULT_STATUS: RangeInclusive<u16> = 200..=399;

#[derive(Clone, Debug, PartialEq)]
pub struct Target {
    /// As written in the host file: the record's key and `address`.
    pub address: String,
    /// The URL to request: absolute, http or https, with the host in ASCII (IDNA), without credentials and fragment.
    pub url: Url,
    pub interval: Duration,
    /// `timeout=`; `None` means CHECK_TIMEOUT.
    pub timeout: Option<Duration>,
    /// `status=`; `None` means that 200 to 399 is good.
    pub status: Option<StatusSet>,
    pub method: Method,
    /// `header=`, in the order of the line.
    pub headers: Vec<Header>,
    pub body: Option<RequestBody>,
    /// `auth=@NAME`: the Authorization header.
    pub auth: Option<Arc<SecretFile>>,
    /// `cert=@NAME`: the certificate with which the client identifies itself.
    pub cert: Option<Arc<CertificateFiles>>,
    /// `plain-auth=yes`: secrets may be sent over http.
    pub plain_auth: bool,
    pub proxy: Option<Proxy>,
    /// How many redirects are followed. With 0 the redirect itself is the response that is judged.
    pub follow: u32,
    /// `slow=`: a response that takes longer is marked as slow in the record. It is still valid.
    pub slow: Option<Duration>,
    /// `cert-days=`: a certificate that is valid for fewer days is a failure.
    pub cert_days: Option<u32>,
    /// `json=`: what the body has to hold.
    pub json: Vec<JsonRule>,
    /// `name=` and `group=`, for people: they are copied to the record.
    pub name: Option<String>,
    pub group: Option<String>,
    /// `topic=`; `None` means KAFKA_TOPIC.
    pub topic: Option<String>,
    pub ip_family: Option<IpFamily>,
    /// `tls=insecure`: the certificate of the address's host is read, but not verified.
    pub tls_insecure: bool,
    /// `tls=required`: a redirect to http is not followed.
    pub tls_required: bool,
    /// Shared by all targets that have the same REGEX.
    pub regex: Option<Arc<Pattern>>,
    /// `!` before the REGEX: the body must not match.
    pub regex_absent: bool,
}

words! {
    Method, as_str:
    Get "GET",
    Head "HEAD",
    Post "POST",
    Put "PUT",
    Patch "PATCH",
    Delete "DELETE",
    Options "OPTIONS",
}

/// `header="NAME: VALUE"`.
#[derive(Clone, Debug, PartialEq)]
pub struct Header {
    pub name: String,
    pub value: HeaderValue,
}

#[derive(Clone, Debug, PartialEq)]
pub enum HeaderValue {
    Plain(String),
    /// `PREFIX@NAME`: the prefix, as in `Bearer @NAME`, may be empty.
    Secret(String, Arc<SecretFile>),
}

/// `body=`.
#[derive(Clone, Debug, PartialEq)]
pub struct RequestBody {
    /// The path after the `@` of `body=@FILE`; `None` if the body is in the line.
    pub file: Option<String>,
    pub bytes: Arc<[u8]>,
}

/// `proxy=http://HOST:PORT`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Proxy {
    /// In ASCII, without the brackets of an IPv6 address.
    pub host: String,
    pub port: u16,
}

impl fmt::Display for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.host.contains(':') {
            true => write!(f, "http://[{}]:{}", self.host, self.port),
            false => write!(f, "http://{}:{}", self.host, self.port),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum IpFamily {
    V4,
    V6,
}

/// Codes and ranges as written in `status=`, e.g. `200-299,301`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StatusSet(pub Vec<RangeInclusive<u16>>);

impl StatusSet {
    pub fn contains(&self, code: u16) -> bool {
        self.0.iter().any(|range| range.contains(&code))
    }
}

/// The host of a URL without the brackets of an IPv6 address.
pub fn bare(host: &str) -> &str {
    host.strip_prefix('[')
        .and_then(|host| host.strip_suffix(']'))
        .unwrap_or(host)
}

/// Whether TLS can ask for the URL's host. DNS allows names that a certificate cannot contain.
pub fn can_be_named(url: &Url) -> bool {
    let host = url.host_str().unwrap_or_default();
    url.scheme() != "https" || ServerName::try_from(bare(host)).is_ok()
}

/// What is wrong with a host if [`can_be_named`] returns false.
pub const NOT_NAMED: &str = "a certificate cannot contain this name: its parts must consist of letters, digits, hyphens and \
                             underscores, and must not begin or end with a hyphen";

impl fmt::Display for StatusSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, range) in self.0.iter().enumerate() {
            let comma = if index == 0 { "" } else { "," };
            match (range.start(), range.end()) {
                (start, end) if start == end => write!(f, "{comma}{start}")?,
                (start, end) => write!(f, "{comma}{start}-{end}")?,
            }
        }
        Ok(())
    }
}

impl Target {
    /// A target without options.
    pub fn new(address: String, url: Url, interval: Duration) -> Self {
        Self {
            address,
            url,
            interval,
            timeout: None,
            status: None,
            method: Method::Get,
            headers: Vec::new(),
            body: None,
            auth: None,
            cert: None,
            plain_auth: false,
            proxy: None,
            follow: DEFAULT_FOLLOW,
            slow: None,
            cert_days: None,
            json: Vec::new(),
            name: None,
            group: None,
            topic: None,
            ip_family: None,
            tls_insecure: false,
            tls_required: false,
            regex: None,
            regex_absent: false,
        }
    }

    /// The time for one check: `timeout=` or `default`, and never more than 95 % of the interval.
    pub fn timeout(&self, default: Duration) -> Duration {
        self.timeout
            .unwrap_or(default)
            .min(self.interval.mul_f64(MAX_TIMEOUT_SHARE))
    }

    /// Whether the answer's body is judged, and not only its head.
    pub fn reads_body(&self) -> bool {
        self.regex.is_some() || !self.json.is_empty()
    }

    /// The secrets that requests contain.
    pub fn secrets(&self) -> impl Iterator<Item = &Arc<SecretFile>> {
        let in_headers = self.headers.iter().filter_map(|header| match &header.value {
            HeaderValue::Plain(_) => None,
            HeaderValue::Secret(_, secret) => Some(secret),
        });
        in_headers.chain(&self.auth)
    }

    pub fn is_good_status(&self, code: u16) -> bool {
        match &self.status {
            Some(set) => set.contains(code),
            None => DEFAULT_STATUS.contains(&code),
        }
    }
}

/// Writes the target as a line of the host file.
impl fmt::Display for Target {
    #[expect(clippy::too_many_lines, reason = "a line or two for each option")]
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.address, duration::text(self.interval))?;
        if let Some(timeout) = self.timeout {
            write!(f, " timeout={}", duration::text(timeout))?;
        }
        if let Some(status) = &self.status {
            write!(f, " status={status}")?;
        }
        if self.method != Method::Get {
            write!(f, " method={}", self.method.as_str())?;
        }
        for Header { name, value } in &self.headers {
            let value = match value {
                HeaderValue::Plain(text) => text.clone(),
                HeaderValue::Secret(prefix, secret) => format!("{prefix}{secret:?}"),
            };
            write!(f, " header={}", Quoted(&format!("{name}: {value}")))?;
        }
        match &self.body {
            None => {}
            Some(RequestBody { file: Some(path), .. }) => write!(f, " body=@{path}")?,
            Some(RequestBody { bytes, .. }) => {
                write!(f, " body={}", Quoted(&String::from_utf8_lossy(bytes)))?;
            }
        }
        if let Some(secret) = &self.auth {
            write!(f, " auth={secret:?}")?;
        }
        if let Some(secret) = &self.cert {
            write!(f, " cert={secret:?}")?;
        }
        if self.plain_auth {
            f.write_str(" plain-auth=yes")?;
        }
        if let Some(proxy) = &self.proxy {
            write!(f, " proxy={proxy}")?;
        }
        if let Some(slow) = self.slow {
            write!(f, " slow={}", duration::text(slow))?;
        }
        if let Some(days) = self.cert_days {
            write!(f, " cert-days={days}")?;
        }
        for rule in &self.json {
            write!(f, " json={}", Quoted(&rule.to_string()))?;
        }
        for (option, text) in [("name", &self.name), ("group", &self.group)] {
            if let Some(text) = text {
                write!(f, " {option}={}", Quoted(text))?;
            }
        }
        if self.follow != DEFAULT_FOLLOW {
            write!(f, " follow={}", self.follow)?;
        }
        if let Some(topic) = &self.topic {
            write!(f, " topic={topic}")?;
        }
        match self.ip_family {
            Some(IpFamily::V4) => f.write_str(" ip=4")?,
            Some(IpFamily::V6) => f.write_str(" ip=6")?,
            None => {}
        }
        if self.tls_insecure {
            f.write_str(" tls=insecure")?;
        }
        if self.tls_required {
            f.write_str(" tls=required")?;
        }
        match &self.regex {
            Some(regex) if self.regex_absent => write!(f, " ! {regex}"),
            Some(regex) => write!(f, " {regex}"),
            None => Ok(()),
        }
    }
}

/// The value of an option, in double quotes.
struct Quoted<'a>(&'a str);

impl fmt::Display for Quoted<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{}\"", self.0.replace('\\', "\\\\").replace('"', "\\\""))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn every(interval: Duration) -> Target {
        let url = Url::parse("https://example.com/").unwrap();
        Target::new("example.com".into(), url, interval)
    }

    #[test]
    fn a_check_ends_before_its_next_tick() {
        let second = Duration::from_secs(1);
        let cases = [
            (60, None, 10_000),
            (10, None, 9_500),
            (1, None, 950),
            (10, Some(3), 3_000),
            (10, Some(30), 9_500),
        ];
        for (interval, timeout, expected_millis) in cases {
            let mut target = every(second * interval);
            target.timeout = timeout.map(|seconds| second * seconds);
            let expected = Duration::from_millis(expected_millis);
            assert_eq!(target.timeout(second * 10), expected, "{interval} {timeout:?}");
        }
    }

    #[test]
    fn without_a_status_option_everything_but_errors_is_good() {
        let mut target = every(Duration::from_secs(60));
        let good: Vec<_> = [199, 200, 301, 399, 400, 500]
            .into_iter()
            .filter(|code| target.is_good_status(*code))
            .collect();
        assert_eq!(good, [200, 301, 399]);

        target.status = Some(StatusSet(vec![404..=404, 500..=599]));
        let good: Vec<_> = [200, 404, 405, 503]
            .into_iter()
            .filter(|code| target.is_good_status(*code))
            .collect();
        assert_eq!(good, [404, 503]);
    }
}
