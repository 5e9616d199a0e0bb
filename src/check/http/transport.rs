//! Connections for ureq: TCP to the first address that accepts, TLS for https, and the buffers.
//!
//! Every wait on a socket ends at the check's deadline, so ureq's own timeouts are not set. A connection is used for one
//! request.

use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use rustls::{ClientConfig, ClientConnection, StreamOwned};
use ureq::http::HeaderValue;
use ureq::unversioned::transport::{Buffers, ConnectionDetails, Connector, NextTimeout, Transport};

use super::head::{self, Start};
use crate::check::fault::{CheckFault, is_agents_own, is_unreachable};
use crate::check::progress::{Phase, SharedProgress, add};
use crate::check::target::bare;
use crate::check::tls;
use crate::clock::instant_now;
use crate::socket::{Socket, connect_one, is_cut, share};

/// The largest header block that is read. A larger one is a protocol error; servers limit what they send to far less.
pub(super) const MAX_HEAD_BYTES: usize = 64 * 1024;

/// The first size of the input buffer: enough for most responses' headers, and small for checks that hang.
const FIRST_INPUT_BYTES: usize = 4 * 1024;

/// The largest size of the buffer for a body, whose bytes are removed after every read.
const BODY_INPUT_BYTES: usize = 16 * 1024;

/// The largest size of the buffer for headers, which stay in it until they are complete. There is room to notice that they
/// are too large.
const HEAD_INPUT_BYTES: usize = MAX_HEAD_BYTES + 4 * 1024;

/// Room for the request that ureq writes, which is not sent: its longest line has a host name of 253 bytes.
const UNSENT_REQUEST_BYTES: usize = 1024;

/// ureq's connector for one checker.
pub(super) struct CheckConnector {
    pub tls: Arc<ClientConfig>,
    pub progress: SharedProgress,
    /// For the proxy; requests have it already.
    pub user_agent: HeaderValue,
}

impl std::fmt::Debug for CheckConnector {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("CheckConnector")
    }
}

impl Connector<()> for CheckConnector {
    type Out = Connection;

    fn connect(
        &self,
        details: &ConnectionDetails<'_>,
        _chained: Option<()>,
    ) -> Result<Option<Connection>, ureq::Error> {
        let next_phase = if details.needs_tls() {
            Phase::Tls
        } else {
            Phase::Response
        };
        let mut socket = self
            .connect_tcp(&details.addrs, next_phase)
            .map_err(CheckFault::Io)?;
        let stream = if details.needs_tls() {
            let host = details.uri.host().unwrap_or_default();
            if self.progress.lock().at_proxy {
                let port = details.uri.port_u16().unwrap_or(443);
                self.tunnel(&format!("{host}:{port}"), &mut socket)?;
            }
            Stream::Tls(Box::new(
                self.connect_tls(bare(host), socket).map_err(CheckFault::Io)?,
            ))
        } else {
            Stream::Plain(socket)
        };
        self.progress.lock().phase = Phase::Response;
        Ok(Some(Connection {
            stream,
            is_http_1_0: false,
            buffers: InOut {
                input: Vec::new(),
                consumed: 0,
                filled: 0,
                stuck: false,
                output: vec![0; UNSENT_REQUEST_BYTES],
                progress: self.progress.clone(),
            },
            progress: self.progress.clone(),
        }))
    }
}

impl CheckConnector {
    /// Tries the addresses in order, each within its share of the time left.
    fn connect_tcp(&self, addresses: &[SocketAddr], next_phase: Phase) -> io::Result<Socket> {
        let deadline = self.progress.lock().deadline;
        let began_at = instant_now();
        let mut failure = None;
        for (tried, address) in addresses.iter().enumerate() {
            {
                let mut progress = self.progress.lock();
                progress.phase = Phase::Connect;
                progress.peer = Some(*address);
            }
            let share = share(
                deadline.saturating_duration_since(instant_now()),
                addresses.len() - tried,
            );
            match connect_one(*address, share) {
                Ok(stream) => {
                    self.connected(*address, began_at, next_phase);
                    return Ok(Socket::new(stream, deadline));
                }
                // The peer accepted the connection and reset it at once. The outcome must be the same as for a reset that is
                // noticed a moment later, so this is not an error of the connect phase.
                Err(error) if is_cut(&error) => {
                    self.connected(*address, began_at, next_phase);
                    return Err(error);
                }
                // Other addresses would fail in the same way.
                Err(error) if is_agents_own(&error) => {
                    failure = Some((*address, error));
                    break;
                }
                // An answer from an address is more informative than "no route", which often only means no IPv6 here.
                Err(error) if failure.is_none() || !is_unreachable(&error) => {
                    failure = Some((*address, error))
                }
                Err(_) => {}
            }
        }
        let mut progress = self.progress.lock();
        add(&mut progress.phases.connect, instant_now() - began_at);
        let Some((address, error)) = failure else {
            // Not reached: the resolver never returns an empty list.
            return Err(io::ErrorKind::AddrNotAvailable.into());
        };
        progress.peer = Some(address);
        Err(error)
    }

    /// Asks the proxy for a connection to the host (RFC 9110, section 9.3.6).
    fn tunnel(&self, authority: &str, socket: &mut Socket) -> Result<(), ureq::Error> {
        let began_at = instant_now();
        self.progress.lock().phase = Phase::Response;
        let result = connect_through(authority, self.user_agent.as_bytes(), socket);
        let mut progress = self.progress.lock();
        add(&mut progress.phases.connect, instant_now() - began_at);
        result?;
        progress.at_proxy = false;
        progress.phase = Phase::Tls;
        Ok(())
    }

    fn connected(&self, address: SocketAddr, began_at: Instant, next_phase: Phase) {
        let mut progress = self.progress.lock();
        progress.phase = next_phase;
        progress.ip = Some(address.ip());
        add(&mut progress.phases.connect, instant_now() - began_at);
    }

    fn connect_tls(&self, host: &str, socket: Socket) -> io::Result<StreamOwned<ClientConnection, Socket>> {
        let began_at = instant_now();
        let result = tls::handshake(&self.tls, host, socket);
        let mut progress = self.progress.lock();
        add(&mut progress.phases.tls, instant_now() - began_at);
        if let (Ok(stream), Some(details)) = (&result, &mut progress.details) {
            details.tls = tls::describe(&stream.conn);
        }
        result
    }
}

fn connect_through(authority: &str, user_agent: &[u8], socket: &mut Socket) -> Result<(), ureq::Error> {
    let line = format!("CONNECT {authority} HTTP/1.1\r\nHost: {authority}\r\nUser-Agent: ");
    let request = [line.as_bytes(), user_agent, b"\r\n\r\n"].concat();
    socket.write_all(&request).map_err(CheckFault::Io)?;
    let mut answer = Vec::new();
    let mut looked_at = 0;
    loop {
        match head::look(&answer, looked_at) {
            Start::Head(bytes) => {
                let head = head::read(&answer[..bytes]).map_err(CheckFault::Protocol)?;
                match head.status {
                    // The host speaks only after the TLS client.
                    200..=299 if answer.len() == bytes => return Ok(()),
                    200..=299 => return Err(CheckFault::Protocol("there are bytes after its head").into()),
                    100..=199 => {
                        answer.drain(..bytes);
                        looked_at = 0;
                        continue;
                    }
                    status => return Err(CheckFault::ProxyStatus(status).into()),
                }
            }
            Start::Unfinished if answer.len() <= MAX_HEAD_BYTES => looked_at = answer.len(),
            Start::Unfinished => return Err(ureq::Error::LargeResponseHeader(answer.len(), MAX_HEAD_BYTES)),
            Start::Unknown => {
                return Err(CheckFault::Protocol("it does not begin with HTTP").into());
            }
        }
        let mut piece = [0; 1024];
        match socket.read(&mut piece).map_err(CheckFault::Io)? {
            0 => return Err(CheckFault::Io(io::ErrorKind::UnexpectedEof.into()).into()),
            count => answer.extend_from_slice(&piece[..count]),
        }
    }
}

enum Stream {
    Plain(Socket),
    Tls(Box<StreamOwned<ClientConnection, Socket>>),
}

impl Stream {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(socket) => socket.read(into),
            // The rest of a request that the server does not want is never sent.
            Self::Tls(stream) if stream.conn.wants_write() => read_only(stream, into),
            Self::Tls(stream) => match stream.read(into) {
                Err(error) if error.kind() != io::ErrorKind::UnexpectedEof && is_cut(&error) => {
                    if let Some(alert) = tls::received_alert(&mut stream.conn, &mut stream.sock) {
                        return Err(alert);
                    }
                    match stream.conn.reader().read(into) {
                        Ok(count) if count > 0 => Ok(count),
                        _ => Err(error),
                    }
                }
                result => result,
            },
        }
    }

    /// Writes a part of the bytes; without bytes, what was kept back.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Plain(socket) if bytes.is_empty() => socket.flush().map(|()| 0),
            Self::Plain(socket) => socket.write(bytes),
            Self::Tls(stream) => {
                // rustls's own function would wait for input when the peer takes nothing.
                while stream.conn.wants_write() {
                    stream.conn.write_tls(&mut stream.sock)?;
                }
                stream.conn.writer().write(bytes)
            }
        }
    }

    fn socket(&mut self) -> &mut Socket {
        match self {
            Self::Plain(socket) => socket,
            Self::Tls(stream) => &mut stream.sock,
        }
    }
}

fn read_only(stream: &mut StreamOwned<ClientConnection, Socket>, into: &mut [u8]) -> io::Result<usize> {
    loop {
        match stream.conn.reader().read(into) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => drop(read_records(stream)?),
            result => return result,
        }
    }
}

/// Reads from the socket once. Returns whether data or the end came: it may have been a session ticket.
fn read_records(stream: &mut StreamOwned<ClientConnection, Socket>) -> io::Result<bool> {
    let count = stream.conn.read_tls(&mut stream.sock)?;
    let state = stream
        .conn
        .process_new_packets()
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
    Ok(count == 0 || state.plaintext_bytes_to_read() > 0 || state.peer_has_closed())
}

/// One connection as ureq sees it.
pub(super) struct Connection {
    stream: Stream,
    /// Set once the response's head was read.
    is_http_1_0: bool,
    buffers: InOut,
    progress: SharedProgress,
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Connection")
    }
}

impl Connection {
    /// Reads the response's head. Interim responses (100, 103) are skipped, so ureq never sees them.
    fn await_head(&mut self) -> Result<(), ureq::Error> {
        let mut looked_at = 0;
        loop {
            let input = self.buffers.input();
            match head::look(input, looked_at) {
                Start::Head(bytes) if bytes <= MAX_HEAD_BYTES => {
                    let head = head::read(&input[..bytes]).map_err(CheckFault::Protocol)?;
                    if head.is_interim() {
                        self.buffers.input_consume(bytes);
                        looked_at = 0;
                        continue;
                    }
                    self.is_http_1_0 = head.is_http_1_0;
                    if let Some(details) = &mut self.progress.lock().details {
                        details.protocol = Some(if head.is_http_1_0 { "HTTP/1.0" } else { "HTTP/1.1" });
                        details.head = String::from_utf8_lossy(&input[..bytes]).into_owned();
                    }
                    self.buffers.replace_head(bytes, head.strict);
                    return Ok(());
                }
                Start::Unfinished if input.len() <= MAX_HEAD_BYTES => looked_at = input.len(),
                Start::Head(_) | Start::Unfinished => {
                    return Err(ureq::Error::LargeResponseHeader(input.len(), MAX_HEAD_BYTES));
                }
                Start::Unknown => return Err(CheckFault::Protocol("it does not begin with HTTP").into()),
            }
            if self.read_more()? == 0 {
                return Err(CheckFault::Io(io::ErrorKind::UnexpectedEof.into()).into());
            }
        }
    }

    /// Sends the bytes, unless the server answers or closes before it has read them. Returns whether they were sent.
    fn send(&mut self, bytes: &[u8]) -> Result<bool, ureq::Error> {
        let mut left = bytes;
        loop {
            match self.stream.write(left) {
                Ok(0) if left.is_empty() => return Ok(true),
                Ok(count) => left = &left[count..],
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if self.look_for_response()? {
                        return Ok(false);
                    }
                }
                // The server may have sent a response or a TLS alert before it closed. It will be read next.
                Err(error) if is_cut(&error) => return Ok(false),
                Err(error) => return Err(CheckFault::Io(error).into()),
            }
        }
    }

    /// Whether the final response has begun, or the server has closed the connection. There is something to read.
    fn look_for_response(&mut self) -> Result<bool, ureq::Error> {
        if let Stream::Tls(stream) = &mut self.stream
            && !read_records(stream).map_err(CheckFault::Io)?
        {
            return Ok(false);
        }
        if self.read_more()? == 0 {
            return Ok(true);
        }
        while let Start::Head(bytes) = head::look(self.buffers.input(), 0)
            && head::read(&self.buffers.input()[..bytes]).is_ok_and(|head| head.is_interim())
        {
            self.buffers.input_consume(bytes);
        }
        Ok(!self.buffers.input().is_empty())
    }

    /// Waits for bytes and reads them. Returns 0 if the server has ended the connection or the buffer is full.
    fn read_more(&mut self) -> Result<usize, ureq::Error> {
        let space = self.buffers.input_append_buf();
        if space.is_empty() {
            return Ok(0);
        }
        let count = match self.stream.read(space) {
            Ok(count) => count,
            // HTTP/1.0 servers often end TLS without close_notify. If the body has a length, ureq notices a truncated one.
            Err(error) if self.is_http_1_0 && error.kind() == io::ErrorKind::UnexpectedEof => 0,
            Err(error) => {
                self.progress.lock().closed_by_peer |= is_cut(&error);
                // Not as an I/O error: ureq would take a reset as the end of a body without a length.
                return Err(CheckFault::Io(error).into());
            }
        };
        let mut progress = self.progress.lock();
        match count {
            0 => progress.closed_by_peer = true,
            _ => progress.bytes_came(),
        }
        drop(progress);
        self.buffers.input_appended(count);
        Ok(count)
    }
}

impl Drop for Connection {
    /// Closes the connection in order if the server has already closed it, because no local port then stays in TIME_WAIT.
    /// Otherwise the connection is reset: see [`connect_one`].
    fn drop(&mut self) {
        match &mut self.stream {
            Stream::Plain(socket) => {
                if socket.has_ended() {
                    socket.close_in_order();
                }
            }
            Stream::Tls(stream) => {
                if stream.sock.has_ended() {
                    stream.conn.send_close_notify();
                    // It does not matter whether the server still reads it.
                    let _ = stream.conn.write_tls(&mut stream.sock);
                    stream.sock.close_in_order();
                }
            }
        }
    }
}

impl Transport for Connection {
    fn buffers(&mut self) -> &mut dyn Buffers {
        &mut self.buffers
    }

    /// Sends the check's request in place of ureq's: see [`super::Checker::send`].
    fn transmit_output(&mut self, _amount: usize, _timeout: NextTimeout) -> Result<(), ureq::Error> {
        let outgoing = self.progress.lock().outgoing.take();
        let Some(outgoing) = outgoing else { return Ok(()) };
        self.stream.socket().yields_to_input = true;
        if self.send(&outgoing.head)?
            && let Some(body) = outgoing.body
        {
            self.send(&body)?;
        }
        self.progress.lock().request_sent();
        Ok(())
    }

    fn await_input(&mut self, _timeout: NextTimeout) -> Result<bool, ureq::Error> {
        let (phase, deadline) = {
            let progress = self.progress.lock();
            (progress.phase, progress.deadline)
        };
        // Set anew for each wait, because a glance at the body has an earlier deadline than the check.
        self.stream.socket().set_deadline(deadline);
        match phase {
            Phase::Response => self.await_head().map(|()| true),
            _ => Ok(self.read_more()? > 0),
        }
    }

    fn is_open(&mut self) -> bool {
        false
    }

    fn is_tls(&self) -> bool {
        matches!(self.stream, Stream::Tls(_))
    }
}

/// The buffers that ureq uses. The input buffer grows when it has to.
struct InOut {
    input: Vec<u8>,
    consumed: usize,
    filled: usize,
    /// ureq could not use the input and needs more.
    stuck: bool,
    output: Vec<u8>,
    progress: SharedProgress,
}

impl InOut {
    /// Replaces the head, which is the first `bytes` bytes of the input.
    fn replace_head(&mut self, bytes: usize, by: Vec<u8>) {
        self.filled = self.filled - bytes + by.len();
        self.input.splice(self.consumed..self.consumed + bytes, by);
    }
}

impl Buffers for InOut {
    fn output(&mut self) -> &mut [u8] {
        &mut self.output
    }

    fn input(&self) -> &[u8] {
        &self.input[self.consumed..self.filled]
    }

    fn input_append_buf(&mut self) -> &mut [u8] {
        if self.filled == self.input.len() {
            let kept = self.filled - self.consumed;
            let limit = if kept == 0 {
                BODY_INPUT_BYTES
            } else {
                HEAD_INPUT_BYTES
            };
            self.input.copy_within(self.consumed..self.filled, 0);
            (self.consumed, self.filled) = (0, kept);
            let larger = (self.input.len() * 2).clamp(FIRST_INPUT_BYTES, limit);
            if larger > self.input.len() {
                self.input.resize(larger, 0);
            }
        }
        &mut self.input[self.filled..]
    }

    fn input_appended(&mut self, amount: usize) {
        self.filled += amount;
    }

    fn input_consume(&mut self, amount: usize) {
        self.consumed += amount;
        self.stuck = amount == 0;
        if amount > 0 {
            self.progress.lock().head_read(self.consumed < self.filled);
        }
    }

    /// Only used to send request bodies, of which ureq knows nothing here.
    fn tmp_and_output(&mut self) -> (&mut [u8], &mut [u8]) {
        (&mut [], &mut self.output)
    }

    fn can_use_input(&self) -> bool {
        self.consumed < self.filled && !self.stuck
    }
}
