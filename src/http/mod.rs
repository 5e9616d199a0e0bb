//! What METRICS_ADDR serves: /metrics for Prometheus, /healthz and /readyz.
//!
//! Owns the HTTP server: a few threads of its own, each with one short request at a time, every wait and length bounded. It
//! only reads what an agent shows of itself, so nobody who asks can hold the agent up, however slow, many or wrong they are.
//! Hand-written, because the small blocking servers that exist bound neither their threads nor the time of a request. What
//! the figures are is the agents' (`produce::metrics`, `consume::metrics`), their text `metrics`'s.

pub mod health;
pub mod metrics;

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context;

use self::metrics::Page;

/// What an agent shows of itself. Called on the server's threads: it must not wait for the agent.
pub trait Watched: Send + Sync + 'static {
    fn page(&self) -> Page;

    /// # Errors
    /// Its loop hangs.
    fn is_alive(&self) -> Result<(), String>;

    /// # Errors
    /// What it waits for.
    fn is_ready(&self) -> Result<(), String>;
}

/// Requests answered at the same time: Prometheus, a health check, a curious person, and one that hangs. More wait in the
/// kernel's queue.
const THREADS: usize = 4;

/// One request from its first byte to the answer's last.
const REQUEST_WITHIN: Duration = Duration::from_secs(2);

/// A request's line and headers; browsers with their cookies stay below it.
const MAX_HEAD_BYTES: usize = 8 << 10;
const MAX_HEADERS: usize = 64;

/// What is read and thrown away of a request's body, so that closing does not take the answer back.
const MAX_REST_BYTES: usize = 64 << 10;

/// After a failed accept (no file handles): the next one would fail, too.
const ACCEPT_AGAIN_AFTER: Duration = Duration::from_millis(200);

/// How long the end of the server knocks at its own door, for each thread.
const KNOCK_WITHIN: Duration = Duration::from_millis(100);

/// A page of many partitions is on the heap.
const STACK_BYTES: usize = 256 << 10;

/// A running server; dropped, it ends.
pub struct Endpoint {
    address: SocketAddr,
    shared: Arc<Shared>,
}

struct Shared {
    listener: TcpListener,
    watched: Box<dyn Watched>,
    is_over: Mutex<bool>,
    changed: Condvar,
}

impl Endpoint {
    /// Serves from now on.
    ///
    /// # Errors
    /// The address cannot be had, or no thread.
    pub fn start(metrics_addr: SocketAddr, watched: impl Watched) -> anyhow::Result<Self> {
        let listener = TcpListener::bind(metrics_addr).with_context(|| {
            format!("METRICS_ADDR: cannot listen on {metrics_addr}; free it, or set another address")
        })?;
        let address = listener.local_addr().context("METRICS_ADDR")?;
        let endpoint = Self {
            address,
            shared: Arc::new(Shared {
                listener,
                watched: Box::new(watched),
                is_over: Mutex::new(false),
                changed: Condvar::new(),
            }),
        };
        for _ in 0..THREADS {
            let shared = Arc::clone(&endpoint.shared);
            std::thread::Builder::new()
                .name("metrics".into())
                .stack_size(STACK_BYTES)
                .spawn(move || shared.serve())
                .context("no thread for METRICS_ADDR")?;
        }
        log::info!("metrics at http://{address}/metrics");
        Ok(endpoint)
    }

    /// Where it listens: with the port that the system chose, if METRICS_ADDR had none.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        *self.shared.is_over.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.shared.changed.notify_all();
        for _ in 0..THREADS {
            // A thread that this does not wake ends after its next request, or with the process.
            for address in health::from_here(self.address) {
                if TcpStream::connect_timeout(&address, KNOCK_WITHIN).is_ok() {
                    break;
                }
            }
        }
    }
}

impl Shared {
    fn serve(&self) {
        loop {
            let accepted = self.listener.accept();
            if self.is_over() {
                return;
            }
            match accepted {
                Ok((stream, peer)) => {
                    let request = Exchange {
                        stream,
                        deadline: now() + REQUEST_WITHIN,
                    };
                    if let Err(error) = request.answer(&*self.watched) {
                        log::debug!("metrics for {peer}: {error}");
                    }
                }
                Err(error) => {
                    log::debug!("metrics: {error}");
                    self.wait(ACCEPT_AGAIN_AFTER);
                }
            }
        }
    }

    fn is_over(&self) -> bool {
        *self.is_over.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait(&self, time: Duration) {
        let is_over = self.is_over.lock().unwrap_or_else(PoisonError::into_inner);
        // Either end of the wait is fine.
        drop(
            self.changed
                .wait_timeout_while(is_over, time, |is_over| !*is_over),
        );
    }
}

/// One request and its answer.
struct Exchange {
    stream: TcpStream,
    deadline: Instant,
}

struct Answer {
    status: &'static str,
    content_type: &'static str,
    body: String,
}

impl Exchange {
    fn answer(mut self, watched: &dyn Watched) -> io::Result<()> {
        let Some((answer, is_head)) = self.read(watched)? else {
            return Ok(());
        };
        let Answer {
            status,
            content_type,
            body,
        } = answer;
        let length = body.len();
        let mut response = format!(
            "HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {length}\r\n\
             Allow: GET, HEAD\r\nCache-Control: no-store\r\nConnection: close\r\n\r\n"
        );
        if !is_head {
            response.push_str(&body);
        }
        self.write(response.as_bytes())?;
        self.stream.shutdown(Shutdown::Write)?;
        self.skip_rest()
    }

    /// Reads the request's head and finds the answer, and whether only its head is wanted; `None`: nothing was asked.
    fn read(&mut self, watched: &dyn Watched) -> io::Result<Option<(Answer, bool)>> {
        let mut head = Vec::new();
        let mut chunk = [0; 1_024];
        loop {
            let count = self.read_some(&mut chunk)?;
            if count == 0 {
                return Ok(None);
            }
            head.extend_from_slice(&chunk[..count]);
            let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
            let mut request = httparse::Request::new(&mut headers);
            return Ok(Some(match request.parse(&head) {
                Ok(httparse::Status::Complete(_)) => {
                    let (method, path) = (
                        request.method.unwrap_or_default(),
                        request.path.unwrap_or_default(),
                    );
                    (answer(method, path, watched), method == "HEAD")
                }
                Ok(httparse::Status::Partial) if head.len() < MAX_HEAD_BYTES => continue,
                Ok(httparse::Status::Partial) | Err(httparse::Error::TooManyHeaders) => (
                    Answer::text("431 Request Header Fields Too Large", "too long a request"),
                    false,
                ),
                Err(error) => (Answer::text("400 Bad Request", &error.to_string()), false),
            }));
        }
    }

    fn read_some(&mut self, chunk: &mut [u8]) -> io::Result<usize> {
        loop {
            self.stream.set_read_timeout(Some(self.left()?))?;
            match self.stream.read(chunk) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => return result,
            }
        }
    }

    fn write(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            self.stream.set_write_timeout(Some(self.left()?))?;
            match self.stream.write(bytes) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => bytes = &bytes[count..],
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// A socket closed with something unread in it is reset, and the answer with it.
    fn skip_rest(&mut self) -> io::Result<()> {
        let mut chunk = [0; 1_024];
        for _ in 0..MAX_REST_BYTES / chunk.len() {
            if self.read_some(&mut chunk)? == 0 {
                break;
            }
        }
        Ok(())
    }

    fn left(&self) -> io::Result<Duration> {
        let left = self.deadline.saturating_duration_since(now());
        match left.is_zero() {
            true => Err(io::ErrorKind::TimedOut.into()),
            false => Ok(left),
        }
    }
}

fn answer(method: &str, path: &str, watched: &dyn Watched) -> Answer {
    let path = path.split_once('?').map_or(path, |(path, _)| path);
    let state = |state: Result<(), String>, well: &str| match state {
        Ok(()) => Answer::text("200 OK", well),
        Err(trouble) => Answer::text("503 Service Unavailable", &trouble),
    };
    match (method, path) {
        ("GET" | "HEAD", "/metrics") => Answer {
            status: "200 OK",
            content_type: metrics::CONTENT_TYPE,
            body: watched.page().text(),
        },
        ("GET" | "HEAD", "/healthz") => state(watched.is_alive(), "alive"),
        ("GET" | "HEAD", "/readyz") => state(watched.is_alive().and_then(|()| watched.is_ready()), "ready"),
        ("GET" | "HEAD", _) => Answer::text("404 Not Found", "here are /metrics, /healthz and /readyz"),
        _ => Answer::text("405 Method Not Allowed", "here is only GET"),
    }
}

impl Answer {
    fn text(status: &'static str, text: &str) -> Self {
        Self {
            status,
            content_type: "text/plain; charset=utf-8",
            body: format!("{text}\n"),
        }
    }
}

#[expect(clippy::disallowed_methods, reason = "an edge: a request has its time")]
fn now() -> Instant {
    Instant::now()
}
