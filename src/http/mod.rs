//! What METRICS_ADDR serves: /metrics for Prometheus, /healthz and /readyz.
//!
//! Owns the HTTP server: hyper on one thread of its own. It only reads what an agent shows of itself, so clients cannot hold
//! the agent up, however slow, many or wrong they are; and each connection has one request, a bounded time and a bounded
//! size, so they cannot hold each other up either. The figures are the agents' (`produce::metrics`, `consume::metrics`), their
//! text is `metrics`'s.

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

/// What an agent shows of itself. Called on the server's thread: it must not wait for the agent.
pub trait Watched: Send + Sync + 'static {
    fn page(&self) -> Page;

    /// # Errors
    /// Its loop hangs.
    fn is_alive(&self) -> Result<(), String>;

    /// # Errors
    /// What it waits for.
    fn is_ready(&self) -> Result<(), String>;
}

/// Connections at the same time. One more closes the oldest, which is most likely a client that dawdles: a request that is
/// all there is answered within milliseconds.
const MAX_CONNECTIONS: usize = 512;

/// Connections that wait to be accepted; a probe must not have to send its SYN again because of a burst of others.
const BACKLOG: u32 = 1_024;

/// From accepting a connection to the last byte of its answer.
const CONNECTION_WITHIN: Duration = Duration::from_secs(2);

/// A request's line and headers; browsers with their cookies stay below it.
const MAX_HEAD_BYTES: usize = 16 << 10;
const MAX_HEADERS: usize = 64;

/// After a failed accept (no file handles): the next one would fail, too.
const ACCEPT_AGAIN_AFTER: Duration = Duration::from_millis(200);

/// A running server; dropped, it ends.
pub struct Endpoint {
    address: SocketAddr,
    _stop: oneshot::Sender<Infallible>,
}

impl Endpoint {
    /// Serves from now on.
    ///
    /// # Errors
    /// The address cannot be had, or no thread.
    pub fn start(metrics_addr: SocketAddr, watched: impl Watched) -> anyhow::Result<Self> {
        let runtime = Builder::new_current_thread()
            .enable_all()
            .build()
            .context("METRICS_ADDR")?;
        let listener = listen(&runtime, metrics_addr).with_context(|| {
            format!("METRICS_ADDR: cannot listen on {metrics_addr}; free it, or set another address")
        })?;
        let address = listener.local_addr().context("METRICS_ADDR")?;
        let (stop, stopped) = oneshot::channel();
        let run = move || {
            runtime.spawn(accept(listener, Arc::new(watched)));
            // Ends when the sender is dropped; then the runtime is dropped, and with it the listener and all connections.
            let _ = runtime.block_on(stopped);
        };
        std::thread::Builder::new()
            .name("metrics".into())
            .spawn(run)
            .context("no thread for METRICS_ADDR")?;
        log::info!("metrics at http://{address}/metrics");
        Ok(Self { address, _stop: stop })
    }

    /// Where it listens: with the port that the system chose, if METRICS_ADDR had none.
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
    // Connections of an agent that was restarted do not keep the port.
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
        // Those that ended behind an older one that did not are counted too, for at most the older one's time.
        if connections.len() > MAX_CONNECTIONS
            && let Some(oldest) = connections.pop_front()
        {
            oldest.abort();
        }
    }
}

/// One request and its answer.
async fn serve(stream: TcpStream, peer: SocketAddr, watched: Arc<dyn Watched>) {
    let service = service_fn(async |request: Request<_>| Ok::<_, Infallible>(answer(&request, &*watched)));
    let connection = http1::Builder::new()
        .keep_alive(false)
        .max_buf_size(MAX_HEAD_BYTES)
        .max_headers(MAX_HEADERS)
        .serve_connection(TokioIo::new(stream), service);
    match tokio::time::timeout(CONNECTION_WITHIN, connection).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => log::debug!("metrics for {peer}: {error}"),
        Err(_) => log::debug!("metrics for {peer}: not done within {CONNECTION_WITHIN:?}"),
    }
}

fn answer<B>(request: &Request<B>, watched: &dyn Watched) -> Response<String> {
    if ![Method::GET, Method::HEAD].contains(request.method()) {
        return text(StatusCode::METHOD_NOT_ALLOWED, "only GET is served here");
    }
    let state = |state: Result<(), String>, well: &str| match state {
        Ok(()) => text(StatusCode::OK, well),
        Err(trouble) => text(StatusCode::SERVICE_UNAVAILABLE, &trouble),
    };
    match request.uri().path() {
        "/metrics" => response(StatusCode::OK, metrics::CONTENT_TYPE, watched.page().text()),
        "/healthz" => state(watched.is_alive(), "alive"),
        "/readyz" => state(watched.is_alive().and_then(|()| watched.is_ready()), "ready"),
        _ => text(StatusCode::NOT_FOUND, "here are /metrics, /healthz and /readyz"),
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
