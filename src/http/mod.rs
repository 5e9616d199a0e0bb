//! The HTTP endpoint at METRICS_ADDR: /metrics for Prometheus, /healthz and /readyz.
//!
//! The endpoint only reads what an agent publishes, so no client can delay the agent. Each connection has one request, a
//! bounded time and a bounded size, so no client can delay another. The agents count the values (`produce::metrics`,
//! `consume::counters`); [`metrics`] formats them. [`server`] is the server; the status page has it too.

pub mod health;
pub mod metrics;
pub mod server;

use std::net::SocketAddr;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE, HeaderValue};
use hyper::{Method, Request, Response, StatusCode};

use self::metrics::Metrics;
use self::server::{Limits, Server};

/// What an agent publishes. The functions are called on the server's thread and must not wait for the agent.
pub trait Monitored: Send + Sync + 'static {
    /// The metrics as they are now.
    fn metrics(&self) -> Metrics;

    /// # Errors
    /// A loop of the agent hangs: which and since when.
    fn is_alive(&self) -> Result<(), String>;

    /// # Errors
    /// What the agent waits for.
    fn is_ready(&self) -> Result<(), String>;
}

/// A complete request is answered within milliseconds, so the oldest of this many is a slow client.
const LIMITS: Limits = Limits {
    connections: 512,
    open_for: Duration::from_secs(2),
    idle_for: None,
};

/// Starts the endpoint, which ends when the result is dropped.
pub fn serve(metrics_addr: SocketAddr, agent: impl Monitored) -> anyhow::Result<Server> {
    let answer =
        move |request: &Request<Incoming>| respond(request, &agent).map(|body| Full::new(body.into()));
    let server = Server::start("metrics", "METRICS_ADDR", metrics_addr, LIMITS, answer)?;
    log::info!("metrics at http://{}/metrics", server.address());
    Ok(server)
}

fn respond<B>(request: &Request<B>, agent: &dyn Monitored) -> Response<String> {
    if ![Method::GET, Method::HEAD].contains(request.method()) {
        return text(StatusCode::METHOD_NOT_ALLOWED, "only GET is supported");
    }
    let check = |result: Result<(), String>, good: &str| match result {
        Ok(()) => text(StatusCode::OK, good),
        Err(reason) => text(StatusCode::SERVICE_UNAVAILABLE, &reason),
    };
    match request.uri().path() {
        "/metrics" => response(StatusCode::OK, metrics::CONTENT_TYPE, agent.metrics().text()),
        "/healthz" => check(agent.is_alive(), "alive"),
        "/readyz" => check(agent.is_alive().and_then(|()| agent.is_ready()), "ready"),
        _ => text(
            StatusCode::NOT_FOUND,
            "not found; try /metrics, /healthz or /readyz",
        ),
    }
}

fn text(status: StatusCode, text: &str) -> Response<String> {
    response(status, "text/plain; charset=utf-8", format!("{text}\n"))
}

fn response(status: StatusCode, content_type: &'static str, body: String) -> Response<String> {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    headers.insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}
