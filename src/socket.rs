//! TCP connections whose every wait ends at a deadline: that of a check, or of a question to a broker.

use std::io::{self, IoSlice, Read, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use rustix::net::{RecvFlags, recv};
use socket2::SockRef;

use crate::clock::instant_now;

/// How much of an unwanted body is read to close a connection in order: usually what came with the headers.
const MAX_LEFT_BYTES: usize = 16 * 1024;

/// How long to try the next address: the time left, divided equally among the addresses that were not tried yet. Time that
/// an address does not use is left to the others.
pub(crate) fn share(left: Duration, addresses_left: usize) -> Duration {
    left / u32::try_from(addresses_left.max(1)).unwrap_or(u32::MAX)
}

pub(crate) fn connect_one(address: SocketAddr, within: Duration) -> io::Result<TcpStream> {
    if within.is_zero() {
        return Err(io::ErrorKind::TimedOut.into());
    }
    let stream = match TcpStream::connect_timeout(&address, within) {
        // Either no local port is free, or this machine has no such network (IPv6 is disabled). Connecting a UDP socket,
        // which sends nothing, only fails in the second case.
        Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable && !has_route(address) => {
            return Err(io::ErrorKind::NetworkUnreachable.into());
        }
        other => other?,
    };
    stream.set_nodelay(true)?;
    // Closing resets the connection, unless the server has closed it first. An orderly close by our side would keep a local
    // port in TIME_WAIT for a minute, which allows only 470 checks a second to one address, and an entry in a firewall's
    // connection table for two minutes. Health checks of load balancers reset connections for the same reason.
    SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
    Ok(stream)
}

fn has_route(address: SocketAddr) -> bool {
    let any = if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    UdpSocket::bind(any)
        .and_then(|socket| socket.connect(address))
        .is_ok()
}

/// How soon a write that waits for the peer notices that the peer has sent something.
const LOOK_FOR_INPUT_EVERY: Duration = Duration::from_millis(50);

/// A TCP connection whose reads and writes end at the deadline with `TimedOut`.
#[derive(Debug)]
pub(crate) struct Socket {
    stream: TcpStream,
    deadline: Instant,
    /// Whether a write that would wait ends with `WouldBlock` when there is something to read.
    pub yields_to_input: bool,
}

impl Socket {
    pub(crate) fn new(stream: TcpStream, deadline: Instant) -> Self {
        Self {
            stream,
            deadline,
            yields_to_input: false,
        }
    }

    pub(crate) fn set_deadline(&mut self, deadline: Instant) {
        self.deadline = deadline;
    }

    /// Whether the server has closed the connection. Reads up to [`MAX_LEFT_BYTES`] of unread data to find out.
    pub(crate) fn has_ended(&self) -> bool {
        let mut left = [0; 4 * 1024];
        (0..=MAX_LEFT_BYTES / left.len())
            .map(|_| recv(&self.stream, &mut left, RecvFlags::DONTWAIT))
            .find_map(|result| match result {
                Ok((_, 0)) => Some(true),
                Ok(_) => None,
                Err(_) => Some(false),
            })
            .unwrap_or(false)
    }

    /// Makes closing the connection orderly, without a reset.
    pub(crate) fn close_in_order(&mut self) {
        // It only fails if the connection no longer exists.
        let _ = SockRef::from(&self.stream).set_linger(None);
    }

    /// Whether a read would not wait.
    fn has_input(&self) -> bool {
        recv(&self.stream, &mut [0; 1], RecvFlags::DONTWAIT | RecvFlags::PEEK).is_ok()
    }

    fn time_left(&self) -> io::Result<Duration> {
        let left = self.deadline.saturating_duration_since(instant_now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        Ok(left)
    }
}

/// By a signal or the kernel's timeout: [`Socket::time_left`] decides whether the wait goes on.
fn is_interrupted(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock
    )
}

impl Read for Socket {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        loop {
            self.stream.set_read_timeout(Some(self.time_left()?))?;
            match self.stream.read(into) {
                Err(error) if is_interrupted(&error) => {}
                result => return result,
            }
        }
    }
}

impl Write for Socket {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(bytes)])
    }

    /// rustls passes several messages at once, which then go out in one packet.
    fn write_vectored(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        loop {
            let left = self.time_left()?;
            self.stream.set_write_timeout(Some(match self.yields_to_input {
                true => left.min(LOOK_FOR_INPUT_EVERY),
                false => left,
            }))?;
            match self.stream.write_vectored(slices) {
                Err(error) if is_interrupted(&error) => {
                    if self.yields_to_input && self.has_input() {
                        return Err(io::ErrorKind::WouldBlock.into());
                    }
                }
                result => return result,
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Whether the peer ended the connection. In TLS that includes an end without close_notify, because a body may then have
/// been truncated (RFC 9112, section 9.8).
pub(crate) fn is_cut(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionAborted
            | io::ErrorKind::BrokenPipe
            | io::ErrorKind::UnexpectedEof
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_share_the_time_left_equally_and_unused_time_goes_to_the_next_ones() {
        let seconds = Duration::from_secs;
        assert_eq!(share(seconds(10), 1), seconds(10));
        assert_eq!(share(seconds(10), 2), seconds(5));
        // Three addresses: the first one refuses at once, the second one does not answer.
        assert_eq!(share(seconds(9), 3), seconds(3));
        assert_eq!(share(seconds(9), 2), Duration::from_millis(4_500));
        assert_eq!(
            share(Duration::from_millis(4_500), 1),
            Duration::from_millis(4_500)
        );
        assert_eq!(share(Duration::ZERO, 2), Duration::ZERO);
    }
}
