//! A small HTTP server on its own thread: bounded connections, heads and times. What it answers is its caller's.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::oneshot;
use tokio::task::{AbortHandle, JoinSet};

use crate::thread::start_thread;

/// What a server answers.
type Respond = dyn Fn(&Request<Incoming>) -> Response<Full<Bytes>> + Send + Sync;

/// What one server allows.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// The most connections at the same time. One more closes the oldest.
    pub connections: usize,
    /// The time from accepting a connection to its end.
    pub open_for: Duration,
    /// How long a connection may wait for its next request; `None`: it has only one.
    pub idle_for: Option<Duration>,
}

/// The most connections that wait to be accepted. Beyond it the kernel drops SYNs, which would delay a client by a second.
const BACKLOG: u32 = 1_024;

/// The most bytes of a request's line and headers, and the most headers. Browsers with their cookies stay below both.
const MAX_HEAD_BYTES: usize = 16 << 10;
const MAX_HEADERS: usize = 64;

/// The wait after a failed accept. The usual cause, no free file handles, does not pass at once.
const ACCEPT_AGAIN_AFTER: Duration = Duration::from_millis(200);

/// A running server. Dropping it ends the server.
pub struct Server {
    address: SocketAddr,
    _stop: oneshot::Sender<Infallible>,
}

impl Server {
    /// Starts the server. `variable` is the one that `address` comes from, and `name` the thread's. `respond` is called on that
    /// thread and must not wait.
    pub fn start(
        name: &'static str,
        variable: &'static str,
        address: SocketAddr,
        limits: Limits,
        respond: impl Fn(&Request<Incoming>) -> Response<Full<Bytes>> + Send + Sync + 'static,
    ) -> anyhow::Result<Self> {
        let runtime = Builder::new_current_thread()
            .enable_all()
            .build()
            .context(variable)?;
        let listener = listen(&runtime, address).with_context(|| {
            format!("{variable}: cannot listen on {address}; free that address or set another one")
        })?;
        let address = listener.local_addr().context(variable)?;
        let (stop, stopped) = oneshot::channel();
        let run = move || {
            runtime.spawn(accept(name, listener, limits, Arc::new(respond)));
            // Ends when the sender is dropped. Then the runtime, the listener and all connections are dropped.
            let _ = runtime.block_on(stopped);
        };
        start_thread(name, run).with_context(|| format!("cannot start the thread that serves {variable}"))?;
        Ok(Self { address, _stop: stop })
    }

    /// The address that it listens on, with the port that the system chose if the variable has port 0.
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
    // Otherwise the connections of a program that has just ended would block the port.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

async fn accept(name: &'static str, listener: TcpListener, limits: Limits, respond: Arc<Respond>) {
    // By the order in which they came, so that the first is the oldest.
    let mut open: BTreeMap<u64, AbortHandle> = BTreeMap::new();
    let mut tasks: JoinSet<u64> = JoinSet::new();
    for number in 0.. {
        let accepted = listener.accept().await;
        // An aborted connection has left the map already.
        while let Some(ended) = tasks.try_join_next() {
            if let Ok(number) = ended {
                open.remove(&number);
            }
        }
        match accepted {
            Ok((stream, peer)) => {
                let respond = Arc::clone(&respond);
                let task = tasks.spawn(async move {
                    serve(name, stream, peer, limits, respond).await;
                    number
                });
                open.insert(number, task);
            }
            Err(error) => {
                log::debug!("{name}: {error}");
                tokio::time::sleep(ACCEPT_AGAIN_AFTER).await;
            }
        }
        if open.len() > limits.connections
            && let Some((_, oldest)) = open.pop_first()
        {
            oldest.abort();
        }
    }
}

/// Serves the requests of one connection.
async fn serve(
    name: &'static str,
    stream: TcpStream,
    peer: SocketAddr,
    limits: Limits,
    respond: Arc<Respond>,
) {
    // Small responses on a connection that stays open must not wait for the client's acknowledgement.
    let _ = stream.set_nodelay(true);
    let answer = service_fn(async |request: Request<Incoming>| Ok::<_, Infallible>(respond(&request)));
    let mut builder = http1::Builder::new();
    builder
        .keep_alive(limits.idle_for.is_some())
        .max_buf_size(MAX_HEAD_BYTES)
        .max_headers(MAX_HEADERS);
    if let Some(idle_for) = limits.idle_for {
        builder.timer(TokioTimer::new()).header_read_timeout(idle_for);
    }
    let connection = builder.serve_connection(TokioIo::new(stream), answer);
    match tokio::time::timeout(limits.open_for, connection).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => log::debug!("{name}: {peer}: {error}"),
        Err(_) => log::debug!("{name}: {peer}: not finished within {:?}", limits.open_for),
    }
}
