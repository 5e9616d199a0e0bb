//! Serves the files of the page from memory. A request never reaches Postgres and renders nothing.

use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{
    ACCEPT_ENCODING, ALLOW, AUTHORIZATION, CACHE_CONTROL, CONTENT_ENCODING, CONTENT_SECURITY_POLICY,
    CONTENT_TYPE, ETAG, HeaderMap, HeaderName, HeaderValue, IF_NONE_MATCH, LOCATION, REFERRER_POLICY, VARY,
    WWW_AUTHENTICATE, X_CONTENT_TYPE_OPTIONS,
};
use hyper::{Method, Request, Response, StatusCode};
use percent_encoding::percent_decode_str;

use crate::config::Secret;
use crate::http::health::Readiness;
use crate::http::server::Limits;
use crate::page::html::POLICY;
use crate::page::view::encoded;
use crate::page::{File, Files};

/// An open browser asks every 15 seconds, so it keeps its connection.
pub const LIMITS: Limits = Limits {
    connections: 4_096,
    open_for: Duration::from_secs(600),
    idle_for: Some(Duration::from_secs(60)),
};

/// What the server and the thread that renders share.
#[derive(Clone, Default)]
pub struct PublishedFiles(Arc<Shared>);

#[derive(Default)]
struct Shared {
    files: RwLock<Arc<Files>>,
    /// Whether the files are as new as they should be.
    ready: Readiness,
    /// The header's value for each allowed user. Empty: everybody may read.
    logins: Vec<Secret>,
}

impl PublishedFiles {
    /// `logins` are pairs `user:password`.
    pub fn new(logins: &[Secret]) -> Self {
        let header = |login: &Secret| {
            let pair = openssl::base64::encode_block(login.reveal().as_bytes());
            Secret::new(format!("Basic {pair}"))
        };
        Self(Arc::new(Shared {
            logins: logins.iter().map(header).collect(),
            ..Shared::default()
        }))
    }

    pub fn put(&self, files: Files) {
        *self.0.files.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(files);
    }

    pub fn set_ready(&self, ready: Result<(), String>) {
        self.0.ready.set(ready);
    }

    fn files(&self) -> Arc<Files> {
        Arc::clone(&self.0.files.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn lets_in(&self, headers: &HeaderMap) -> bool {
        let logins = &self.0.logins;
        let sent = headers
            .get(AUTHORIZATION)
            .map(HeaderValue::as_bytes)
            .unwrap_or_default();
        // Takes the same time wherever the first difference is, and for every login.
        let is = |login: &&Secret| {
            let login = login.reveal().as_bytes();
            login.len() == sent.len() && openssl::memcmp::eq(login, sent)
        };
        logins.is_empty() || logins.iter().filter(is).count() > 0
    }

    /// What the server answers.
    pub fn service(self) -> impl Fn(&Request<Incoming>) -> Response<Full<Bytes>> + Send + Sync + 'static {
        move |request| self.respond(request)
    }

    fn respond(&self, request: &Request<Incoming>) -> Response<Full<Bytes>> {
        if ![Method::GET, Method::HEAD].contains(request.method()) {
            return text(StatusCode::METHOD_NOT_ALLOWED, "only GET is supported");
        }
        let path = request.uri().path();
        match path {
            "/healthz" => return text(StatusCode::OK, "alive"),
            "/readyz" => {
                return match self.0.ready.check() {
                    Ok(()) => text(StatusCode::OK, "ready"),
                    Err(reason) => text(StatusCode::SERVICE_UNAVAILABLE, &reason),
                };
            }
            _ => {}
        }
        if !self.lets_in(request.headers()) {
            let mut response = text(StatusCode::UNAUTHORIZED, "a user and a password are needed");
            let challenge = HeaderValue::from_static("Basic realm=\"status\", charset=\"UTF-8\"");
            response.headers_mut().insert(WWW_AUTHENTICATE, challenge);
            return response;
        }
        let files = self.files();
        let Ok(path) = percent_decode_str(path.trim_start_matches('/')).decode_utf8() else {
            return text(StatusCode::NOT_FOUND, "not found");
        };
        let index = |path: &str| files.get(&format!("{path}index.html"));
        if let Some(file) = files
            .get(&*path)
            .or_else(|| index(&path).filter(|_| path.is_empty() || path.ends_with('/')))
        {
            return send(file, request.headers());
        }
        if index(&format!("{path}/")).is_some() {
            let name = path.rsplit('/').next().unwrap_or_default();
            let mut response = text(StatusCode::PERMANENT_REDIRECT, "it ends in a slash");
            if let Ok(location) = HeaderValue::from_str(&format!("{}/", encoded(name))) {
                response.headers_mut().insert(LOCATION, location);
            }
            return response;
        }
        if files.is_empty() {
            return text(
                StatusCode::SERVICE_UNAVAILABLE,
                "there is no page yet: the database has not been read",
            );
        }
        text(StatusCode::NOT_FOUND, "not found")
    }
}

fn send(file: &File, headers: &HeaderMap) -> Response<Full<Bytes>> {
    let lists = |name: HeaderName, is: &dyn Fn(&str) -> bool| {
        let values = headers
            .get_all(name)
            .iter()
            .filter_map(|value| value.to_str().ok());
        values
            .flat_map(|value| value.split(','))
            .any(|item| is(item.trim()))
    };
    let opaque = |tag: &str| tag.trim_start_matches("W/").to_owned();
    let is_known = lists(IF_NONE_MATCH, &|tag| {
        tag == "*" || opaque(tag) == opaque(&file.tag)
    });
    let takes_gzip = lists(ACCEPT_ENCODING, &|coding| {
        let (coding, quality) = coding.split_once(';').unwrap_or((coding, ""));
        let is_refused = matches!(
            quality.trim().strip_prefix("q="),
            Some("0" | "0." | "0.0" | "0.00" | "0.000")
        );
        matches!(coding.trim(), "gzip" | "*") && !is_refused
    });
    let mut response = Response::new(match (is_known, takes_gzip) {
        (true, _) => Full::default(),
        (false, true) => Full::new(file.gzipped()),
        (false, false) => Full::new(file.body.clone()),
    });
    if is_known {
        *response.status_mut() = StatusCode::NOT_MODIFIED;
    } else if takes_gzip {
        response
            .headers_mut()
            .insert(CONTENT_ENCODING, HeaderValue::from_static("gzip"));
    }
    if let Ok(tag) = HeaderValue::from_str(&file.tag) {
        response.headers_mut().insert(ETAG, tag);
    }
    finish(response, file.content_type, "no-cache")
}

fn text(status: StatusCode, text: &str) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(format!("{text}\n").into()));
    *response.status_mut() = status;
    finish(response, "text/plain; charset=utf-8", "no-store")
}

fn finish(
    mut response: Response<Full<Bytes>>,
    content_type: &'static str,
    cache: &'static str,
) -> Response<Full<Bytes>> {
    static FULL_POLICY: std::sync::LazyLock<HeaderValue> = std::sync::LazyLock::new(|| {
        let policy = format!("{POLICY}; frame-ancestors 'none'");
        HeaderValue::from_str(&policy).unwrap_or(HeaderValue::from_static("default-src 'none'"))
    });
    let headers = response.headers_mut();
    headers.insert(CONTENT_SECURITY_POLICY, FULL_POLICY.clone());
    for (name, value) in [
        (CONTENT_TYPE, content_type),
        (CACHE_CONTROL, cache),
        (VARY, "Accept-Encoding"),
        (X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (REFERRER_POLICY, "no-referrer"),
        (ALLOW, "GET, HEAD"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    response
}
