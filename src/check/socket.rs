//! A TCP connection: made within its share of the time, and every wait on it ended at the check's deadline.

use std::io::{self, IoSlice, Read, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use rustix::net::{RecvFlags, recv};
use socket2::SockRef;

use super::progress::now;

/// As much of a page that nobody wants is read for the sake of an orderly close: what came with the headers, mostly.
const MAX_LEFT_BYTES: usize = 16 * 1024;

/// An address's share of the time left: an equal part for every address not tried yet. A single address gets all; of
/// two, a dead one leaves half; what an address does not use is the next ones'.
pub(super) fn share(left: Duration, addresses_left: usize) -> Duration {
    left / u32::try_from(addresses_left.max(1)).unwrap_or(u32::MAX)
}

pub(super) fn connect_one(address: SocketAddr, within: Duration) -> io::Result<TcpStream> {
    if within.is_zero() {
        return Err(io::ErrorKind::TimedOut.into());
    }
    let stream = match TcpStream::connect_timeout(&address, within) {
        // Either no port is left, or this machine has no such network (IPv6 turned off): connecting a datagram socket,
        // which sends nothing, fails for the second only.
        Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable && !has_route(address) => {
            return Err(io::ErrorKind::NetworkUnreachable.into());
        }
        other => other?,
    };
    stream.set_nodelay(true)?;
    // Closing resets the connection, unless the server has closed it: where we close first (the body is not wanted, or
    // its end is known before the server's FIN is here), a clean close would hold a local port for a minute in
    // TIME_WAIT, 470 checks a second to one address being the end, and an entry of a firewall's connection table for two.
    // Health checks of load balancers do the same.
    SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
    Ok(stream)
}

fn has_route(address: SocketAddr) -> bool {
    let any = if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    UdpSocket::bind(any)
        .and_then(|socket| socket.connect(address))
        .is_ok()
}

/// A TCP connection whose reads and writes end at the deadline with `TimedOut`.
pub(super) struct Socket {
    stream: TcpStream,
    deadline: Instant,
}

impl Socket {
    pub(super) fn new(stream: TcpStream, deadline: Instant) -> Self {
        Self { stream, deadline }
    }

    /// Whether the server has closed the connection, behind no more than [`MAX_LEFT_BYTES`] that nobody read.
    pub(super) fn has_ended(&self) -> bool {
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

    /// Closing it will not reset it.
    pub(super) fn close_in_order(&mut self) {
        // It fails for a connection that is gone, which needs no close.
        let _ = SockRef::from(&self.stream).set_linger(None);
    }

    fn time_left(&self) -> io::Result<Duration> {
        let left = self.deadline.saturating_duration_since(now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        Ok(left)
    }
}

impl Read for Socket {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        loop {
            self.stream.set_read_timeout(Some(self.time_left()?))?;
            match self.stream.read(into) {
                // A signal, or the kernel's timeout: the clock decides.
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock
                    ) => {}
                result => return result,
            }
        }
    }
}

impl Write for Socket {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(bytes)])
    }

    /// rustls hands over several messages at once: one packet instead of one each.
    fn write_vectored(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        loop {
            self.stream.set_write_timeout(Some(self.time_left()?))?;
            match self.stream.write_vectored(slices) {
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock
                    ) => {}
                result => return result,
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The peer ended the connection; for TLS also by closing it without saying so, which leaves a body's end unknown (RFC
/// 9112, section 9.8).
pub(super) fn is_cut(error: &io::Error) -> bool {
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
    fn addresses_share_the_time_left_equally_and_inherit_what_is_not_used() {
        let seconds = Duration::from_secs;
        assert_eq!(share(seconds(10), 1), seconds(10));
        assert_eq!(share(seconds(10), 2), seconds(5));
        // Three addresses, the first one refused at once, the second one dead.
        assert_eq!(share(seconds(9), 3), seconds(3));
        assert_eq!(share(seconds(9), 2), Duration::from_millis(4_500));
        assert_eq!(
            share(Duration::from_millis(4_500), 1),
            Duration::from_millis(4_500)
        );
        assert_eq!(share(Duration::ZERO, 2), Duration::ZERO);
    }
}
