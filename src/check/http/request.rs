//! The requests of a check: what is sent to which URL, and what a redirect changes in it.
//!
//! Pure, except that a secret is read from its file when a request is written.

use std::sync::Arc;

use url::Url;

use crate::check::progress::Outgoing;
use crate::check::target::{Header, HeaderValue, Method, Target};

/// The headers that only go to the origin of the line: what identifies the user there, and the name of the host.
const FOR_THE_ORIGIN: [&str; 3] = ["Authorization", "Cookie", "Host"];

/// The headers that describe a request's body (the Fetch standard's "request-body-header name").
const OF_THE_BODY: [&str; 4] = [
    "Content-Encoding",
    "Content-Language",
    "Content-Location",
    "Content-Type",
];

/// One request of a check: the first one, or one for a redirect.
pub(super) struct Request<'a> {
    target: &'a Target,
    pub url: Url,
    pub method: Method,
    has_body: bool,
}

impl<'a> Request<'a> {
    pub(super) fn first(target: &'a Target) -> Self {
        Self {
            target,
            url: target.url.clone(),
            method: target.method,
            has_body: true,
        }
    }

    /// The request that follows a redirect. As in browsers, a 303 turns every method into GET, and a 301 or 302 turns POST
    /// into GET; otherwise method and body are repeated (the Fetch standard, "HTTP-redirect fetch").
    pub(super) fn redirect(&mut self, status: u16, url: Url) {
        let becomes_get = match status {
            303 => self.method != Method::Head,
            301 | 302 => self.method == Method::Post,
            _ => false,
        };
        if becomes_get {
            self.method = Method::Get;
            self.has_body = false;
        }
        self.url = url;
    }

    /// Whether it goes to the scheme, host and port of the line.
    pub(super) fn is_to_own_origin(&self) -> bool {
        self.url.origin() == self.target.url.origin()
    }

    pub(super) fn write(&self, user_agent: &[u8]) -> Outgoing {
        let mut head = Vec::with_capacity(512);
        let mut line = |parts: &[&[u8]]| {
            parts.iter().for_each(|part| head.extend_from_slice(part));
            head.extend_from_slice(b"\r\n");
        };
        line(&[
            self.method.as_str().as_bytes(),
            b" ",
            self.request_target().as_bytes(),
            b" HTTP/1.1",
        ]);

        let own_headers: Vec<&Header> = self
            .target
            .headers
            .iter()
            .filter(|header| self.sends(header))
            .collect();
        let accepted = match self.target.reads_body() && self.method != Method::Head {
            true => super::body::ACCEPTED_CODINGS,
            false => "identity",
        };
        let authority = authority(&self.url);
        // In the spelling of most clients: some servers do not accept `host:`.
        let usual: [(&str, &[u8]); 5] = [
            ("Host", authority.as_bytes()),
            ("User-Agent", user_agent),
            ("Accept", b"*/*"),
            ("Accept-Encoding", accepted.as_bytes()),
            ("Connection", b"close"),
        ];
        for (name, value) in usual {
            if !own_headers
                .iter()
                .any(|header| header.name.eq_ignore_ascii_case(name))
            {
                line(&[name.as_bytes(), b": ", value]);
            }
        }
        for Header { name, value } in own_headers {
            match value {
                HeaderValue::Plain(text) => line(&[name.as_bytes(), b": ", text.as_bytes()]),
                HeaderValue::Secret(prefix, secret) => {
                    let secret = secret.value();
                    let value = [prefix.as_bytes(), secret.header_value().as_bytes()].concat();
                    line(&[name.as_bytes(), b": ", &value]);
                }
            }
        }
        if let Some(auth) = self.target.auth.as_ref().filter(|_| self.is_to_own_origin()) {
            line(&[b"Authorization: ", auth.value().header_value().as_bytes()]);
        }
        let body = self.target.body.as_ref().filter(|_| self.has_body);
        let body = body.map(|body| Arc::clone(&body.bytes));
        // Servers may require it where the method has a body (RFC 9110, section 8.6).
        let has_length = body.is_some() || matches!(self.method, Method::Post | Method::Put | Method::Patch);
        if has_length {
            let length = body.as_ref().map_or(0, |body| body.len()).to_string();
            line(&[b"Content-Length: ", length.as_bytes()]);
        }
        line(&[]);
        Outgoing { head, body }
    }

    /// The whole URL in a request to a proxy, else its path and query (RFC 9112, section 3.2).
    fn request_target(&self) -> String {
        let url = &self.url;
        let origin = match self.target.proxy.is_some() && url.scheme() == "http" {
            true => origin(url),
            false => String::new(),
        };
        let (question_mark, query) = match url.query() {
            Some(query) => ("?", query),
            None => ("", ""),
        };
        [origin.trim_end_matches('/'), url.path(), question_mark, query].concat()
    }

    fn sends(&self, header: &Header) -> bool {
        let is_one_of = |names: &[&str]| names.iter().any(|name| header.name.eq_ignore_ascii_case(name));
        let is_for_the_origin = matches!(header.value, HeaderValue::Secret(..)) || is_one_of(&FOR_THE_ORIGIN);
        (self.is_to_own_origin() || !is_for_the_origin) && (self.has_body || !is_one_of(&OF_THE_BODY))
    }
}

/// The value of `Host:`.
pub(super) fn authority(url: &Url) -> String {
    let host = url.host_str().unwrap_or_default();
    match url.port() {
        Some(port) => format!("{host}:{port}"),
        None => host.to_owned(),
    }
}

pub(super) fn origin(url: &Url) -> String {
    format!("{}://{}/", url.scheme(), authority(url))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(method: Method) -> Target {
        let url = Url::parse("https://a.test/x?y=z").unwrap();
        let header = |name: &str| Header {
            name: name.to_owned(),
            value: HeaderValue::Plain("v".to_owned()),
        };
        Target {
            method,
            headers: ["accept", "Cookie", "Content-Type", "X-Own"].map(header).to_vec(),
            body: Some(crate::check::target::RequestBody {
                file: None,
                bytes: b"body"[..].into(),
            }),
            ..Target::new("a.test".to_owned(), url, std::time::Duration::from_secs(60))
        }
    }

    /// The request's lines but those of every request, and its body.
    fn sent(request: &Request<'_>) -> String {
        let Outgoing { head, body } = request.write(b"test");
        let head = String::from_utf8(head).unwrap();
        assert!(head.ends_with("\r\n\r\n"), "{head:?}");
        let usual = ["User-Agent:", "Accept-Encoding:", "Connection:"];
        let lines = head
            .lines()
            .filter(|line| !usual.iter().any(|usual| line.starts_with(usual)));
        let body = body.map_or(String::new(), |body| String::from_utf8_lossy(&body).into_owned());
        lines.chain([body.as_str()]).collect::<Vec<_>>().join("|")
    }

    #[test]
    fn a_redirect_changes_method_and_body_as_in_browsers() {
        use Method::*;
        for (method, status, expected) in [
            (Post, 301, Get),
            (Post, 302, Get),
            (Post, 303, Get),
            (Post, 307, Post),
            (Post, 308, Post),
            (Put, 301, Put),
            (Patch, 302, Patch),
            (Delete, 303, Get),
            (Options, 308, Options),
            (Head, 303, Head),
            (Get, 303, Get),
        ] {
            let target = target(method);
            let mut request = Request::first(&target);
            request.redirect(status, Url::parse("https://a.test/next").unwrap());
            let keeps_body = expected == method && !(status == 303 && method == Get);
            let content = if keeps_body { "Content-Type: v|" } else { "" };
            let length = if keeps_body {
                "Content-Length: 4||body"
            } else {
                "|"
            };
            assert_eq!(
                sent(&request),
                format!(
                    "{} /next HTTP/1.1|Host: a.test|accept: v|Cookie: v|{content}X-Own: v|{length}",
                    expected.as_str()
                ),
                "{method:?} {status}"
            );
        }
    }

    #[test]
    fn another_origin_gets_nothing_that_identifies_the_user() {
        let target = target(Method::Put);
        let mut request = Request::first(&target);
        assert_eq!(
            sent(&request),
            "PUT /x?y=z HTTP/1.1|Host: a.test|accept: v|Cookie: v|Content-Type: v|X-Own: v|Content-Length: 4||body"
        );
        for other in ["http://a.test/", "https://a.test:444/", "https://b.test/"] {
            request.redirect(307, Url::parse(other).unwrap());
            assert!(!sent(&request).contains("Cookie"), "{other}");
            assert!(sent(&request).contains("X-Own"), "{other}");
        }
        // And back again.
        request.redirect(307, Url::parse("https://a.test/").unwrap());
        assert!(sent(&request).contains("Cookie"));
    }
}
