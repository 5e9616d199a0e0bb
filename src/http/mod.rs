//! The HTTP server at METRICS_ADDR: /metrics for Prometheus, /healthz and /readyz.
//!
//! hyper on its own thread. The server only reads what an agent publishes, so no client can delay the agent. Each connection
//! has one request, a bounded time and a bounded size, so no client can delay another. The agents count the values
//! (`produce::metrics`, `consume::metrics`); [`metrics`] formats them.

pub mod health;
pub mod metrics;

use std::collections::VecDeque;
use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use hyper::header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::oneshot;
use tokio::task::AbortHandle;

use self::metrics::Page;

/// What an agent publishes. The functions are called on the server's thread and must not wait for the agent.
pub trait Watched: Send + Sync + 'static {
    /// The metrics as they are now.
    fn page(&self) -> Page;

    /// # Errors
    /// A loop of the agent hangs: which and since when.
    fn is_alive(&self) -> Result<(), String>;

    /// # Errors
    /// What the agent waits for.
    fn is_ready(&self) -> Result<(), String>;
}

/// The most connections at the same time. One more closes the oldest, which is probably a slow client, because a complete
/// request is answered within milliseconds.
const MAX_CONNECTIONS: usize = 512;

/// The most connections that wait to be accepted. Beyond it the kernel drops SYNs, which would delay a probe by a second.
const BACKLOG: u32 = 1_024;

/// The time from accepting a connection to the last byte of its response.
const CONNECTION_WITHIN: Duration = Duration::from_secs(2);

/// The most bytes of a request's line and headers. Browsers with their cookies stay below it.
const MAX_HEAD_BYTES: usize = 16 << 10;
const MAX_HEADERS: usize = 64;

/// The wait after a failed accept. The usual cause, no free file handles, does not pass at once.
const ACCEPT_AGAIN_AFTER: Duration = Duration::from_millis(200);

/// A running server. Dropping it ends the server.
pub struct Endpoint {
    address: SocketAddr,
    _stop: oneshot::Sender<Infallible>,
}

impl Endpoint {
    /// Starts the server.
    ///
    /// # Errors
    /// The address is in use or not this machine's, or no thread can be started.
    pub fn start(metrics_addr: SocketAddr, watched: impl Watched) -> anyhow::Result<Self> {
        let runtime = Builder::new_current_thread()
            .enable_all()
            .build()
            .context("METRICS_ADDR")?;
        let listener = listen(&runtime, metrics_addr).with_context(|| {
            format!("METRICS_ADDR: cannot listen on {metrics_addr}; free that address or set another one")
        })?;
        let address = listener.local_addr().context("METRICS_ADDR")?;
        let (stop, stopped) = oneshot::channel();
        let run = move || {
            runtime.spawn(accept(listener, Arc::new(watched)));
            // Ends when the sender is dropped. Then the runtime, the listener and all connections are dropped.
            let _ = runtime.block_on(stopped);
        };
        std::thread::Builder::new()
            .name("metrics".into())
            .spawn(run)
            .context("cannot start the thread that serves METRICS_ADDR")?;
        log::info!("metrics at http://{address}/metrics");
        Ok(Self { address, _stop: stop })
    }

    /// The address that it listens on, with the port that the system chose if METRICS_ADDR has port 0.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

fn listen(runtime: &Runtime, address: SocketAddr) -> io::Result<TcpListener> {
    let _inside = runtime.enter();
    let socket = match address {
        SocketAddr::V4(_) => TcpSocket::new_v4()?,
        SocketAddr::V6(_) => TcpSocket::new_v6()?,
    };
    // Otherwise the connections of an agent that has just ended would block the port.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

async fn accept(listener: TcpListener, watched: Arc<dyn Watched>) {
    let mut connections: VecDeque<AbortHandle> = VecDeque::new();
    loop {
        match listener.accept().await {
            Ok((stream, peer)) => {
                let served = tokio::spawn(serve(stream, peer, Arc::clone(&watched)));
                connections.push_back(served.abort_handle());
            }
            Err(error) => {
                log::debug!("metrics: {error}");
                tokio::time::sleep(ACCEPT_AGAIN_AFTER).await;
            }
        }
        while connections.front().is_some_and(AbortHandle::is_finished) {
            connections.pop_front();
        }
        // A finished connection behind an older open one still counts, for at most CONNECTION_WITHIN.
        if connections.len() > MAX_CONNECTIONS
            && let Some(oldest) = connections.pop_front()
        {
            oldest.abort();
        }
    }
}

/// Serves one request.
async fn serve(stream: TcpStream, peer: SocketAddr, watched: Arc<dyn Watched>) {
    let service = service_fn(async |request: Request<_>| Ok::<_, Infallible>(respond(&request, &*watched)));
    let connection = http1::Builder::new()
        .keep_alive(false)
        .max_buf_size(MAX_HEAD_BYTES)
        .max_headers(MAX_HEADERS)
        .serve_connection(TokioIo::new(stream), service);
    match tokio::time::timeout(CONNECTION_WITHIN, connection).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => log::debug!("metrics for {peer}: {error}"),
        Err(_) => log::debug!("metrics for {peer}: not finished within {CONNECTION_WITHIN:?}"),
    }
}

fn respond<B>(request: &Request<B>, watched: &dyn Watched) -> Response<String> {
    if ![Method::GET, Method::HEAD].contains(request.method()) {
        return text(StatusCode::METHOD_NOT_ALLOWED, "only GET is supported");
    }
    let check = |result: Result<(), String>, good: &str| match result {
        Ok(()) => text(StatusCode::OK, good),
        Err(reason) => text(StatusCode::SERVICE_UNAVAILABLE, &reason),
    };
    match request.uri().path() {
        "/metrics" => response(StatusCode::OK, metrics::CONTENT_TYPE, watched.page().text()),
        "/healthz" => check(watched.is_alive(), "alive"),
        "/readyz" => check(watched.is_alive().and_then(|()| watched.is_ready()), "ready"),
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
